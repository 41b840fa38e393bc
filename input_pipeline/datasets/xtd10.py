"""Multilingual test sets in XTD10's layout, and XTD10 itself.

Aggarwal and Kale 2020, "Towards Zero-shot Cross-lingual Image Retrieval",
https://github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10.

A folder holds `test_image_names.txt` and, for each language, `test_captions_LANG.txt` (or XTD10's
own `test_1kcaptions_LANG.txt`): line i of each file belongs to the same photo. The folder may also
be XTD10 as published, where the files lie in XTD10/, MIC/ and STAIR/. XTD10's own files are checked
against their SHA-256, and its photos can be told from others by name: `origin`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import logging
import os
import pathlib
import re
import urllib.request

import numpy as np

from input_pipeline.cache import cache_folder

log = logging.getLogger(__name__)

NAMES_FILE = "test_image_names.txt"
CAPTIONS_FILE = re.compile(r"test_(?:1k)?captions_([A-Za-z0-9_-]+)\.txt")
# XTD10 calls Japanese by its country's code.
ALIASES = {"jp": "ja"}

REPOSITORY = "adobe-research/Cross-lingual-Test-Dataset-XTD10"
URL = f"https://github.com/{REPOSITORY}"
RAW_URL = f"https://raw.githubusercontent.com/{REPOSITORY}"
# Of the files as published. They may lie in any folder: upstream has English ones in two.
SHA256 = {
    "test_image_names.txt": "504a472dfd40e44f2d0facd6320b9dc1c7d64c58aac9840f0b1da4807cb3a30a",
    "test_1kcaptions_en.txt": "ac5531b6842c1d469fba80aa6f44e2af054e84a41da8f9eaf01d831e943039b9",
    "test_1kcaptions_de.txt": "51f1e9fe05d85b7cd33543676ed2fea51b05399cc403a5fca557ca7ecdb9a207",
    "test_1kcaptions_es.txt": "cacc43d4e7af56b02033865531ea70494049f1d0dd3ea89ff2a217e7e190c4f2",
    "test_1kcaptions_fr.txt": "84aa16954706a0f654b59788ffb6a3bcb1b1d9d12dc9d7a3de26730bc04664b5",
    "test_1kcaptions_it.txt": "b4095d3550eb1accf8c9c78314b4bef45847a3929b5c5fe15a1264ea31dec7cc",
    "test_1kcaptions_jp.txt": "20908aa5763ee7b1bacc1f29aa507532d3dc6a7e6a8c43e6acd2ec72d1e80c10",
    "test_1kcaptions_ko.txt": "92d35e082cd081724560c9abdb2b45753ceb52aaabddb9a0f79dc04967a36800",
    "test_1kcaptions_pl.txt": "b6af6b7941f44e902b50736dcf9a7221af28e755a259511652c599cf6ae89c78",
    "test_1kcaptions_ru.txt": "7d93631ff85b53592091b3cbfd9ca963397e77038fb3d0fdd9374b1b02ae98a3",
    "test_1kcaptions_tr.txt": "147e9763dcb6e6ebba0b98fc799f0145c7d90005fa03ca8ec5a7cf29a04dd136",
    "test_1kcaptions_zh.txt": "17229ff02ac85dd2d165f8316515a24fbe5100dbf486c22aaa12105dfb3353bf",
}
LICENCE_SHA256 = "f9908a6ae7d75e49452013687f4db397b035d7bb69f3975961eb739e878a83bf"
# Commit of the repository -> files that it holds as published.
COMMITS = {
    "f2ce7e3b87f871c655a49542ea59ccf4c065089e": (
        "LICENSE.md",
        *(
            f"XTD10/test_1kcaptions_{code}.txt"
            for code in ("es", "it", "ko", "pl", "ru", "tr", "zh")
        ),
    ),
    "455f8bace77912d2e879e64cbc9e7402d4598626": tuple(
        f"MIC/test_1kcaptions_{code}.txt" for code in ("en", "de", "fr")
    ),
    "d77ff16148468c84287f3efcbf602a015c5e4954": ("STAIR/test_1kcaptions_jp.txt",),
    "d6cfdf769647697cfc060fab276c9f1fb883652a": ("XTD10/test_image_names.txt",),
}
# Lines, from 1, of the German file that translate nothing: "Could not translate" (148, 241, 727),
# "?" and "dfgdfg".
JUNK = {"de": (148, 241, 262, 727, 768, 939)}
# COCO 2014's names, and 2017's, which are the bare id.
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Photos by name, and one caption for each in every language.

    Attributes:
      name: of the set.
      filenames: of the photos.
      captions: language -> captions, in the order of `filenames`; English comes first.
      dropped: language -> rows whose caption is left out of `captions`.
    """

    __test__ = False  # not a test case, whatever pytest takes the name for

    name: str
    filenames: list[str]
    captions: dict[str, list[str]]
    dropped: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def rows(self, language: str) -> np.ndarray:
        """The photo of each caption of a language, int64."""
        return np.delete(np.arange(len(self.filenames)), list(self.dropped.get(language, ())))


def read_test_set(folder: str | os.PathLike) -> TestSet:
    """Reads a folder in XTD10's layout.

    Line ends may be CRLF or LF, a byte order mark and a missing final newline are fine. A line of
    a caption file may be empty only at the file's end.

    Raises:
      FileNotFoundError: the folder, its list of names, or every caption file is missing.
      ValueError: files of differing line counts, an empty line, a language that stands there
        twice, or a photo that does.
    """
    folder = pathlib.Path(folder)
    files = _text_files(folder)
    lists = [file for file in files if file.name == NAMES_FILE]
    if len(lists) != 1:
        found = f"{len(lists)} of them" if lists else "none"
        raise FileNotFoundError(f"{folder} should hold one {NAMES_FILE}, found {found}")
    names, lines = _lines(lists[0]), {}
    counts = {lists[0]: len(names)}
    for file in files:
        match = CAPTIONS_FILE.fullmatch(file.name)
        if match:
            language = ALIASES.get(match[1].lower(), match[1].lower())
            if language in lines:
                raise ValueError(f"{folder} holds two caption files of language {language!r}")
            lines[language] = _lines(file)
            counts[file] = len(lines[language])
    if not lines:
        raise FileNotFoundError(f"{folder} holds no test_captions_LANG.txt")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{file.name} {count}" for file, count in counts.items())
        raise ValueError(f"the files of {folder} have differing numbers of lines: {found}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{lists[0]} names {twice} twice")
    return TestSet(os.path.basename(os.path.abspath(folder)), names, _english_first(lines))


def read_xtd10(folder: str | os.PathLike, *, drop_junk: bool = False) -> TestSet:
    """XTD10 as published: 1,000 photos, 11 languages. Its licence is shown once on a machine.

    Args:
      folder: a clone of its repository, or any folder with its files.
      drop_junk: leave out the German captions that translate nothing. Their photos stay.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file is not the published one.
    """
    folder = pathlib.Path(folder)
    command = f"git clone {URL} {folder}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no captions of XTD10 in {folder} (config.data.xtd10); get them (1 MB, for "
            "noncommercial research only) with python -m xlir.main prepare and the same flags, or "
            f"with {command}"
        )
    found = {}
    for file in _text_files(folder):
        if SHA256.get(file.name) == _sha256(file):
            found[file.name] = file
    absent = [name for name in SHA256 if name not in found]
    if absent:
        there = {file.name for file in _text_files(folder)}
        error, what = FileNotFoundError, "lacks"
        if altered := [name for name in absent if name in there]:
            error, what, absent = ValueError, "differs from XTD10 as published in", altered
        raise error(f"{folder} {what} {', '.join(absent)}; get XTD10 anew with {command}")
    names, lines = _lines(found.pop(NAMES_FILE)), {}
    for name, file in found.items():
        code = CAPTIONS_FILE.fullmatch(name)[1]
        lines[ALIASES.get(code, code)] = _lines(file)
    _show_licence(folder)
    dropped = {}
    if drop_junk:
        dropped = {language: tuple(n - 1 for n in numbers) for language, numbers in JUNK.items()}
        for language, rows in dropped.items():
            lines[language] = [c for row, c in enumerate(lines[language]) if row not in rows]
    # Results with and without are filed apart.
    name = "xtd10-without-junk" if drop_junk else "xtd10"
    return TestSet(name, names, _english_first(lines), dropped)


def download(folder: str | os.PathLike) -> None:
    """Downloads XTD10's captions and its licence, 1 MB, at pinned commits; each file is checked.

    Files that are there already are kept.

    Raises:
      OSError: a file can't be downloaded or written.
      ValueError: a file is not the published one; nothing of it is written.
    """
    folder = pathlib.Path(folder)
    for commit, paths in COMMITS.items():
        for path in paths:
            target, url = folder / path, f"{RAW_URL}/{commit}/{path}"
            if target.is_file():
                continue
            try:
                with urllib.request.urlopen(url, timeout=60) as response:
                    data = response.read()
            except OSError as error:
                raise OSError(
                    f"can't download {url} ({error}); without a network get XTD10 elsewhere, with "
                    f"git clone {URL}, and name its folder: --config.data.xtd10=DIR"
                ) from error
            expected = {**SHA256, "LICENSE.md": LICENCE_SHA256}[target.name]
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f"{url} is not the file that was published (its SHA-256 differs)")
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = target.with_suffix(".partial")
            unfinished.write_bytes(data)
            unfinished.rename(target)
    log.info("XTD10's captions are in %s", folder)


def is_xtd10(folder: str | os.PathLike) -> bool:
    """Whether a folder holds XTD10's own list of names."""
    files = _text_files(pathlib.Path(folder))
    return any(_sha256(file) == SHA256[NAMES_FILE] for file in files if file.name == NAMES_FILE)


def origin(filename: str) -> str | None:
    """train2014 or val2014 for a photo of XTD10, None for another.

    A photo is known by its id, as COCO 2014 and 2017 name their files, in any folder.
    """
    match = COCO_NAME.fullmatch(filename.rsplit("/", 1)[-1])
    return _test_photos().get(int(match[1])) if match else None


@functools.cache
def _test_photos() -> dict[int, str]:
    """COCO's id -> train2014 or val2014, for XTD10's photos in their order."""
    text = importlib.resources.files(__package__).joinpath("xtd10_names.txt").read_text()
    photos, origin = {}, ""
    for line in text.splitlines():
        if line.endswith(":"):
            origin = line.removesuffix(":")
        elif not line.startswith("#"):
            photos |= {int(image_id): origin for image_id in line.split()}
    return photos


def _show_licence(folder: pathlib.Path) -> None:
    """Tells the terms once on a machine."""
    stamp = cache_folder() / "licences" / "xtd10"
    if stamp.exists():
        return
    licence = next(folder.rglob("LICENSE.md"), f"{URL}/blob/master/LICENSE.md")
    log.warning(
        "XTD10's captions are under the Adobe Research License: noncommercial research only, and "
        "copies carry the license with them. Its text: %s (this is shown once)",
        licence,
    )
    # Where the cache can't be written they are shown again.
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()


def _text_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*folder.glob("test_*.txt"), *folder.glob("*/test_*.txt")])


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _english_first(lines: dict[str, list[str]]) -> dict[str, list[str]]:
    languages = sorted(lines, key=lambda language: (language != "en", language))
    return {language: lines[language] for language in languages}


def find_photos(test_set: TestSet, folder: str | os.PathLike) -> list[pathlib.Path]:
    """The photos of a test set below a folder, in its order.

    Raises:
      FileNotFoundError: the folder or some of the photos are missing.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of photos {folder}")
    wanted = set(test_set.filenames)
    found: dict[str, pathlib.Path] = {}
    for place, _, names in os.walk(folder):
        for name in wanted.intersection(names):
            found.setdefault(name, pathlib.Path(place) / name)
    missing = [name for name in test_set.filenames if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(wanted)} photos of {test_set.name} are not below "
            f"{folder}: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return [found[name] for name in test_set.filenames]


def _lines(file: pathlib.Path) -> list[str]:
    """The lines of a file, split at LF and CRLF only: captions may hold other separators."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error})") from error
    lines = [line.removesuffix("\r").strip() for line in text.rstrip("\r\n").split("\n")]
    if "" in lines:
        raise ValueError(f"{file}: line {lines.index('') + 1} is empty")
    return lines

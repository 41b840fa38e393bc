"""XTD10: 1,000 photos of COCO with captions in 11 languages.

Aggarwal and Kale 2020, "Towards Zero-shot Cross-lingual Image Retrieval",
https://github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10.

Its files are checked against their SHA-256. `origin` recognizes its photos by their names.
"""

import contextlib
import functools
import hashlib
import importlib.resources
import logging
import os
import pathlib
import re
import urllib.request

from input_pipeline import files
from input_pipeline.cache import cache_folder
from input_pipeline.lines import read_lines
from input_pipeline.test_sets import captioned_photos, line_aligned
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos
from input_pipeline.test_sets.retrieval_set import Entry, Options, RetrievalSet, RunData

log = logging.getLogger(__name__)


REPOSITORY = "adobe-research/Cross-lingual-Test-Dataset-XTD10"
URL = f"https://github.com/{REPOSITORY}"
RAW_URL = f"https://raw.githubusercontent.com/{REPOSITORY}"
# SHA-256 of the published files, by name, not path: two folders of XTD10 hold the English file.
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
TERMS = (
    "the Adobe Research License: noncommercial research only, and copies carry the license with "
    "them"
)
LICENCE_SHA256 = "f9908a6ae7d75e49452013687f4db397b035d7bb69f3975961eb739e878a83bf"
# Commit of the repository -> files to download from this commit.
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
# Lines, counted from 1, of the German file that are not translations: "Could not translate" (148,
# 241, 727), "?" and "dfgdfg".
JUNK = {"de": (148, 241, 262, 727, 768, 939)}
# File names of COCO 2014; those of COCO 2017 are only the id.
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12})\.jpg")


def read_captions(folder: str | os.PathLike, *, drop_junk: bool = False) -> CaptionedPhotos:
    """Reads XTD10: 1,000 photos, 11 languages. Shows its licence the first time on a machine.

    Args:
      folder: a clone of XTD10's repository, or any folder with its files.
      drop_junk: leave out the German captions that are not translations. Their photos stay.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: a file differs from the published one.
    """
    folder = pathlib.Path(folder)
    command = f"git clone {URL} {folder}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there are no captions of XTD10 in {folder} (config.evals.xtd10.captions); get them "
            "(1 MB, for noncommercial research only) with python -m xlir.main prepare and the same "
            f"flags, or with {command}"
        )
    found = {}
    for file in line_aligned.text_files(folder):
        if SHA256.get(file.name) == _sha256(file):
            found[file.name] = file
    absent = [name for name in SHA256 if name not in found]
    if absent:
        there = {file.name for file in line_aligned.text_files(folder)}
        error, what = FileNotFoundError, "lacks"
        if altered := [name for name in absent if name in there]:
            error, what, absent = ValueError, "differs from the published XTD10 in", altered
        raise error(f"{folder} {what} {', '.join(absent)}; get XTD10 again with {command}")
    names, lines = read_lines(found.pop(line_aligned.NAMES_FILE)), {}
    for name, file in found.items():
        code = line_aligned.CAPTIONS_FILE.fullmatch(name)[1]
        lines[line_aligned.ALIASES.get(code, code)] = read_lines(file)
    _show_licence(folder)
    junk = JUNK if drop_junk else {}
    pairs = {
        language: [
            (photo, caption)
            for line, (photo, caption) in enumerate(zip(names, of_one, strict=True), start=1)
            if line not in junk.get(language, ())
        ]
        for language, of_one in lines.items()
    }
    # Results with and without these captions have different names.
    name = "xtd10-without-junk" if drop_junk else "xtd10"
    return captioned_photos.from_pairs(name, pairs, names)


def download(folder: str | os.PathLike) -> None:
    """Downloads XTD10's captions and licence (1 MB) at pinned commits, and checks each file.

    Existing files are kept.

    Raises:
      OSError: a file can't be downloaded or written.
      ValueError: a file differs from the published one, and is not written.
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
                    f"can't download {url} ({error}); without a network, clone XTD10 elsewhere "
                    f"(git clone {URL}) and name its folder: --config.evals.xtd10.captions=DIR"
                ) from error
            expected = {**SHA256, "LICENSE.md": LICENCE_SHA256}[target.name]
            if hashlib.sha256(data).hexdigest() != expected:
                raise ValueError(f"{url} is not the file that was published (its SHA-256 differs)")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(target, data)
    log.info("XTD10's captions are in %s", folder)


def is_xtd10(folder: str | os.PathLike) -> bool:
    """Whether a folder holds XTD10's published list of photos."""
    name = line_aligned.NAMES_FILE
    texts = line_aligned.text_files(pathlib.Path(folder))
    return any(_sha256(file) == SHA256[name] for file in texts if file.name == name)


def origin(filename: str) -> str | None:
    """train2014 or val2014 for a photo of XTD10, None for any other photo.

    Photos are recognized by the id in their file name, as in COCO 2014 or 2017, in any folder.
    """
    match = COCO_NAME.fullmatch(filename.rsplit("/", 1)[-1])
    return origins().get(int(match[1])) if match else None


@functools.cache
def origins() -> dict[int, str]:
    """COCO's id -> train2014 or val2014, for the photos of XTD10, in XTD10's order."""
    text = importlib.resources.files(__package__).joinpath("xtd10_names.txt").read_text()
    photos, origin = {}, ""
    for line in text.splitlines():
        if line.endswith(":"):
            origin = line.removesuffix(":")
        elif not line.startswith("#"):
            photos |= {int(image_id): origin for image_id in line.split()}
    return photos


def _show_licence(folder: pathlib.Path) -> None:
    """Logs the terms, the first time on a machine."""
    stamp = cache_folder() / "licences" / "xtd10"
    if stamp.exists():
        return
    licence = next(folder.rglob("LICENSE.md"), f"{URL}/blob/master/LICENSE.md")
    log.warning(
        "XTD10's captions are under %s. The licence is at %s (this is shown once)",
        *(TERMS, licence),
    )
    # If the cache can't be written, the terms are shown again next time.
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(exist_ok=True)
        stamp.touch()


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read(options: Options, run: RunData) -> RetrievalSet:
    """XTD10 with its photos, from `options.images` or, by name, from the run's data set.

    Raises:
      FileNotFoundError: captions or photos are missing.
      ValueError: a file is not the published one.
    """
    captions = read_captions(_folder(options, run), drop_junk=options.drop_junk)
    for language, lines in JUNK.items():
        way = f"config.evals.{options.name}.drop_junk or --drop_junk"
        what = "left out" if options.drop_junk else f"kept ({way} leaves them out)"
        log.info(
            "xtd10: %d captions in %r are not translations; they are %s",
            *(len(lines), language, what),
        )
    if options.images:
        return captioned_photos.with_photos_of_folder(captions, options.images)
    return captioned_photos.with_photos_of_run(captions, options, run)


def _missing(options: Options, run: RunData) -> str:
    try:
        read_captions(_folder(options, run))
    except FileNotFoundError as error:
        return str(error)
    return ""


def _download(options: Options, run: RunData) -> None:
    download(_folder(options, run))


def _folder(options: Options, run: RunData) -> pathlib.Path:
    """The folder of the captions; by default xtd10 in the run's data folder."""
    return pathlib.Path(options.captions or pathlib.Path(run.folder or "PATH") / "xtd10")


# No `photos`: training leaves out XTD10's photos in any case, recognized by `origin`.
ENTRIES = {
    "xtd10": Entry(
        read,
        missing=_missing,
        download=_download,
        terms=TERMS,
        authors="written and translated by people",
        origin=URL,
    )
}

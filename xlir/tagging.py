"""Tags for images, in any language of the text encoder, from a vocabulary of names.

    encoder = xlir.Encoder.load(workdir)
    tagger = Tagger(encoder, vocabularies.load("coco"), "de", reference(encoder, workdir))
    tagger.tag(encoder.encode_image(["dog.jpg"]), top_k=3)

A tag's embedding is the mean over its names and over a few prompts ("a photo of a ..."; Radford et
al. 2021, section 3.1.4), each of unit length. The mean, and not the best of several names: a name
with a second sense finds photos of its own, and of more names one is always nearer (measured in
docs/results.md).

A score is the cosine of image and tag, each relative to its neighbourhood: cross-domain similarity
local scaling (Conneau et al. 2018, section 2.3), with training photos for the tag's neighbours. In
a large vocabulary it takes away the pull of names that are near to everything, and of those that
the run was trained on.

Whether an image has a tag is decided by the tag's margin: how far it stands out of the image's
twenty best, once the tag's own neighbourhood is taken away. Within an image, margins and scores
order tags alike. Between images, scores are left with differences that margins are not: they tell
of two photos which one rather has a tag, but with a threshold some get many tags and others none
(measured in docs/results.md).

Margins of different languages lie differently. A level, 0 to 1, means the same in all of them: the
share of all pairs of a held-out photo (of the validation split) and a tag with a lower margin.
"""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
from jaxtyping import Float

from input_pipeline import vocabularies
from xlir import figures
from xlir.decoding import decode_each
from xlir.embed import IMAGE_BATCH
from xlir.encoder import Encoder
from xlir.reference_photos import Reference, reference

log = logging.getLogger(__name__)

# Prompts: the bare name, and a photo of it.
TEMPLATES = {
    "en": ("{}", "a photo of a {}"),
    "ar": ("{}", "صورة {}"),
    "de": ("{}", "ein Foto: {}"),
    "es": ("{}", "una foto de {}"),
    "fa": ("{}", "عکس {}"),
    "fr": ("{}", "une photo de {}"),
    "id": ("{}", "foto {}"),
    "it": ("{}", "una foto di {}"),
    "ja": ("{}", "{}の写真"),
    "ko": ("{}", "{} 사진"),
    "pl": ("{}", "zdjęcie: {}"),
    "pt": ("{}", "uma foto de {}"),
    "ru": ("{}", "фото: {}"),
    "tr": ("{}", "{} fotoğrafı"),
    "zh": ("{}", "一张{}的照片"),
}
# Neighbours that make a neighbourhood, as published.
NEIGHBOURS = 10
# An image's best tags, which a tag has to stand out of. With fewer, all images get the same number
# of tags; with more, the number hangs on which few photos a small set holds out.
BEST_TAGS = 20
# Images of a contact sheet, and tags of each in a language.
SHEET_PHOTOS, SHEET_TAGS = 12, 4
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


@dataclasses.dataclass(frozen=True)
class Tag:
    """A tag of an image.

    Attributes:
      tag: what identifies it.
      name: its first name in the language.
      level: 0 to 1, the share of held-out pairs with a lower margin; None without held-out photos.
      cosine: of image and tag, -1 to 1.
    """

    tag: str
    name: str
    level: float | None
    cosine: float


class Tagger:
    """Scores images against a vocabulary in one language.

    Args:
      encoder: embeds the names.
      vocabulary: the tags.
      language: of the names.
      reference: photos of the run; without them scores are plain cosines, and there are no levels.

    Attributes:
      tags: what identifies each tag.
      names: the first name of each.
      embeddings: of unit length.

    Raises:
      ValueError: the vocabulary has no names in that language.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: vocabularies.Vocabulary,
        language: str,
        reference: Reference | None = None,
    ):
        names = vocabulary.names_in(language)
        self.tags, self.names = vocabulary.tags, [first for first, *_ in names]
        self.embeddings = embed_names(encoder, names, language)
        self._offset, self._curve = None, None
        if reference is not None:
            self._offset = _neighbourhood(self.embeddings @ reference.training.T) / 2
            self._curve = _level_curve(self.margins(reference.held_out))

    def scores(self, images: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images tags"]:
        """Scores of embedded images of unit length; comparable within a language."""
        cosines = images @ self.embeddings.T
        if self._offset is None:
            return cosines
        return cosines - self._offset - _neighbourhood(cosines)[:, None] / 2

    def margins(self, images: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images tags"]:
        """How far each tag stands out of the image's best; needs reference photos."""
        relative = images @ self.embeddings.T - self._offset
        return relative - _neighbourhood(relative, BEST_TAGS)[:, None]

    def levels(self, margins: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Margins -> levels, 0 to 1, which are comparable between languages."""
        levels, of_level = self._curve
        return np.interp(margins, of_level, levels)

    def threshold(self, level: float) -> float:
        """The margin at a level.

        Raises:
          ValueError: there are no held-out photos, or the level is not between 0 and 1.
        """
        if self._curve is None:
            raise ValueError("a threshold needs the run's data set, which is not at hand")
        if not 0 <= level <= 1:
            raise ValueError(f"the threshold is {level}; it is a share, between 0 and 1")
        return float(np.interp(level, *self._curve))

    def tag(
        self,
        images: Float[np.ndarray, "images dim"],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[Tag]]:
        """The tags of embedded images, the best first.

        Args:
          images: embeddings of unit length.
          top_k: at most so many of each image; None for all.
          threshold: a level; tags below it are left out. None leaves out none.
        """
        cosines = images @ self.embeddings.T
        calibrated = self._curve is not None
        # Without margins, cosines: the order in an image is that of its scores.
        values = self.margins(images) if calibrated else cosines
        least = -np.inf if threshold is None else self.threshold(threshold)
        found = []
        for row, value in enumerate(values):
            best = np.argsort(-value, kind="stable")[:top_k]
            best = best[value[best] >= least]
            levels = self.levels(value[best]).tolist() if calibrated else [None] * len(best)
            found.append(
                [
                    Tag(self.tags[column], self.names[column], level, float(cosines[row, column]))
                    for column, level in zip(best, levels, strict=True)
                ]
            )
        return found


def embed_names(
    encoder: Encoder, names: Sequence[vocabularies.Names], language: str
) -> Float[np.ndarray, "tags dim"]:
    """One embedding of unit length a tag: the mean over its names and the language's prompts.

    A language without prompts has the bare names.
    """
    templates = TEMPLATES.get(language, ("{}",))
    prompts = [
        template.format(name) for of_tag in names for name in of_tag for template in templates
    ]
    if language == "fr":
        # Une photo d'arbre.
        prompts = [
            re.sub(r"\bde (?=[aâeéèêiîoôœu])", "d'", prompt, flags=re.I) for prompt in prompts
        ]
    flat = encoder.encode_text(prompts)
    starts = np.cumsum([0] + [len(of_tag) * len(templates) for of_tag in names[:-1]])
    sums = np.add.reduceat(flat, starts, axis=0)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def _neighbourhood(
    cosines: Float[np.ndarray, "rows others"], count: int = NEIGHBOURS
) -> Float[np.ndarray, " rows"]:
    """The mean of each row's `count` highest."""
    count = min(count, cosines.shape[1])
    return np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)


def _level_curve(
    margins: Float[np.ndarray, "held_out tags"],
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Levels, 0 to 1 and denser towards the ends, and the margin at each.

    It is the mean of the margins' quantiles at half to twice the odds. A single one, high up, hangs
    on few pairs; where margins thin out exponentially the mean is the same.
    """
    odds = np.geomspace(1 / margins.size, margins.size, 300)
    around = np.multiply.outer(odds, np.geomspace(0.5, 2, 9))
    means = np.quantile(margins, around / (1 + around)).mean(axis=1)
    levels = np.concatenate([[0], odds / (1 + odds), [1]])
    return levels, np.concatenate([[margins.min()], means, [margins.max()]])


def find_images(paths: Sequence[str]) -> list[pathlib.Path]:
    """The files that the paths name: images, folders of images at any depth, or patterns.

    Raises:
      FileNotFoundError: a path leads to nothing, or none to an image.
    """
    found: dict[pathlib.Path, None] = {}
    for path in paths:
        places = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not places:
            raise FileNotFoundError(f"there is no image {path}")
        for place in map(pathlib.Path, places):
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            inside = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
            # A file that is named outright is an image whatever its ending.
            found |= dict.fromkeys(inside if place.is_dir() else files)
    if not found:
        raise FileNotFoundError(f"there are no images in {', '.join(paths)}")
    return list(found)


def embed_files(
    encoder: Encoder, files: Iterable[pathlib.Path], skip: Callable[[str], None]
) -> Iterator[tuple[list[pathlib.Path], Float[np.ndarray, "images dim"]]]:
    """Files and their embeddings, a batch at a time, decoded by threads ahead of the tower.

    Args:
      encoder: embeds.
      files: of images.
      skip: is told, in a line, of each file that can't be read or decoded; it is left out.
    """
    size, ready = IMAGE_BATCH * encoder.mesh.size, []
    whole = False
    for file, pixels in decode_each(encoder.embedder.decode, files, 2 * size):
        if isinstance(pixels, Exception):
            skip(str(pixels))
            continue
        ready.append((file, pixels))
        if len(ready) == size:
            yield _embedded(encoder, ready, size)
            ready, whole = [], True
    if ready:
        # After whole batches the last one is filled up: another shape would be compiled for.
        yield _embedded(encoder, ready, size if whole else len(ready))


def _embedded(
    encoder: Encoder, ready: Sequence[tuple[pathlib.Path, np.ndarray]], size: int
) -> tuple[list[pathlib.Path], Float[np.ndarray, "images dim"]]:
    files, pixels = (list(part) for part in zip(*ready, strict=True))
    filled = pixels + [pixels[-1]] * (size - len(pixels))
    return files, encoder.encode_image(filled)[: len(files)]


def run(
    workdir: pathlib.Path,
    vocabulary: vocabularies.Vocabulary,
    languages: Sequence[str],
    files: Sequence[pathlib.Path],
    *,
    top_k: int | None,
    threshold: float | None,
    output: str | None,
    sheet: str | None,
) -> None:
    """Tags files: a table in the terminal, and JSON lines and a picture where they are asked for.

    Files that can't be decoded are reported, one line each, counted and skipped.

    Args:
      workdir: the folder of the training run.
      vocabulary: the tags.
      languages: that they are given in.
      files: of images.
      top_k, threshold: which tags, see `Tagger.tag`.
      output: file for the JSON lines, a line an image and language; "-" prints them instead of the
        table.
      sheet: file for the contact sheet.

    Raises:
      ValueError: no file can be decoded; or as `Tagger`.
    """
    encoder = Encoder.load(workdir)
    taggers = _taggers(encoder, workdir, vocabulary, languages)
    if threshold is not None:
        # Without held-out photos refused now, not after the first batch.
        next(iter(taggers.values())).threshold(threshold)
    skipped: list[str] = []

    def skip(reason: str) -> None:
        skipped.append(reason)
        log.warning("skipped: %s", _printable(reason))

    shown: list[tuple[pathlib.Path, dict[str, list[str]]]] = []
    with contextlib.ExitStack() as stack:
        lines = None
        if output is not None:
            lines = (
                sys.stdout
                if output == "-"
                else stack.enter_context(open(output, "w", encoding="utf8"))
            )
        done = 0
        for names, images in embed_files(encoder, files, skip):
            tags = {code: tagger.tag(images, top_k, threshold) for code, tagger in taggers.items()}
            for row, file in enumerate(names):
                found = {language: of_batch[row] for language, of_batch in tags.items()}
                _tell(file, found, lines, quiet=output == "-")
                if len(shown) < SHEET_PHOTOS:
                    shown.append((file, {code: _names(one) for code, one in found.items()}))
            done += len(names)
    if skipped:
        log.warning("%d of %d images were skipped", len(skipped), len(files))
    if not done:
        raise ValueError("none of the images can be decoded")
    if sheet is not None:
        _draw(shown, pathlib.Path(sheet))


def _draw(shown: Sequence[tuple[pathlib.Path, dict[str, list[str]]]], sheet: pathlib.Path) -> None:
    """A contact sheet of files and their tags, by language."""
    rows = {code: [found[code] for _, found in shown] for code in shown[0][1]}
    figures.plot_tags([file for file, _ in shown], rows, sheet)


def _taggers(
    encoder: Encoder,
    workdir: pathlib.Path,
    vocabulary: vocabularies.Vocabulary,
    languages: Sequence[str],
) -> dict[str, Tagger]:
    """A tagger a language; where the run's data set is not at hand, of plain cosines."""
    photos = None
    try:
        photos = reference(encoder, workdir)
    except (ValueError, FileNotFoundError) as error:
        log.warning("scores are plain cosines, without levels: %s", str(error).splitlines()[0])
    return {
        language: Tagger(encoder, vocabulary, language, photos)
        for language in dict.fromkeys(languages)
    }


def _names(tags: Sequence[Tag]) -> list[str]:
    return [tag.name for tag in tags[:SHEET_TAGS]]


def _tell(
    file: pathlib.Path, found: Mapping[str, Sequence[Tag]], lines: TextIO | None, *, quiet: bool
) -> None:
    """An image's tags, to the terminal unless `quiet`, and to the file of JSON lines."""
    for place, (language, tags) in enumerate(found.items()):
        if lines is not None:
            lines.write(record(file, language, tags) + "\n")
        if not quiet:
            cells = [
                f"{tag.name} {tag.cosine if tag.level is None else tag.level:.3f}" for tag in tags
            ]
            name = _printable(str(file)) if place == 0 else ""
            print(f"{name:<40}  {language:<3} {', '.join(cells) or '-'}")


def _printable(text: str) -> str:
    """A text with escapes for line ends, a terminal's control characters and bytes of no UTF-8."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def record(file: pathlib.Path, language: str, tags: Sequence[Tag]) -> str:
    r"""One line of JSON: an image's tags in a language.

    A byte of a file name that is not UTF-8, such as 0xe9, is escaped as \udce9 (PEP 383): Python's
    `os.fsencode(json.loads(line)["image"])` is the name again, byte for byte.
    """
    rounded = [
        dataclasses.replace(
            tag,
            level=None if tag.level is None else round(tag.level, 5),
            cosine=round(tag.cosine, 5),
        )
        for tag in tags
    ]
    line = {
        "image": str(file),
        "language": language,
        "tags": list(map(dataclasses.asdict, rounded)),
    }
    return json.dumps(line, ensure_ascii=False).encode("utf8", "backslashreplace").decode()

"""Crossmodal-3600: 3,600 photos with captions in 36 languages, about two of each language.

Thapliyal et al. 2022, https://arxiv.org/abs/2205.12522, https://google.github.io/crossmodal-3600.

`captions.jsonl` has a line for each photo: `image/key`, and for each language a field such as
`"de": {"caption": ["...", "..."]}`. The photo is KEY.jpg.
"""

import pathlib

from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs
from input_pipeline.test_sets.published import WRITTEN, Published, field, json_lines

LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr"),
    *("he", "hi", "hr", "hu", "id", "it", "ja", "ko", "mi", "nl", "no", "pl"),
    *("pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh"),
)


def read(folder: pathlib.Path) -> CaptionedPhotos:
    """Reads `captions.jsonl`; several captions of a photo stay in their order.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: a line is not as described above.
    """
    file = folder / "captions.jsonl"
    pairs: dict[str, list[tuple[str, str]]] = {language: [] for language in LANGUAGES}
    names = []
    for content in json_lines(file):
        names.append(f"{field(content, 'image/key', str, file)}.jpg")
        for language in LANGUAGES:
            captions = field(field(content, language, dict, file), "caption", list, file)
            pairs[language] += [(names[-1], caption) for caption in captions]
    return from_pairs("crossmodal3600", pairs, names)


SET = Published(
    name="crossmodal3600",
    title="Crossmodal-3600",
    read=read,
    languages=LANGUAGES,
    photos=3600,
    captions=261_375,
    in_all=True,
    authors=WRITTEN,
    origin="https://google.github.io/crossmodal-3600",
    terms="CC BY 4.0",
)
ENTRIES = {SET.name: SET.entry()}

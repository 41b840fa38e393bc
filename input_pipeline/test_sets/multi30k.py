"""Multi30k, task 1: one caption of each photo in English, translated by people.

Elliott et al. 2016, https://arxiv.org/abs/1605.00459; the test sets of 2017 and 2018 and their
languages are described in the reports of WMT's shared task on multimodal translation. The folder is
a clone of https://github.com/multi30k/dataset: data/task1/raw/test_2016_flickr.de.gz and so on are
aligned, line by line, with data/task1/image_splits/test_2016_flickr.txt. The photos come from
Flickr30k, Flickr and COCO.
"""

import functools
import pathlib

from input_pipeline.lines import read_lines
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs
from input_pipeline.test_sets.published import TRANSLATED, Published


def read(name: str, stem: str, languages: tuple[str, ...], folder: pathlib.Path) -> CaptionedPhotos:
    """Reads the files of one test set; `stem` is the beginning of their names.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or the files have different numbers of lines.
    """
    task = folder / "data" / "task1"
    # For COCO, a line names the photo and the caption: COCO_val2014_000000398076.jpg#657409.
    lines = read_lines(task / "image_splits" / f"{stem}.txt")
    names = [line.partition("#")[0] for line in lines]
    captions = {code: read_lines(task / "raw" / f"{stem}.{code}.gz") for code in languages}
    for language, texts in captions.items():
        if len(texts) != len(names):
            raise ValueError(
                f"{folder}: {stem}.{language}.gz has {len(texts)} lines, and {stem}.txt has "
                f"{len(names)}"
            )
    pairs = {code: zip(names, texts, strict=True) for code, texts in captions.items()}
    return from_pairs(name, pairs, names)


def _published(name: str, stem: str, languages: str, captions: int) -> Published:
    codes = tuple(languages.split())
    return Published(
        name=name,
        title=f"Multi30k {stem}",
        read=functools.partial(read, name, stem, codes),
        languages=codes,
        captions=captions,
        authors=TRANSLATED,
        origin="https://github.com/multi30k/dataset",
        terms="the repository names no licence; the photos are for research only",
    )


SETS = [
    _published("multi30k_2016", "test_2016_flickr", "en de fr cs", 1000),
    _published("multi30k_2017", "test_2017_flickr", "en de fr", 1000),
    _published("multi30k_2017_coco", "test_2017_mscoco", "en de fr", 461),
    _published("multi30k_2018", "test_2018_flickr", "en de fr cs", 1071),
]
ENTRIES = {one.name: one.entry() for one in SETS}

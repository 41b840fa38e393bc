"""Flickr8k-CN and COCO-CN: Chinese captions of photos of Flickr8k and COCO.

Li et al. 2016, https://doi.org/10.1145/2911996.2912049, and Li et al. 2018,
https://arxiv.org/abs/1805.08661. A list names the photos of the test split without ".jpg", and a
line of a caption file is `NAME.jpg#zhc#0 CAPTION` (Flickr8k-CN) or, with a tab,
`NAME#0	CAPTION` (COCO-CN).
"""

import functools
import pathlib
import re
from collections.abc import Iterator, Mapping

from input_pipeline.lines import read_lines
from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs
from input_pipeline.test_sets.published import TRANSLATED, WRITTEN, Published

LINE = re.compile(r"(.+?)(?:\.jpg)?(?:#[a-z]+)?#\d+\s+(.*)")


def read(
    name: str, list_file: str, caption_files: Mapping[str, str], folder: pathlib.Path
) -> CaptionedPhotos:
    """Reads the captions of the photos of the test split.

    Args:
      name: the name of the set.
      list_file: the list of the photos, as a path in the folder.
      caption_files: language -> path in the folder.
      folder: the publisher's files.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a line is not as described above.
    """
    names = [f"{line}.jpg" for line in read_lines(folder / list_file)]
    pairs = {code: list(_pairs(folder / file)) for code, file in caption_files.items()}
    return from_pairs(name, pairs, names)


def _pairs(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """The photo and the caption of each line."""
    for number, line in enumerate(read_lines(file), start=1):
        match = LINE.fullmatch(line)
        if not match:
            raise ValueError(f"{file}: line {number} is not NAME#NUMBER CAPTION")
        yield f"{match[1]}.jpg", match[2]


def _flickr8k(name: str, title: str, chinese: str, authors: str) -> Published:
    files = {"en": "data/flickr8kenc.caption.txt", "zh": f"data/{chinese}"}
    return Published(
        name=name,
        title=title,
        read=functools.partial(read, name, "data/flickr8ktest.txt", files),
        languages=("en", "zh"),
        photos=1000,
        captions=5000,
        authors=authors,
        origin="https://github.com/li-xirong/flickr8kcn",
        terms="the repository names no licence; Flickr8k is for research only",
    )


COCO_FILES = {"zh": "imageid.human-written-caption.txt"}
SETS = [
    _flickr8k("flickr8k_cn", "Flickr8k-CN", "flickr8kzhc.caption.txt", WRITTEN),
    _flickr8k(
        *("flickr8k_cn_translated", "Flickr8k-CN, translated"),
        *("flickr8kzhmtest.captions.txt", TRANSLATED),
    ),
    Published(
        name="coco_cn",
        title="COCO-CN",
        read=functools.partial(read, "coco_cn", "coco-cn_test.txt", COCO_FILES),
        languages=("zh",),
        photos=1000,
        authors=WRITTEN,
        origin="https://github.com/li-xirong/coco-cn",
        terms="given by its authors on request, for research",
    ),
]
ENTRIES = {one.name: one.entry() for one in SETS}

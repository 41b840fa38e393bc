"""xFlickrCO of IGLUE: 1,000 photos of Flickr30k and 1,000 of COCO, captions in eight languages.

Bugliarello et al. 2022, https://arxiv.org/abs/2201.11732. The folder is datasets/xFlickrCO of
https://github.com/e-bug/iglue: a line of annotations/de/test.jsonl is
`{"sentences": ["..."], "id": ..., "img_path": "COCO_val2014_000000391895.jpg"}`.
"""

import pathlib

from input_pipeline.test_sets.captioned_photos import CaptionedPhotos, from_pairs
from input_pipeline.test_sets.published import WRITTEN, Published, field, json_lines

LANGUAGES = ("de", "en", "es", "id", "ja", "ru", "tr", "zh")


def read(folder: pathlib.Path) -> CaptionedPhotos:
    """Reads annotations/LANGUAGE/test.jsonl.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a line is not as described above.
    """
    pairs = {}
    for language in LANGUAGES:
        file = folder / "annotations" / language / "test.jsonl"
        pairs[language] = [
            (field(content, "img_path", str, file), sentence)
            for content in json_lines(file)
            for sentence in field(content, "sentences", list, file)
        ]
    return from_pairs("xflickrco", pairs)


SET = Published(
    name="xflickrco",
    title="xFlickrCO",
    read=read,
    languages=LANGUAGES,
    photos=2000,
    captions=2000,
    authors=WRITTEN,
    origin="https://github.com/e-bug/iglue",
    terms="see the licences of IGLUE, Flickr30k (research only) and COCO",
)
ENTRIES = {SET.name: SET.entry()}

"""Data sets: captioned images as TFDS records, and multilingual test sets."""

from input_pipeline.datasets import captions, coco, emoji, xtd10
from input_pipeline.datasets.captioned_images import CaptionedImages
from input_pipeline.datasets.xtd10 import (
    TestSet,
    find_photos,
    is_xtd10,
    read_test_set,
    read_xtd10,
)

__all__ = [
    "CaptionedImages",
    "TestSet",
    "captions",
    "coco",
    "emoji",
    "find_photos",
    "is_xtd10",
    "read_test_set",
    "read_xtd10",
    "xtd10",
]

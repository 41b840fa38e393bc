"""Data sets: captioned images as TFDS records, and multilingual test sets."""

from input_pipeline.datasets import captions, emoji
from input_pipeline.datasets.records import Builder, CaptionedImages
from input_pipeline.datasets.xtd10 import TestSet, find_photos, read_test_set

__all__ = [
    "Builder",
    "CaptionedImages",
    "TestSet",
    "captions",
    "emoji",
    "find_photos",
    "read_test_set",
]

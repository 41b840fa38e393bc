"""Data sets: captioned images as TFDS records, and multilingual test sets."""

from input_pipeline.datasets import captions, emoji
from input_pipeline.datasets.records import Builder, CaptionedImages, cache_folder, fingerprint
from input_pipeline.datasets.xtd10 import TestSet, find_photos, read_test_set

__all__ = [
    "Builder",
    "CaptionedImages",
    "TestSet",
    "cache_folder",
    "captions",
    "emoji",
    "find_photos",
    "fingerprint",
    "read_test_set",
]

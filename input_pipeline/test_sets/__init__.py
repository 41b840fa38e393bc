"""Test sets. `TYPES` lists the values of `config.evals.NAME.type`.

A module of this package reads one or more types: its `ENTRIES` maps the name of a type to the
type's entry. To add a type, write its entry, add its name to `TYPES`, describe it in
docs/test_sets.md, and test it.
"""

import importlib

from input_pipeline.test_sets.retrieval_set import Entry

# Type -> the module that reads it.
TYPES = {
    "xtd10": "xtd10",
    # Any folder in XTD10's layout.
    "folder": "folder",
    # A split of the run's own data set.
    "split": "split",
    "crossmodal3600": "crossmodal3600",
    "multi30k_2016": "multi30k",
    "multi30k_2017": "multi30k",
    "multi30k_2017_coco": "multi30k",
    "multi30k_2018": "multi30k",
    "xflickrco": "xflickrco",
    "xtd200": "flores_languages",
    "flickr30k_200": "flores_languages",
    "flickr8k_cn": "chinese",
    "flickr8k_cn_translated": "chinese",
    "coco_cn": "chinese",
    # For zero-shot classification.
    "babel_imagenet": "babel_imagenet",
    # Any folder in Babel-ImageNet's layout.
    "class_names": "babel_imagenet",
}


def find(type: str) -> Entry:
    """The entry of a type of test sets.

    Raises:
      ValueError: the type is unknown.
    """
    if type not in TYPES:
        raise ValueError(f"there is no type {type!r} of test sets; known: {', '.join(TYPES)}")
    return importlib.import_module(f"{__name__}.{TYPES[type]}").ENTRIES[type]

"""Data sets to train on, by the names that `config.data.name` may have.

Each name is a module of this package, which says by its `DATA_SET` how the set is opened. To add a
data set, write its module, add its name to `NAMES`, and test it.
"""

import importlib

from input_pipeline.datasets.source import DataSet

# The modules are imported when they are asked for: TFDS takes a while.
NAMES = ("emoji", "captions", "coco", "coco_captions")


def find(name: str) -> DataSet:
    """The data set of a name.

    Raises:
      ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"there is no data set {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").DATA_SET

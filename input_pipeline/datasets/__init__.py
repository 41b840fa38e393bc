"""Data sets to train on. `NAMES` lists the values of `config.data.name`.

Each name is a module of this package, whose `DATA_SET` opens the data set. To add a data set, write
its module, add its name to `NAMES`, and test it.
"""

import importlib

from input_pipeline.datasets.source import DataSet

# `find` imports a module only when its data set is used, because importing TFDS is slow.
NAMES = ("emoji", "captions", "coco", "coco_captions", "texts", "shards")
# Data sets without photos.
WITHOUT_PHOTOS = ("texts",)
# Data sets whose captions are read with their photos, so that none are held in memory.
STREAMED = ("shards",)


def find(name: str) -> DataSet:
    """The data set of this name.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in NAMES:
        raise ValueError(f"there is no data set {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(f"{__name__}.{name}").DATA_SET

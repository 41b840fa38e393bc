"""Prepare the data set that --config names, and print its folder and its size.

Training prepares a data set too, if this was not done before. If the configuration has XTD10 as a
test set, its captions (1 MB) are downloaded once; nothing else is ever downloaded.

Example:
  python -m xlir.main prepare --config=configs/flickr8k.py --config.data.dir=PATH
"""

from absl.flags import FlagValues

from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.config()


def run(values: FlagValues) -> None:
    """Prepares the data set; JAX is not needed."""
    from xlir import data

    print(data.prepare(values.config))

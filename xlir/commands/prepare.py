"""Prepare the data set that --config describes, and say where it is and what it holds.

Training would prepare it too. Where the configuration is evaluated on XTD10, its captions (1 MB)
are downloaded if they are not there yet; nothing else is ever downloaded.

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

"""Prepare the data set that --config names, or shards from files of photos with captions.

Training prepares the data set of --config too, if this was not done before. If the configuration
has XTD10 as a test set, its captions (1 MB) are downloaded once; nothing else is ever downloaded.

PAIRS are tar archives that img2dataset has written (or webdataset's), or Parquet files with photos,
or patterns of them. They become a folder of shards, a split of the data set "shards". Left out, and
counted, are pairs without a photo or a caption, photos that can't be decoded or are too small,
photos that occurred before, and photos of test sets: those of XTD10 by name; those of --config and
--keep_out by name, by content and as near copies (re-encoded, resized, greyed). If it is stopped,
the same command goes on.

Examples:
  python -m xlir.main prepare --config=configs/flickr8k.py --config.data.dir=PATH
  python -m xlir.main prepare --to=web/val cc12m/00000.tar
  python -m xlir.main prepare --to=web/cc12m --keep_out=web/val,flickr30k-images 'cc12m/*.tar'
"""

import glob
import os
import pathlib

from absl.flags import FlagValues

from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

WORDS = "[PAIRS ...]"


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.config(needed=False)
    flags.string("to", "Folder of the shards.")
    flags.strings(
        "keep_out",
        "Folders of photos, searched at any depth, or of shards: photos that must not be trained "
        "on, such as those of test sets.",
        default="",
    )
    flags.strings(
        "languages", "Keep only captions in these languages, such as en,de. Default: all.", ""
    )
    flags.integer("min_side", "Least width and height of a photo in pixels. Default: 64.", 1)
    flags.integer("processes", "Number of processes. Default: that of CPU cores.", 1)


def run(values: FlagValues, *words: str) -> None:
    """Prepares the data set or the shards; JAX is not needed."""
    if bool(words) != bool(values.to):
        raise UsageError("prepare needs both --to=FOLDER and PAIRS, or neither")
    if not words:
        if values.config is None:
            raise UsageError("prepare needs --config, or --to=FOLDER and PAIRS")
        from xlir import data

        print(data.prepare(values.config))
        return
    sources = [pathlib.Path(path) for word in words for path in _found(word)]
    from xlir import prepare_shards

    print(
        prepare_shards.prepare(
            sources,
            pathlib.Path(values.to),
            config=values.config,
            keep_out=[pathlib.Path(folder) for folder in values.keep_out],
            languages=tuple(values.languages),
            min_side=values.min_side or prepare_shards.MIN_SIDE,
            processes=values.processes or os.cpu_count() or 1,
        )
    )


def _found(pattern: str) -> list[str]:
    """The files of a pattern."""
    if found := sorted(glob.glob(pattern)) or [pattern] * os.path.exists(pattern):
        return found
    raise UsageError(f"there is no file {pattern}")

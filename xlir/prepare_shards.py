"""Shards from files of photos with captions, without the photos of test sets."""

import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from input_pipeline import kept_out, shard_writer
from input_pipeline.shards import INDEX, Shards
from xlir import data

MIN_SIDE = shard_writer.Options.min_side
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def prepare(
    sources: Sequence[pathlib.Path],
    folder: pathlib.Path,
    config: ConfigDict | None,
    keep_out: Sequence[pathlib.Path],
    languages: tuple[str, ...],
    min_side: int,
    processes: int,
) -> str:
    """Writes or completes a folder of shards; see `input_pipeline.shard_writer`.

    Args:
      sources: tar archives or Parquet files.
      folder: the folder of the shards.
      config: a configuration whose test sets (`config.evals`) are kept out; None for none.
      keep_out: folders of photos, or of shards, that are kept out.
      languages: codes of the languages whose captions are kept; empty: all.
      min_side: the least width and height of a photo, in pixels.
      processes: number of processes.

    Returns:
      How many photos and captions it has, and how many pairs were left out, by reason.

    Raises:
      FileNotFoundError: a folder, or a test set, is missing.
      ValueError, OSError: as `input_pipeline.shard_writer.prepare`.
    """
    names, photos, test_sets = set(), [], []
    if config is not None and (config := _without_splits(config)).evals:
        names = data.test_photo_names(config)
        for test_set in data.own_test_sets(config):
            photos += list(test_set.images)
            test_sets.append(test_set.fingerprint)
    for place in keep_out:
        photos += _photos_of(place)
    options = shard_writer.Options(
        kept_out.identify(names, photos), tuple(test_sets), languages, min_side
    )
    found = shard_writer.prepare(sources, folder, options, processes)
    lines = [f"{folder}: {found['photos']:,} photos, {found['captions']:,} captions"]
    lines += [f"  {count:>12,} left out: {reason}" for reason, count in found["dropped"].items()]
    return "\n".join(lines)


def _without_splits(config: ConfigDict) -> ConfigDict:
    """The configuration without test sets that are splits of its own data set."""
    config = config.copy_and_resolve_references()
    config.evals = {
        name: test_set
        for name, test_set in config.evals.items()
        if test_set.get("type", "folder") != "split"
    }
    return config


def _photos_of(folder: pathlib.Path) -> Sequence[bytes | pathlib.Path]:
    """The photos of a folder of shards, or of photos at any depth."""
    if (folder / INDEX).is_file():
        shards = Shards(folder)
        return [shards[row].image for row in range(len(shards))]
    found = [
        pathlib.Path(place, name)
        for place, _, names in os.walk(folder)
        for name in sorted(names)
        if name.lower().endswith(PHOTO_SUFFIXES)
    ]
    if not found:
        raise FileNotFoundError(f"there are no photos in {folder} (--keep_out)")
    return found

"""Preparing captioned images as a TFDS data set: one schema, built without TensorFlow.

A prepared set is named by a fingerprint of its source, so a changed source is prepared anew, never
read stale, and earlier sets stay. It is written shard by shard into a folder beside, which is
renamed at the end: a killed preparation leaves nothing that could be taken for a whole one, and
the next one uses the shards that were finished.

Everything in a set has a digest. ArrayRecord checks each record that is read; SHA256SUMS has the
other files', which are checked when the set is opened.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from input_pipeline import files
from input_pipeline.cache import cache_folder, fingerprint, make_folder, not_writable

log = logging.getLogger(__name__)

VERSION = "1.1.0"
# Photos in a shard: what a kill can cost, some seconds of decoding.
SHARD = 2048
# Photos read ahead by threads.
AHEAD = 256
# Names that a message lists before it only counts.
NAMED = 3


class Unread(NamedTuple):
    """A captioned image that is not read yet; `read` returns None if it can't be decoded."""

    filename: str
    image_id: int
    captions: list[str]
    read: Callable[[], bytes | None]


def prepare(
    name: str,
    source: str,
    splits: Mapping[str, Sequence[Unread]],
    check: Callable[[], None] = lambda: None,
    size: int = 0,
) -> tfds.core.DatasetBuilder:
    """The prepared set, as a TFDS builder; written as ArrayRecord where it is not there yet.

    Another process that prepares the same set is waited for. Images that can't be decoded are
    counted, named and skipped.

    Args:
      name: of the set.
      source: a fingerprint of where the examples come from; part of the folder's name.
      splits: split -> examples.
      check: is called before anything is written, and not for a set that is there.
      size: of all images, in bytes; so much has to be free.

    Raises:
      ValueError: no image of a split can be decoded, or a file of the set is damaged.
      OSError: the cache folder can't be written, or the disk is full; finished shards are kept.
    """
    folder = cache_folder() / "datasets" / name / source / VERSION
    if not folder.exists():
        make_folder(folder.parent)
        with _lock(folder.parent / "lock"):
            if not folder.exists():
                check()
                _clean_up(folder)
                unfinished = _unfinished(folder)
                unfinished.mkdir(exist_ok=True)
                _check_space(unfinished, size)
                _write(unfinished, name, splits)
                unfinished.rename(folder)
    return open_prepared(folder)


@contextlib.contextmanager
def _lock(file: pathlib.Path) -> Iterator[None]:
    """Keeps other runs from preparing the same set."""
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(file, "w"))
        except OSError as error:
            raise not_writable(file.parent, error) from error
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_space(folder: pathlib.Path, size: int) -> None:
    """Raises OSError where a set of that size does not fit on the disk."""
    there = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if size > there + free:
        raise OSError(
            f"the set takes {size / 1e9:,.1f} GB in {cache_folder()}, where {free / 1e9:,.1f} GB "
            "are free; free some space, or name a folder on another disk: XLIR_CACHE=DIR"
        )


def open_prepared(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    """A set that is prepared, here or by TFDS, as a TFDS builder.

    Raises:
      ValueError: one of its files, other than the shards, is damaged; the message names it.
    """
    way_out = way_out_of(folder)
    try:
        files.check_sums(folder, way_out=way_out)
    except FileNotFoundError as error:
        raise ValueError(f"{error}. {way_out}") from error
    try:
        return tfds.builder_from_directory(folder)
    # Sets of earlier versions have no digests: TFDS raises many kinds of errors at damaged JSON.
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{folder}: dataset_info.json or features.json is damaged ({reason}). {way_out}"
        ) from error


def _small_files(folder: pathlib.Path) -> list[str]:
    """The files of a set other than its shards."""
    rows = [file.name for file in folder.glob("rows-*.json")]
    return [*rows, "dataset_info.json", "features.json"]


def way_out_of(folder: pathlib.Path) -> str:
    """What can be done about a damaged set."""
    if any([*folder.glob("rows-*.json"), *folder.glob(files.SUMS)]):
        return f"Delete {folder}: the set is prepared anew from its source"
    return f"Prepare it anew with TFDS, or restore {folder} from a copy"


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"incomplete.{folder.name}")


def _clean_up(folder: pathlib.Path) -> None:
    """Removes what killed preparations left, other than shards that this one can use."""
    for left in folder.parent.parent.glob("*/incomplete.*"):
        if left == _unfinished(folder):
            continue
        with open(left.parent / "lock", "w") as lock, contextlib.suppress(BlockingIOError):
            # This source's lock is held already; a set of another source may be in the making.
            if left.parent != folder.parent:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.info("removing an unfinished preparation of another source: %s", left)
            shutil.rmtree(left)


def _write(folder: pathlib.Path, name: str, splits: Mapping[str, Sequence[Unread]]) -> None:
    """Writes all shards that are not there yet, the rows of each split, and TFDS's metadata."""
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        shards = []
        starts = range(0, len(examples), SHARD)
        with tqdm(total=len(examples), desc=f"preparing {name} {split}", unit="") as bar:
            for shard, start in enumerate(starts):
                file = template.sharded_filepath(shard_index=shard, num_shards=len(starts))
                part = examples[start : start + SHARD]
                shards.append(_write_shard(pathlib.Path(file), part, bar))
        broken = [filename for shard in shards for filename in shard["broken"]]
        if len(broken) == len(examples):
            raise ValueError(f"no photo of split {split!r} can be decoded")
        warn("photos that can't be decoded", broken)
        content = {
            "digest": fingerprint([shard["digest"] for shard in shards]),
            "rows": [row for shard in shards for row in shard["rows"]],
        }
        files.write_whole(folder / f"rows-{split}.json", json.dumps(content))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard["rows"]) for shard in shards],
                num_bytes=sum(shard["bytes"] for shard in shards),
                filename_template=template,
            )
        )
    # TFDS reports each of its steps on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=_features(),
            split_infos=infos,
            version=VERSION,
            check_data=False,
        )
    small = _small_files(folder)
    for name in small:
        # What TFDS wrote may not be on disk yet.
        files.write_whole(folder / name, (folder / name).read_bytes())
    files.write_sums(folder, small)
    for pattern in ("*.shard.json", "*.partial"):
        for file in folder.glob(pattern):
            file.unlink()


def _write_shard(file: pathlib.Path, examples: Sequence[Unread], bar: tqdm) -> dict[str, Any]:
    """Writes one shard, or finds it whole; returns its rows, and what is broken.

    The file beside it, with its rows, comes last: a shard that has it is whole.
    """
    beside = file.with_name(f"{file.name}.shard.json")
    if content := _finished(file, beside):
        bar.update(len(examples))
        return content
    features = _features()
    serializer = ExampleSerializer(features.get_serialized_info())
    rows, broken, digest = [], [], hashlib.sha256()
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for example, image in _read_ahead(examples):
        bar.update(1)
        if image is None:
            broken.append(example.filename)
            continue
        record = {
            "image": io.BytesIO(image),
            "image/filename": example.filename,
            "image/id": example.image_id,
            "captions": example.captions,
        }
        writer.write(serializer.serialize_example(features.encode_example(record)))
        digest.update(hashlib.sha256(image).digest())
        rows.append((example.filename, example.image_id, example.captions))
    try:
        writer.close()
    except RuntimeError as error:
        # ArrayRecord's, for a full disk among others; the first line says why.
        raise OSError(f"{file} can't be written: {str(error).splitlines()[0]}") from error
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    content = {
        "rows": rows,
        "broken": broken,
        "digest": digest.hexdigest(),
        "bytes": file.stat().st_size,
        "sha256": files.sha256(file),
    }
    files.write_digested(beside, content)
    return content


def _finished(file: pathlib.Path, beside: pathlib.Path) -> dict[str, Any] | None:
    """What an interrupted preparation left of a shard, where the shard is whole."""
    content = files.read_digested(beside)
    if content and not (file.exists() and files.sha256(file) == content["sha256"]):
        log.warning("%s is damaged: it is written anew", file)
        return None
    return content


def _read_ahead(examples: Sequence[Unread]) -> Iterator[tuple[Unread, bytes | None]]:
    """Examples and their images, in order; threads read ahead."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(examples), AHEAD):
            block = examples[start : start + AHEAD]
            yield from zip(block, pool.map(lambda example: example.read(), block), strict=True)


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
    )


def warn(what: str, filenames: Sequence[str]) -> None:
    """One line that counts and names photos that are skipped."""
    if filenames:
        names = ", ".join(filenames[:NAMED])
        more = ", ..." if len(filenames) > NAMED else ""
        log.warning("%s, skipped: %d (%s%s)", what, len(filenames), names, more)

"""Prepares captioned images as a TFDS data set, without TensorFlow.

A prepared set's folder is named by a fingerprint of its source: if the source changes, the set is
prepared again in another folder. The shards are written into a temporary folder that is renamed at
the end, so a killed preparation is never mistaken for a complete set. The next preparation uses the
shards that were finished.

All content is protected by digests. ArrayRecord checks each record that is read. The other files
are checked against SHA256SUMS when the set is opened.
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
# Photos in a shard. A killed preparation loses at most this many, some seconds of decoding.
SHARD = 2048
# Number of photos that threads read ahead.
AHEAD = 256
# Number of skipped photos that a message names; it only counts the rest.
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
    """The prepared set, as a TFDS builder; written as ArrayRecord if it does not exist yet.

    If another process is preparing the same set, this waits for it. Images that can't be decoded
    are skipped; a log line counts them and names the first ones.

    Args:
      name: name of the set.
      source: a fingerprint of where the examples come from; part of the folder's path.
      splits: split -> examples.
      check: called before anything is written; not called if the set exists.
      size: bytes of all images, which must be free on the disk.

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
    """Raises OSError if a set of this size does not fit on the disk."""
    written = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if size > written + free:
        raise OSError(
            f"the set takes {size / 1e9:,.1f} GB in {cache_folder()}, where {free / 1e9:,.1f} GB "
            "are free; free some space, or name a folder on another disk: XLIR_CACHE=DIR"
        )


def open_prepared(folder: pathlib.Path) -> tfds.core.DatasetBuilder:
    """A set that this package or TFDS prepared, as a TFDS builder.

    Raises:
      ValueError: a file other than a shard is damaged; the message names the file.
    """
    way_out = way_out_of(folder)
    try:
        files.check_sums(folder, way_out=way_out)
    except FileNotFoundError as error:
        raise ValueError(f"{error}. {way_out}") from error
    try:
        return tfds.builder_from_directory(folder)
    # Sets of earlier versions have no digests, and TFDS raises many types of errors for bad JSON.
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
    """A sentence that says what to do about a damaged set."""
    if any([*folder.glob("rows-*.json"), *folder.glob(files.SUMS)]):
        return f"Delete {folder}: the set is then prepared again from its source"
    return f"Prepare it again with TFDS, or restore {folder} from a copy"


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"incomplete.{folder.name}")


def _clean_up(folder: pathlib.Path) -> None:
    """Removes what killed preparations left, other than shards that this one can use."""
    for left in folder.parent.parent.glob("*/incomplete.*"):
        if left == _unfinished(folder):
            continue
        with open(left.parent / "lock", "w") as lock, contextlib.suppress(BlockingIOError):
            # This process holds this source's lock. Skip other sources that another process holds.
            if left.parent != folder.parent:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.info("removing an unfinished preparation of another source: %s", left)
            shutil.rmtree(left)


def _write(folder: pathlib.Path, name: str, splits: Mapping[str, Sequence[Unread]]) -> None:
    """Writes the shards that do not exist yet, the rows of each split, and TFDS's metadata."""
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
    # Hide the progress messages that TFDS prints to stdout.
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
        # Write TFDS's files again, because `write_whole` also flushes them to disk.
        files.write_whole(folder / name, (folder / name).read_bytes())
    files.write_sums(folder, small)
    for pattern in ("*.shard.json", "*.partial"):
        for file in folder.glob(pattern):
            file.unlink()


def _write_shard(file: pathlib.Path, examples: Sequence[Unread], bar: tqdm) -> dict[str, Any]:
    """Writes one shard, unless it is complete; returns its rows and its broken photos.

    The description file beside the shard is written last, so a shard that has one is complete.
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
        # For example, the disk is full. The first line of ArrayRecord's message has the reason.
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
    """The description of a shard that an earlier preparation completed, else None."""
    content = files.read_digested(beside)
    if content and not (file.exists() and files.sha256(file) == content["sha256"]):
        log.warning("%s is damaged: it is written again", file)
        return None
    return content


def _read_ahead(examples: Sequence[Unread]) -> Iterator[tuple[Unread, bytes | None]]:
    """Examples and their images, in order; threads read the images ahead."""
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
    """Logs one line that counts the skipped photos and names the first ones."""
    if filenames:
        names = ", ".join(filenames[:NAMED])
        more = ", ..." if len(filenames) > NAMED else ""
        log.warning("%s, skipped: %d (%s%s)", what, len(filenames), names, more)

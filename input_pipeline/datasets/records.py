"""Captioned images as a TFDS data set: one schema, built and read without TensorFlow.

A prepared set is named by a fingerprint of its source, so a changed source is prepared anew, never
read stale, and earlier sets stay. It is written shard by shard into a folder beside, which is
renamed at the end: a killed preparation leaves nothing that could be taken for a whole one, and
the next one keeps the shards that were finished.
"""

import concurrent.futures
import contextlib
import copy
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

from input_pipeline.cache import cache_folder, fingerprint

log = logging.getLogger(__name__)

VERSION = "1.1.0"
# Photos in a shard: what a kill can cost, some seconds of decoding.
SHARD = 2048
# Photos read ahead by threads.
AHEAD = 256
# Names that a message lists before it only counts.
NAMED = 3

# (file name, id, captions)
Row = tuple[str, int, list[str]]


class Example(NamedTuple):
    """One captioned image, not read yet; `read` gives None where it can't be decoded."""

    filename: str
    image_id: int
    captions: list[str]
    read: Callable[[], bytes | None]


class CaptionedImages(Sequence):
    """One or more splits of a prepared set: captions in memory, images read by row.

    Args:
      builder: the prepared set.
      splits: their names, joined with a plus.
      exclude: says of a file name whether to leave the image out.

    Attributes:
      filenames: the file name of each image.
      image_ids: the id of each image, int64.
      captions: the English captions of each image.
      excluded: the file names that were left out.
      fingerprint: identifies the content, for caches of what is computed from it. The same photos
        and captions, prepared from another place, have the same.

    Raises:
      ValueError: the set has no such split.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        splits: str,
        exclude: Callable[[str], object] = lambda filename: False,
    ):
        self._sources, self._places, self.excluded = [], [], []
        rows: list[Row] = []
        digests = []
        for name in splits.split("+"):
            if name not in builder.info.splits:
                known = ", ".join(builder.info.splits)
                raise ValueError(f"the data set has no split {name!r}; it has {known}")
            source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
            content = _read_rows(source, builder, name)
            digests.append(content["digest"])
            for place, (filename, image_id, captions) in enumerate(content["rows"]):
                if exclude(filename):
                    self.excluded.append(filename)
                else:
                    self._places.append((len(self._sources), place))
                    rows.append((filename, image_id, captions))
            self._sources.append(source)
        self._take(rows, digests)

    def _take(self, rows: list[Row], digests: list[str]) -> None:
        self._rows, self._digests = rows, digests
        self.filenames = [filename for filename, _, _ in rows]
        self.image_ids = np.array([image_id for _, image_id, _ in rows], np.int64)
        self.captions = [captions for _, _, captions in rows]
        self.fingerprint = fingerprint([digests, rows])

    def select(self, filenames: Sequence[str]) -> "CaptionedImages":
        """The images of these names, in this order.

        Raises:
          KeyError: an image is not there.
        """
        row_of = {filename: row for row, filename in enumerate(self.filenames)}
        rows = [row_of[filename] for filename in filenames]
        chosen = copy.copy(self)
        chosen._places = [self._places[row] for row in rows]
        chosen._take([self._rows[row] for row in rows], self._digests)
        return chosen

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> bytes:
        """The encoded image of a row, as it was on disk."""
        source, place = self._places[row]
        return self._sources[source][place]["image"]


def prepare(
    name: str,
    source: str,
    splits: Mapping[str, Sequence[Example]],
    check: Callable[[], None] = lambda: None,
) -> tfds.core.DatasetBuilder:
    """The prepared set, as a TFDS builder; written as ArrayRecord where it is not there yet.

    Another process that prepares the same set is waited for. Images that can't be decoded are
    counted, named and skipped.

    Args:
      name: of the set.
      source: a fingerprint of where the examples come from; part of the folder's name.
      splits: split -> examples.
      check: is called before anything is written, and not for a set that is there.

    Raises:
      ValueError: no image of a split can be decoded.
      OSError: the cache folder can't be written, or the disk is full; finished shards are kept.
    """
    folder = cache_folder() / "datasets" / name / source / VERSION
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(folder.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                check()
                _clean_up(folder)
                unfinished = _unfinished(folder)
                unfinished.mkdir(exist_ok=True)
                _write(unfinished, name, splits)
                unfinished.rename(folder)
    return tfds.builder_from_directory(folder)


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"incomplete.{folder.name}")


def _clean_up(folder: pathlib.Path) -> None:
    """Removes what killed preparations of this set left, but for what can be gone on with."""
    for left in folder.parent.parent.glob("*/incomplete.*"):
        if left == _unfinished(folder):
            continue
        with open(left.parent / "lock", "w") as lock, contextlib.suppress(BlockingIOError):
            # This source's lock is held already; a set of another source may be in the making.
            if left.parent != folder.parent:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            log.info("removing an unfinished preparation of another source: %s", left)
            shutil.rmtree(left)


def _write(folder: pathlib.Path, name: str, splits: Mapping[str, Sequence[Example]]) -> None:
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
        _write_json(folder / f"rows-{split}.json", content)
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
    for file in folder.glob("*.shard.json"):
        file.unlink()


def _write_shard(file: pathlib.Path, examples: Sequence[Example], bar: tqdm) -> dict[str, Any]:
    """Writes one shard, or finds it whole; returns its rows, and what is broken.

    The file beside it, with its rows, comes last: a shard that has it is whole.
    """
    beside = file.with_name(f"{file.name}.shard.json")
    if beside.exists():
        bar.update(len(examples))
        return json.loads(beside.read_text())
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
    writer.close()
    with open(file, "rb") as written:
        os.fsync(written.fileno())
    size = file.stat().st_size
    content = {"rows": rows, "broken": broken, "digest": digest.hexdigest(), "bytes": size}
    _write_json(beside, content)
    return content


def _read_ahead(examples: Sequence[Example]) -> Iterator[tuple[Example, bytes | None]]:
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


def _read_rows(source: Sequence, builder: tfds.core.DatasetBuilder, split: str) -> dict[str, Any]:
    """`digest` of the images and `rows` of everything else.

    They lie beside records that were prepared here. For a set that TFDS prepared all records are
    read once, and the result is kept in the cache: its folder may not be ours to write to.
    """
    folder = pathlib.Path(builder.data_path)
    file = folder / f"rows-{split}.json"
    if not file.exists():
        records = sorted(folder.glob(f"*-{split}.array_record*"))
        identity = [(record.name, record.stat().st_size) for record in records]
        info = (folder / "dataset_info.json").read_text()
        key = fingerprint([builder.info.full_name, split, identity, info])
        file = cache_folder() / "datasets" / builder.name / "rows" / f"{key}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest, rows = hashlib.sha256(), []
        for place in tqdm(range(len(source)), desc=f"reading {builder.name} {split}", unit=""):
            example = source[place]
            digest.update(hashlib.sha256(example["image"]).digest())
            rows.append(_row(example))
        _write_json(file, {"digest": digest.hexdigest(), "rows": rows})
    return json.loads(file.read_text())


def _row(example: Mapping[str, Any]) -> Row:
    captions = example["captions"]
    # TFDS's coco_captions has an id beside each text.
    texts = captions["text"] if isinstance(captions, Mapping) else captions
    texts = [" ".join(text.decode().split()) for text in texts]
    return example["image/filename"].decode(), int(example["image/id"]), [t for t in texts if t]


def _write_json(file: pathlib.Path, content: object) -> None:
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content))
    unfinished.rename(file)


def warn(what: str, filenames: Sequence[str]) -> None:
    """One line that counts and names photos that are skipped."""
    if filenames:
        names = ", ".join(filenames[:NAMED])
        more = ", ..." if len(filenames) > NAMED else ""
        log.warning("%s, skipped: %d (%s%s)", what, len(filenames), names, more)

"""Prepared sets, and their splits: captions in memory, images read by row, without TensorFlow."""

import copy
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from input_pipeline import files
from input_pipeline.cache import cache_folder, fingerprint, make_folder
from input_pipeline.datasets import records
from input_pipeline.datasets.source import Example, Images

log = logging.getLogger(__name__)

# (file name, id, captions)
Row = tuple[str, int, list[str]]


class CaptionedImages:
    """A source of one or more splits of a prepared set: `source[row]` reads an image.

    Args:
      builder: the prepared set.
      splits: their names, joined with a plus.
      exclude: takes a file name, and says whether to leave that image out.

    Attributes:
      filenames: the file name of each image.
      image_ids: the id of each image, int64.
      captions: the English captions of each image, which are in memory.
      excluded: the file names that were left out.
      fingerprint: identifies the content, for caches of what is computed from it. The same photos
        and captions, prepared from another place, have the same.

    Raises:
      ValueError: the set has no such split, or a file of it is damaged.
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
            source = _Records(builder, name)
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

    @property
    def images(self) -> Images:
        """The encoded images alone."""
        return Images(self)

    def __getitem__(self, row: int) -> Example:
        """The encoded image of a row, as it was on disk, and its captions.

        Raises:
          ValueError: its record is damaged.
        """
        source, place = self._places[row]
        example = self._sources[source][place]
        if example["image/filename"].decode() != self.filenames[row]:
            raise self._sources[source].damaged(place, "it holds another photo")
        return Example(example["image"], self.captions[row])


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A data set that was prepared, here or by TFDS.

    Attributes:
      builder: TFDS's view of it.
      name: what results are filed under, with the split's name behind it.
      main_split: the split whose results are filed under the set's name alone; may be empty.
      translations: for a set that has one text a photo in several languages: takes a split and
        gives, by language, the text of each photo. None: English captions alone.
      keeps_order: whether photos are in the order of the publisher's file.
      own_tags: for a set whose photos each show one thing: takes a split and gives for each photo
        the row of its tag in the vocabulary that has the set's name.
    """

    builder: tfds.core.DatasetBuilder
    name: str
    main_split: str = ""
    keeps_order: bool = True
    translations: Callable[[str], dict[str, list[str]]] | None = None
    own_tags: Callable[[str], list[int]] | None = None

    @property
    def folder(self) -> pathlib.Path:
        """Where it is."""
        return pathlib.Path(self.builder.data_path)

    @property
    def splits(self) -> list[str]:
        """The names of its splits."""
        return list(self.builder.info.splits)

    def source(
        self, splits: str, exclude: Callable[[str], object] = lambda filename: False
    ) -> CaptionedImages:
        """See `CaptionedImages`."""
        return CaptionedImages(self.builder, splits, exclude)

    def filed_under(self, split: str) -> str:
        """What results on a split are filed under."""
        return self.name if split == self.main_split else f"{self.name}-{split}"


class _Records(Sequence):
    """The records of a split, whose errors name the shard."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split, decoders=decoders)
        info = builder.info.splits[split]
        self._shards, self._ends = info.filepaths, np.cumsum(info.shard_lengths)
        self.way_out = records.way_out_of(pathlib.Path(builder.data_path))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The record at a place; raises ValueError where it is damaged."""
        try:
            return self._source[place]
        # ArrayRecord's checks raise RuntimeError, and TFDS reads bytes with several libraries.
        except Exception as error:
            raise self.damaged(place, str(error).splitlines()[0]) from error

    def damaged(self, place: int, fault: str) -> ValueError:
        """The error of a damaged record."""
        shard = self._shards[int(np.searchsorted(self._ends, place, side="right"))]
        return ValueError(f"{shard} can't be read: {fault}. {self.way_out}")


def _read_rows(source: _Records, builder: tfds.core.DatasetBuilder, split: str) -> dict[str, Any]:
    """`digest` of the images and `rows` of everything else.

    They lie beside records that were prepared here. For a set that TFDS prepared all records are
    read once, and the result is kept in the cache: its folder may not be ours to write to.
    """
    folder = pathlib.Path(builder.data_path)
    file = folder / f"rows-{split}.json"
    if file.exists() or (folder / files.SUMS).exists():
        content = _parse(file, source.way_out)
        if len(content["rows"]) != len(source):
            found = f"{len(content['rows'])} rows for {len(source)} photos"
            raise ValueError(f"{file} is damaged: {found}. {source.way_out}")
        return content
    shards = sorted(folder.glob(f"*-{split}.array_record*"))
    identity = [(shard.name, shard.stat().st_size) for shard in shards]
    info = (folder / "dataset_info.json").read_text()
    key = fingerprint([builder.info.full_name, split, identity, info])
    file = cache_folder() / "datasets" / builder.name / "rows" / f"{key}.json"
    content = files.read_digested(file)
    if content is None:
        digest, rows = hashlib.sha256(), []
        for place in tqdm(range(len(source)), desc=f"reading {builder.name} {split}", unit=""):
            example = source[place]
            digest.update(hashlib.sha256(example["image"]).digest())
            rows.append(_row(example))
        content = {"digest": digest.hexdigest(), "rows": rows}
        try:
            make_folder(file.parent)
            files.write_digested(file, content)
        except OSError as error:
            log.warning("what was read of %s is not kept: %s", builder.name, error)
    return content


def _parse(file: pathlib.Path, way_out: str) -> dict[str, Any]:
    """A file with rows; those of versions that wrote no digests may be damaged."""
    try:
        content = json.loads(file.read_bytes())
        rows = [
            (str(name), int(image_id), list(texts)) for name, image_id, texts in content["rows"]
        ]
        return {"digest": str(content["digest"]), "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}. {way_out}") from error


def _row(example: Mapping[str, Any]) -> Row:
    captions = example["captions"]
    # TFDS's coco_captions has an id beside each text.
    texts = captions["text"] if isinstance(captions, Mapping) else captions
    texts = [" ".join(text.decode().split()) for text in texts]
    return example["image/filename"].decode(), int(example["image/id"]), [t for t in texts if t]

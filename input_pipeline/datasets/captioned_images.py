"""Prepared data sets and their splits: captions in memory, images read by row, no TensorFlow."""

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
    """Images and captions of one or more splits of a prepared set; `source[row]` reads an image.

    Args:
      builder: the prepared set.
      splits: names of splits, joined with a plus.
      exclude: takes a file name and returns whether to leave that image out.

    Attributes:
      filenames: the file name of each image.
      image_ids: the id of each image, int64.
      captions: the English captions of each image.
      excluded: the file names of the images that were left out.
      fingerprint: identifies the photos and captions, for caches of features. It does not depend on
        the path that they were prepared from.

    Raises:
      ValueError: the set has no such split, or one of its files is damaged.
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
        """The images with these file names, in this order.

        Raises:
          KeyError: there is no image of a name.
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
        """The encoded images without their captions."""
        return Images(self)

    def __getitem__(self, row: int) -> Example:
        """The image of a row, with the bytes of its original file, and its captions.

        Raises:
          ValueError: the image's record is damaged.
        """
        source, place = self._places[row]
        example = self._sources[source][place]
        if example["image/filename"].decode() != self.filenames[row]:
            raise self._sources[source].damaged(place, "it holds another photo")
        return Example(example["image"], self.captions[row])


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """A data set that was prepared by this package or by TFDS.

    Attributes:
      builder: the data set as a TFDS builder.
      name: name of the set; results on a split are named NAME-SPLIT.
      main_split: the split whose results are named NAME alone; may be empty.
      translations: takes a split's name and returns, by language, the text of each photo; for a
        set with one text per photo in each language. None: the set has English captions only.
      keeps_order: whether photos are in the order of the publisher's file.
      own_tags: takes a split's name and returns the row of each photo's tag in the vocabulary that
        has the same name as the set; for a set with exactly one tag per photo, else None.
    """

    builder: tfds.core.DatasetBuilder
    name: str
    main_split: str = ""
    keeps_order: bool = True
    translations: Callable[[str], dict[str, list[str]]] | None = None
    own_tags: Callable[[str], list[int]] | None = None

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the prepared files."""
        return pathlib.Path(self.builder.data_path)

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self.builder.info.splits)

    def source(
        self, splits: str, exclude: Callable[[str], object] = lambda filename: False
    ) -> CaptionedImages:
        """The images and captions of some splits: see `CaptionedImages`."""
        return CaptionedImages(self.builder, splits, exclude)

    def filed_under(self, split: str) -> str:
        """The name of results on a split."""
        return self.name if split == self.main_split else f"{self.name}-{split}"


class _Records(Sequence):
    """The records of a split; an error names the damaged shard."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        decoders = {"image": tfds.decode.SkipDecoding()}
        self._source = builder.as_data_source(split, decoders=decoders)
        info = builder.info.splits[split]
        self._shards, self._ends = info.filepaths, np.cumsum(info.shard_lengths)
        self.way_out = records.way_out_of(pathlib.Path(builder.data_path))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """The record at a position; raises ValueError if it is damaged."""
        try:
            return self._source[place]
        # ArrayRecord raises RuntimeError; the libraries that TFDS decodes with raise other types.
        except Exception as error:
            raise self.damaged(place, str(error).splitlines()[0]) from error

    def damaged(self, place: int, fault: str) -> ValueError:
        """The error for a damaged record."""
        shard = self._shards[int(np.searchsorted(self._ends, place, side="right"))]
        return ValueError(f"{shard} can't be read: {fault}. {self.way_out}")


def _read_rows(source: _Records, builder: tfds.core.DatasetBuilder, split: str) -> dict[str, Any]:
    """A split's rows (everything but the images) and a digest of its images.

    Sets that this package prepared have a file with both. For a set that TFDS prepared, all records
    are read once and the result is stored in the cache, because the set's folder may be read-only.
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
            log.warning(
                "the list of %s's photos is not kept, so the next run reads them again: %s",
                *(builder.name, error),
            )
    return content


def _parse(file: pathlib.Path, way_out: str) -> dict[str, Any]:
    """Reads a rows file. Earlier versions wrote no digests, so damage may only show here."""
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
    # TFDS's coco_captions has a mapping of ids and texts.
    texts = captions["text"] if isinstance(captions, Mapping) else captions
    texts = [" ".join(text.decode().split()) for text in texts]
    return example["image/filename"].decode(), int(example["image/id"]), [t for t in texts if t]

"""Captioned images as a TFDS data set: one schema, built and read without TensorFlow.

A prepared set is named by a fingerprint of its source, so a changed source is prepared anew and
never read stale. TFDS writes to a temporary folder and renames it at the end: a killed preparation
leaves nothing that could be taken for a whole one.
"""

import contextlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from input_pipeline.cache import cache_folder, fingerprint

log = logging.getLogger(__name__)

# (encoded image, file name, id, captions)
Example = tuple[bytes, str, int, list[str]]
# (file name, id, captions)
Row = tuple[str, int, list[str]]


class CaptionedImages(Sequence):
    """One or more splits of a prepared set: captions in memory, images read by row.

    Attributes:
      filenames: the file name of each image.
      image_ids: the id of each image, int64.
      captions: the English captions of each image.
      excluded: how many images were left out by name.
      fingerprint: identifies the content, for caches of what is computed from it.
    """

    def __init__(
        self, builder: tfds.core.DatasetBuilder, splits: str, exclude: Collection[str] = ()
    ):
        self._sources, self._rows = [], []
        rows: list[Row] = []
        for name in splits.split("+"):
            if name not in builder.info.splits:
                known = ", ".join(builder.info.splits)
                raise ValueError(f"the data set has no split {name!r}; it has {known}")
            source = builder.as_data_source(name, decoders={"image": tfds.decode.SkipDecoding()})
            for place, row in enumerate(_read_rows(source, builder.data_path, name)):
                if row[0] not in exclude:
                    self._rows.append((len(self._sources), place))
                    rows.append(row)
            self._sources.append(source)
        self.excluded = sum(map(len, self._sources)) - len(rows)
        self.filenames = [filename for filename, _, _ in rows]
        self.image_ids = np.array([image_id for _, image_id, _ in rows], np.int64)
        self.captions = [captions for _, _, captions in rows]
        self.fingerprint = fingerprint([builder.info.full_name, rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> bytes:
        """The encoded image of a row, as it was on disk."""
        source, place = self._rows[row]
        return self._sources[source][place]["image"]


class Builder(tfds.core.GeneratorBasedBuilder):
    """A TFDS builder, written as ArrayRecord, whose examples are handed to it.

    Args:
      name: of the data set.
      source: a fingerprint of where the examples come from; part of the folder's name.
      splits: split -> examples; needed to prepare, not to read.
      sizes: split -> number of examples, for the progress bar.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        name: str,
        source: str,
        splits: Mapping[str, Iterator[Example]],
        sizes: Mapping[str, int],
    ):
        self.name = name
        self._splits, self._sizes = splits, sizes
        super().__init__(
            data_dir=cache_folder() / "datasets",
            config=tfds.core.BuilderConfig(name=source, version=self.VERSION),
            file_format="array_record",
        )

    def prepare(self) -> "Builder":
        """Writes the set where it is not there yet.

        Raises:
          OSError: the cache folder can't be written, or the disk is full.
        """
        if not pathlib.Path(self.data_path).exists():
            tfds.disable_progress_bar()
            # TFDS would announce a download; there is none.
            with contextlib.redirect_stdout(io.StringIO()):
                try:
                    self.download_and_prepare()
                except OSError:
                    if not pathlib.Path(self.data_path).exists():
                        raise
                    # Another process prepared the same set meanwhile.
                    self.info.read_from_directory(self.data_path)
        return self

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                }
            ),
            # Training has an order of its own.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        bar = tqdm(
            self._splits[split],
            total=self._sizes[split],
            desc=f"preparing {self.name} {split}",
            unit="",
        )
        for key, (image, filename, image_id, captions) in enumerate(bar):
            yield (
                key,
                {
                    "image": io.BytesIO(image),
                    "image/filename": filename,
                    "image/id": image_id,
                    "captions": captions,
                },
            )


def _read_rows(source: Any, folder: os.PathLike, split: str) -> list[Row]:
    """Everything but the images, from a file beside the records that is made on first use."""
    file = pathlib.Path(folder) / f"rows-{split}.json"
    if not file.exists():
        rows = [
            (
                example["image/filename"].decode(),
                int(example["image/id"]),
                [caption.decode() for caption in example["captions"]],
            )
            for example in (source[row] for row in range(len(source)))
        ]
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(rows))
        unfinished.rename(file)
    return [
        (filename, image_id, captions)
        for filename, image_id, captions in json.loads(file.read_text())
    ]

"""Any number of photos with captions, in folders of shards that `prepare` writes.

    web/cc12m/index.json  web/cc12m/*.array_record  web/coco/...  web/val/...

Each folder is a split. Nothing that grows with the number of photos is held in memory: names and
captions are read with their photo (`input_pipeline.shards`).
"""

import pathlib
from collections.abc import Callable, Iterator, Sequence

from input_pipeline.cache import fingerprint
from input_pipeline.datasets.source import DataSet, Example, Images
from input_pipeline.shards import INDEX, BrokenRecord, Shards


class ShardedPhotos:
    """The photos of one or more folders of shards.

    Attributes:
      sizes: number of photos in each folder; rows are numbered folder by folder.
      caption_count: number of captions.
      filenames: none, because they are not held in memory.
      fingerprint: identifies the photos and captions.
      kept_out: for each folder, the fingerprints of the test sets whose photos it has none of.
    """

    filenames = ()

    def __init__(self, folders: Sequence[pathlib.Path]):
        self._folders = [Shards(folder) for folder in folders]
        self.sizes = [len(shards) for shards in self._folders]
        self.caption_count = sum(shards.captions for shards in self._folders)
        self.fingerprint = fingerprint([shards.fingerprint for shards in self._folders])
        self.kept_out = [set(shards.facts.get("kept_out", ())) for shards in self._folders]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, row: int) -> Example:
        """The photo of a row, with its captions.

        Raises:
          BrokenRecord: its record is damaged.
          OSError: its shard can't be read.
        """
        folder, place = self._find(row)
        record = self._folders[folder][place]
        return Example(record.image, record.captions)

    def next_row(self, row: int) -> int:
        """The row after this one; after the last one of a folder comes its first one."""
        folder, place = self._find(row)
        return row - place + (place + 1) % self.sizes[folder]

    def _find(self, row: int) -> tuple[int, int]:
        """The folder of a row, and the row in it."""
        for folder, size in enumerate(self.sizes):
            if row < size:
                return folder, row
            row -= size
        raise IndexError("there is no such row")

    def texts(self) -> Iterator[str]:
        """All captions, photo by photo, without those of broken records; this reads all shards."""
        for row in range(len(self)):
            try:
                yield from self[row].texts
            except BrokenRecord:
                continue

    @property
    def images(self) -> Images:
        """The encoded photos without their captions."""
        return Images(self)

    @property
    def captions(self) -> Sequence[list[str]]:
        """The captions of each photo, read when they are asked for."""
        return _Captions(self)


class _Captions(Sequence):
    def __init__(self, photos: ShardedPhotos):
        self._photos = photos

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, row: int) -> list[str]:
        return self._photos[row].texts


class ShardedSet:
    """A folder of splits; see `source.Opened`."""

    keeps_order, translations = True, None

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} (config.data.dir)")
        self.name = self.folder.resolve().name
        self.splits = sorted(file.parent.name for file in self.folder.glob(f"*/{INDEX}"))

    def source(
        self, splits: str, exclude: Callable[[str], object] = lambda filename: False
    ) -> ShardedPhotos:
        """The photos of some splits. `prepare` has left out those of test sets.

        Raises:
          ValueError: there is no such split.
        """
        names = splits.split("+")
        for name in names:
            if name not in self.splits:
                known = ", ".join(self.splits) or "none"
                raise ValueError(
                    f"{self.folder} holds no complete folder of shards {name!r} (complete: {known})"
                )
        return ShardedPhotos([self.folder / name for name in names])

    def filed_under(self, split: str) -> str:
        """The name of results on a split."""
        return f"{self.name}-{split}"


def _open(folder: str, annotations: str) -> ShardedSet:
    return ShardedSet(folder)


DATA_SET = DataSet(_open)

"""How the rows of a training batch are chosen and read, for data in memory and in shards."""

import functools
import itertools
import logging

import numpy as np
from ml_collections import ConfigDict

from input_pipeline import loader, tokenizers
from input_pipeline.datasets.captioned_images import CaptionedImages
from input_pipeline.datasets.shards import ShardedPhotos
from input_pipeline.datasets.texts import Texts
from input_pipeline.images import Pixels
from input_pipeline.packing import Packing
from xlir import data, decoding, losses, partition
from xlir.embed import Embedder, Inputs
from xlir.encoder import Encoder
from xlir.metric_log import Progress
from xlir.teacher import Lessons

log = logging.getLogger(__name__)

# The key of a batch that has, for each row, how many photos before it could not be read.
BROKEN = "broken_records"
# A run ends if it meets more broken photos than these one after the other.
MOST_BROKEN = 100


def sampler(config: ConfigDict, photos: data.TrainingData) -> loader.Sampler | loader.Mixture:
    """Chooses the rows of each global batch."""
    seed, size = config.seed, config.data.batch_size
    if isinstance(photos, ShardedPhotos):
        return loader.Mixture(seed, photos.sizes, config.data.weights, size)
    return loader.Sampler(seed, list(map(len, photos.captions)), size)


def reader(
    encoder: Encoder,
    photos: data.TrainingData,
    sampler: loader.Sampler | loader.Mixture,
    lessons: Lessons | None,
) -> tuple[loader.Read, dict[str, np.ndarray]]:
    """The function that reads the rows of a batch, and the outputs of frozen towers by side.

    From shards, no outputs are kept: frozen towers run in each step.
    """
    embedder = encoder.embedder
    if isinstance(photos, ShardedPhotos):
        return of_shards(photos, embedder), {}
    captions = list(data.captions_of(photos))
    inputs = Inputs("training", captions, photos.images, photos.fingerprint)
    sides = losses.sides(encoder.config.loss)
    features = encoder.frozen_features(inputs, data.feature_cache(), sides)
    packing = _packing(embedder, captions, sampler) if encoder.config.text.pack else None
    return of_rows(photos, captions, embedder, features, lessons, packing), features


def _packing(embedder: Embedder, captions: list[str], sampler: loader.Sampler) -> Packing:
    """Packs captions in a group for each device and microbatch."""
    config, devices = embedder.config, embedder.mesh.size
    length, microbatches = config.text.max_length, config.data.microbatches
    tokenize = functools.partial(embedder.tokenizer, max_length=length)
    group = config.data.batch_size // devices // microbatches
    packing = Packing(tokenize, captions, length, sampler, group, microbatches)
    log.info(
        "text.pack: %d captions share %d rows of %d tokens", group, packing.rows, packing.length
    )
    return packing


def of_rows(
    photos: CaptionedImages | Texts,
    captions: list[str],
    embedder: Embedder,
    features: dict[str, np.ndarray],
    lessons: Lessons | None = None,
    packing: Packing | None = None,
) -> loader.Read:
    """The function that reads the rows of a batch: features of frozen towers, raw input of others.

    Photos are read only if the loss takes images.

    Args:
      photos: the training photos, or the training texts.
      captions: all captions, photo by photo.
      embedder: provides the tokenizer and the preprocessing.
      features: side -> outputs of a frozen tower for all inputs of that side. The raw inputs of
        these sides are not read.
      lessons: a teacher's embeddings of all captions, or None.
      packing: packs the texts of a batch; None: each text has a row of its own.
    """
    raw = [side for side in losses.sides(embedder.config.loss) if side not in features]
    length, seed = embedder.config.text.max_length, embedder.config.seed
    # Photo ids may have 64 bits, and ids in a batch have 32: number the photos from 0.
    _, image_id = np.unique(photos.image_ids, return_inverse=True)
    image_id = image_id.astype(np.int32)

    def decode(item: tuple[int, list[int]]) -> Pixels:
        row, key = item
        return embedder.decode(photos.images[row], f"image {row}", np.random.default_rng(key))

    def read(
        image_rows: np.ndarray, caption_rows: np.ndarray, step: int, places: np.ndarray
    ) -> loader.Batch:
        rows = {"text": caption_rows, "image": image_rows}
        batch = {f"{side}_features": array[rows[side]] for side, array in features.items()}
        if lessons:
            batch["teacher"] = lessons[caption_rows]
        if "text" in raw and packing:
            batch |= packing(step, places)
        elif "text" in raw:
            ids = embedder.tokenizer([captions[row] for row in caption_rows], max_length=length)
            batch["text_ids"], batch["text_mask"] = tokenizers.pad(ids, length)
        if "image" in raw:
            keys = [[seed, step, place] for place in places.tolist()]
            items = zip(image_rows.tolist(), keys, strict=True)
            batch["image"] = np.stack(list(decoding.decode_all(decode, items, len(keys))))
        return batch | {"image_id": image_id[image_rows]}

    return read


def of_shards(photos: ShardedPhotos, embedder: Embedder) -> loader.Read:
    """The function that reads the rows of a batch from shards: token ids and pixels.

    In place of a photo that can't be read or decoded, it reads the next photo of the same folder.
    `BROKEN` counts such photos.

    Args:
      photos: the training photos.
      embedder: provides the tokenizer and the preprocessing.
    """
    length, seed = embedder.config.text.max_length, embedder.config.seed

    def read_pair(item: tuple[int, int, list[int]]) -> tuple[int, int, str, Pixels]:
        row, turn, key = item
        for broken in itertools.count():
            try:
                example = photos[row]
                generator = np.random.default_rng(key)
                pixels = embedder.decode(example.image, f"image {row}", generator)
                return broken, row, example.texts[turn % len(example.texts)], pixels
            except ValueError as error:
                if broken >= MOST_BROKEN:
                    raise ValueError(
                        f"more than {MOST_BROKEN} photos one after the other can't be read; the "
                        f"last one: {error}"
                    ) from error
                log.info("skipped: %s", error)
                row = photos.next_row(row)

    def read(rows: np.ndarray, turns: np.ndarray, step: int, places: np.ndarray) -> loader.Batch:
        keys = [[seed, step, place] for place in places.tolist()]
        items = zip(rows.tolist(), turns.tolist(), keys, strict=True)
        pairs = list(decoding.decode_all(read_pair, items, len(keys)))
        broken, used, captions, pixels = zip(*pairs, strict=True)
        ids = embedder.tokenizer(list(captions), max_length=length)
        text_ids, text_mask = tokenizers.pad(ids, length)
        return {
            "text_ids": text_ids,
            "text_mask": text_mask,
            "image": np.stack(pixels),
            # Rows may have 64 bits. If two rows of a batch have the same lower bits, the pairs are
            # only not used as negatives of each other.
            "image_id": np.array(used, np.int64).astype(np.int32),
            BROKEN: np.array(broken, np.int32),
        }

    return read


def without_counts(batch: loader.Batch, progress: Progress) -> loader.Batch:
    """A batch without `BROKEN`, which is added to the counts of `progress`."""
    if BROKEN not in batch:
        return batch
    progress.counts[BROKEN] = progress.counts.get(BROKEN, 0) + int(batch[BROKEN].sum())
    return {name: array for name, array in batch.items() if name != BROKEN}


def total_counts(progress: Progress) -> dict[str, int]:
    """The counts of all processes since this run started or resumed. All must call this."""
    return {name: partition.total(count) for name, count in sorted(progress.counts.items())}

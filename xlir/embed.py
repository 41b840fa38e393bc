"""Embeds texts and images with given parameters. Batches use all devices, and have few shapes."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from input_pipeline import features as feature_cache
from input_pipeline import images as image_io
from input_pipeline import tokenizers
from input_pipeline.cache import fingerprint
from xlir import decoding, partition
from xlir.models import dual_encoder, parameter_names, pretrained
from xlir.models.family import TowerSpec

PyTree = Any
SIDES = ("text", "image")

# Batch sizes per device: inputs of a tower, tokens, and rows of precomputed features.
IMAGE_BATCH = 32
TEXT_BATCH = 128
TEXT_TOKENS = 2048  # padding included; mUSE's activations then stay in a CPU's cache
FEATURE_BATCH = 1024

# Pairs: the row numbers of a batch, and this process's share of the batch. The keys of the share
# are those of a training batch.
Batches = Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]
# This process's share of a batch -> the outputs of the whole batch.
Compute = Callable[[dict[str, np.ndarray]], np.ndarray]


class Parameters(NamedTuple):
    """The arrays of a dual encoder, as two trees of nested dicts.

    Attributes:
      trained: the parameters that training changes, as in `TrainState.params`.
      frozen: everything else, such as the weights of a frozen tower.
    """

    trained: PyTree
    frozen: PyTree


def split(config: ConfigDict, model: dual_encoder.DualEncoder) -> tuple[nnx.GraphDef, Parameters]:
    """The structure of a model, and its arrays (for an abstract model, their shapes)."""
    graph, *states = nnx.split(model, dual_encoder.trainable(config), ...)
    return graph, Parameters(*map(nnx.to_pure_dict, states))


def averaged(params: PyTree, start: PyTree, weight: float) -> PyTree:
    """Averages trained towers with the towers that training started from; heads stay as they are.

    Averages of weights keep more of a published model's robustness than the fine-tuned weights do
    (WiSE-FT, Wortsman et al. 2022, https://arxiv.org/abs/2109.01903).

    Args:
      params: the trained parameters.
      start: the trained parameters before the first step.
      weight: the weight of `start`, from 0 to 1 (`config.average`).
    """
    if not weight:
        return params
    towers = [{name: tree[name] for name in towers_of(params)} for tree in (params, start)]
    return params | _interpolated(*towers, weight)


def start_of(config: ConfigDict, params: PyTree) -> PyTree:
    """The part of the initial trained parameters that a run keeps for `averaged`."""
    return {name: params[name] for name in towers_of(params)} if config.average else {}


def towers_of(params: PyTree) -> list[str]:
    """The names of the towers in a tree of trained parameters."""
    return [f"{side}_tower" for side in SIDES if f"{side}_tower" in params]


@jax.jit
def _interpolated(params: PyTree, start: PyTree, weight: Float[Array, ""]) -> PyTree:
    # In this form, an average of equal values is exactly that value.
    return jax.tree.map(lambda end, begin: end + weight * (begin - end), params, start)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Texts and images whose frozen-tower outputs are cached.

    Attributes:
      name: their name in progress bars.
      texts: all texts.
      images: all images.
      images_fingerprint: identifies the images' content.
    """

    name: str
    texts: Sequence[str]
    images: Sequence
    images_fingerprint: str


class Embedder:
    """Computes embeddings with the parameters passed to each call.

    It holds no arrays of the model, so a training step may change or delete the parameters. Inputs
    are split over the devices of a mesh. If the devices belong to several processes, all processes
    must make the same calls, and every process gets all outputs.

    Attributes:
      config: the configuration of the model.
      graph: the structure of the model, from `split`.
      tokenizer: texts -> token ids.
      specs: the descriptions of both towers.
      preprocessing: size and normalization of the pixels that the image tower expects.
      feature_dims: the width of each tower's outputs.
      mesh: the devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        graph: nnx.GraphDef,
        tokenizer: tokenizers.Tokenizer,
        specs: dict[str, TowerSpec],
        feature_dims: dict[str, int],
        mesh: Mesh,
    ):
        self.config, self.graph, self.tokenizer = config, graph, tokenizer
        self.specs, self.feature_dims, self.mesh = specs, feature_dims, mesh
        self.preprocessing = specs["image"].preprocessing
        # Every process gets all rows of the outputs.
        compiled = functools.partial(jax.jit, out_shardings=partition.replicated(mesh))
        self._embed = {side: compiled(functools.partial(self._embed_batch, side)) for side in SIDES}
        self._tower = {side: compiled(functools.partial(self._tower_batch, side)) for side in SIDES}

    def embed(
        self, parameters: Parameters, side: str, inputs: Sequence
    ) -> Float[np.ndarray, "inputs dim"]:
        """Unit-length embeddings of texts or images; dot products are cosines.

        Args:
          parameters: the model's parameters, sharded over the mesh.
          side: "text" or "image".
          inputs: texts, or photos in any form that `decode` takes.

        Raises:
          ValueError: an embedding is not finite; or as `decode`.
          FileNotFoundError: a path does not exist.
        """
        shape = (len(inputs), self.config.embedding_dim)
        compute = self._on_mesh(self._embed[side], parameters)
        return collect(compute, side, self.batches(side, inputs), shape)

    def embed_features(
        self, parameters: Parameters, side: str, features: Float[np.ndarray, "rows features"]
    ) -> Float[np.ndarray, "rows dim"]:
        """As `embed`, but from outputs of the tower that were computed before.

        Raises:
          ValueError: an embedding is not finite.
        """
        shape = (len(features), self.config.embedding_dim)
        compute = self._on_mesh(self._embed[side], parameters)
        return collect(compute, side, self.feature_batches(side, features), shape)

    def features(
        self, parameters: Parameters, side: str, inputs: Sequence
    ) -> Float[np.ndarray, "inputs features"]:
        """The outputs of a side's tower, which are the inputs of its head.

        Args, Raises: as `embed`.
        """
        shape = (len(inputs), self.feature_dims[side])
        compute = self._on_mesh(self._tower[side], parameters)
        return collect(compute, side, self.batches(side, inputs), shape)

    def batches(self, side: str, inputs: Sequence) -> Batches:
        """(rows, batch) pairs of texts or images; every row occurs once, in any order."""
        return self.text_batches(inputs) if side == "text" else self.image_batches(inputs)

    def text_batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs. A batch has texts of similar length; batches have few shapes."""
        longest = self.config.text.max_length
        ids = self.tokenizer(texts, max_length=longest)
        size, tokens = TEXT_BATCH * self.mesh.size, TEXT_TOKENS * self.mesh.size
        lengths = [len(i) for i in ids]
        for rows, length in tokenizers.length_batches(
            lengths, size, max_tokens=tokens, longest=longest
        ):
            share = padded_share(rows, self.mesh)
            text_ids, text_mask = tokenizers.pad([ids[row] for row in share], length)
            yield rows, {"text_ids": text_ids, "text_mask": text_mask}

    def image_batches(self, images: Sequence) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs; threads decode photos two batches in advance."""
        batches = list(_row_batches(len(images), IMAGE_BATCH * self.mesh.size, self.mesh))
        # Padding repeats the last row of a batch. That row is decoded only once.
        shares = [np.unique(share, return_inverse=True) for _, share in batches]
        pixels = decoding.decode_all(
            lambda row: self.decode(images[row], f"image {row}"),
            (row for unique, _ in shares for row in unique.tolist()),
            ahead=2 * IMAGE_BATCH * len(self.mesh.local_devices),
        )
        for (rows, _), (unique, places) in zip(batches, shares, strict=True):
            yield rows, {"image": np.stack([next(pixels) for _ in unique])[places]}

    def feature_batches(self, side: str, features: np.ndarray) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs of outputs of a tower that were computed before."""
        size = FEATURE_BATCH * self.mesh.size
        for rows, share in _row_batches(len(features), size, self.mesh):
            yield rows, {f"{side}_features": np.asarray(features[share])}

    def decode(
        self,
        photo: decoding.Photo,
        name: str = "image",
        generator: np.random.Generator | None = None,
    ) -> image_io.Pixels:
        """One photo as the image tower takes it, of the shape and dtype of `preprocessing`.

        `decoding.decode_each` and `decode_all` call this in the program's pool of threads.

        Args:
          photo: a path, encoded bytes or a PIL image; decoded pixels are returned unchanged.
          name: what error messages call a photo that has no path.
          generator: draws the random crop and mirroring of config.image; None for neither.

        Raises:
          ValueError, FileNotFoundError: as `decoding.decode`.
        """
        read = functools.partial(image_io.decode, preprocessing=self.preprocessing)
        if generator is not None:
            read = functools.partial(
                image_io.decode_augmented,
                preprocessing=self.preprocessing,
                generator=generator,
                min_area=self.config.image.min_area,
                mirror=self.config.image.mirror,
            )
        return decoding.decode(photo, name, read)

    def weights(self, parameters: Parameters, part: str) -> dict[str, np.ndarray]:
        """The unsharded weights of a part such as "text_tower" or "image_head", by dotted path."""
        module = getattr(nnx.merge(self.graph, *parameters), part)
        return {name: partition.gather(x) for name, x in pretrained.flatten(module).items()}

    def describe_tower(self, parameters: Parameters, side: str) -> dict[str, object]:
        """Everything that a tower's outputs depend on, except the input.

        It is the key of cached features. Parameters and the default pooling therefore have the
        names of the first version, so that features cached by that version are still found.
        """
        weights = self.weights(parameters, f"{side}_tower")
        options, tower = self.config[side], self.specs[side].to_json()
        if side == "image" and "pooling" in tower:
            tower["pooling"] = options.pooling
        description: dict[str, object] = {
            "tower": tower,
            "weights": digest(parameter_names.weights_of(1, weights)),
            "dtype": jnp.dtype(dual_encoder.compute_dtype(options.dtype)).name,
        }
        if side == "text":
            description["max_length"] = options.max_length
            description["tokenizer"] = self.tokenizer.fingerprint()
        return description

    def _on_mesh(self, compiled: Callable, parameters: Parameters) -> Compute:
        """A function that passes a process's share of a batch to a compiled function."""

        def compute(batch: dict[str, np.ndarray]) -> np.ndarray:
            with jax.set_mesh(self.mesh):
                return np.asarray(compiled(parameters, partition.global_batch(batch, self.mesh)))

        return compute

    def _embed_batch(
        self, side: str, parameters: Parameters, batch: dict[str, Array]
    ) -> Float[Array, "batch dim"]:
        model = nnx.merge(self.graph, *parameters)
        encode = model.encode_text if side == "text" else model.encode_image
        embeddings = encode(batch)
        # Normalize even if training uses raw embeddings: retrieval is by cosine.
        return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)

    def _tower_batch(
        self, side: str, parameters: Parameters, batch: dict[str, Array]
    ) -> Float[Array, "batch features"]:
        model = nnx.merge(self.graph, *parameters)
        if side == "text":
            return model.text_tower(batch["text_ids"], batch["text_mask"])
        return model.image_tower(batch["image"])


def collect(
    compute: Compute, side: str, batches: Batches, shape: tuple[int, int]
) -> Float[np.ndarray, "inputs dim"]:
    """The outputs of `compute` for all batches, in the order of the inputs.

    Raises:
      ValueError: an output is not finite.
    """
    out = np.empty(shape, np.float32)
    for rows, batch in batches:
        out[rows] = compute(batch)[: len(rows)]  # further rows only fill the batch
        bad = rows[~np.isfinite(out[rows]).all(axis=1)]
        if len(bad):
            raise ValueError(
                f"the embedding of {side} {bad[0]} (counted from 0) is not finite: the "
                "weights are damaged, or the computation overflowed"
            )
    return out


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of weights by name, in hexadecimal."""
    summed = hashlib.sha256()
    for name, array in sorted(weights.items()):
        summed.update(name.encode())
        summed.update(np.ascontiguousarray(array))
    return summed.hexdigest()


def padded_share(rows: Int[np.ndarray, " rows"], mesh: Mesh) -> Int[np.ndarray, " share"]:
    """The rows of a batch that this process reads.

    The batch is padded to a power of two per device by repeating its last row, so that few shapes
    are compiled.
    """
    of_device = -(-len(rows) // mesh.size)
    size = mesh.size << (of_device - 1).bit_length()
    padded = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])
    return padded[partition.local_rows(size, mesh)]


def _row_batches(count: int, size: int, mesh: Mesh) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive rows in batches of at most `size`, each with this process's share of it."""
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        yield rows, padded_share(rows, mesh)


def frozen_features(
    embedder: Embedder,
    parameters: Parameters,
    descriptions: Mapping[str, dict[str, object]],
    inputs: Inputs,
    folder: pathlib.Path,
) -> dict[str, Float[np.ndarray, "rows features"]]:
    """The outputs of frozen towers by side, read from the cache or computed and cached.

    Args:
      embedder: computes outputs that are not cached.
      parameters: the parameters of the towers.
      descriptions: `Embedder.describe_tower` of each requested side.
      inputs: the texts and images.
      folder: the folder of the cache.
    """
    sources = {
        "text": (inputs.texts, fingerprint({"texts": inputs.texts})),
        "image": (inputs.images, inputs.images_fingerprint),
    }

    def compute(side: str, start: int, stop: int) -> np.ndarray:
        part = [sources[side][0][row] for row in range(start, stop)]
        return embedder.features(parameters, side, part)

    return {
        side: feature_cache.cached(
            folder,
            {**description, "source": sources[side][1]},
            (len(sources[side][0]), embedder.feature_dims[side]),
            functools.partial(compute, side),
            label=f"{inputs.name} {side}s",
            block=FEATURE_BATCH * embedder.mesh.size,
            agree=partition.agree_minimum if jax.process_count() > 1 else None,
        )
        for side, description in descriptions.items()
    }


def top_k(scores: Float[np.ndarray, "... items"], k: int | None) -> Int[np.ndarray, "... k"]:
    """The indices of the k highest scores, best first; ties are in index order.

    Args:
      scores: one score per item along the last axis.
      k: the maximum number of indices; None for all.
    """
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]

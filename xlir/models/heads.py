"""Heads: what maps a tower's output into the shared embedding space."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class MLP(nnx.Module):
    """`LayerNorm -> [Dense -> GELU -> Dropout] for each hidden width -> Dense`.

    One hidden layer is the usual projection head; `hidden=(2048, 1024)` is the text head of
    Aggarwal et al. 2021.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        hidden: Sequence[int],
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first, *others = (*hidden, dim)
        self.input = NormLinear(features, first, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            nnx.Linear(wide, narrow, dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs)
            for wide, narrow in itertools.pairwise((first, *others))
        )
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings; with `rngs` in training mode (dropout on)."""
        x = self.input(x)
        for layer in self.layers:
            x = jax.nn.gelu(x)
            if rngs is not None:
                x = dropout(x, self.dropout, rngs.dropout())
            x = layer(x)
        return x


class NormLinear(nnx.Module):
    """Layer norm, then a dense layer, as one matrix product.

    The norm's scale and offset are multiplied into the matrix. That is the same function, but
    where the input is fixed (a frozen tower's features) its backward pass needs no product with
    the transposed matrix, which would only serve the two vectors: a fifth of a head's training.
    """

    def __init__(self, features: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.offset = nnx.Param(jnp.zeros(features))
        self.linear = nnx.Linear(features, dim, rngs=rngs)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch dim"]:
        """Applies both; sums and results are float32."""
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
        kernel = self.linear.kernel[...]
        bias = self.offset[...] @ kernel + self.linear.bias[...]
        kernel = (self.scale[...][:, None] * kernel).astype(self.dtype)
        return jnp.dot(x.astype(self.dtype), kernel, preferred_element_type=jnp.float32) + bias


def dropout(x: Float[Array, "batch dim"], rate: float, key: Key[Array, ""]):
    """Zeroes a share `rate` of the elements, in steps of 1/256, and scales up the others.

    A byte for each element costs a quarter of the random bits that a float would take.
    """
    kept = 256 - round(256 * rate)
    if kept == 256:
        return x
    mask = jax.random.bits(key, x.shape, jnp.uint8) < kept
    return jnp.where(mask, x * (256 / kept), 0)


class Linear(nnx.Module):
    """One dense layer without a bias, as in CLIP."""

    def __init__(self, features: int, dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.output = nnx.Linear(
            features,
            dim,
            use_bias=False,
            dtype=dtype,
            preferred_element_type=jnp.float32,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings."""
        return self.output(x)


class Identity(nnx.Module):
    """No head: the tower's output is the embedding."""

    def __init__(self, features: int, dim: int):
        if features != dim:
            raise ValueError(
                f"a tower without a head gives {features} features, but config.embedding_dim is "
                f"{dim}: set config.embedding_dim={features} or a head"
            )

    def __call__(
        self, x: Float[Array, "batch dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Returns its input."""
        return x


class Center(Identity):
    """A fixed space to map the other side into: the tower's output less its mean over the data.

    Outputs of a network that ends in a ReLU share a large mean, which hides their differences from
    the cosine. The mean is set once, before training, and no gradient moves it.
    """

    def __init__(self, features: int, dim: int):
        super().__init__(features, dim)
        self.mean = nnx.Param(jnp.zeros(features))

    def __call__(
        self, x: Float[Array, "batch dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Subtracts the mean."""
        return x - jax.lax.stop_gradient(self.mean[...])

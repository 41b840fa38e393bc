"""Heads, which map a tower's output into the shared embedding space."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from xlir.models.layers import Linear, dropout, matmul


class MLP(nnx.Module):
    """`LayerNorm -> [Dense -> GELU -> Dropout] for each hidden width -> Dense`.

    One hidden layer is the usual projection head; `hidden=(2048, 1024)` is the text head of
    Aggarwal et al. 2021. GELU and the norm's epsilon match PyTorch's defaults, so that exports need
    only standard layers. With `plain=True` there are neither norm nor biases, as in open_clip's
    text projection.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        hidden: Sequence[int],
        dropout: float = 0.0,
        plain: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first, *others = (*hidden, dim)
        self.input = (Linear if plain else NormLinear)(features, first, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            Linear(wide, narrow, use_bias=not plain, dtype=dtype, rngs=rngs)
            for wide, narrow in itertools.pairwise((first, *others))
        )
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings; dropout is on if `rngs` is given."""
        x = self.input(x)
        for layer in self.layers:
            x = gelu(x)
            if rngs is not None:
                x = dropout(x, self.dropout, rngs.dropout())
            x = layer(x)
        return x


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact GELU (Hendrycks and Gimpel 2016), as in PyTorch.

    `jax.nn.gelu` uses erfc, which takes 1.5 times as long on CPUs.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class NormLinear(nnx.Module):
    """Layer norm, then a dense layer, as one matrix product.

    The norm's scale and offset are folded into the matrix. This computes the same function, but if
    the input needs no gradient (features of a frozen tower), the backward pass saves a product
    with the transposed matrix: a fifth of a head's training time.
    """

    def __init__(self, features: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.offset = nnx.Param(jnp.zeros(features))
        self.linear = Linear(features, dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch dim"]:
        """Applies norm and layer; sums and results are float32."""
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5)
        kernel = self.linear.kernel[...]
        bias = self.offset[...] @ kernel + self.linear.bias[...]
        return matmul(x, self.scale[...][:, None] * kernel, self.linear.dtype) + bias


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
    """Subtracts the mean over the training data from the tower's output; has no trained weights.

    The outputs of a network that ends in a ReLU share a large mean, which makes all their cosine
    similarities high. The mean is computed once before training, and gets no gradient.
    """

    def __init__(self, features: int, dim: int):
        super().__init__(features, dim)
        self.mean = nnx.Param(jnp.zeros(features))

    def __call__(
        self, x: Float[Array, "batch dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Subtracts the mean."""
        return x - jax.lax.stop_gradient(self.mean[...])

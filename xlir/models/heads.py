"""Heads: what maps a tower's output into the shared embedding space."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


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
        widths = (features, *hidden)
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.hidden = nnx.List(
            nnx.Linear(wide, narrow, dtype=dtype, rngs=rngs)
            for wide, narrow in itertools.pairwise(widths)
        )
        self.dropout = nnx.Dropout(dropout)
        self.output = nnx.Linear(widths[-1], dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings; with `rngs` in training mode (dropout on)."""
        x = self.norm(x)
        for layer in self.hidden:
            x = jax.nn.gelu(layer(x))
            x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        return self.output(x).astype(jnp.float32)


class Linear(nnx.Module):
    """One dense layer without a bias, as in CLIP."""

    def __init__(self, features: int, dim: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.output = nnx.Linear(features, dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings."""
        return self.output(x).astype(jnp.float32)


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

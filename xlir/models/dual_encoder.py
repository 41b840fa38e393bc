"""The dual encoder: two towers, two heads, a temperature and a bias."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from xlir.models import heads
from xlir.models.layers import Linear
from xlir.partition import split_rows

# Learned temperatures stay above 1 / MAX_SCALE (CLIP, Radford et al. 2021, section 2.5).
MAX_SCALE = 100.0

Batch = Mapping[str, Array | np.ndarray]


class DualEncoder(nnx.Module):
    """Maps texts and images into one embedding space.

    If the batch holds precomputed tower outputs (`text_features`, `image_features`), only the head
    is applied to them. Otherwise the raw input goes through tower and head: `image`, and
    `text_ids` with `text_mask`, or with `text_positions` and `text_starts` if texts share rows.

    Args:
      config: see configs/base.py.
      text_tower: (text_ids, text_mask) -> features; `dim` is their width.
      image_tower: images -> features; `dim` is their width.
      rngs: keys for the heads' initial parameters.

    Raises:
      ValueError: a dtype is unknown, or a tower's width does not match config.embedding_dim.
    """

    def __init__(
        self, config: ConfigDict, text_tower: nnx.Module, image_tower: nnx.Module, *, rngs: nnx.Rngs
    ):
        self.normalize = config.normalize
        self.text_frozen, self.image_frozen = config.text.frozen, config.image.frozen
        self.text_tower = text_tower
        self.image_tower = image_tower
        self.text_head = _head("text", config, text_tower.dim, rngs)
        self.image_head = _head("image", config, image_tower.dim, rngs)
        self.max_scale = max_scale(config.loss)
        log_scale = -jnp.log(jnp.float32(config.loss.temperature))
        self.log_scale = nnx.Param(jnp.minimum(log_scale, np.float32(math.log(self.max_scale))))
        self.bias = nnx.Param(jnp.float32(config.loss.bias))

    def encode_text(
        self, batch: Batch, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Text embeddings; dropout is on if `rngs` is given, except in a frozen tower."""
        if "text_features" in batch:
            features = batch["text_features"]
        elif "text_starts" in batch:
            packed = (batch[f"text_{name}"] for name in ("ids", "positions", "starts"))
            features = self.text_tower.encode_packed(*packed, rngs=rngs)
        else:
            own = None if self.text_frozen else rngs
            features = self.text_tower(batch["text_ids"], batch["text_mask"], rngs=own)
        return self._finish(self.text_head(features, rngs=rngs))

    def encode_image(
        self, batch: Batch, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Image embeddings; dropout is on if `rngs` is given, except in a frozen tower."""
        if "image_features" in batch:
            features = batch["image_features"]
        else:
            own = None if self.image_frozen else rngs
            features = self.image_tower(batch["image"], rngs=own)
        return self._finish(self.image_head(features, rngs=rngs))

    @property
    def scale(self) -> Float[Array, ""]:
        """The inverse temperature, at most `max_scale`.

        `clipped` keeps the parameter in range, but runs of older versions can hold a larger value.
        It is cut off here without changing the gradient, so that training can bring it back.
        """
        scale = jnp.exp(self.log_scale[...])
        return scale - jax.lax.stop_gradient(jax.nn.relu(scale - self.max_scale))

    def _finish(self, embeddings: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
        embeddings = split_rows(embeddings.astype(jnp.float32))
        if not self.normalize:
            return embeddings
        return embeddings * jax.lax.rsqrt(
            jnp.sum(jnp.square(embeddings), axis=-1, keepdims=True) + 1e-12
        )


def max_scale(loss: ConfigDict) -> float:
    """The upper bound of the inverse temperature.

    SigLIP was trained without a bound, and its published models are beyond `MAX_SCALE`. A model
    that starts there stays there, if its loss is the sigmoid loss, or does not learn the scale.

    Args:
      loss: `config.loss`.
    """
    unbounded = loss.name in ("sigmoid", "distill")
    return max(MAX_SCALE, 1 / loss.temperature) if unbounded else MAX_SCALE


def clipped(params: dict, loss: ConfigDict) -> dict:
    """Clips the temperature of a `DualEncoder`'s parameters after an optimizer step.

    open_clip does the same. `jnp.minimum` in the model would have no gradient beyond the bound.

    Args:
      params: a tree of the parameters' values.
      loss: `config.loss`.
    """
    bound = np.float32(math.log(max_scale(loss)))
    return params | {"log_scale": jnp.minimum(params["log_scale"], bound)}


def trainable(config: ConfigDict) -> nnx.filterlib.Filter:
    """An NNX filter for the trained parameters: all except those of frozen towers."""
    frozen = [
        nnx.PathContains(f"{side}_tower") for side in ("text", "image") if config[side].frozen
    ]
    return nnx.All(nnx.Param, nnx.Not(nnx.Any(*frozen)))


def compute_dtype(name: str) -> DTypeLike:
    """The compute dtype for a config's `dtype` or `head_dtype`."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; known: auto, float32, bfloat16")
    return jnp.dtype(name)


def _head(side: str, config: ConfigDict, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """Creates the head of one side; `xlir.config` has validated the options."""
    options, dim = config[side], config.embedding_dim
    dtype = compute_dtype(config.head_dtype)
    if options.head == "none":
        return heads.Identity(features, dim)
    if options.head == "center":
        return heads.Center(features, dim)
    if options.head in ("linear", "affine"):
        return Linear(features, dim, use_bias=options.head == "affine", dtype=dtype, rngs=rngs)
    return heads.MLP(
        features,
        dim,
        hidden=options.hidden,
        dropout=options.dropout,
        plain=options.head == "plain_mlp",
        dtype=dtype,
        rngs=rngs,
    )

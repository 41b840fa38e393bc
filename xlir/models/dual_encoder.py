"""The dual encoder: two towers, two heads, a temperature."""

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
MAX_LOG_SCALE = np.float32(math.log(MAX_SCALE))

Batch = Mapping[str, Array | np.ndarray]


class DualEncoder(nnx.Module):
    """Maps texts and images into one space.

    Each side takes raw input (`text_ids` and `text_mask`, or `image`) through its tower, or the
    tower's outputs (`text_features`, `image_features`), whichever the batch holds.

    Args:
      config: see configs/base.py.
      text_tower: (text_ids, text_mask) -> features; `dim` is their width.
      image_tower: images -> features; `dim` is their width.
      rngs: keys for the heads' initial parameters.

    Raises:
      ValueError: a dtype is unknown, or the widths do not fit.
    """

    def __init__(
        self, config: ConfigDict, text_tower: nnx.Module, image_tower: nnx.Module, *, rngs: nnx.Rngs
    ):
        self.normalize = config.normalize
        self.text_tower = text_tower
        self.image_tower = image_tower
        self.text_head = _head("text", config, text_tower.dim, rngs)
        self.image_head = _head("image", config, image_tower.dim, rngs)
        log_scale = -jnp.log(jnp.float32(config.loss.temperature))
        self.log_scale = nnx.Param(jnp.minimum(log_scale, MAX_LOG_SCALE))
        self.bias = nnx.Param(jnp.float32(config.loss.bias))

    def encode_text(
        self, batch: Batch, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Text embeddings; dropout is on where `rngs` is given."""
        if "text_features" in batch:
            features = batch["text_features"]
        else:
            features = self.text_tower(batch["text_ids"], batch["text_mask"], rngs=rngs)
        return self._finish(self.text_head(features, rngs=rngs))

    def encode_image(
        self, batch: Batch, *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Image embeddings; dropout is on where `rngs` is given."""
        if "image_features" in batch:
            features = batch["image_features"]
        else:
            features = self.image_tower(batch["image"], rngs=rngs)
        return self._finish(self.image_head(features, rngs=rngs))

    @property
    def scale(self) -> Float[Array, ""]:
        """The inverse temperature, at most `MAX_SCALE`.

        `clipped` keeps the parameter in range. Of runs from before it did, the parameter may be
        beyond: such a value is cut off here, and the gradient goes on as if it were not, or the
        temperature could never come back.
        """
        scale = jnp.exp(self.log_scale[...])
        return scale - jax.lax.stop_gradient(jax.nn.relu(scale - MAX_SCALE))

    def _finish(self, embeddings: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
        embeddings = split_rows(embeddings.astype(jnp.float32))
        if not self.normalize:
            return embeddings
        return embeddings * jax.lax.rsqrt(
            jnp.sum(jnp.square(embeddings), axis=-1, keepdims=True) + 1e-12
        )


def clipped(params: dict) -> dict:
    """Trained parameters after an optimizer's step, with the temperature put back into its range.

    As open_clip does it. A minimum inside of the model would have no gradient at the bound.

    Args:
      params: a pure tree of a `DualEncoder`'s parameters.
    """
    return params | {"log_scale": jnp.minimum(params["log_scale"], MAX_LOG_SCALE)}


def trainable(config: ConfigDict) -> nnx.filterlib.Filter:
    """An NNX filter for what is trained: parameters, less those of frozen towers."""
    frozen = [
        nnx.PathContains(f"{side}_tower") for side in ("text", "image") if config[side].frozen
    ]
    return nnx.All(nnx.Param, nnx.Not(nnx.Any(*frozen)))


def compute_dtype(name: str) -> DTypeLike:
    """The dtype that a tower (`dtype`) or the heads (`head_dtype`) of a config compute in."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {name!r}; known: auto, float32, bfloat16")
    return jnp.dtype(name)


def _head(side: str, config: ConfigDict, features: int, rngs: nnx.Rngs) -> nnx.Module:
    """The head of one side, whose configuration `xlir.config` has checked."""
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

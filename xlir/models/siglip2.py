"""The image tower of SigLIP 2's NaFlex models: Tschannen et al. 2025, section 2.4.2.

https://arxiv.org/abs/2502.14786. Photos keep their proportions, as in NaViT (Dehghani et al. 2023,
https://arxiv.org/abs/2307.06304): each becomes a grid of patches of its own, at most as many as a
limit. SigLIP 2's models of one resolution have the architecture of `siglip.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32, UInt8

from xlir.config import Whole, read_field
from xlir.models import siglip
from xlir.models.family import TowerSpec, Weights
from xlir.models.vision_transformer import VisionTransformer

_BASE = siglip.SIGLIP.defaults | {
    "model_type": "siglip2_vision_model",
    "image_size": 256,
    "num_patches": 256,
}
_SO400M = _BASE | {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}


class NaFlexTransformer(VisionTransformer):
    """Grids of patches of any proportions to one pooled vector.

    The position table is resized to each grid, bilinearly and with antialiasing.
    """

    def __call__(
        self, images: UInt8[Array | np.ndarray, "batch rows bytes"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Pooled features of images as `input_pipeline.images.packed` writes them."""
        images = jnp.asarray(images)
        batch, length = images.shape[0], images.shape[1] - 1
        high, low = jnp.split(images[:, -1, :4].astype(jnp.int32).reshape(batch, 2, 2), 2, axis=-1)
        grid = (256 * high + low)[..., 0]
        mask = jnp.arange(length) < jnp.prod(grid, axis=-1, keepdims=True)
        x = self._projected(images[:, :-1].reshape(batch * length, -1))
        x = x.reshape(batch, length, self.dim)
        x = x + self._resized(grid, mask)
        x = self.norm(self.layers(x, mask, key=None if rngs is None else rngs.dropout()))
        if self.attention_pool is not None:
            return self.attention_pool(x, mask)
        weights = mask / jnp.sum(mask, axis=-1, keepdims=True)
        return jnp.sum(x * weights[..., None], axis=1)

    def _resized(
        self, grid: Int32[Array, "batch 2"], mask: Array
    ) -> Float[Array, "batch length dim"]:
        """The position table, resized to each image's rows and columns of patches."""
        side, columns = self.config.grid, grid[:, 1:]
        # The values at padding have no effect, but must not become infinite.
        index = jnp.where(mask, jnp.arange(mask.shape[1]), 0)
        down = bilinear_weights(index // columns, grid[:, :1], side)
        across = bilinear_weights(index % columns, columns, side)
        weights = down[..., :, None] * across[..., None, :]
        return weights.reshape(*mask.shape, side**2) @ self.position[...]


def bilinear_weights(
    index: Int32[Array, "batch places"], new: Int32[Array, "batch 1"], old: int
) -> Float[Array, "batch places old"]:
    """Rows of the matrices that resize `old` samples to other numbers of samples like PyTorch.

    The kernel is a triangle that widens in proportion when the samples become fewer
    (antialiasing). Samples beyond the edges are left out.

    Args:
      index: the new samples whose rows are returned, counted from 0.
      new: the number of new samples.
      old: the number of old samples.
    """
    scale = old / new[..., None]
    center = (index[..., None] + 0.5) * scale - 0.5
    distance = jnp.abs(jnp.arange(old) - center) / jnp.maximum(scale, 1)
    weights = jax.nn.relu(1 - distance)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


class NaFlexFamily(siglip.SigLIPFamily):
    """Image towers that take patches in a photo's own proportions."""

    def complete(self, config: Mapping) -> dict[str, Any]:
        """See `VisionFamily.complete`. The position table is for a square of `num_patches`."""
        config = super().complete(config)
        patches = read_field(config, "num_patches", Whole(1))
        side = math.isqrt(patches)
        if side**2 != patches:
            raise ValueError(f"num_patches is {patches}; it must be a square number")
        return config | {"image_size": side * config["patch_size"]}

    def photo_patch(self, config: Mapping) -> int:
        """See `Family.photo_patch`."""
        return self.complete(config)["patch_size"]

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`. The projection of patches is a matrix, not a convolution."""
        restored, name = super().restore(weights, config), f"{self.modules['patches']}.weight"
        kernel = restored[name].transpose(0, 2, 3, 1)
        return restored | {name: kernel.reshape(len(kernel), -1)}

    def used_weights(self, spec: TowerSpec, weights: Weights) -> dict[str, np.ndarray]:
        """See `Family.used_weights`. The position table is resized to each photo later."""
        return dict(weights)

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        arguments = super().torch_arguments(spec)
        image_size = {"image_size": self.complete(spec.config)["image_size"]}
        return arguments | {"config": arguments["config"] | image_size}


NAFLEX = NaFlexFamily(
    name="siglip2_vision_model",
    kind="naflex",
    other_names=("siglip2",),
    tower=NaFlexTransformer,
    poolings=siglip.SIGLIP.poolings,
    defaults=_BASE,
    read=siglip.SIGLIP.read,
    layer_names=siglip.SIGLIP.layer_names,
    embedding_names=siglip.SIGLIP.embedding_names,
    modules=siglip.SIGLIP.modules,
    prefixes=siglip.SIGLIP.prefixes,
    ignored=siglip.SIGLIP.ignored,
    architectures={
        "google/siglip2-base-patch16-naflex": _BASE,
        "google/siglip2-so400m-patch16-naflex": _SO400M,
    },
)

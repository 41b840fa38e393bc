"""The image tower around the stack of layers: maps pixels to one pooled vector.

Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from xlir.models.layers import LayerNorm, Linear
from xlir.models.transformer import FeedForward, Layers, TransformerConfig, attend


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """An image tower.

    Attributes:
      transformer: the stack of layers.
      image_size: image size, in pixels per side, that the tower was trained with. For other sizes
        and for rectangles the position table is interpolated.
      patch_size: size of a patch, in pixels per side.
      patch_bias: the projection of patches has a bias.
      class_token: a learned token is prepended to the patches.
      registers: number of learned tokens between the class token and the patches. They have no
        positions and are left out of the pooling (Darcet et al. 2024,
        https://arxiv.org/abs/2309.16588).
      input_norm: a norm before the layers.
      antialias: interpolate positions with antialiasing when the table shrinks.
      rope_theta: instead of a position table, rotary positions with this base (`patch_angles`);
        None for a table.
    """

    transformer: TransformerConfig
    image_size: int
    patch_size: int
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0
    input_norm: bool = False
    antialias: bool = False
    rope_theta: float | None = None

    @property
    def grid(self) -> int:
        """Number of patches per side in the position table."""
        return self.image_size // self.patch_size

    @property
    def first_patch(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token) + self.registers


class VisionTransformer(nnx.Module):
    """Images to one pooled vector.

    The class token and its position are one parameter, as only their sum is ever used.

    Args:
      config: widths, tokens and positions.
      mean: red, green and blue mean that pixels in [0, 1] are normalised with.
      std: red, green and blue standard deviation that they are normalised with.
      pooling: "cls" (the normalised class token), "pooler" (a dense layer and tanh over it),
        "attention" (SigLIP's attention pooling), or "mean" (over the normalised patches).
      dtype: the dtype of the layers (see `Layers`); results are float32.
      remat: see `transformer.Layers`.
      rngs: keys for the initial parameters.

    Attributes:
      dim: width of the output.
      image_size: the config's `image_size`.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        pooling: str,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        stack, normal = config.transformer, nnx.initializers.normal(0.02)
        self.config, self.pooling = config, pooling
        self.dim, self.image_size = stack.width, config.image_size
        self.mean, self.std = tuple(mean), tuple(std)
        dense = functools.partial(Linear, dtype=dtype, rngs=rngs)
        norm = functools.partial(LayerNorm, self.dim, epsilon=stack.epsilon)
        self.patches = dense(3 * config.patch_size**2, self.dim, use_bias=config.patch_bias)
        table, token = config.rope_theta is None, config.class_token
        positions = (config.grid**2, self.dim)
        self.position = nnx.Param(normal(rngs.params(), positions)) if table else None
        self.class_token = nnx.Param(normal(rngs.params(), (self.dim,))) if token else None
        registers = (config.registers, self.dim)
        self.registers = nnx.Param(normal(rngs.params(), registers)) if config.registers else None
        self.input_norm = norm() if config.input_norm else None
        self.layers = Layers(stack, dtype=dtype, remat=remat, rngs=rngs)
        self.norm = norm()
        self.pooler = dense(self.dim, self.dim, use_bias=True) if pooling == "pooler" else None
        attention = pooling == "attention"
        self.attention_pool = AttentionPool(stack, dtype=dtype, rngs=rngs) if attention else None

    def __call__(
        self,
        images: Num[Array | np.ndarray, "batch height width 3"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Pooled features of RGB images with values 0 to 255, which this method normalises.

        Pixels on the right and at the bottom that do not fill a whole patch are cut off.
        """
        images, patch = jnp.asarray(images), self.config.patch_size
        batch, height, width, _ = images.shape
        rows, columns = height // patch, width // patch
        images = images[:, : rows * patch, : columns * patch]
        # Pixels are put in order while each takes one byte, and the three channels stay together:
        # TPUs pad the last axis, unless it is long.
        split = images.reshape(batch, rows, patch, columns, 3 * patch).swapaxes(2, 3)
        x = self._projected(split.reshape(batch * rows * columns, -1))
        x = x.reshape(batch, rows * columns, self.dim)
        x = x if self.position is None else x + self._positions(rows, columns)
        tokens = [] if self.class_token is None else [self.class_token[...][None]]
        tokens += [] if self.registers is None else [self.registers[...]]
        tokens = [jnp.broadcast_to(token, (batch, *token.shape)) for token in tokens]
        x = jnp.concatenate([*tokens, x], axis=1)
        x = x if self.input_norm is None else self.input_norm(x)
        key = None if rngs is None else rngs.dropout()
        return self._pool(self.layers(x, rotary=self._angles(rows, columns), key=key))

    def _projected(self, patches: Num[Array, "patches pixels"]) -> Float[Array, "patches dim"]:
        """Normalises and projects flattened patches."""
        mean, std = (np.tile(np.float32(x), patches.shape[1] // 3) for x in (self.mean, self.std))
        return self.patches((patches.astype(jnp.float32) / 255 - mean) / std)

    def _pool(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch dim"]:
        if self.attention_pool is not None:
            return self.attention_pool(self.norm(x))
        if self.pooling == "mean":
            return jnp.mean(self.norm(x)[:, self.config.first_patch :], axis=1)
        x = self.norm(x[:, 0])
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def _positions(self, rows: int, columns: int) -> Float[Array, "patches dim"]:
        """The position table, interpolated to a grid of patches."""
        table, side = self.position[...], self.config.grid
        if (rows, columns) == (side, side):
            return table
        grid = table.reshape(side, side, self.dim)
        weights = functools.partial(bicubic_weights, side, antialias=self.config.antialias)
        resized = jnp.einsum("ri,cj,ijd->rcd", weights(rows), weights(columns), grid)
        return resized.reshape(-1, self.dim)

    def _angles(self, rows: int, columns: int) -> Float[np.ndarray, "1 length angles"] | None:
        """The rotary angles of all tokens; those before the patches are not rotated."""
        config = self.config
        if config.rope_theta is None:
            return None
        half = config.transformer.head_width // 2
        angles = patch_angles(rows, columns, half, config.rope_theta)
        return np.concatenate([np.zeros((config.first_patch, half), np.float32), angles])[None]


class AttentionPool(nnx.Module):
    """SigLIP's pooling: one learned query attends to all tokens, then a feed-forward block."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        normal, width = nnx.initializers.normal(0.02), config.width
        dense = functools.partial(Linear, use_bias=True, dtype=dtype, rngs=rngs)
        self.probe = nnx.Param(normal(rngs.params(), (width,)))
        self.query = dense(width, width)
        self.key_value = dense(width, 2 * width)
        self.output = dense(width, width)
        self.norm = LayerNorm(width, epsilon=config.epsilon)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.heads, self.dtype = config.num_heads, dtype

    def __call__(
        self, x: Float[Array, "batch length dim"], mask: Bool[Array, "batch length"] | None = None
    ) -> Float[Array, "batch dim"]:
        """Pools each row's tokens, except those whose mask is False."""
        seen = None if mask is None else mask[:, None]
        batch, length, dim = x.shape
        query = self.query(self.probe[...][None]).reshape(1, 1, self.heads, -1)
        key_value = self.key_value(x.reshape(-1, dim)).reshape(batch, length, 2, self.heads, -1)
        query = jnp.broadcast_to(query, (batch, *query.shape[1:]))
        pooled = attend(query, key_value[:, :, 0], key_value[:, :, 1], seen, self.dtype)
        pooled = self.output(pooled.reshape(batch, dim))
        return pooled + self.mlp(self.norm(pooled))


def patch_angles(
    rows: int, columns: int, angles: int, theta: float
) -> Float[np.ndarray, "patches angles"]:
    """The rotary angles of a grid of patches, in radians (DINOv3).

    The coordinates of the patches' centres go from -1 to 1 along each side of an image, of whatever
    size. The first half of the angles is 2 pi times the vertical coordinate, divided by periods
    from 1 to nearly `theta` in geometric progression; the second half uses the horizontal one.

    Args:
      rows, columns: the number of patches along the sides.
      angles: the number of angles of a patch: half the width of a head.
      theta: the base of the periods.
    """
    periods = theta ** (np.arange(angles // 2) * 2 / angles)
    centers = ((np.arange(side)[:, None] + 0.5) * 2 / side - 1 for side in (rows, columns))
    down, across = (2 * np.pi * center / periods for center in centers)
    down, across = np.repeat(down, columns, axis=0), np.tile(across, (rows, 1))
    return np.concatenate([down, across], axis=1).astype(np.float32)


def resized_positions(
    position: Float[np.ndarray, "patches dim"], config: VisionConfig, image_size: int
) -> Float[np.ndarray, "patches2 dim"]:
    """Interpolates a position table to square images of another size."""
    old, new = config.grid, image_size // config.patch_size
    if old == new:
        return position
    weights = bicubic_weights(old, new, antialias=config.antialias)
    grid = position.reshape(old, old, -1)
    return np.einsum("ri,cj,ijd->rcd", weights, weights, grid).reshape(-1, position.shape[1])


def bicubic_weights(old: int, new: int, *, antialias: bool = False) -> Float[np.ndarray, "new old"]:
    """The matrix that resizes a row of `old` samples to `new` samples like PyTorch.

    Both of PyTorch's variants are Keys' cubic convolution, which has a parameter `a`, with aligned
    sample centres. Without antialiasing, `a` is -0.75 and edge samples are repeated. With
    antialiasing, `a` is -0.5, and the kernel widens in proportion when the row shrinks. Samples
    beyond the edges are then left out, and the remaining weights are scaled to sum to 1, as in
    `jax.image.resize`.
    """
    a = -0.5 if antialias else -0.75
    shrinking = max(old / new, 1.0) if antialias else 1.0
    center = (np.arange(new) + 0.5) * old / new - 0.5
    # Include the samples beyond the edges that the kernel can reach.
    margin = int(np.ceil(2 * shrinking)) + 1
    samples = np.arange(-margin, old + margin)
    distance = np.abs(center[:, None] - samples) / shrinking
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    kernel = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    inside = (samples >= 0) & (samples < old)
    if antialias:
        kernel = kernel * inside
        return (kernel / kernel.sum(1, keepdims=True))[:, inside].astype(np.float32)
    weights = np.zeros((new, old))
    for sample, column in zip(samples, kernel.T, strict=True):
        weights[:, np.clip(sample, 0, old - 1)] += column
    return weights.astype(np.float32)

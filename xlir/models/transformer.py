"""The stack of transformer layers that text and image towers share.

Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762). `text_transformer.py` and
`vision_transformer.py` build towers around the stack, and the file of each family of published
models fills a `TransformerConfig`.

Outside of the attention, activations have the shape [batch * length, width]. On CPUs this is a
third faster than [batch, length, width]; on other devices it makes no difference. The parameters
of all layers are stacked along a first axis, and a scan applies them, so that XLA compiles a single
layer.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from xlir.config import MOST_DROPPED, WIDEST, Real, Whole
from xlir.models.layers import LayerNorm, Linear, dropout
from xlir.partition import split_rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# Valid ranges of numbers in a config.json.
WIDTH, RATE, EPSILON = Whole(1, WIDEST), Real(0, MOST_DROPPED), Real(0, 1)
# The projections in a stack's `attention.qkv`.
PARTS = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A stack of layers with the same shape.

    Attributes:
      depth: number of layers.
      width: width of the residual stream.
      num_heads: number of attention heads; it divides `width`.
      mlp_dim: width inside the feed-forward block.
      activation: a key of `ACTIVATIONS`.
      epsilon: epsilon of the layer norms.
      pre_norm: normalise the input of each block (ViT) instead of the sum after it (BERT).
      dropout: rate on the output of each block.
      attention_dropout: rate on the attention weights.
      qkv_bias: queries, keys and values have a bias.
      part_biases: which of "query", "key" and "value" have a bias if `qkv_bias` is False (DINOv3).
      output_bias: the output of the attention has a bias.
      mlp_bias: both layers of the feed-forward block have a bias.
      layer_scale: each block's output is scaled by a learned vector (CaiT, DINOv2).
      gated: the feed-forward block is SwiGLU (DINOv2 giant).
      causal: tokens attend only to themselves and the tokens before them (CLIP's texts).
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    activation: str
    epsilon: float
    pre_norm: bool
    dropout: float = 0.0
    attention_dropout: float = 0.0
    qkv_bias: bool = True
    part_biases: tuple[str, ...] = ()
    output_bias: bool = True
    mlp_bias: bool = True
    layer_scale: bool = False
    gated: bool = False
    causal: bool = False


class Layers(nnx.Module):
    """A stack of transformer layers.

    Args:
      config: the number of layers and their shape.
      dtype: dtype of the operands of matrix products; everything else is float32.
      remat: keep only each layer's input for the backward pass, and recompute the rest.
    """

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(axis_size=config.depth)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, rngs=rngs)

        self.stacked = stacked(rngs)
        self.depth = config.depth
        self.remat = remat

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"] | None = None,
        *,
        rotary: Float[Array | np.ndarray, "1 length angles"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Applies the layers.

        Args:
          x: one sequence of tokens per row.
          mask: False for tokens that no token attends to, such as padding.
          rotary: the angles of each token's `rotated` queries and keys; None for no rotation.
          key: random key for dropout; None turns dropout off.
        """
        batch, length, width = x.shape
        graph, params = nnx.split(self.stacked)
        angles = None if rotary is None else jnp.asarray(rotary[0])

        def apply(x: Array, inputs: tuple) -> tuple[Array, None]:
            params, key = inputs
            x = nnx.merge(graph, params)(split_rows(x), (batch, length), mask, angles, key)
            return split_rows(x), None

        # Without remat the results of matrix products are kept, and the operations between them
        # are recomputed: this takes less memory, and on CPUs a tenth less time.
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if self.remat else saved
        apply = jax.checkpoint(apply, prevent_cse=False, policy=policy)
        keys = None if key is None else jax.random.split(key, self.depth)
        x, _ = jax.lax.scan(apply, x.reshape(batch * length, width), (params, keys))
        return x.reshape(batch, length, width)


class Layer(nnx.Module):
    """Self-attention, then a feed-forward block, each with a residual connection and a norm."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(config.width, epsilon=config.epsilon)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.width, epsilon=config.epsilon)
        ones = functools.partial(jnp.ones, config.width)
        self.attention_scale = nnx.Param(ones()) if config.layer_scale else None
        self.mlp_scale = nnx.Param(ones()) if config.layer_scale else None

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        size: tuple[int, int],
        mask: Bool[Array, "batch length"] | None,
        angles: Float[Array, "length angles"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens width"]:
        """Applies the layer to a flattened batch; `size` is (batch, length)."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        attention = functools.partial(
            self.attention, size=size, mask=mask, angles=angles, key=keys[0]
        )
        x = self._block(x, attention, self.attention_norm, self.attention_scale, keys[1])
        return self._block(x, self.mlp, self.mlp_norm, self.mlp_scale, keys[2])

    def _block(
        self,
        x: Array,
        function: Callable[[Array], Array],
        norm: LayerNorm,
        scale: nnx.Param | None,
        key: Key[Array, ""] | None,
    ) -> Array:
        y = function(norm(x) if self.pre_norm else x)
        y = y if scale is None else y * scale[...]
        y = y if key is None else dropout(y, self.dropout, key)
        return x + y if self.pre_norm else norm(x + y)


class Attention(nnx.Module):
    """Multi-head self-attention; the softmax is float32."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(dense_layer, dtype=dtype, rngs=rngs)
        self.qkv = dense(config.width, 3 * config.width, use_bias=config.qkv_bias)
        self.output = dense(config.width, config.width, use_bias=config.output_bias)
        for part in config.part_biases:
            setattr(self, f"{part}_bias", nnx.Param(jnp.zeros(config.width)))
        self.heads, self.dropout, self.dtype = config.num_heads, config.attention_dropout, dtype
        self.causal, self.part_biases = config.causal, config.part_biases

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        size: tuple[int, int],
        mask: Bool[Array, "batch length"] | None,
        angles: Float[Array, "length angles"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens width"]:
        """Attends within each sequence of a flattened batch; `size` is (batch, length)."""
        parts = dict(zip(PARTS, jnp.split(self.qkv(x), 3, axis=-1), strict=True))
        for part in self.part_biases:
            parts[part] = parts[part] + getattr(self, f"{part}_bias")[...]
        query, key_, value = (part.reshape(*size, self.heads, -1) for part in parts.values())
        if angles is not None:
            query, key_ = rotated(query, angles), rotated(key_, angles)
        seen = None if mask is None else mask[:, None]
        if self.causal:
            before = jnp.tri(size[1], dtype=bool)[None]
            seen = before if seen is None else seen & before
        attended = attend(query, key_, value, seen, self.dtype, self.dropout, key)
        return self.output(attended.reshape(x.shape))


def rotated(
    x: Float[Array, "batch length heads dim"], angles: Float[Array, "length angles"]
) -> Float[Array, "batch length heads dim"]:
    """Rotary positions: Su et al. 2021 (https://arxiv.org/abs/2104.09864).

    Dimensions i and i + dim / 2 form a pair, which is rotated by the token's angle i, in radians.
    """
    cosines, sines = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate(turned, axis=-1)


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch length heads dim"],
    value: Float[Array, "batch length heads dim"],
    mask: Bool[Array, "#batch #queries length"] | None,
    dtype: DTypeLike,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
      query: the projected queries.
      key: the projected keys.
      value: the projected values.
      mask: False for keys that a query does not attend to. A query without any True averages over
        all keys.
      dtype: dtype of the operands of both matrix products; sums and the softmax are float32.
      rate: dropout rate of the attention weights; it has no effect without `dropout_key`.
      dropout_key: random key for dropout; None turns dropout off.
    """
    query = query * query.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = einsum("bqhd,bkhd->bhqk", query.astype(dtype), key.astype(dtype))
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    if dropout_key is not None and rate:
        flat = weights.reshape(-1, weights.shape[-1])
        weights = dropout(flat, rate, dropout_key).reshape(weights.shape)
    return einsum("bhqk,bkhd->bqhd", weights.astype(dtype), value.astype(dtype))


class FeedForward(nnx.Module):
    """`Dense -> activation -> Dense`. If gated, `fc1` computes the gate and the value at once."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(dense_layer, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.fc1 = dense(config.width, (2 if config.gated else 1) * config.mlp_dim)
        self.fc2 = dense(config.mlp_dim, config.width)
        self.activation, self.gated = config.activation, config.gated

    def __call__(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """Applies the block."""
        x, activation = self.fc1(x), ACTIVATIONS[self.activation]
        if not self.gated:
            return self.fc2(activation(x))
        gate, x = jnp.split(x, 2, axis=-1)
        return self.fc2(activation(gate) * x)


def dense_layer(
    features: int, dim: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> Linear:
    """A dense layer with BERT's initial values."""
    return Linear(
        features,
        dim,
        use_bias=use_bias,
        dtype=dtype,
        initializer=nnx.initializers.truncated_normal(0.02),
        rngs=rngs,
    )

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
from xlir.models import short_attention
from xlir.models.layers import LayerNorm, Linear, RMSNorm, dropout, kept_dtype, recomputed
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
      epsilon: epsilon of the norms.
      pre_norm: normalise the input of each block (ViT) instead of the sum after it (BERT).
      dropout: rate on the output of each block.
      attention_dropout: rate on the attention weights.
      qkv_bias: queries, keys and values have a bias.
      part_biases: which of "query", "key" and "value" have a bias if `qkv_bias` is False (DINOv3).
      output_bias: the output of the attention has a bias.
      mlp_bias: both layers of the feed-forward block have a bias.
      layer_scale: each block's output is scaled by a learned vector (CaiT, DINOv2).
      gated: the feed-forward block multiplies the activation of one projection with another
        projection (GLU variants: Shazeer 2020, https://arxiv.org/abs/2002.05202).
      causal: tokens attend only to themselves and the tokens before them (CLIP's texts).
      rms_norm: the norms are `RMSNorm` instead of `LayerNorm`.
      norm_bias: each `LayerNorm` has a bias.
      first_norm: the attention of the first layer has a norm; False for ModernBERT, where the
        layer's input is normalised already.
      output_norms: the output of each block is normalised too, before it is added (Gemma 3).
      num_kv_heads: number of heads of the keys and of the values. Each is shared by consecutive
        heads of the queries (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). None:
        `num_heads`.
      head_dim: width of a head. None: `width / num_heads`.
      qk_norms: the queries and the keys of each head are normalised.
      query_scale: factor on the queries, besides 1 / sqrt(`head_dim`).
      local: for each layer, whether its attention is local. Empty: no layer is local.
      window: in local layers, a token attends to tokens that are at most this far away.
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
    rms_norm: bool = False
    norm_bias: bool = True
    first_norm: bool = True
    output_norms: bool = False
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qk_norms: bool = False
    query_scale: float = 1.0
    local: tuple[bool, ...] = ()
    window: int = 0

    @property
    def head_width(self) -> int:
        """Width of a head."""
        return self.head_dim or self.width // self.num_heads

    def norm(self, features: int) -> LayerNorm | RMSNorm:
        """Creates a norm of this stack's kind."""
        if self.rms_norm:
            return RMSNorm(features, epsilon=self.epsilon)
        return LayerNorm(features, epsilon=self.epsilon, use_bias=self.norm_bias)


class Layers(nnx.Module):
    """A stack of transformer layers.

    Args:
      config: the number of layers and their shape.
      dtype: dtype of the operands of matrix products and, except on CPUs, of what is kept between
        them (`kept_dtype`); norms, softmax and sums are float32.
      remat: keep only each layer's input for the backward pass, and recompute the rest.
    """

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(axis_size=config.depth)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, rngs=rngs)

        self.stacked = stacked(rngs)
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"] | Bool[Array, "batch length length"] | None = None,
        *,
        rotary: Float[Array | np.ndarray, "kinds *rows length angles"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Applies the layers.

        Args:
          x: one sequence of tokens per row.
          mask: False for tokens that no token attends to, such as padding. With three axes, the
            second one is the token that attends: rows of several texts need that.
          rotary: the angles of each token's `rotated` queries and keys; None for no rotation. If
            some layers are local, there are two kinds: for the other layers, and for local ones.
            Without a batch axis, the angles are the same in all rows.
          key: random key for dropout; None turns dropout off.
        """
        batch, length, width = x.shape
        (graph, params), config = nnx.split(self.stacked), self.config
        rotary = None if rotary is None else jnp.asarray(rotary)
        masks = self._masks(mask, length)
        if short_attention.fits(config, self.dtype, length, rotary, key):
            x, seen = short_attention.padded(x, masks[0])
            masks = seen, seen
        padded = x.shape[1]

        def apply(x: Array, inputs: tuple) -> tuple[Array, None]:
            params, key, local, first = inputs
            seen = masks[0] if masks[1] is masks[0] else jnp.where(local, masks[1], masks[0])
            angles = rotary
            if rotary is not None:
                angles = rotary[0 if local is None else local.astype(int)]
            layer = nnx.merge(graph, params)
            return split_rows(layer(split_rows(x), (batch, padded), seen, angles, first, key)), None

        # Without remat the results of matrix products are kept, and the operations between them
        # are recomputed: this takes less memory, and on CPUs a tenth less time.
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if self.remat else saved
        apply = jax.checkpoint(apply, prevent_cse=False, policy=policy)
        keys = None if key is None else jax.random.split(key, config.depth)
        local = jnp.array(config.local) if config.local else None
        first = None if config.first_norm else jnp.arange(config.depth) == 0
        inputs = (params, keys, local, first)
        x = x.reshape(-1, width).astype(kept_dtype(self.dtype))
        x, _ = jax.lax.scan(apply, x, inputs)
        return x.reshape(batch, padded, width)[:, :length].astype(jnp.float32)

    def _masks(
        self,
        mask: Bool[Array, "batch length"] | Bool[Array, "batch length length"] | None,
        length: int,
    ) -> tuple[Bool[Array, "#batch #length length"] | None, ...]:
        """Which tokens each token attends to: in layers that are not local, and in local ones."""
        config, position = self.config, jnp.arange(length)
        distance = position[:, None] - position
        seen = mask[:, None] if mask is not None and mask.ndim == 2 else mask
        seen = _both(seen, (distance >= 0)[None]) if config.causal else seen
        if not config.local or length <= config.window + 1:
            return seen, seen
        return seen, _both(seen, (abs(distance) <= config.window)[None])


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other


class Layer(nnx.Module):
    """Self-attention, then a feed-forward block, each with a residual connection and a norm."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pre_norm, self.dropout = config.pre_norm, config.dropout
        norm = functools.partial(config.norm, config.width)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = norm()
        self.attention_output_norm = norm() if config.output_norms else None
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp_output_norm = norm() if config.output_norms else None
        ones = functools.partial(jnp.ones, config.width)
        self.attention_scale = nnx.Param(ones()) if config.layer_scale else None
        self.mlp_scale = nnx.Param(ones()) if config.layer_scale else None

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        size: tuple[int, int],
        mask: Bool[Array, "#batch #length length"] | None,
        angles: Float[Array, "*rows length angles"] | None,
        first: Bool[Array, ""] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens width"]:
        """Applies the layer to a flattened batch.

        Args:
          x: the tokens.
          size: (batch, length).
          mask: True for the tokens that a token attends to; None for all.
          angles: see `Layers`.
          first: True if the norm before the attention is left out; None counts as False.
          key: random key for dropout; None turns dropout off.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def norm(x: Array) -> Array:
            normed = self.attention_norm(x)
            return normed if first is None else jnp.where(first, x.astype(normed.dtype), normed)

        attention = functools.partial(
            self.attention, size=size, mask=mask, angles=angles, key=keys[0]
        )
        after = functools.partial(_after, self.attention_output_norm, self.attention_scale)
        x = self._block(x, lambda x: after(attention(x)), norm, keys[1])
        after = functools.partial(_after, self.mlp_output_norm, self.mlp_scale)
        return self._block(x, lambda x: after(self.mlp(x)), self.mlp_norm, keys[2])

    def _block(
        self,
        x: Array,
        function: Callable[[Array], Array],
        norm: Callable[[Array], Array],
        key: Key[Array, ""] | None,
    ) -> Array:
        y = function(norm(x).astype(x.dtype) if self.pre_norm else x)
        y = y if key is None else dropout(y, self.dropout, key)
        return (x + y if self.pre_norm else norm(x + y)).astype(x.dtype)


def _after(norm: Callable[[Array], Array] | None, scale: nnx.Param | None, x: Array) -> Array:
    """A block's output with its norm and its layer scale, if there are any."""
    x = x if norm is None else norm(x)
    return x if scale is None else x * scale[...]


class Attention(nnx.Module):
    """Multi-head self-attention; the softmax is float32."""

    def __init__(self, config: TransformerConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(dense_layer, dtype=dtype, rngs=rngs)
        dim, shared = config.head_width, config.num_kv_heads or config.num_heads
        self.widths = (config.num_heads * dim, shared * dim, shared * dim)
        self.qkv = dense(config.width, sum(self.widths), use_bias=config.qkv_bias)
        self.output = dense(self.widths[0], config.width, use_bias=config.output_bias)
        for part in config.part_biases:
            width = self.widths[PARTS.index(part)]
            setattr(self, f"{part}_bias", nnx.Param(jnp.zeros(width)))
        self.query_norm = config.norm(dim) if config.qk_norms else None
        self.key_norm = config.norm(dim) if config.qk_norms else None
        self.config, self.dtype = config, dtype

    def __call__(
        self,
        x: Float[Array, "tokens width"],
        size: tuple[int, int],
        mask: Bool[Array, "#batch #length length"] | None,
        angles: Float[Array, "*rows length angles"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens width"]:
        """Attends within each sequence of a flattened batch; the arguments are a `Layer`'s."""
        config, ends = self.config, np.cumsum(self.widths)[:2]
        qkv = self.qkv(x).astype(kept_dtype(self.dtype))
        if short_attention.fits(config, self.dtype, size[1], angles, key):
            qkv, rate = qkv.reshape(*size, -1), config.attention_dropout
            attended = short_attention.attend(qkv, mask, config.num_heads, rate, key)
            return self.output(attended.reshape(len(x), -1))
        parts = dict(zip(PARTS, jnp.split(qkv, ends, axis=-1), strict=True))
        for part in config.part_biases:
            parts[part] = parts[part] + getattr(self, f"{part}_bias")[...]
        split = (part.reshape(*size, -1, config.head_width) for part in parts.values())
        query, key_, value = split
        if config.qk_norms:
            query, key_ = self.query_norm(query), self.key_norm(key_)
        if angles is not None:
            query, key_ = rotated(query, angles), rotated(key_, angles)
        if config.query_scale != 1:
            query = query * config.query_scale
        if config.num_kv_heads:
            shared = config.num_heads // config.num_kv_heads
            key_, value = (jnp.repeat(each, shared, axis=2) for each in (key_, value))
        attended = attend(query, key_, value, mask, self.dtype, config.attention_dropout, key)
        return self.output(attended.reshape(len(x), -1))


def rotated(
    x: Float[Array, "batch length heads dim"], angles: Float[Array, "*rows length angles"]
) -> Float[Array, "batch length heads dim"]:
    """Rotary positions: Su et al. 2021 (https://arxiv.org/abs/2104.09864).

    Dimensions i and i + dim / 2 form a pair, which is rotated by the token's angle i, in radians.
    """
    cosines, sines = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
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
        self.activation, self.gated, self.dtype = config.activation, config.gated, dtype

    def __call__(self, x: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
        """Applies the block."""

        @recomputed
        def activate(gate: Array, x: Array | float = 1) -> Array:
            return ACTIVATIONS[self.activation](gate.astype(jnp.float32)) * x

        x = self.fc1(x).astype(kept_dtype(self.dtype))
        return self.fc2(activate(*jnp.split(x, 2 if self.gated else 1, axis=-1)))


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

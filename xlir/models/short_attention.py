"""Self-attention within short sequences, as one kernel for TPUs (Pallas).

XLA writes the logits of every head to the TPU's memory, and reads them several times. This kernel
holds whole sequences on the chip: it reads queries, keys and values, and writes the result. Its
backward pass computes the attention weights again (FlashAttention, Dao et al. 2022,
https://arxiv.org/abs/2205.14135, without the blocks that long sequences need).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from xlir.models.layers import dropout_mask, dropout_scale
from xlir.partition import batch_sharding, platform

# Width of a TPU's vectors; a kernel loads the heads that share one at once.
LANES = 128
# The number of tokens of a sequence is a multiple of this, the height of a tile in memory.
SUBLANES = 8
# The longest sequence; the logits of a head then take 4 MiB of the 16 that a kernel may use.
LONGEST = 1024
# A step of the kernel takes as many sequences as have at most this many tokens.
TOKENS = 256
# With dropout, the kernel also holds a byte for each attention weight of a sequence, at most these.
MOST_WEIGHTS = 2 * 1024**2


def fits(config: Any, dtype: DTypeLike, length: int, rotary: Any, key: Any) -> bool:
    """Whether this kernel computes the attention of a stack of layers.

    Args:
      config: the stack's `TransformerConfig`.
      dtype: the dtype of the stack.
      length: number of tokens of a sequence.
      rotary: the rotary angles, or None.
      key: the random key for dropout, or None.
    """
    changed = config.part_biases or config.qk_norms or config.num_kv_heads or config.local
    dropped = key is not None and config.attention_dropout
    weights = config.num_heads * (length + -length % SUBLANES) ** 2
    return bool(
        platform() == "tpu"
        and dtype == jnp.bfloat16
        and length <= LONGEST
        and config.head_width in (LANES // 2, LANES)
        and config.num_heads * config.head_width % LANES == 0
        and not (dropped and weights > MOST_WEIGHTS)
        and not (changed or rotary is not None or config.query_scale != 1)
    )


def padded(
    x: Float[Array, "batch length width"], mask: Bool[Array, "#batch #length length"] | None
) -> tuple[Float[Array, "batch length2 width"], Bool[Array, "#batch #length2 length2"]]:
    """Sequences of a length that the kernel takes, and which tokens each token attends to."""
    more = (0, -x.shape[1] % SUBLANES)
    mask = jnp.ones((1, 1, x.shape[1]), bool) if mask is None else mask
    queries = more if mask.shape[1] > 1 else (0, 0)
    return jnp.pad(x, ((0, 0), more, (0, 0))), jnp.pad(mask, ((0, 0), queries, more))


def attend(
    qkv: Float[Array, "batch length parts"],
    mask: Bool[Array, "#batch #queries length"],
    heads: int,
    rate: float = 0.0,
    key: Key[Array, ""] | None = None,
) -> Float[Array, "batch length width"]:
    """Scaled dot-product attention, as `transformer.attend`.

    On other devices than TPUs, Pallas interprets the kernel, which is slow and meant for tests.

    Args:
      qkv: queries, keys and values of all heads, side by side. The length is a multiple of
        `SUBLANES`, and the width of a head is 64 or 128.
      mask: False for keys that a query does not attend to.
      heads: number of heads.
      rate: dropout rate of the attention weights; it has no effect without `key`.
      key: random key for dropout; None turns dropout off.
    """
    scale, kept = 1.0, None
    if key is not None and rate:
        shape = (len(qkv), heads, qkv.shape[1], qkv.shape[1])
        kept = dropout_mask((math.prod(shape[:3]), shape[3]), rate, key)
        scale, kept = dropout_scale(rate), kept.astype(jnp.int8).reshape(shape)
    attention = functools.partial(_attention, heads, scale)
    operands = (qkv, mask.astype(jnp.float32), kept)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention(*operands)
    rows = batch_sharding(mesh).spec
    specs = (rows, rows if len(mask) > 1 else PartitionSpec(), rows)
    return jax.shard_map(attention, in_specs=specs, out_specs=rows, check_vma=False)(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(heads: int, scale: float, qkv: Array, mask: Array, kept: Array | None) -> Array:
    return _call(_forward_kernel, heads, scale, qkv.shape[-1] // 3, (qkv, mask, kept))


def _forward(heads: int, scale: float, *operands: Array | None) -> tuple[Array, tuple]:
    return _attention(heads, scale, *operands), operands


def _backward(heads: int, scale: float, operands: tuple, gradient: Array) -> tuple:
    width = operands[0].shape[-1]
    return _call(_backward_kernel, heads, scale, width, (gradient, *operands)), None, None


_attention.defvjp(_forward, _backward)


def _call(kernel: Callable, heads: int, scale: float, width: int, operands: tuple) -> Array:
    """Runs a kernel over blocks of sequences; its result has this width."""
    operands = [x for x in operands if x is not None]
    # Importing Pallas takes half a second, which only a TPU repays.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, _ = operands[0].shape
    size = max(n for n in range(1, max(TOKENS // length, 1) + 1) if batch % n == 0)

    def block(*shape: int) -> Any:
        rest = (0,) * (len(shape) - 1)
        if shape[0] == 1:
            return pl.BlockSpec(shape, lambda i: (0, *rest))
        return pl.BlockSpec((size, *shape[1:]), lambda i: (i, *rest))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads, scale=scale, size=size),
        grid=(batch // size,),
        in_specs=[block(*x.shape) for x in operands],
        out_specs=block(batch, length, width),
        out_shape=jax.ShapeDtypeStruct((batch, length, width), operands[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=platform() != "tpu",
    )(*operands)


def _forward_kernel(qkv_ref, mask_ref, *refs, heads: int, scale: float, size: int) -> None:
    *kept_ref, out_ref = refs
    width = out_ref.shape[-1]

    def run(row: Array, _: None) -> None:
        mask = mask_ref[jnp.minimum(row, mask_ref.shape[0] - 1)]
        for lane in range(0, width, LANES):
            parts = [_heads(qkv_ref, row, start + lane, width // heads) for start in _starts(width)]
            parts.append(_factors(kept_ref, row, lane, width // heads, scale))
            attended = []
            for query, key, value, factor in zip(*parts, strict=True):
                weights = _weights(query, key, mask) * factor
                attended.append(_product(weights.astype(value.dtype), value, 1, 0))
            _store(out_ref, row, lane, attended)

    jax.lax.fori_loop(0, size, run, None)


def _backward_kernel(
    gradient_ref, qkv_ref, mask_ref, *refs, heads: int, scale: float, size: int
) -> None:
    *kept_ref, out_ref = refs
    width = gradient_ref.shape[-1]

    def run(row: Array, _: None) -> None:
        mask = mask_ref[jnp.minimum(row, mask_ref.shape[0] - 1)]
        for lane in range(0, width, LANES):
            parts = [_heads(qkv_ref, row, start + lane, width // heads) for start in _starts(width)]
            parts.append(_factors(kept_ref, row, lane, width // heads, scale))
            parts.append(_heads(gradient_ref, row, lane, width // heads))
            gradients = [_gradients(*head, mask) for head in zip(*parts, strict=True)]
            for start, gradient in zip(_starts(width), zip(*gradients, strict=True), strict=True):
                _store(out_ref, row, start + lane, gradient)

    jax.lax.fori_loop(0, size, run, None)


def _gradients(query, key, value, factor, gradient, mask) -> tuple[Array, Array, Array]:
    """The gradients with respect to the queries, keys and values of a head."""
    weights = _weights(query, key, mask)
    by_weights = _product(gradient, value, 1, 1) * factor
    mean = jnp.sum(weights * by_weights, axis=1, keepdims=True)
    by_logits = weights * (by_weights - mean) * query.shape[-1] ** -0.5
    by_logits = by_logits.astype(query.dtype)
    return (
        _product(by_logits, key, 1, 0),
        _product(by_logits, query, 0, 0),
        _product((weights * factor).astype(value.dtype), gradient, 0, 0),
    )


def _factors(kept_ref: list, row, start: int, dim: int, scale: float) -> list[Array | float]:
    """The factors of dropout on the attention weights of the heads that `_heads` returns."""
    heads = range(start // dim, (start + LANES) // dim)
    return [kept_ref[0][row, i].astype(jnp.float32) * scale if kept_ref else 1.0 for i in heads]


def _weights(query, key, mask) -> Array:
    """The attention weights of a head, [length, length]."""
    logits = _product(query, key, 1, 1) * query.shape[-1] ** -0.5
    logits = jnp.where(mask > 0, logits, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """The product of two matrices, which sums over these axes."""
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _starts(width: int) -> tuple[int, int, int]:
    """Where queries, keys and values begin."""
    return 0, width, 2 * width


def _heads(ref, row, start: int, dim: int) -> list[Array]:
    """The heads of a row whose numbers begin at `start` and fill a vector."""
    x = ref[row, :, start : start + LANES]
    return [x[:, i : i + dim] for i in range(0, LANES, dim)]


def _store(ref, row, start: int, heads) -> None:
    ref[row, :, start : start + LANES] = jnp.concatenate(heads, axis=1).astype(ref.dtype)

"""Self-attention within short sequences, as one kernel for TPUs (Pallas).

XLA writes the logits of every head to the TPU's memory, and reads them several times. This kernel
holds whole sequences on the chip: it reads queries, keys and values, and writes the result. Its
backward pass computes the attention weights again (FlashAttention, Dao et al. 2022,
https://arxiv.org/abs/2205.14135, without the blocks that long sequences need).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from xlir.partition import batch_sharding, platform

# Width of a TPU's vectors; a kernel loads the heads that share one at once.
LANES = 128
# The number of tokens of a sequence is a multiple of this, the height of a tile in memory.
SUBLANES = 8
# The longest sequence; the logits of a head then take 4 MiB of the 16 that a kernel may use.
LONGEST = 1024
# A step of the kernel takes as many sequences as have at most this many tokens.
TOKENS = 256


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
    return bool(
        platform() == "tpu"
        and dtype == jnp.bfloat16
        and length <= LONGEST
        and config.head_width in (LANES // 2, LANES)
        and config.num_heads * config.head_width % LANES == 0
        and not (changed or dropped or rotary is not None or config.query_scale != 1)
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
) -> Float[Array, "batch length width"]:
    """Scaled dot-product attention, as `transformer.attend` without dropout.

    On other devices than TPUs, Pallas interprets the kernel, which is slow and meant for tests.

    Args:
      qkv: queries, keys and values of all heads, side by side. The length is a multiple of
        `SUBLANES`, and the width of a head is 64 or 128.
      mask: False for keys that a query does not attend to.
      heads: number of heads.
    """
    attention = functools.partial(_attention, heads)
    mesh = jax.sharding.get_abstract_mesh()
    mask = mask.astype(jnp.float32)
    if mesh.empty or mesh.size == 1:
        return attention(qkv, mask)
    rows = batch_sharding(mesh).spec
    specs = (rows, rows if len(mask) > 1 else PartitionSpec())
    sharded = jax.shard_map(attention, in_specs=specs, out_specs=rows, check_vma=False)
    return sharded(qkv, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(heads: int, qkv: Array, mask: Array) -> Array:
    return _call(_forward_kernel, heads, qkv.shape[-1] // 3, qkv, mask)


def _forward(heads: int, qkv: Array, mask: Array) -> tuple[Array, tuple[Array, Array]]:
    return _attention(heads, qkv, mask), (qkv, mask)


def _backward(heads: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    qkv, mask = kept
    return _call(_backward_kernel, heads, qkv.shape[-1], qkv, mask, gradient), None


_attention.defvjp(_forward, _backward)


def _call(kernel: Callable, heads: int, width: int, *operands: Array) -> Array:
    """Runs a kernel over blocks of sequences; its result has this width."""
    # Importing Pallas takes half a second, which only a TPU repays.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, _ = operands[0].shape
    size = max(n for n in range(1, max(TOKENS // length, 1) + 1) if batch % n == 0)

    def block(*shape: int) -> Any:
        if shape[0] == 1:
            return pl.BlockSpec(shape, lambda i: (0, 0, 0))
        return pl.BlockSpec((size, *shape[1:]), lambda i: (i, 0, 0))

    return pl.pallas_call(
        functools.partial(kernel, heads=heads, size=size),
        grid=(batch // size,),
        in_specs=[block(*x.shape) for x in operands],
        out_specs=block(batch, length, width),
        out_shape=jax.ShapeDtypeStruct((batch, length, width), operands[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=platform() != "tpu",
    )(*operands)


def _forward_kernel(qkv_ref, mask_ref, out_ref, *, heads: int, size: int) -> None:
    width = out_ref.shape[-1]

    def run(row: Array, _: None) -> None:
        mask = mask_ref[jnp.minimum(row, mask_ref.shape[0] - 1)]
        for lane in range(0, width, LANES):
            parts = (_heads(qkv_ref, row, start + lane, width // heads) for start in _starts(width))
            attended = []
            for query, key, value in zip(*parts, strict=True):
                weights = _weights(query, key, mask)
                attended.append(_product(weights.astype(value.dtype), value, 1, 0))
            _store(out_ref, row, lane, attended)

    jax.lax.fori_loop(0, size, run, None)


def _backward_kernel(qkv_ref, mask_ref, gradient_ref, out_ref, *, heads: int, size: int) -> None:
    width = gradient_ref.shape[-1]

    def run(row: Array, _: None) -> None:
        mask = mask_ref[jnp.minimum(row, mask_ref.shape[0] - 1)]
        for lane in range(0, width, LANES):
            parts = [_heads(qkv_ref, row, start + lane, width // heads) for start in _starts(width)]
            parts.append(_heads(gradient_ref, row, lane, width // heads))
            gradients = [_gradients(*head, mask) for head in zip(*parts, strict=True)]
            for start, gradient in zip(_starts(width), zip(*gradients, strict=True), strict=True):
                _store(out_ref, row, start + lane, gradient)

    jax.lax.fori_loop(0, size, run, None)


def _gradients(query, key, value, gradient, mask) -> tuple[Array, Array, Array]:
    """The gradients with respect to the queries, keys and values of a head."""
    weights = _weights(query, key, mask)
    by_weights = _product(gradient, value, 1, 1)
    mean = jnp.sum(weights * by_weights, axis=1, keepdims=True)
    by_logits = weights * (by_weights - mean) * query.shape[-1] ** -0.5
    by_logits = by_logits.astype(query.dtype)
    return (
        _product(by_logits, key, 1, 0),
        _product(by_logits, query, 0, 0),
        _product(weights.astype(value.dtype), gradient, 0, 0),
    )


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

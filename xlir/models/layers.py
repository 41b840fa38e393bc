"""Layers that heads and transformer towers share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from xlir.partition import gathered, platform


class Linear(nnx.Module):
    """A dense layer. Used as a head without a bias, it is CLIP's projection.

    Args:
      features: width of the input.
      dim: width of the output.
      use_bias: add a bias.
      dtype: dtype of the matrix product's operands; parameters, sums and results are float32.
      initializer: initializer of the matrix.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        initializer: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        initial = initializer or nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (features, dim)))
        self.bias = nnx.Param(jnp.zeros(dim)) if use_bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "rows features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "rows dim"]:
        """Applies the layer."""
        x = matmul(x.astype(jnp.float32), self.kernel[...], self.dtype)
        return x if self.bias is None else x + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, features: int, *, epsilon: float, use_bias: bool = True):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features)) if use_bias else None
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        """Normalises each row."""
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.epsilon) * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


class RMSNorm(nnx.Module):
    """Division by the root mean square over the last axis, in float32, and a learned scale.

    Zhang and Sennrich 2019 (https://arxiv.org/abs/1910.07467).
    """

    def __init__(self, features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        """Normalises each row."""
        x = x.astype(jnp.float32)
        square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(square + self.epsilon) * self.scale[...]


def dropout(
    x: Float[Array, "rows dim"], rate: float, key: Key[Array, ""]
) -> Float[Array, "rows dim"]:
    """Zeroes a fraction `rate` of the elements, rounded to 1/256, and scales up the others."""
    scale = dropout_scale(rate)
    return x if scale == 1 else jnp.where(dropout_mask(x.shape, rate, key), x * scale, 0)


def dropout_scale(rate: float) -> float:
    """The factor on the elements that dropout keeps."""
    return 256 / (256 - round(256 * rate))


def dropout_mask(
    shape: tuple[int, int], rate: float, key: Key[Array, ""]
) -> Bool[Array, "rows dim"]:
    """The elements that dropout keeps.

    Each random 32-bit word serves four elements. (`jax.random.bits` can draw bytes directly, but
    takes 16 times as long for them on CPUs.)
    """
    rows, dim = shape
    words = jax.random.bits(key, (rows, -(-dim // 4)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(rows, -1)[:, :dim]
    # The barrier keeps XLA from recomputing the mask in every operation that uses it.
    return jax.lax.optimization_barrier(draws < 256 - round(256 * rate))


def kept_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype of what towers of this dtype keep between their matrix products.

    On CPUs it is float32: converting bfloat16 takes longer there than moving twice the bytes.
    """
    return jnp.float32 if platform() == "cpu" else dtype


def recomputed(function: Callable) -> Callable:
    """A function whose backward pass keeps its arguments alone, except on CPUs.

    Otherwise XLA may keep what it computes on the way, such as gelu's erf in float32.
    """
    if platform() == "cpu":
        return function

    def backward(arguments: tuple, gradient: Array) -> tuple:
        # Unlike that of `jax.checkpoint`, this barrier lets XLA fuse what computes the gradient.
        return jax.vjp(function, *jax.lax.optimization_barrier(arguments))[1](gradient)

    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return wrapped


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(
    x: Float[Array, "rows inner"], y: Float[Array, "inner columns"], dtype: DTypeLike
) -> Float[Array, "rows columns"]:
    """`x @ y` with operands in `dtype` and float32 sums, in the backward pass as well.

    JAX would compute the derivative with float32 operands, which takes twice as long on hardware
    with native bfloat16.
    """
    return _matmul_forward(x, y, dtype)[0]


def _matmul(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _matmul_forward(x: Array, y: Array, dtype: DTypeLike):
    x, y = x.astype(dtype), gathered(y.astype(dtype))
    return _matmul(x, y), (x, y)


def _matmul_backward(dtype: DTypeLike, operands: tuple[Array, Array], gradient: Array):
    x, y = operands
    gradient = gradient.astype(dtype)
    return _matmul(gradient, _transposed(y)), gathered(_matmul(_transposed(x), gradient))


def _transposed(x: Array) -> Array:
    """`x.T`, stored row-major if it is bfloat16 and on a CPU.

    XLA's CPU backend multiplies bfloat16 matrices twice as fast as float32, but only if they are
    row-major. Flattening behind a barrier forces it to materialise the transpose.
    """
    if x.dtype != jnp.bfloat16:
        return x.T

    def written_out(x: Array) -> Array:
        return jax.lax.optimization_barrier(x.T.reshape(-1)).reshape(x.shape[::-1])

    return jax.lax.platform_dependent(x, cpu=written_out, default=jnp.transpose)


matmul.defvjp(_matmul_forward, _matmul_backward)

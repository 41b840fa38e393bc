"""Layers that heads and transformer towers share."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class Linear(nnx.Module):
    """A dense layer; as a head without a bias it is CLIP's.

    Args:
      features: width of the input.
      dim: width of the output.
      use_bias: add a bias.
      dtype: of the product's operands; parameters, sums and results are float32.
      initializer: of the matrix.
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
        x = product(x, self.kernel[...], self.dtype)
        return x if self.bias is None else x + self.bias[...]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32 (Ba et al. 2016)."""

    def __init__(self, features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        """Normalises each row."""
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=self.epsilon)
        return x * self.scale[...] + self.bias[...]


def dropout(
    x: Float[Array, "rows dim"], rate: float, key: Key[Array, ""]
) -> Float[Array, "rows dim"]:
    """Zeroes a share `rate` of the elements, in steps of 1/256, and scales up the others.

    Each random word serves four elements. (`jax.random.bits` gives bytes too, but XLA's CPU
    backend takes 16 times as long for them.)
    """
    kept = 256 - round(256 * rate)
    if kept == 256:
        return x
    rows, dim = x.shape
    words = jax.random.bits(key, (rows, -(-dim // 4)), jnp.uint32)
    draws = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(rows, -1)[:, :dim]
    # Behind the barrier it is drawn once, and not in every operation that uses it.
    mask = jax.lax.optimization_barrier(draws < kept)
    return jnp.where(mask, x * (256 / kept), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "rows inner"], y: Float[Array, "inner columns"], dtype: DTypeLike
) -> Float[Array, "rows columns"]:
    """`x @ y` with operands in `dtype` and float32 sums, in the backward pass as well.

    JAX's own derivative of a product with float32 results multiplies in float32, which takes
    twice as long where bfloat16 is native.
    """
    return _product(x.astype(dtype), y.astype(dtype))


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _product_forward(x: Array, y: Array, dtype: DTypeLike):
    x, y = x.astype(dtype), y.astype(dtype)
    return _product(x, y), (x, y)


def _product_backward(dtype: DTypeLike, operands: tuple[Array, Array], gradient: Array):
    x, y = operands
    gradient = gradient.astype(dtype)
    return _product(gradient, _transposed(y)), _product(_transposed(x), gradient)


def _transposed(x: Array) -> Array:
    """`x.T`; where it matters, written out row by row.

    XLA's CPU backend multiplies bfloat16 at twice float32's speed, but only matrices that lie in
    memory row by row. Flattening behind a barrier makes it write the transpose out.
    """
    if x.dtype != jnp.bfloat16:
        return x.T

    def written_out(x: Array) -> Array:
        return jax.lax.optimization_barrier(x.T.reshape(-1)).reshape(x.shape[::-1])

    return jax.lax.platform_dependent(x, cpu=written_out, default=jnp.transpose)


product.defvjp(_product_forward, _product_backward)

"""Heads: what maps a tower's output into the shared embedding space."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key


class MLP(nnx.Module):
    """`LayerNorm -> [Dense -> GELU -> Dropout] for each hidden width -> Dense`.

    One hidden layer is the usual projection head; `hidden=(2048, 1024)` is the text head of
    Aggarwal et al. 2021.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        hidden: Sequence[int],
        dropout: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        first, *others = (*hidden, dim)
        self.input = NormLinear(features, first, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            Linear(wide, narrow, use_bias=True, dtype=dtype, rngs=rngs)
            for wide, narrow in itertools.pairwise((first, *others))
        )
        self.dropout = dropout

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Maps features to embeddings; with `rngs` in training mode (dropout on)."""
        x = self.input(x)
        for layer in self.layers:
            x = jax.nn.gelu(x)
            if rngs is not None:
                x = dropout(x, self.dropout, rngs.dropout())
            x = layer(x)
        return x


class NormLinear(nnx.Module):
    """Layer norm, then a dense layer, as one matrix product.

    The norm's scale and offset are multiplied into the matrix. That is the same function, but
    where the input is fixed (a frozen tower's features) its backward pass needs no product with
    the transposed matrix, which would only serve the two vectors: a fifth of a head's training.
    """

    def __init__(self, features: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.offset = nnx.Param(jnp.zeros(features))
        self.linear = Linear(features, dim, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch features"]) -> Float[Array, "batch dim"]:
        """Applies both; sums and results are float32."""
        x = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-6)
        kernel = self.linear.kernel[...]
        bias = self.offset[...] @ kernel + self.linear.bias[...]
        return product(x, self.scale[...][:, None] * kernel, self.linear.dtype) + bias


def dropout(x: Float[Array, "batch dim"], rate: float, key: Key[Array, ""]):
    """Zeroes a share `rate` of the elements, in steps of 1/256, and scales up the others.

    Each random word serves four elements. (`jax.random.bits` gives bytes too, but XLA's CPU
    backend takes 16 times as long for them.)
    """
    kept = 256 - round(256 * rate)
    if kept == 256:
        return x
    rows, dim = x.shape
    words = jax.random.bits(key, (rows, -(-dim // 4)), jnp.uint32)
    parts = [(words >> shift) & 255 for shift in (0, 8, 16, 24)]
    # Behind the barrier it is drawn once, and not again in the backward pass.
    mask = jax.lax.optimization_barrier(jnp.concatenate(parts, axis=1)[:, :dim] < kept)
    return jnp.where(mask, x * (256 / kept), 0)


class Linear(nnx.Module):
    """A dense layer; without a bias it is CLIP's head."""

    def __init__(
        self,
        features: int,
        dim: int,
        *,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        initial = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (features, dim)))
        self.bias = nnx.Param(jnp.zeros(dim)) if use_bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "batch features"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Applies the layer; sums and results are float32."""
        x = product(x, self.kernel[...], self.dtype)
        return x if self.bias is None else x + self.bias[...]


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
    if jax.default_backend() != "cpu" or x.dtype != jnp.bfloat16:
        return x.T
    return jax.lax.optimization_barrier(x.T.reshape(-1)).reshape(x.shape[::-1])


product.defvjp(_product_forward, _product_backward)


class Identity(nnx.Module):
    """No head: the tower's output is the embedding."""

    def __init__(self, features: int, dim: int):
        if features != dim:
            raise ValueError(
                f"a tower without a head gives {features} features, but config.embedding_dim is "
                f"{dim}: set config.embedding_dim={features} or a head"
            )

    def __call__(
        self, x: Float[Array, "batch dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Returns its input."""
        return x


class Center(Identity):
    """A fixed space to map the other side into: the tower's output less its mean over the data.

    Outputs of a network that ends in a ReLU share a large mean, which hides their differences from
    the cosine. The mean is set once, before training, and no gradient moves it.
    """

    def __init__(self, features: int, dim: int):
        super().__init__(features, dim)
        self.mean = nnx.Param(jnp.zeros(features))

    def __call__(
        self, x: Float[Array, "batch dim"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch dim"]:
        """Subtracts the mean."""
        return x - jax.lax.stop_gradient(self.mean[...])

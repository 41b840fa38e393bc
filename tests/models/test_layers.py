"""Compares products and dropout with their definitions, layer normalisation with Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xlir.models import layers


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_product_has_the_derivative_of_a_product(dtype, tolerance):
    x = jax.random.normal(jax.random.key(0), (7, 5))
    y = jax.random.normal(jax.random.key(1), (5, 3))
    seed = jax.random.normal(jax.random.key(2), (7, 3))
    ours, pull = jax.vjp(lambda x, y: layers.matmul(x, y, dtype), x, y)
    expected, pull_expected = jax.vjp(jnp.matmul, x, y)
    for a, b in zip((ours, *pull(seed)), (expected, *pull_expected(seed)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("dim", [64, 61])
def test_dropout_keeps_the_mean_and_its_rate(dim):
    x = jnp.ones((4096, dim))
    dropped = layers.dropout(x, 0.25, jax.random.key(0))
    assert dropped.shape == x.shape
    assert np.mean(dropped == 0) == pytest.approx(0.25, abs=0.005)
    assert np.mean(dropped) == pytest.approx(1, abs=0.01)
    # Four columns share a random word, but are independent of each other.
    correlation = np.corrcoef(np.asarray(dropped).T)
    assert np.abs(correlation - np.eye(dim)).max() < 0.1
    gradient = jax.grad(lambda x: jnp.sum(layers.dropout(x, 0.25, jax.random.key(0))))(x)
    np.testing.assert_array_equal(gradient, dropped)


def test_layer_norm_equals_flax():
    ours, flax = (
        layers.LayerNorm(12, epsilon=1e-5),
        nnx.LayerNorm(12, epsilon=1e-5, rngs=nnx.Rngs(0)),
    )
    for norm in (ours, flax):
        norm.scale[...] = jax.random.uniform(jax.random.key(0), (12,), minval=0.5, maxval=2)
        norm.bias[...] = jax.random.normal(jax.random.key(1), (12,))
    x = 3 + 2 * jax.random.normal(jax.random.key(2), (5, 4, 12))
    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-5, atol=1e-5)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_linear_has_a_bias_where_asked():
    x = jax.random.normal(jax.random.key(0), (7, 5))
    with_bias, without = (layers.Linear(5, 3, use_bias=b, rngs=nnx.Rngs(0)) for b in (True, False))
    with_bias.bias[...] = jnp.arange(3.0)
    np.testing.assert_allclose(with_bias(x) - without(x), [[0, 1, 2]] * 7, atol=1e-6)
    np.testing.assert_allclose(without(x), x @ without.kernel[...], rtol=1e-5, atol=1e-6)

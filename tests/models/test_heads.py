"""Compares our heads, which are faster, with heads built from Flax's layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import xlmr
from xlir.models import heads, towers


def both(hidden=(24, 20)):
    """Our MLP, and an equal one made of Flax's layers with the same parameters."""
    ours = heads.MLP(12, 8, hidden=hidden, rngs=nnx.Rngs(0))
    ours.input.scale[...] = jax.random.uniform(jax.random.key(1), (12,), minval=0.5, maxval=2)
    ours.input.offset[...] = jax.random.normal(jax.random.key(2), (12,))
    norm = nnx.LayerNorm(12, epsilon=1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = ours.input.scale[...], ours.input.offset[...]
    linears = []
    for layer in (ours.input.linear, *ours.layers):
        linear = nnx.Linear(*layer.kernel.shape, rngs=nnx.Rngs(0))
        linear.kernel[...], linear.bias[...] = layer.kernel[...], layer.bias[...]
        linears.append(linear)
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    return ours, nnx.Sequential(norm, *[f for x in linears for f in (x, gelu)][:-1])


@pytest.mark.parametrize("hidden", [(), (24,), (24, 20)])
def test_values_and_gradients_equal_layer_norm_and_dense(hidden):
    ours, flax = both(hidden)
    x = 3 + 2 * jax.random.normal(jax.random.key(3), (16, 12))

    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    np.testing.assert_allclose(ours(x), flax(x), rtol=1e-5, atol=1e-5)
    mine, mine_x = nnx.grad(loss, argnums=(0, 1))(ours, x)
    theirs, theirs_x = nnx.grad(loss, argnums=(0, 1))(flax, x)
    np.testing.assert_allclose(mine_x, theirs_x, rtol=1e-4, atol=1e-5)
    norm, first = theirs["layers"][0], theirs["layers"][1]
    for a, b in (
        (mine["input"]["scale"], norm["scale"]),
        (mine["input"]["offset"], norm["bias"]),
        (mine["input"]["linear"]["kernel"], first["kernel"]),
        (mine["input"]["linear"]["bias"], first["bias"]),
    ):
        np.testing.assert_allclose(a[...], b[...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [(), (24,), (24, 20)])
def test_a_plain_mlp_is_matrices_and_gelu(hidden):
    head = heads.MLP(12, 8, hidden=hidden, plain=True, rngs=nnx.Rngs(0))
    matrices = [layer.kernel[...] for layer in (head.input, *head.layers)]
    assert len(jax.tree.leaves(nnx.state(head))) == len(matrices), "other parameters"
    x = expected = jax.random.normal(jax.random.key(0), (16, 12))
    for matrix in matrices[:-1]:
        expected = jax.nn.gelu(expected @ matrix, approximate=False)
    np.testing.assert_allclose(head(x), expected @ matrices[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"), [("linear", {"kernel"}), ("affine", {"kernel", "bias"})]
)
def test_only_an_affine_head_has_a_bias(name, parameters):
    config = xlmr.get_config("tiny")
    config.text.head = name
    head = towers.abstract_model(config).text_head
    assert set(nnx.to_pure_dict(nnx.state(head))) == parameters


def test_without_keys_there_is_no_dropout():
    head = heads.MLP(12, 8, hidden=(16,), dropout=0.5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 12))
    np.testing.assert_array_equal(head(x), head(x))
    assert (head(x, rngs=nnx.Rngs(dropout=1)) != head(x)).any()


def test_an_identity_head_wants_the_towers_width():
    with pytest.raises(ValueError, match=r"embedding_dim is 8: set config\.embedding_dim=12"):
        heads.Identity(12, 8)


def test_the_centre_stays_where_it_is():
    head = heads.Center(4, 4)
    head.mean[...] = jnp.arange(4.0)
    gradient = nnx.grad(lambda head: jnp.sum(head(jnp.ones((2, 4)))))(head)
    assert not gradient["mean"][...].any()
    np.testing.assert_array_equal(head(jnp.ones((1, 4)))[0], 1 - jnp.arange(4.0))

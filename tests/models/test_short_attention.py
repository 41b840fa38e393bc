"""The kernel for TPUs, interpreted on a CPU, against the attention of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from xlir import compile, cost, hlo, partition
from xlir.models import layers, short_attention, transformer

BATCH, LENGTH, HEADS = 8, 16, 2


def reference(qkv, mask, heads, rate=0.0, key=None):
    parts = jnp.split(qkv, 3, axis=-1)
    query, key_, value = (x.reshape(*x.shape[:2], heads, -1) for x in parts)
    weights = linen.dot_product_attention_weights(query, key_, mask=mask[:, None])
    if key is not None:
        flat = layers.dropout(weights.reshape(-1, weights.shape[-1]), rate, key)
        weights = flat.reshape(weights.shape)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*qkv.shape[:2], -1)


@pytest.mark.parametrize(
    ("shape", "rate"),
    [((1, 1, LENGTH), 0.0), ((BATCH, 1, LENGTH), 0.1), ((BATCH, LENGTH, LENGTH), 0.0)],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_values_and_gradients(shape, rate, sharded):
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.normal(size=(BATCH, LENGTH, 3 * HEADS * 64)), jnp.float32)
    mask = jnp.asarray(random.random(shape) < 0.7).at[..., 0].set(True)
    weight = jnp.asarray(random.normal(size=(BATCH, LENGTH, HEADS * 64)), jnp.float32)
    key = jax.random.key(0) if rate else None

    def evaluate(attend, qkv):
        def loss(qkv):
            return jnp.vdot(attend(qkv, mask, HEADS, rate, key), weight)

        return jax.value_and_grad(loss)(qkv)

    value, gradient = jax.jit(evaluate, static_argnums=0)(reference, qkv)
    mesh = partition.create_mesh() if sharded else partition.single_device_mesh()
    with jax.set_mesh(mesh):
        rows = jax.device_put(qkv, partition.batch_sharding(mesh))
        found = jax.jit(evaluate, static_argnums=0)(short_attention.attend, rows)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    np.testing.assert_allclose(found[1], gradient, atol=1e-5)


def test_the_kernel_is_compiled_for_a_tpu():
    """Forward and backward pass move queries, keys, values, results and gradients, and no more."""
    pytest.importorskip("libtpu")
    mesh = partition.create_mesh({"data": 2, "fsdp": 4}, compile.devices("v5e:2x4"))
    rows = partition.batch_sharding(mesh)
    parts, width = 3 * HEADS * 64, HEADS * 64
    arrays = [
        jax.ShapeDtypeStruct((BATCH, LENGTH, size), jnp.bfloat16, sharding=rows)
        for size in (parts, width)
    ]
    mask = jnp.ones((1, 1, LENGTH), bool)

    def attend(qkv):
        return short_attention.attend(qkv, mask, HEADS, 0.1, jax.random.key(0))

    def evaluate(qkv, gradient):
        value, pull = jax.vjp(attend, qkv)
        return value, pull(gradient)

    with jax.set_mesh(mesh):
        traced = jax.jit(evaluate).trace(*arrays)
    text = traced.lower().compile().as_text()
    assert text.count("tpu_custom_call") >= 2
    # Two products forward; backward, the logits again and four products more.
    assert cost.flops(traced.jaxpr) == 7 * 2 * BATCH * LENGTH**2 * width
    needed = 2 * LENGTH * (parts + width + parts + width + parts)
    assert hlo.hbm_bytes(text) < 1.5 * needed


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_stack_on_a_tpu_equals_the_stack_elsewhere(pre_norm, monkeypatch):
    """The kernel, bfloat16 between products and a padded length change only the rounding."""
    config = transformer.TransformerConfig(
        depth=2,
        width=128,
        num_heads=2,
        mlp_dim=64,
        activation="gelu",
        epsilon=1e-6,
        pre_norm=pre_norm,
    )
    stack = transformer.Layers(config, dtype=jnp.bfloat16, remat=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(stack)
    x = jax.random.normal(jax.random.key(1), (2, 13, 128))

    def evaluate(params):
        return jax.value_and_grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(x)) * x))(
            params
        )

    expected = jax.jit(evaluate)(params)
    monkeypatch.setattr(short_attention, "fits", lambda *_: True)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    found = jax.jit(lambda params: evaluate(params))(params)
    norms = [
        jnp.linalg.norm(a - b) / jnp.linalg.norm(b)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    assert max(norms) < 0.04

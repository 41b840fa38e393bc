import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from xlir import cost, hlo


def shape(*dimensions, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding)


def flops(function, *arguments):
    return cost.flops(jax.jit(function).trace(*arguments).jaxpr)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def collectives(text):
    return {kind: (each.count, each.bytes) for kind, each in hlo.collectives(text).items()}


def grid(devices) -> Mesh:
    return Mesh(np.array(devices).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def stack(layer):
    """A loss whose `scan` runs over stacked weights."""
    return lambda weights, x: lax.scan(layer, x, weights)[0].sum()


def layer(x, w):
    return jnp.tanh(x @ w), None


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


# --- Arithmetic ---

x, w, weights = shape(8, 16), shape(16, 16), shape(5, 16, 16)
PRODUCT = 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("function", "arguments", "products"),
    [
        (jnp.matmul, (x, w), 1),
        (jnp.matmul, (shape(3, 5, 8, 16), shape(3, 5, 16, 16)), 15),
        (lambda x: jnp.sin(x) + 1, (x,), 0),
        (lambda x, w: jax.jit(jnp.matmul)(x, w) + jax.checkpoint(jnp.matmul)(x, w), (x, w), 2),
        (custom, (x, w), 1),
        (jax.value_and_grad(lambda w, x: custom(x, w).sum()), (w, x), 3),
        (lambda x, w: lax.fori_loop(0, 3, lambda i, x: x @ w, x), (x, w), 3),
        (lambda x, w: lax.while_loop(lambda x: x[0, 0] < 1, lambda x: x @ w, x), (x, w), 1),
        (lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (x, w), 2),
        (jax.value_and_grad(lambda w, x: (x @ w).sum()), (w, x), 2),
        (jax.value_and_grad(stack(layer)), (weights, x), 5 * 3),
        # Rematerialised operations count again.
        (jax.value_and_grad(stack(jax.checkpoint(layer))), (weights, x), 5 * 4),
    ],
)
def test_flops_of_matrix_products(function, arguments, products):
    assert flops(function, *arguments) == products * PRODUCT


def test_flops_of_convolutions():
    def convolve(x, kernel, groups=1, stride=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        strides = (stride, stride)
        return lax.conv_general_dilated(
            x, kernel, strides, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    image, kernel = shape(2, 8, 8, 4), shape(3, 3, 4, 6)
    once = 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    assert flops(convolve, image, kernel) == once
    depthwise = functools.partial(convolve, groups=4)
    assert flops(depthwise, image, shape(3, 3, 1, 4)) == 2 * (2 * 8 * 8 * 4) * (3 * 3)
    strided = functools.partial(convolve, stride=2)
    assert flops(strided, image, kernel) == once / 4
    backward = jax.value_and_grad(lambda x, k: strided(x, k).sum(), argnums=(0, 1))
    assert flops(backward, image, kernel) == pytest.approx(3 * once / 4)


def test_flops_of_shard_map_are_those_of_all_devices():
    specs = {"in_specs": (P("data"), P(None, "fsdp")), "out_specs": P("data", "fsdp")}
    sharded = jax.shard_map(jnp.matmul, mesh=grid(jax.devices()), **specs)
    assert flops(sharded, x, w) == PRODUCT
    # Manual over "data" only: the body still sees whole arrays along "fsdp".
    partly = jax.shard_map(
        jnp.matmul,
        mesh=grid(jax.devices()),
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    assert flops(partly, x, w) == PRODUCT


# --- Time ---


def test_estimate_is_a_range():
    chip = cost.CHIPS["v5e"]
    step = cost.estimate(2 * chip.flops, 3 * chip.bandwidth, chip.network, chip)
    assert (step.compute, step.memory, step.network) == (2, 3, 1)
    assert (step.overlapped, step.serial) == (3, 6)


@pytest.mark.parametrize("name", cost.CHIPS)
def test_chips_are_plausible(name):
    chip = cost.CHIPS[name]
    assert 1e10 < chip.hbm < 1e12
    assert chip.network < chip.bandwidth < chip.flops

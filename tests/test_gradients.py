"""Compares gradients from microbatches and from whole batches, on one device and a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import xlmr
from tests.conftest import REPOSITORY  # noqa: F401  (eight devices are forced there)
from xlir import gradients, losses, partition
from xlir.encoder import Encoder

BATCH = 32


@pytest.fixture(scope="module")
def parts():
    """Toy towers, their parameters and a batch with two pairs of the same photo."""
    encoder = Encoder.create(xlmr.get_config("tiny"))
    rng = np.random.default_rng(0)
    batch = {
        "text_ids": rng.integers(4, 260, (BATCH, 12)).astype(np.int32),
        "text_mask": np.arange(12) < rng.integers(3, 13, (BATCH, 1)),
        "image": rng.integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8),
        "image_id": np.array([0, 0, 1, 1, *range(2, BATCH - 2)], np.int32),
    }
    return encoder, encoder.parameters.trained, batch


def build_objective(name):
    config = xlmr.get_config("tiny").loss
    config.name, config.push_apart = name, 0.25
    return losses.build(config)


def functions(encoder, name, dropout=False):
    """`embed` and `loss` of an objective, as in the training step."""
    objective = build_objective(name)

    def embed(params, rows, key):
        model = nnx.merge(encoder.embedder.graph, params, encoder.parameters.frozen)
        rngs = nnx.Rngs(dropout=key) if dropout else None
        return model.encode_text(rows, rngs=rngs), model.encode_image(rows, rngs=rngs)

    def loss(image_id, params, embeddings):
        model = nnx.merge(encoder.embedder.graph, params, encoder.parameters.frozen)
        return objective(*embeddings, image_id, model.scale, model.bias[...])

    return embed, loss


@functools.cache
def compiled(encoder, name, microbatches, **options):
    """Compiling towers takes seconds, so tests share the compiled functions."""
    return value_and_gradient(*functions(encoder, name, **options), microbatches)


def value_and_gradient(embed, loss, microbatches):
    @jax.jit
    def run(params, batch, key):
        of_batch = functools.partial(loss, batch["image_id"])
        return gradients.value_and_gradient(embed, of_batch, params, batch, key, microbatches)

    return run


def assert_equal(ours, expected):
    (value, gradient), (expected_value, expected_gradient) = ours, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected_gradient))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * largest),
        gradient,
        expected_gradient,
    )


def without_towers(name):
    """`embed` and `loss` of an objective for two linear maps, which compile quickly."""
    objective = build_objective(name)

    def embed(params, rows, key):
        del key
        text = jnp.sum(params["text"][rows["text_ids"]] * rows["text_mask"][..., None], axis=1)
        image = rows["image"].reshape(len(rows["image"]), -1) / 255 @ params["image"]
        return tuple(x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))

    def loss(image_id, params, embeddings):
        return objective(*embeddings, image_id, jnp.exp(params["log_scale"]), params["bias"])

    rng = np.random.default_rng(1)
    params = {
        "text": rng.normal(size=(260, 16)).astype(np.float32),
        "image": rng.normal(size=(32 * 32 * 3, 16)).astype(np.float32),
        "log_scale": np.float32(2),
        "bias": np.float32(-3),
    }
    return embed, loss, params


OBJECTIVES = ["infonce", "sigmoid", "triplet", "patr", "m3l"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_microbatches_give_the_whole_batchs_gradient(parts, name):
    """The loss would differ if negatives did not come from the whole batch."""
    *_, batch = parts
    embed, loss, params = without_towers(name)
    key = jax.random.key(0)
    whole = value_and_gradient(embed, loss, 1)(params, batch, key)
    assert_equal(value_and_gradient(embed, loss, 8)(params, batch, key), whole)
    part = {name: rows[::8] for name, rows in batch.items()}
    of_part = value_and_gradient(embed, loss, 1)(params, part, key)[0]
    assert abs(of_part - whole[0]) > 1e-2 * abs(whole[0])


# Towers do not depend on the objective, so one objective is enough.
@pytest.mark.parametrize(
    "name",
    [OBJECTIVES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in OBJECTIVES[1:])],
)
def test_microbatches_give_the_whole_batchs_gradient_of_towers(parts, name):
    encoder, params, batch = parts
    key = jax.random.key(0)
    whole = compiled(encoder, name, 1)(params, batch, key)
    assert_equal(compiled(encoder, name, 8)(params, batch, key), whole)


def test_microbatches_on_a_mesh(parts):
    encoder, params, batch = parts
    mesh, key = partition.create_mesh(), jax.random.key(0)
    assert mesh.size == 8
    whole = compiled(encoder, "infonce", 1)(params, batch, key)
    sharded = partition.global_batch(batch, mesh)
    on_mesh = jax.device_put(params, partition.replicated(mesh))
    assert_equal(compiled(encoder, "infonce", 4)(on_mesh, sharded, key), whole)


def test_dropout_is_the_same_in_both_passes(parts):
    """The gradient belongs to the returned loss: a finite difference along it confirms this."""
    encoder, params, batch = parts
    run = compiled(encoder, "infonce", 4, dropout=True)
    key = jax.random.key(3)
    value, gradient = run(params, batch, key)
    assert value == run(params, batch, key)[0] != run(params, batch, jax.random.key(4))[0]
    squared = sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(gradient))
    length = 1e-2 / squared**0.5

    def at(distance):
        moved = jax.tree.map(lambda x, g: x + distance * g / squared**0.5, params, gradient)
        return float(run(moved, batch, key)[0])

    slope = (at(length) - at(-length)) / (2 * length)
    assert slope == pytest.approx(squared**0.5, rel=2e-2)


def test_microbatches_save_memory(parts):
    encoder, params, batch = parts
    key = jax.random.key(0)
    temporary = {
        count: compiled(encoder, "infonce", count)
        .lower(params, batch, key)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for count in (1, 8)
    }
    assert temporary[8] < 0.5 * temporary[1]

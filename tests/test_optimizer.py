"""Schedules, learning rates by tower, and no optimizer state for frozen towers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, xlmr
from xlir import optimizer
from xlir.encoder import Encoder


def config(**towers_frozen):
    config = base.get_config()
    config.steps = 100
    config.optimizer.warmup_steps = 10
    config.optimizer.clip_norm = 0.0
    config.optimizer.weight_decay = 0.0
    for side, frozen in towers_frozen.items():
        config[side].frozen = frozen
    return config


def tree(*names):
    return {name: {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)} for name in names}


def test_schedule_warms_up_and_ends_at_zero():
    rate = optimizer.schedule(config())
    assert rate(0) == 0
    assert rate(10) == pytest.approx(1e-3)
    assert rate(55) == pytest.approx(5e-4, rel=1e-3)
    assert rate(100) == pytest.approx(0, abs=1e-9)


def test_warmup_longer_than_the_run_is_still_a_schedule():
    short = config()
    short.steps = 5
    assert 0 < optimizer.schedule(short)(5) < 1e-3


def test_an_unfrozen_tower_has_its_own_rate():
    transformation = optimizer.build(config(text=False))
    params = tree("text_tower", "text_head")
    state = transformation.init(params)
    # The first step's rate is zero; Adam's first moments are then equal, so the ratio is exact.
    for _ in range(2):
        updates, state = transformation.update(params, state, params)
    ratio = updates["text_tower"]["kernel"] / updates["text_head"]["kernel"]
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-5)


def test_only_matrices_decay():
    decaying = config()
    decaying.optimizer.weight_decay = 0.5
    transformation = optimizer.build(decaying)
    params = tree("text_head") | {"log_scale": jnp.ones(())}
    state = transformation.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):
        updates, state = transformation.update(zero, state, params)
    assert (updates["text_head"]["kernel"] < 0).all()
    assert not updates["text_head"]["bias"].any()
    assert updates["log_scale"] == 0


def test_clipping_bounds_the_global_norm_before_adam():
    clipped = config()
    clipped.optimizer.clip_norm = 1.0
    transformation = optimizer.build(clipped)
    params = tree("text_head", "image_head")
    huge = jax.tree.map(lambda x: 1e6 * x, params)
    _, state = transformation.update(huge, transformation.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    # Adam's first moments are (1 - b1) times the clipped gradient.
    first = optax.tree.norm([m for m in moments if m.max() > 1e-3])
    assert 0.05 < first < 0.11


@pytest.fixture(scope="module")
def towers():
    """The trainable parameters of toy towers: two layers in a stack, two blocks in a list."""
    experiment = xlmr.get_config("tiny")
    experiment.image.tower = "toy-resnet"
    return Encoder.create(experiment).parameters.trained


def test_layers_learn_the_slower_the_lower(towers):
    text = optimizer.layer_scales({"text_tower": towers["text_tower"]}, 0.5)["text_tower"]
    kernel = text["layers"]["stacked"]["attention"]["qkv"]["kernel"]
    np.testing.assert_array_equal(jnp.ravel(kernel), [0.25, 0.5])
    assert text["embedding"] == text["position"] == 0.125
    image = optimizer.layer_scales({"image_tower": towers["image_tower"]}, 0.5)["image_tower"]
    assert jax.tree.leaves(image["stem"]) == [0.125] * 2
    assert set(jax.tree.leaves(image["blocks"][0])) == {0.25}
    assert set(jax.tree.leaves(image["blocks"][1])) == {0.5}


def test_layer_decay_scales_a_towers_updates_and_no_others(towers):
    steady, decayed = config(text=False, image=False), config(text=False, image=False)
    decayed.text.layer_decay = 0.5
    gradient = jax.tree.map(jnp.ones_like, towers)
    updates = []
    for experiment in (steady, decayed):
        transformation = optimizer.build(experiment)
        state = transformation.init(towers)
        for _ in range(2):  # the rate of the first step is 0
            update, state = jax.jit(transformation.update)(gradient, state, towers)
        updates.append(update)
    expected = optimizer.layer_scales({"text_tower": towers["text_tower"]}, 0.5)
    expected |= jax.tree.map(lambda _: 1.0, {k: v for k, v in towers.items() if k != "text_tower"})
    jax.tree.map(
        lambda plain, scaled, scale: np.testing.assert_allclose(scaled, plain * scale, rtol=1e-6),
        *(*updates, expected),
    )


def test_biases_and_norms_of_a_stack_do_not_decay(towers):
    layers = optimizer.decays(towers)["text_tower"]["layers"]["stacked"]
    assert layers["mlp"]["fc1"] == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves(layers["mlp_norm"]))

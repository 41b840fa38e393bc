"""Compares every objective with a float64 reference: values, gradients, masking."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from xlir import losses

SCALE, BIAS = 12.0, -3.0
NAMES = ("infonce", "sigmoid", "triplet", "patr", "m3l")
METRICS = ("euclidean", "squared_euclidean", "cosine")


def config(name: str, metric: str = "euclidean", push_apart: float = 0.0) -> ConfigDict:
    options = base.get_config().loss
    options.name, options.metric, options.push_apart = name, metric, push_apart
    options.margin, options.rho = 0.7, 3.0
    return options


def batch(rows: int = 12, dim: int = 16, seed: int = 0, unit: bool = True):
    """Correlated pairs; every third photo is in two rows."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(rows, dim))
    text = image + 1.5 * rng.normal(size=(rows, dim))
    if unit:
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        text /= np.linalg.norm(text, axis=1, keepdims=True)
    image_id = np.arange(rows)
    image_id[1::6] = image_id[0::6]
    return text, image, image_id


# --- the reference: loops over pairs, float64, no code shared with the implementation ---


def reference_distance(x, y, metric):
    if metric == "cosine":
        return 1 - x @ y / np.sqrt((x @ x) * (y @ y))
    gap = x - y
    return gap @ gap if metric == "squared_euclidean" else np.sqrt(gap @ gap)


def reference(options, text, image, image_id):
    rows = range(len(text))
    d = functools.partial(reference_distance, metric=options.metric)
    others = [[j for j in rows if image_id[j] != image_id[i]] for i in rows]
    value = 0.0
    for i in rows:
        positive = d(text[i], image[i])
        if options.name in ("infonce", "sigmoid"):
            to_image = {j: SCALE * text[i] @ image[j] for j in others[i]}
            to_text = {j: SCALE * text[j] @ image[i] for j in others[i]}
            own = SCALE * text[i] @ image[i]
            if options.name == "infonce":
                for negatives in (to_image, to_text):
                    terms = np.exp([own, *negatives.values()])
                    value -= np.log(terms[0] / terms.sum()) / 2
            else:
                value += np.log1p(np.exp(-(own + BIAS)))
                value += sum(np.log1p(np.exp(s + BIAS)) for s in to_image.values())
        elif options.name == "patr":
            hard = min((d(text[i], image[j]) for j in others[i]), default=np.inf)
            value += positive + max(0.0, options.margin - hard)
        elif options.name == "triplet" and others[i]:
            hard_image = min(d(text[i], image[j]) for j in others[i])
            hard_text = min(d(image[i], text[j]) for j in others[i])
            value += max(0.0, options.margin + positive - hard_image) / 2
            value += max(0.0, options.margin + positive - hard_text) / 2
        if others[i] and (options.name == "m3l" or options.push_apart):
            n = min(others[i], key=lambda j: d(text[i], image[j]))
            apart = positive**options.rho / d(text[i], text[n])
            value += options.push_apart * apart
            if options.name == "m3l":
                value += options.text_weight * apart
                value += options.image_weight * positive**options.rho / d(text[i], image[n])
    return value / len(text)


def evaluate(options, text, image, image_id):
    objective = losses.build(options)
    return objective(text, image, image_id, jnp.float32(SCALE), jnp.float32(BIAS))


@pytest.mark.parametrize("push_apart", [0.0, 0.3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_match_the_reference(name, metric, push_apart):
    options = config(name, metric, push_apart)
    text, image, image_id = batch(unit=name in ("infonce", "sigmoid"))
    arrays = [jnp.asarray(x, jnp.float32) for x in (text, image)]
    value, gradients = jax.value_and_grad(functools.partial(evaluate, options), argnums=(0, 1))(
        *arrays, jnp.asarray(image_id)
    )
    expected = reference(options, text, image, image_id)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Finite differences of the float64 reference along random directions.
    rng = np.random.default_rng(1)
    for side, gradient in enumerate(gradients):
        for _ in range(4):
            step = 1e-6 * rng.normal(size=text.shape)
            above, below = [text, image], [text, image]
            above[side], below[side] = above[side] + step, below[side] - step
            slope = (
                reference(options, *above, image_id) - reference(options, *below, image_id)
            ) / 2
            np.testing.assert_allclose(np.sum(gradient * step), slope, rtol=2e-4, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_two_captions_of_one_photo_do_not_repel(name):
    """Rows 0 and 1 show one photo: moving one row does not change the other row's terms."""
    options = config(name, push_apart=0.5)
    text, image, _ = (jnp.asarray(x, jnp.float32) for x in batch(rows=2))
    image_id = jnp.zeros(2, jnp.int32)
    together = evaluate(options, text, image, image_id)
    alone = [evaluate(options, text[i : i + 1], image[i : i + 1], image_id[:1]) for i in (0, 1)]
    np.testing.assert_allclose(together, sum(alone) / 2, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(evaluate, argnums=1)(options, text, image, image_id)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_finite_where_everything_coincides(name):
    text = image = jnp.ones((6, 4)) / 2
    gradient = jax.grad(evaluate, argnums=(1, 2))(
        config(name, push_apart=1.0), text, image, jnp.arange(6)
    )
    assert all(np.isfinite(g).all() for g in gradient)


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_infonce_of_a_solved_batch_is_not_negative(scale, chunk):
    """All pairs are far apart, so the loss is near zero; rounding must not make it negative."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    value = jax.jit(jax.value_and_grad(losses.infonce, argnums=3), static_argnames="chunk")
    lowest = math.inf
    for seed in range(8):
        generator = np.random.default_rng(seed)
        image = generator.normal(size=(48, 512))
        text = image + 0.02 * generator.normal(size=image.shape)
        text, image = (
            (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (text, image)
        )
        ids = np.arange(48, dtype=np.int32)
        ids[1] = ids[0]
        loss, gradient = value(text, image, ids, np.float32(scale), chunk=chunk)
        logits = scale * torch.from_numpy(text).double() @ torch.from_numpy(image).double().T
        logits[0, 1] = logits[1, 0] = -math.inf
        target = torch.arange(48)
        cross_entropy = torch.nn.functional.cross_entropy
        expected = (cross_entropy(logits, target) + cross_entropy(logits.T, target)).item() / 2
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=2e-6)
        assert np.isfinite(gradient)
        lowest = min(lowest, float(loss))
    assert lowest >= 0

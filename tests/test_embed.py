"""Embedding with parameters passed to each call, and the pool that decodes photos."""

import jax
import numpy as np
import pytest
from PIL import Image

from configs import xlmr
from xlir import decoding, embed, train_step
from xlir.data import RetrievalSet
from xlir.embed import Parameters
from xlir.encoder import Encoder
from xlir.evaluate import Evaluator

TEXTS = ["A red circle, left.", "Quadrat, grün, Mitte", "빨간 원", ""]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Toy towers, both trainable, with a large learning rate."""
    config = xlmr.get_config("tiny")
    config.optimizer.update(learning_rate=0.05, warmup_steps=0, ema=0.5)
    return Encoder.create(config)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)) for _ in TEXTS]


@pytest.fixture(scope="module")
def states(encoder) -> list[train_step.TrainState]:
    """The states after one step and after three steps; each step deletes the previous state."""
    config, (params, frozen) = encoder.config, encoder.parameters
    layout, step = train_step.compile_step(config, encoder.embedder.graph, params, encoder.mesh)
    rng = np.random.default_rng(0)
    batch = {
        "text_ids": rng.integers(4, 260, (8, 12)).astype(np.int32),
        "text_mask": np.ones((8, 12), bool),
        "image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "image_id": np.arange(8, dtype=np.int32),
    }
    reached = []
    for steps in (1, 3):
        state = train_step.first_state(config, params, layout)
        for _ in range(steps):
            last, (state, _) = state, step(state, frozen, batch)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(last.params))
        reached.append(state)
    return reached


def retrieval_set(pictures) -> RetrievalSet:
    rows = np.arange(len(TEXTS))
    return RetrievalSet("hand-made", pictures, {"en": TEXTS}, {"en": rows}, "")


def test_an_encoder_keeps_its_parameters_while_a_state_of_them_is_trained(
    encoder, pictures, request
):
    """A training step deletes the arrays of its state, but no others."""
    before = encoder.encode_text(TEXTS), encoder.encode_image(pictures)
    request.getfixturevalue("states")
    np.testing.assert_array_equal(encoder.encode_text(TEXTS), before[0])
    np.testing.assert_array_equal(encoder.encode_image(pictures), before[1])


@pytest.mark.parametrize("part", ["params", "ema"])
def test_one_evaluator_takes_the_parameters_of_any_state(
    part, encoder, states, pictures, tmp_path, caplog
):
    """The evaluator is compiled once for all states."""
    fresh = Encoder(
        embed.Embedder(
            *(encoder.config, encoder.embedder.graph, encoder.tokenizer),
            *(encoder.specs, encoder.feature_dims, encoder.mesh),
        ),
        encoder.parameters,
    )
    evaluator = Evaluator(fresh, retrieval_set(pictures), tmp_path)
    frozen, found, compiled = encoder.parameters.frozen, [], []
    for state in states:
        caplog.clear()
        with jax.log_compiles():
            found.append(evaluator.embeddings(Parameters(getattr(state, part), frozen)))
        compiled.append(sum(message.startswith("Compiling") for message in caplog.messages))
    assert compiled[0] > 0
    assert compiled[1] == 0
    for one, other in zip(*(jax.tree.leaves(each) for each in found), strict=True):
        assert np.abs(one - other).max() > 1e-2
    results = evaluator(Parameters(states[1].best_params, frozen), 3)
    assert (results["step"], results["images"]) == (3, len(TEXTS))


def test_embeddings_of_a_state_are_those_of_an_encoder_of_it(encoder, states, pictures):
    parameters = Parameters(states[1].params, encoder.parameters.frozen)
    loaded = Encoder(encoder.embedder, parameters, step=3)
    for side, inputs, encode in (
        ("text", TEXTS, loaded.encode_text),
        ("image", pictures, loaded.encode_image),
    ):
        embedded = encoder.embedder.embed(parameters, side, inputs)
        np.testing.assert_array_equal(encode(inputs), embedded)
        features = encoder.embedder.features(parameters, side, inputs)
        again = encoder.embedder.embed_features(parameters, side, features)
        np.testing.assert_allclose(again, embedded, atol=1e-6)


def decode_number(number: int) -> np.ndarray:
    if number % 7 == 3:
        raise ValueError(f"{number} is broken")
    return np.full((1, 1, 3), number % 256, np.uint8)


def test_photos_are_decoded_in_order_with_errors_in_their_places():
    found = list(decoding.decode_each(decode_number, range(100), ahead=8))
    assert [item for item, _ in found] == list(range(100))
    for item, result in found:
        if item % 7 == 3:
            assert str(result) == f"{item} is broken"
        else:
            assert result[0, 0, 0] == item


def test_whoever_needs_all_photos_gets_the_first_error():
    decoded = decoding.decode_all(decode_number, range(100), ahead=50)
    for number in range(3):
        assert next(decoded)[0, 0, 0] == number
    with pytest.raises(ValueError, match="3 is broken"):
        next(decoded)


def test_no_more_photos_are_taken_than_are_decoded_ahead():
    taken = []
    decoded = decoding.decode_each(decode_number, (taken.append(i) or i for i in range(100)), 5)
    next(decoded)
    assert len(taken) == 6
    decoded.close()
    assert len(taken) == 6


def test_other_errors_are_not_taken_for_broken_photos():
    def fail(number: int) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        list(decoding.decode_each(fail, range(3), ahead=1))


def test_top_k_is_stable():
    scores = np.array([[0.5, 0.9, 0.5, 0.1], [0, 0, 0, 1]], np.float32)
    np.testing.assert_array_equal(embed.top_k(scores, 3), [[1, 0, 2], [3, 0, 1]])
    np.testing.assert_array_equal(embed.top_k(scores[0], None), [1, 0, 2, 3])

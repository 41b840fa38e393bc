"""`config.average`: the average of the start and the end is validated, loaded and exported."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.runs import checkpoint_of, interrupted_copy, metrics_of
from xlir import data, embed, evaluate, results, train
from xlir.encoder import Encoder

AVERAGE = 0.25


@pytest.fixture(scope="module")
def config(toy_config) -> ConfigDict:
    chosen = toy_config.copy_and_resolve_references().unlock()
    chosen.average = AVERAGE
    # The runs are packed too, because they have to resume bit for bit.
    chosen.text.pack = True
    return chosen


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("average") / "run"
    train.train(config, folder)
    return folder


def test_loading_interpolates_towers_between_start_and_end(run):
    start = Encoder.open(run).parameters.trained
    end, raw, used = (
        Encoder.load(run, checkpoint="latest", weights=weights).parameters.trained
        for weights in ("ema", "raw", "")
    )
    saved = checkpoint_of(run, 6)["params"]
    jax.tree.map(np.testing.assert_array_equal, raw, saved)
    for name in end:
        tower = name.endswith("_tower")
        expected = end[name]
        if tower:
            expected = jax.tree.map(
                lambda a, b: AVERAGE * np.float64(a) + (1 - AVERAGE) * np.float64(b),
                start[name],
                end[name],
            )
            moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start[name], end[name])
            assert max(jax.tree.leaves(moved)) > 1e-4
        jax.tree.map(
            lambda a, b, atol=1e-7 * tower: np.testing.assert_allclose(a, b, rtol=0, atol=atol),
            used[name],
            expected,
        )


def test_an_average_with_equal_parameters_changes_no_bit(run):
    start = Encoder.open(run).parameters.trained
    jax.tree.map(np.testing.assert_array_equal, embed.averaged(start, start, 0.3), start)


def test_the_average_is_what_was_validated(run, config):
    encoder = Encoder.load(run, checkpoint="latest")
    evaluator = evaluate.Evaluator(encoder, data.validation_set(config), data.feature_cache())
    found = results.scalars(evaluator(encoder.parameters, encoder.step))
    (logged,) = [x for x in metrics_of(run) if x["step"] == 6 and "loss" not in x]
    assert found.items() <= logged.items()


def test_a_resumed_run_averages_with_the_same_start(run, config, tmp_path):
    resumed = interrupted_copy(run, tmp_path / "run", 4)
    train.train(config, resumed)
    both = [checkpoint_of(folder, 6) for folder in (run, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert metrics_of(run) == metrics_of(resumed)

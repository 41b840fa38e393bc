"""Starting a run from another run's model (`config.init`)."""

import shutil

import jax
import numpy as np
import pytest

from configs import base, xlmr
from tests.runs import checkpoint_of, interrupted_copy, metrics_of, run_main
from xlir import initial, partition, train
from xlir.encoder import Encoder
from xlir.export import card

TEXTS = ["A red circle, left.", "oben: das Quadrat ist blau"]


@pytest.fixture
def config(photos, toy_run):
    """A run that continues both sides of `toy_run`."""
    config = xlmr.get_config("tiny")
    config.data.dir = str(photos)
    config.text.tower = config.image.tower = ""
    config.init, config.steps, config.eval_every, config.log_every = str(toy_run), 4, 2, 1
    # Those of the other run replace these values.
    config.embedding_dim, config.text.max_length, config.image.head = 99, 7, "none"
    return config


def pictures(photos):
    return sorted((photos / "images").iterdir())[:3]


def test_it_begins_with_the_embeddings_of_the_other_run(config, toy_run, photos):
    other, started = Encoder.load(toy_run), Encoder.create(config)
    np.testing.assert_array_equal(started.encode_text(TEXTS), other.encode_text(TEXTS))
    files = pictures(photos)
    np.testing.assert_array_equal(started.encode_image(files), other.encode_image(files))
    trained = started.parameters.trained
    for name in ("log_scale", "bias"):
        np.testing.assert_array_equal(trained[name], other.parameters.trained[name])
    assert started.scale != pytest.approx(1 / config.loss.temperature, rel=1e-6)  # it was learned
    assert started.config.embedding_dim == 16
    assert started.config.text.max_length == other.config.text.max_length


@pytest.mark.parametrize(("new", "kept"), [("text", "image"), ("image", "text")])
def test_a_side_that_names_a_tower_starts_anew(new, kept, config, toy_run, photos):
    config[new].tower = {"text": "toy-xlmr", "image": "toy-vit"}[new]
    config[new].head, config.text.max_length, config.loss.temperature = "linear", 128, 0.2
    other, started = Encoder.load(toy_run), Encoder.create(config)
    inputs = {"text": TEXTS, "image": pictures(photos)}
    found = {
        side: np.abs(
            getattr(started, f"encode_{side}")(inputs[side])
            - getattr(other, f"encode_{side}")(inputs[side])
        ).max()
        for side in inputs
    }
    assert found[kept] == 0
    assert found[new] > 0.01
    assert started.scale == pytest.approx(5)


def test_a_model_card_names_the_other_run(config):
    started = Encoder.create(config)
    assert "| tower | toy | toy |" in card._table(started)
    assert "- text tower: toy: see the terms of that checkpoint" in card._terms(started, "torch")


def test_it_resumes_without_the_other_run(config, toy_run, tmp_path):
    other = shutil.copytree(toy_run, tmp_path / "other")
    config.init = str(other)
    straight = tmp_path / "straight"
    train.train(config, straight)
    interrupted = interrupted_copy(straight, tmp_path / "interrupted", 2)
    shutil.rmtree(other)
    train.train(config, interrupted)
    runs = [checkpoint_of(folder, 4) for folder in (straight, interrupted)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert metrics_of(straight) == metrics_of(interrupted)


def test_a_head_that_subtracts_a_mean_keeps_it(config):
    """The mean of the new training set does not replace it."""
    config.text.head, mesh = "center", partition.single_device_mesh()
    params, features = {"text_head": {"mean": np.ones(3)}}, {"text": np.zeros((4, 3))}
    assert train._centered(config, params, features, mesh) is params
    config.text.tower = "toy-xlmr"
    (mean,) = train._centered(config, params, features, mesh)["text_head"].values()
    np.testing.assert_array_equal(mean, np.zeros(3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "absent"}, "config.init: absent is not the folder of a training run"),
        ({"init": ""}, r"config.text.tower is ''; it must be the name of a tower"),
        (
            {"text.tower": "muse", "image.tower": "toy-vit"},
            "it must be empty where both towers are named",
        ),
        ({"text.trim_vocab": "words"}, "whose vocabulary can't be trimmed"),
    ],
)
def test_what_is_refused(fields, message, config):
    config.update_from_flattened_dict(fields)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        Encoder.create(config)


def test_a_run_without_a_checkpoint_is_refused(config, toy_run, tmp_path):
    other = shutil.copytree(toy_run, tmp_path / "other")
    shutil.rmtree(other / "checkpoints")
    config.init = str(other)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        Encoder.create(config)


def test_the_command_line_says_it_in_one_line(toy_run, photos, tmp_path):
    flags = ["--config=configs/xlmr.py:tiny", f"--config.data.dir={photos}", "--config.init=absent"]
    flags += ["--config.text.tower=", f"--workdir={tmp_path / 'run'}"]
    process = run_main(*flags, check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "config.init: absent is not the folder of a training run" in line


def test_shardings_know_the_other_runs_towers(toy_run):
    flags = ["shardings", "--config=configs/base.py", f"--config.init={toy_run}", "--devices=8"]
    printed = run_main(*flags, "--config.data.name=captions").stdout
    (line,) = (line for line in printed.splitlines() if line.startswith("text_tower.embedding "))
    assert "float32[260,32]" in line


def test_without_init_nothing_changes():
    config = base.get_config()
    assert initial.resolve(config) is config

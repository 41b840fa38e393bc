"""A run folder that an earlier version wrote still loads, gives the same results, and resumes.

`data/run-of-ea4c6af.zip` holds a run of toy towers that commit ea4c6af trained for 5 of 8 steps
(both towers trained, a moving average, checkpoints of steps 4 and 5), and its data set of 24
drawings. It also holds that version's outputs: the results and embeddings of the best checkpoint,
and the loss curve and results of the same run after all 8 steps.
"""

import json
import pathlib
import zipfile

import numpy as np
import pytest

from input_pipeline.cache import fingerprint
from tests.runs import metrics_of
from xlir import data, evaluate, train
from xlir.encoder import Encoder
from xlir.workdir import read_config

ARCHIVE = pathlib.Path(__file__).parent / "data" / "run-of-ea4c6af.zip"


@pytest.fixture
def expected(tmp_path, monkeypatch) -> dict:
    """The outputs of the earlier version; the working folder holds its run in `run`."""
    zipfile.ZipFile(ARCHIVE).extractall(tmp_path)
    # The run's configuration names the folder of its data set relative to the working folder.
    monkeypatch.chdir(tmp_path)
    return json.loads(pathlib.Path("expected.json").read_text())


def earlier_fields(results: dict, earlier: dict) -> dict:
    """The fields of results that the earlier version had; it had fewer metrics."""
    return {
        name: earlier_fields(results[name], old) if isinstance(old, dict) else results[name]
        for name, old in earlier.items()
    }


def test_an_earlier_run_evaluates_to_the_same_digits(expected):
    encoder = Encoder.load("run")
    (test_set,) = data.test_sets(encoder.config)
    evaluate.report(encoder, test_set, pathlib.Path("run"), data.feature_cache())
    results = json.loads(pathlib.Path("run/results/multilingual_test-4.json").read_text())
    assert earlier_fields(results, expected["best"]) == expected["best"]
    for language, captions in test_set.captions.items():
        embeddings = expected["text_embeddings"][language]
        np.testing.assert_allclose(encoder.encode_text(captions), embeddings, atol=1e-5)


def test_an_earlier_run_resumes_to_the_same_curve(expected):
    workdir = pathlib.Path("run")
    train.train(read_config(workdir), workdir)
    curve = [(each["step"], each["loss"]) for each in metrics_of(workdir) if "loss" in each]
    np.testing.assert_allclose(curve, expected["loss"], rtol=1e-5)
    (results,) = workdir.glob("results/*.json")
    final = expected["final"][results.name]
    assert earlier_fields(json.loads(results.read_text()), final) == final


def test_features_that_an_earlier_version_kept_are_found(expected):
    """File names are fingerprints of the towers, including weights and names of parameters."""
    encoder = Encoder.open(pathlib.Path("run"))
    found = [
        fingerprint(encoder.embedder.describe_tower(encoder.parameters, side))
        for side in ("text", "image")
    ]
    assert found == ["fadf48af6105f7cabd03196e", "15855259361228d0707c36a4"]

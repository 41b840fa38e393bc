"""`Encoder.load(engine="onnxruntime")`: embeddings, and what it refuses."""

import shutil
import sys

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="needs torch and others: pip install 'xlir[export]'")

from configs import xlmr
from xlir import export
from xlir.encoder import Encoder
from xlir.export.verification import TOLERANCE

TEXTS = ["a dog", "ein Hund läuft durch den Schnee, und ein anderer sieht ihm zu", ""]


def saved(seed: int, folder):
    """A run of toys, without training."""
    config = xlmr.get_config("tiny")
    config.seed = seed
    Encoder.create(config).save_run(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with the graphs in its folder."""
    run = saved(0, tmp_path_factory.mktemp("exported") / "run")
    folder = run / "onnx"
    folder.mkdir()
    export.FORMATS["onnx"].write(Encoder.load(run, dtype="float32"), folder)
    return run


@pytest.fixture
def run(exported, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(exported, tmp_path / "run")


def test_embeddings_are_those_of_jax(exported):
    jax, onnx = (Encoder.load(exported, engine=name) for name in ("jax", "onnxruntime"))
    size = jax.preprocessing.size
    images = list(np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8))
    for name, inputs in (("encode_text", TEXTS), ("encode_image", images)):
        expected, embed = getattr(jax, name)(inputs), getattr(onnx, name)
        np.testing.assert_allclose(embed(inputs), expected, atol=TOLERANCE)
        # The graphs take any length and number.
        alone = np.concatenate([embed([x]) for x in inputs])
        np.testing.assert_allclose(alone, expected, atol=TOLERANCE)
    assert onnx.encode_text([]).shape == (0, 16)
    assert onnx.fingerprint() == jax.fingerprint()


def test_a_saved_encoder_keeps_its_graphs(exported, tmp_path):
    Encoder.load(exported, engine="onnxruntime").save_run(tmp_path / "copy")
    again = Encoder.load(tmp_path / "copy", engine="onnxruntime")
    assert np.isfinite(again.encode_text(["a dog"])).all()


def test_an_index_embeds_with_its_graphs(exported, tmp_path, photos):
    pytest.importorskip("lancedb", reason="needs pip install 'xlir[search]'")
    from xlir.search.index import Index

    folder = tmp_path / "photos.index"
    index = Index.create(folder, exported, engine="onnxruntime")
    assert index.add([photos / "images"]).new
    index = Index.open(folder, engine="onnxruntime")
    assert index.encoder.graphs is not None
    assert index.search("a dog", count=3)


def refused(run, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        Encoder.load(run, engine="onnxruntime")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_without_graphs_names_the_command(run):
    shutil.rmtree(run / "onnx")
    command = f"export --workdir={run} --to={run / 'onnx'} --format=onnx"
    assert command in refused(run, FileNotFoundError)


def test_graphs_of_other_weights_are_refused(exported, tmp_path):
    other = saved(1, tmp_path / "other")
    shutil.copytree(exported / "onnx", other / "onnx")
    assert "does not hold the weights of this checkpoint" in refused(other, ValueError)


def test_damaged_graphs_are_refused(run):
    (run / "onnx" / "image.onnx").write_bytes(b"damaged")
    assert "onnx is damaged" in refused(run, ValueError)
    (run / "onnx" / "config.json").write_text("[")
    assert "does not hold the weights" in refused(run, ValueError)


def test_onnxruntime_may_be_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install 'xlir[onnxruntime]'" in refused(run, FileNotFoundError)


def test_engines_are_named(run):
    with pytest.raises(ValueError, match="engine is 'torch'; known: jax, onnxruntime"):
        Encoder.load(run, engine="torch")

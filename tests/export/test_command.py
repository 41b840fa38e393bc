"""`export` as a user runs it: what is written, what is printed, and what is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="needs torch and others: pip install 'xlir[export]'")

import xlir
from xlir import export
from xlir.checkpoint import Checkpoints

# Runs a script where none of these can be imported.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jax", "flax", "xlir", "input_pipeline", {more})))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def transformers_run(command, photos, tmp_path_factory) -> pathlib.Path:
    """A run with towers that every format but `transformers` holds, and a moving average."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    command(
        "--config=configs/xlmr.py:tiny",
        f"--config.data.dir={photos}",
        "--config.data.test_set=multilingual_test",
        "--config.optimizer.ema=0.9",
        f"--workdir={folder}",
    )
    return folder


def left(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("format", "without"), [("torch", ""), ("onnx", '"torch", "safetensors"')])
def test_an_exported_folder_runs_by_its_example(
    format, without, command, workdir, photos, tmp_path
):
    to = tmp_path / "exported"
    printed = command("export", f"--workdir={workdir}", f"--to={to}", f"--format={format}").stdout
    assert "checked on 40 captions in de, en and 20 photos of multilingual_test" in printed
    assert "40 of 40 captions equal" in printed
    assert left(tmp_path) == ["exported"]
    card = (to / "README.md").read_text()
    assert "language:\n- de\n- en\n" in card
    assert "mUSE, Apache-2.0" in card
    assert ("`text.onnx`" in card) == (format == "onnx")
    images = [str(photos / "images" / f"0{i}.jpg") for i in range(2)]
    texts = ["A red circle, left.", "Quadrat, grün, Mitte"]
    script = [sys.executable, "-c", WITHOUT.format(more=without), str(to / "example.py")]
    process = subprocess.run(
        [*script, *images, "--texts", *texts],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert process.returncode == 0, process.stderr
    encoder = xlir.Encoder.load(workdir, dtype="float32")
    cosines = encoder.encode_text(texts) @ encoder.encode_image(images).T
    printed = [float(line.split()[0]) for line in process.stdout.splitlines()]
    np.testing.assert_allclose(printed, cosines.ravel(), atol=6e-4)
    # What a user sees is no clutter of caches.
    assert not list(to.rglob("__pycache__"))


def test_sentence_transformers_is_the_default_where_it_holds_the_model(
    command, transformers_run, photos, tmp_path
):
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    to = tmp_path / "new" / "exported"
    process = command("export", f"--workdir={transformers_run}", f"--to={to}")
    assert f"writing {to} (sentence-transformers)" in process.stderr
    assert f"written: {to}" in process.stdout
    model = SentenceTransformer(str(to))
    files = sorted((photos / "images").iterdir())[:3]
    texts = ["A red circle, left.", "Quadrat, grün, Mitte"]
    encoder = xlir.Encoder.load(transformers_run, dtype="float32")
    images = [Image.open(file) for file in files]
    np.testing.assert_allclose(model.encode(texts), encoder.encode_text(texts), atol=1e-5)
    np.testing.assert_allclose(model.encode(images), encoder.encode_image(files), atol=1e-5)
    assert not list(to.rglob("*.bin")) + list(to.rglob("*.p*k*l"))


def test_the_moving_average_or_the_last_weights(transformers_run, tmp_path, monkeypatch):
    load, seen = xlir.Encoder.load, []

    def stop(encoder, *_):
        seen.append(encoder.weights("text_head")["kernel"])
        raise ValueError("seen")

    monkeypatch.setitem(export.FORMATS, "torch", export.FORMATS["torch"]._replace(write=stop))
    for weights in ("", "ema", "raw"):
        with pytest.raises(ValueError, match="seen"):
            export.export(transformers_run, tmp_path / "exported", "torch", weights=weights)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert np.abs(seen[1] - seen[2]).max() > 1e-4
    np.testing.assert_array_equal(seen[0], load(transformers_run).weights("text_head")["kernel"])


def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(
    transformers_run, workdir, photos, tmp_path
):
    """The command's own words are what these raise (`main._report`)."""
    target = tmp_path / "out" / "exported"
    target.parent.mkdir()
    half = tmp_path / "half"
    shutil.copytree(transformers_run, half)
    (half / "text_tower" / "weights.safetensors").unlink()
    unsaved = shutil.copytree(transformers_run, tmp_path / "unsaved")
    shutil.rmtree(unsaved / "checkpoints")
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = shutil.copytree(transformers_run, tmp_path / "damaged")
    (damaged / "image_tower" / "tower.json").write_text('{"kind": ')
    for run, options, message in (
        (empty, {}, "not the folder of a training run"),
        (unsaved, {}, "holds no checkpoint yet"),
        (half, {}, "weights.safetensors"),
        (damaged, {}, "tower.json is damaged"),
        (workdir, {"format": "sentence-transformers"}, "it has no text tower 'muse'; it has no im"),
        (transformers_run, {"format": "transformers"}, "its text pooling is 'pooler', not 'mean'"),
        (transformers_run, {"format": "keras"}, "known: sentence-transformers, torch"),
        (workdir, {"weights": "ema"}, "keeps no moving average"),
        (transformers_run, {"test_set": str(empty)}, "test_image_names.txt"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as raised:
            export.export(run, target, **options)
        assert "\n" not in str(raised.value)
        assert left(target.parent) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_stays(kind, transformers_run, tmp_path):
    target = tmp_path / "exported"
    if kind == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already: name another folder"):
        export.export(transformers_run, target)
    assert (target / "mine" if kind == "folder" else target).read_text() == "mine"
    with pytest.raises(OSError, match="can't write to"):
        export.export(transformers_run, pathlib.Path("/proc/exported"))


def test_a_failed_check_leaves_nothing(transformers_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.verification, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="the exported model is not the run's"):
        export.export(transformers_run, tmp_path / "exported", "torch")
    assert left(tmp_path) == []


def test_flags_of_export(command, workdir, tmp_path):
    for arguments, message in (
        (["--workdir=x"], "export needs --to"),
        (["--to=x"], "export needs --workdir"),
        (["--workdir=x", "--to=y", "--weights=mean"], "weights"),
        (["--workdir=x", "--to=y", "--vocabulary=coco"], "--vocabulary goes with tag and eval"),
    ):
        process = command("export", *arguments, check=False)
        assert process.returncode == 2
        assert message in process.stderr
    process = command("export", f"--workdir={tmp_path}", "--to=y", check=False)
    assert process.returncode == 1
    assert process.stderr.startswith(f"xlir: {tmp_path} is not the folder of a training run")
    assert len(process.stderr.splitlines()) == 1


def test_exported_results_are_the_runs(transformers_run, tmp_path):
    report = export.export(transformers_run, tmp_path / "exported", "torch")
    with Checkpoints(transformers_run, read_only=True) as checkpoints:
        step = checkpoints.best_step()
    results = json.loads(
        (transformers_run / "results" / f"multilingual_test-{step}.json").read_text()
    )
    assert report.recall[0] == report.recall[1]
    card = (tmp_path / "exported" / "README.md").read_text()
    for language, scores in results["languages"].items():
        assert f"| {language} | {100 * scores['text_to_image']['R@1']:.1f} |" in card


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_e5_and_efficientnet(format, command, tiny, tmp_path):
    folder = os.environ.get("XLIR_E5_SMALL")
    if not folder:
        pytest.skip("set XLIR_E5_SMALL to a folder of multilingual-e5-small")
    run, (_, *flags) = tmp_path / "run", tiny
    e5 = ["--config=configs/flickr8k.py:e5", f"--config.text.tower={folder}"]
    command(*e5, *flags, "--config.image.tower=efficientnet-lite2", f"--workdir={run}")
    report = export.export(run, tmp_path / "exported", format)
    assert report.agrees
    assert max(report.embeddings.values()) <= 2e-6

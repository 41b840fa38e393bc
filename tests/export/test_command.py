"""The command `export`: what it writes, what it prints, and what it refuses."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("onnxscript", reason="needs torch and others: pip install 'xlir[export]'")

import xlir
from tests.conftest import REPOSITORY
from tests.runs import run_main
from xlir import export

# Runs a script in a process in which these packages can't be imported.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jax", "flax", "xlir", "input_pipeline", {more})))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def transformers_run(photos, tmp_path_factory) -> pathlib.Path:
    """A run with a moving average that every format except `transformers` can represent."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    run_main(
        "--config=configs/xlmr.py:tiny",
        f"--config.data.dir={photos}",
        "--config.evals={'multilingual_test': {'captions': 'multilingual_test'}}",
        "--config.optimizer.ema=0.9",
        f"--workdir={folder}",
    )
    return folder


def left(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The run of mUSE takes half a minute in each format.
EXAMPLES = [
    pytest.param("torch", "", "workdir", marks=pytest.mark.slow),
    pytest.param("onnx", '"torch", "safetensors"', "workdir", marks=pytest.mark.slow),
    ("onnx", '"torch", "safetensors"', "transformers_run"),
]


@pytest.mark.parametrize(("format", "without", "run"), EXAMPLES)
def test_an_exported_folder_runs_by_its_example(format, without, run, photos, tmp_path, request):
    workdir, to = request.getfixturevalue(run), tmp_path / "exported"
    printed = run_main("export", f"--workdir={workdir}", f"--to={to}", f"--format={format}").stdout
    assert "checked on 40 captions in de, en and 20 photos of multilingual_test" in printed
    assert "42 of 42 texts equal" in printed
    assert left(tmp_path) == ["exported"]
    card = (to / "README.md").read_text()
    assert "language:\n- de\n- en\n" in card
    assert ("mUSE, Apache-2.0" in card) == (run == "workdir")
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
    # Other users may read the folder too, and it contains no caches.
    assert {file.stat().st_mode & 0o777 for file in to.rglob("*") if file.is_file()} == {
        (workdir / "config.json").stat().st_mode & 0o777
    }
    assert not list(to.rglob("__pycache__"))


def test_sentence_transformers_is_the_default_where_it_holds_the_model(
    transformers_run, photos, tmp_path
):
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    to = tmp_path / "new" / "exported"
    process = run_main("export", f"--workdir={transformers_run}", f"--to={to}")
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


def test_the_moving_average_or_the_weights_themselves(transformers_run, tmp_path, monkeypatch):
    cards, kernels = {}, {}
    report = export.export(transformers_run, tmp_path / "checked", "torch")
    monkeypatch.setattr(export.verification, "verify", lambda *_: report)
    for weights in ("", "ema", "raw"):
        folder = tmp_path / f"exported-{weights}"
        export.export(transformers_run, folder, "torch", weights=weights)
        kernels[weights] = load_file(folder / "model.safetensors")["text_head.0.weight"]
        cards[weights] = (folder / "README.md").read_text()
    np.testing.assert_array_equal(kernels[""], kernels["ema"])
    assert np.abs(kernels["ema"] - kernels["raw"]).max() > 1e-4
    # The run was evaluated with the average, so there are no results for the raw weights.
    assert ["R@1" in cards[weights] for weights in ("", "ema", "raw")] == [True, True, False]


def test_what_can_not_be_exported_is_one_line_and_leaves_nothing(
    transformers_run, workdir, photos, tmp_path
):
    """The command prints the messages of these errors (`xlir.commands.errors`)."""
    target = tmp_path / "out" / "new" / "exported"
    (tmp_path / "out").mkdir()
    half = tmp_path / "half"
    shutil.copytree(transformers_run, half)
    (half / "text_tower" / "weights.safetensors").unlink()
    unsaved = shutil.copytree(transformers_run, tmp_path / "unsaved")
    shutil.rmtree(unsaved / "checkpoints")
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = shutil.copytree(transformers_run, tmp_path / "damaged")
    (damaged / "image_tower" / "tower.json").write_text('{"kind": ')
    results = shutil.copytree(transformers_run, tmp_path / "results")
    for file in (results / "results").glob("*.json"):
        file.write_text("{")
    for run, options, message in (
        (empty, {}, "not the folder of a training run"),
        (unsaved, {}, "holds no checkpoint yet"),
        (half, {}, "weights.safetensors"),
        (damaged, {}, "tower.json is damaged"),
        (results, {}, "multilingual_test-.*json is damaged"),
        (
            workdir,
            {"format": "sentence-transformers"},
            "has no text tower 'muse'; .*has no image",
        ),
        (transformers_run, {"format": "transformers"}, "text pooling is 'pooler', not 'mean'"),
        (transformers_run, {"format": "keras"}, "known: sentence-transformers, torch"),
        (workdir, {"weights": "ema"}, "keeps no moving average"),
        (transformers_run, {"test_set": str(empty)}, "test_image_names.txt"),
    ):
        with pytest.raises((ValueError, OSError), match=message) as raised:
            export.export(run, target, **options)
        assert "\n" not in str(raised.value)
        assert left(tmp_path / "out") == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_stays(kind, transformers_run, tmp_path):
    target = tmp_path / "exported"
    {
        "folder": target.mkdir,
        "file": lambda: target.write_text("mine"),
        "link": lambda: target.symlink_to(tmp_path / "nowhere"),
    }[kind]()
    before = target.lstat()
    with pytest.raises(FileExistsError, match="already exists: choose another folder"):
        export.export(transformers_run, target)
    assert target.lstat() == before
    assert left(tmp_path) == ["exported"]


def test_where_nothing_can_be_written(transformers_run, tmp_path):
    (tmp_path / "file").touch()
    for folder in (pathlib.Path("/proc"), tmp_path / "file"):
        with pytest.raises(OSError, match=f"can't write to {folder}"):
            export.export(transformers_run, folder / "exported")


def test_a_failed_check_leaves_nothing(transformers_run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.verification, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="the exported model differs from the run's"):
        export.export(transformers_run, tmp_path / "exported", "torch")
    assert left(tmp_path) == []


def test_a_signal_leaves_nothing(transformers_run, tmp_path):
    """SIGTERM arrives while the exported folder is checked."""
    script = "import os, signal, sys; from xlir import main; from xlir.export import verification\n"
    script += "verification.verify = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
    script += "main.leave(main.main())"
    arguments = ["export", f"--workdir={transformers_run}", f"--to={tmp_path / 'exported'}"]
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert process.returncode == 128 + signal.SIGTERM
    assert "checking the folder" in process.stderr
    assert left(tmp_path) == []


def test_flags_of_export(command, workdir, tmp_path):
    for arguments, message in (
        (["--workdir=x"], "export needs --to"),
        (["--to=x"], "export needs --workdir"),
        (["--workdir=x", "--to=y", "--weights=mean"], "weights"),
        (["--workdir=x", "--to=y", "--vocabulary=coco"], "--vocabulary is a flag of eval and tag"),
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
    step = xlir.Encoder.load(transformers_run).step
    results = json.loads(
        (transformers_run / "results" / f"multilingual_test-{step}.json").read_text()
    )
    assert len(report.examples.image_of) == 40
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
    assert max(report.embeddings.values()) <= 2e-6

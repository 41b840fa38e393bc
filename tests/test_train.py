"""Training: bit-for-bit resumption, equal steps on all meshes, refusals, and a run's files."""

import json
import math
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import base
from input_pipeline.datasets import captions
from input_pipeline.datasets.captioned_images import CaptionedImages
from tests.runs import checkpoint_of, interrupted_copy, metrics_of, run_main
from xlir import batches, partition, train, train_step
from xlir.checkpoint import Checkpoints
from xlir.embed import Parameters
from xlir.encoder import Encoder
from xlir.models import dual_encoder
from xlir.workdir import read_config

KILL = """
import os, signal
from xlir import checkpoint
save = checkpoint.Checkpoints.save
def save_and_die(self, step, *items):
    save(self, step, *items)
    if step == 20:
        {wait}
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = save_and_die
"""


@pytest.mark.parametrize(
    "wait",
    [pytest.param("self._manager.wait_until_finished()", marks=pytest.mark.slow), "pass"],
)
def test_kill_and_resume_equals_the_uninterrupted_run(wait, workdir, command, tiny, tmp_path):
    """kill -9 right after a checkpoint is saved, and while one is being written."""
    interrupted = tmp_path / "run"
    flags = [*tiny, f"--workdir={interrupted}"]
    killed = command(*flags, script=KILL.format(wait=wait), check=False)
    assert killed.returncode == -9, killed.stderr
    resumed = command(*flags)
    expected = "resuming from step 20" if wait != "pass" else "resuming from step"
    assert expected in resumed.stderr
    straight, again = (checkpoint_of(folder, 40) for folder in (workdir, interrupted))
    jax.tree.map(np.testing.assert_array_equal, straight, again)
    assert metrics_of(workdir) == metrics_of(interrupted)


@pytest.mark.slow  # test_faults.py resumes runs of toy-vit, test_distillation.py with microbatches
@pytest.mark.parametrize("image_tower", ["toy-vit", "toy-resnet"])
def test_trained_towers_resume_bit_for_bit(image_tower, photos, tmp_path):
    """Trains both towers with microbatches, dropout and augmentation; resumes to equal numbers."""
    flags = [
        "--config=configs/xlmr.py:tiny",
        f"--config.data.dir={photos}",
        f"--config.image.tower={image_tower}",
        "--config.image.mirror=True",
        "--config.data.microbatches=4",
        "--config.steps=9",
        "--config.eval_every=3",
        "--config.log_every=2",
    ]
    straight = tmp_path / "straight"
    run_main(*flags, f"--workdir={straight}")
    interrupted = interrupted_copy(straight, tmp_path / "interrupted", 6)
    assert "resuming from step 6" in run_main(*flags, f"--workdir={interrupted}").stderr
    runs = [checkpoint_of(folder, 9) for folder in (straight, interrupted)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert metrics_of(straight) == metrics_of(interrupted)


def test_a_run_resumes_from_a_checkpoint_between_validations(
    toy_config, toy_run, tmp_path, monkeypatch, caplog
):
    """It resumes bit for bit, and the best checkpoint is one of the validated checkpoints."""
    config, run = toy_config.copy_and_resolve_references(), tmp_path / "run"
    config.save_every = 1
    save = Checkpoints.save

    def save_and_die(self, step, *items):
        save(self, step, *items)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, run)
    monkeypatch.undo()
    assert Encoder.load(run, checkpoint="latest").step == 3
    assert Encoder.load(run).step == 2
    config.save_every = 5  # may change, because it does not affect the trained model
    with caplog.at_level("INFO"):
        train.train(config, run)
    assert "resuming from step 3" in caplog.text
    with Checkpoints(run, read_only=True) as checkpoints:
        assert {5, 6} <= set(checkpoints.steps())
    jax.tree.map(np.testing.assert_array_equal, *(checkpoint_of(f, 6) for f in (run, toy_run)))
    assert metrics_of(run) == metrics_of(toy_run)
    assert Encoder.load(run).step == Encoder.load(toy_run).step


def test_a_finished_run_only_evaluates_again(workdir, tiny):
    before = (workdir / "metrics.jsonl").read_text()
    process = run_main(*tiny, f"--workdir={workdir}")
    assert "zero-shot" in process.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_it_learns(workdir):
    losses = [record["loss"] for record in metrics_of(workdir) if "loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    results = json.loads(next((workdir / "results").glob("multilingual_test-*.json")).read_text())
    recall = {k: v["text_to_image"]["R@5"] for k, v in results["languages"].items()}
    assert recall["en"] > 0.5  # chance: 0.25
    assert results["zero_shot_macro"]["text_to_image"]["R@5"] == recall["de"] > 0.3


def test_what_a_run_leaves_behind(workdir):
    files = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    assert {
        "config.json",
        "metrics.jsonl",
        "text_tower/weights.safetensors",
        "text_tower/sentencepiece.model",
        "image_tower/weights.safetensors",
        "data.json",
        "machine.json",
        "report.html",
        "SHA256SUMS",
    } <= files
    kinds = {name.split(".", 1)[-1] for name in files if name.startswith("results/")}
    assert kinds == {"json", "recall.png", "queries.png", "results/SHA256SUMS"}
    assert any(name.startswith("tensorboard/events") for name in files)
    # Checkpoints do not contain frozen towers; heads and their optimizer state are small.
    assert sum(p.stat().st_size for p in (workdir / "checkpoints").rglob("*")) < 3_000_000


def test_where_the_time_goes(workdir):
    """Records the time waiting for data, the rest of a step, validation and saving."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "seconds/step" in record]
    assert len(steps) == 8
    for record in steps:
        per_step = record["seconds/data"] + record["seconds/step"]
        assert per_step * record["examples_per_second"] == pytest.approx(16)
        assert min(record["seconds/data"], record["seconds/step"]) >= 0
    after_validation = [record["step"] for record in steps if "seconds/evaluation" in record]
    assert after_validation == [15, 25, 35]
    assert all(record["seconds/save"] > 0 for record in steps if record["step"] in (15, 25, 35))


def test_a_trace_of_chosen_steps(tiny, tmp_path):
    flags = [f"--workdir={tmp_path}", "--config.steps=6", "--config.profile.steps=(2,3)"]
    process = run_main(*tiny, *flags)
    assert f"steps 2 to 3 are traced in {tmp_path / 'profile'}" in process.stderr
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train_step" in trace.read_bytes()


def test_test_photos_are_kept_out_of_training(one_device):
    # The split train has 38 photos, and 4 of them are in the test set.
    assert "34 training photos with 68 captions; 4 photos of the test set removed" in (
        one_device.workdir.with_name("err").read_text()
    )


def test_another_configuration_is_refused_with_the_fields(workdir, tiny):
    process = run_main(
        *tiny,
        f"--workdir={workdir}",
        "--config.seed=3",
        "--config.loss.name=sigmoid",
        check=False,
    )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert "config.loss.name ('infonce' -> 'sigmoid'), config.seed (0 -> 3)" in line


def test_a_run_goes_on_where_only_the_machine_differs(workdir, tiny):
    """Mesh, microbatches, rematerialisation and logging do not affect the trained model."""
    flags = ["--config.mesh.data=1", "--config.log_every=7", "--config.text.remat=True"]
    process = run_main(*tiny, *flags, f"--workdir={workdir}", "--config.profile.steps=(1,2)")
    assert "resuming from step 40" in process.stderr


def test_a_run_of_an_older_version_has_the_defaults_of_newer_fields(workdir, tmp_path):
    saved = json.loads((workdir / "config.json").read_text())
    del saved["mesh"], saved["loss"]["chunk"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert read_config(tmp_path) == read_config(workdir)


def test_divergence_stops_and_keeps_what_was_saved(tiny, tmp_path):
    flags = ["--config.optimizer.clip_norm=0.0", "--config.optimizer.learning_rate=1e18"]
    flags += ["--config.optimizer.warmup_steps=25"]
    process = run_main(*tiny, *flags, f"--workdir={tmp_path}", check=False)
    assert process.returncode == 1
    assert "diverged" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_a_batch_that_does_not_divide_over_the_devices(command, tiny, tmp_path):
    process = command(
        *tiny,
        "--config.data.batch_size=12",
        f"--workdir={tmp_path}",
        check=False,
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
    assert process.returncode == 1
    assert "batch_size=12 does not divide over 8 devices" in process.stderr


SIGNAL_IN_FIRST_BATCH = """
import os, signal, time
from input_pipeline import loader
iterate = loader.iterate
def signalled(*args, **options):
    for batch in iterate(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        yield batch
loader.iterate = signalled
"""


def test_sigterm_ends_a_run_at_once_before_its_first_step(command, tiny, tmp_path):
    """Reading a large batch and compiling may take minutes, and there is nothing to save yet."""
    flags = [*tiny, f"--workdir={tmp_path / 'run'}"]
    process = command(*flags, script=SIGNAL_IN_FIRST_BATCH, check=False)
    assert process.returncode == -signal.SIGTERM, process.stderr
    assert "SIGTERM" not in process.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) == []


@pytest.mark.parametrize(
    ("frozen", "mesh"), [(True, {"data": 8, "fsdp": 1}), (False, {"data": 2, "fsdp": 4})]
)
def test_a_step_on_eight_devices_equals_one(frozen, mesh, workdir):
    """Compares parameters after three steps with dropout, for frozen and fine-tuned towers."""
    config = read_config(workdir)
    config.text.frozen = frozen
    config.head_dtype = "float32"
    config.optimizer.ema = 0.9
    rng = np.random.default_rng(0)
    batch = {
        "image_features": rng.normal(size=(16, 1280)).astype(np.float32),
        "image_id": np.arange(16, dtype=np.int32) // 2 * 2,
    }
    if frozen:
        batch["text_features"] = rng.normal(size=(16, 512)).astype(np.float32)
    else:
        batch["text_ids"] = rng.integers(3, 1000, (16, 8)).astype(np.int32)
        batch["text_mask"] = np.arange(8) < rng.integers(2, 9, (16, 1))
    meshes = (partition.single_device_mesh(), partition.create_mesh(mesh))
    one, other = (take_steps(config, workdir, batch, mesh) for mesh in meshes)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def take_steps(config: ConfigDict, workdir, batch, mesh):
    source = Encoder.open(workdir)
    opened = nnx.merge(source.embedder.graph, *source.parameters)
    model = dual_encoder.DualEncoder(
        config, opened.text_tower, opened.image_tower, rngs=nnx.Rngs(config.seed)
    )
    encoder = Encoder.from_model(config, model, source.tokenizer, source.specs, mesh)
    params, frozen = encoder.parameters
    layout, step = train_step.compile_step(config, encoder.embedder.graph, params, mesh)
    towers = [name for name in params if "tower" in name]
    assert towers == ([] if config.text.frozen else ["text_tower"])
    with jax.set_mesh(mesh):
        state = train_step.first_state(config, params, layout)
        for _ in range(3):
            state, _ = step(state, frozen, partition.global_batch(batch, mesh))
    kept = jax.tree.map(lambda x, expected: x.sharding == expected.sharding, state, layout)
    assert all(jax.tree.leaves(kept))
    moved = jax.tree.map(lambda a, b: (np.asarray(a) != np.asarray(b)).any(), params, state.params)
    assert all(jax.tree.leaves({k: v for k, v in moved.items() if k != "bias"}))
    return state.params, state.ema


@pytest.fixture(scope="module")
def without_heads():
    """An encoder in which only temperature and bias are trained, and its training step."""

    def create(temperature: float, learning_rate: float = 0.05):
        config = base.get_config()
        config.text.tower, config.image.tower = "toy-xlmr", "toy-vit"
        config.text.head = config.image.head = "none"
        config.embedding_dim, config.steps, config.loss.temperature = 32, 1000, temperature
        config.optimizer.update(learning_rate=learning_rate, warmup_steps=0, ema=0.5)
        encoder = Encoder.create(config)
        params, graph = encoder.parameters.trained, encoder.embedder.graph
        layout, step = train_step.compile_step(config, graph, params, encoder.mesh)
        return encoder, train_step.first_state(config, params, layout), step

    return create


def pairs_of(noise: float) -> dict[str, np.ndarray]:
    """Features of pairs; with less noise, the features of a pair are more similar."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(16, 32)).astype(np.float32)
    image = text + noise * rng.normal(size=text.shape).astype(np.float32)
    ids = np.arange(16, dtype=np.int32)
    return {"text_features": text, "image_features": image, "image_id": ids}


# CLIP's published logit_scale is 4.6052, a little above ln 100.
@pytest.mark.parametrize(
    ("temperature", "noise", "expected"),
    [(0.01, 3.0, "falls"), (math.exp(-4.6052), 3.0, "falls"), (0.04, 0.9, "rises")],
)
def test_the_temperature_is_learned_up_to_its_bound(temperature, noise, expected, without_heads):
    """From the bound, the scale falls if pairs are hard to tell apart; otherwise it stays there."""
    encoder, state, step = without_heads(temperature, 0.05 if expected == "falls" else 0.2)
    scales, frozen = [encoder.scale], encoder.parameters.frozen
    for _ in range(24):
        state, metrics = step(state, frozen, pairs_of(noise))
        assert metrics["gradient_norm"] > 0
        for params in (state.ema, state.params):
            assert params["log_scale"] <= np.float32(math.log(100))
            scale = Encoder(encoder.embedder, Parameters(params, frozen)).scale
            assert scale <= 100
        scales.append(scale)
    if expected == "falls":
        assert scales[0] == pytest.approx(100, rel=1e-6)
        assert (np.diff(scales) < 0).all()
        assert scales[-1] < 60
    else:
        assert scales[0] == pytest.approx(25)
        assert max(scales) == pytest.approx(100, rel=1e-6)


def test_the_temperature_of_a_run_that_was_beyond_its_bound(without_heads):
    """Old runs may have a scale above 100: it is 100 when loaded, and training can lower it."""
    encoder, state, step = without_heads(0.01)
    beyond = {**state.params, "log_scale": jax.numpy.float32(5.5)}
    frozen = encoder.parameters.frozen
    assert Encoder(encoder.embedder, Parameters(beyond, frozen)).scale == 100
    state = train_step.TrainState(state.step, beyond, state.optimizer, state.ema)
    state, metrics = step(state, frozen, pairs_of(3.0))
    assert metrics["temperature"] == np.float32(0.01)
    assert metrics["gradient_norm"] > 0
    for _ in range(3):
        state, _ = step(state, frozen, pairs_of(3.0))
    assert state.params["log_scale"] < math.log(100) - 0.05


def test_photos_are_told_apart_whatever_their_ids(photos, without_heads):
    """Ids have 64 bits; two rows with the same id show the same photo."""
    encoder, *_ = without_heads(0.01)
    training = CaptionedImages(captions.prepare(photos), "train")
    training.image_ids[:6] = 5, 2**32 + 5, 2**32 - 1, -1, 5, 2**63 - 1
    ids = training.image_ids
    cached = {side: np.zeros((len(ids), 4), np.float32) for side in ("text", "image")}
    read = batches.of_rows(training, [""] * len(ids), encoder.embedder, cached)
    rows = np.array([3, 0, 1, 2, 4, 5, 0, 9])
    image_id = read(rows, rows, 1, rows)["image_id"]
    assert image_id.dtype == np.int32
    np.testing.assert_array_equal(
        image_id[:, None] == image_id[None, :], ids[rows][:, None] == ids[rows][None, :]
    )

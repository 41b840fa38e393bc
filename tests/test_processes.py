"""Equal losses and batches on 1 device, 8 devices, 2 processes, and across all of these."""

import json
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from tests.runs import (
    RECORD,
    STEPS,
    Run,
    assert_same_curves,
    batches_of,
    flags_of,
    run,
    run_once,
    terminate,
    whole_run,
)
from xlir import partition
from xlir.encoder import Encoder


@pytest.fixture(scope="session")
def flags(photos) -> list[str]:
    return flags_of(photos)


@pytest.fixture(scope="session")
def eight_devices(flags, session_folder) -> Run:
    return whole_run(session_folder / "eight", [*flags, "--config.mesh.fsdp=8"], devices=8)


@pytest.fixture(scope="session")
def two_processes(flags, session_folder) -> Run:
    flags = [*flags, "--config.mesh.fsdp=4"]
    return whole_run(session_folder / "two", flags, processes=2, devices=4)


@pytest.fixture(scope="session")
def interrupted(flags, stopped, session_folder) -> Run:
    """A run that stops on 1 device, then in 2 processes of 4 devices, and ends on 8 devices."""
    folder = session_folder / "interrupted"
    return run_once(folder, lambda folder: train_in_legs(folder, flags, stopped))


def train_in_legs(folder: pathlib.Path, flags: list[str], stopped: Run) -> list[list]:
    """Trains the run of `interrupted`; returns the batches."""
    record = RECORD.format(folder=folder)
    shutil.copytree(stopped.workdir, folder / "run")
    batches = list(stopped.batches)

    script = record + terminate(12, processes=2)
    ended = run(folder, [*flags, "--config.mesh.fsdp=4"], script=script, processes=2, devices=4)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert "resuming from step 6\n" in ended.err
    # The processes agree on a step to stop after.
    step = max(int(path.name) for path in (folder / "run" / "checkpoints").glob("[0-9]*"))
    assert 12 <= step < STEPS
    said = f"stopped by SIGTERM after step {step}, which is saved"
    assert f"\nxlir: {said}; run the same command again to resume" in ended.err
    batches += batches_of(folder, 6, step, processes=2)

    ended = run(folder, [*flags, "--config.mesh.fsdp=8"], script=record, devices=8)
    assert ended.code == 0, ended.err
    assert f"resuming from step {step}\n" in ended.err
    return batches + batches_of(folder, step, STEPS)


# The interrupted run combines the parts of the other two runs.
MESHES = [
    pytest.param("eight_devices", marks=pytest.mark.slow),
    pytest.param("two_processes", marks=pytest.mark.slow),
    "interrupted",
]


@pytest.mark.parametrize("where", MESHES)
def test_the_same_numbers_everywhere(where, one_device, request):
    assert_same_curves(request.getfixturevalue(where).workdir, one_device.workdir)


@pytest.mark.parametrize("where", MESHES)
def test_the_same_batches_everywhere(where, one_device, request):
    """Photos, captions and their augmentation are the same; no row is read twice."""
    assert all([row[0] for row in rows] == list(range(16)) for rows in one_device.batches)
    assert len({tuple(row[1] for row in rows) for rows in one_device.batches}) == STEPS
    assert request.getfixturevalue(where).batches == one_device.batches


@pytest.mark.parametrize("where", MESHES)
def test_the_same_results_written_once(where, one_device, request):
    other = request.getfixturevalue(where)
    (name,) = (path.name for path in (one_device.workdir / "results").glob("*.json"))
    files = [run.workdir / "results" / name for run in (one_device, other)]
    expected, got = (json.loads(file.read_text()) for file in files)
    assert got == expected
    assert sorted(path.name for path in files[1].parent.iterdir()) == sorted(
        path.name for path in files[0].parent.iterdir()
    )
    assert other.out.count(f"written: {files[1]}") == 1


# The devices from which a checkpoint was saved, and those onto which it is loaded.
MOVES = [
    pytest.param("eight_devices", 1, marks=pytest.mark.slow),
    ("one_device", 8),
    pytest.param("two_processes", 1, marks=pytest.mark.slow),
    pytest.param("two_processes", 8, marks=pytest.mark.slow),
    ("interrupted", 1),
]


@pytest.mark.parametrize(("where", "devices"), MOVES)
def test_checkpoints_restore_onto_other_devices(where, devices, one_device, request):
    """Each device gets its shard, and the embeddings are the same."""
    workdir = request.getfixturevalue(where).workdir
    mesh = partition.create_mesh({"data": 1, "fsdp": devices}, jax.devices()[:devices])
    encoder = Encoder.load(workdir, mesh=mesh)
    table = encoder.parameters.trained["text_tower"]["embedding"]
    assert len(table.addressable_shards) == devices
    assert table.addressable_shards[0].data.shape == (260, 32 // devices)
    texts = ["A red circle, left.", "oben: das Quadrat ist blau"]
    expected = Encoder.load(one_device.workdir).encode_text(texts)
    np.testing.assert_allclose(encoder.encode_text(texts), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_evaluation_on_other_devices(eight_devices, tmp_path):
    """`eval` of a run that was trained on more devices than this machine has."""
    folder = tmp_path / "copy"
    shutil.copytree(eight_devices.workdir, folder / "run")
    (file,) = (folder / "run" / "results").glob("*.json")
    expected = json.loads(file.read_text())
    file.unlink()
    ended = run(folder, ["eval"])
    assert ended.code == 0, ended.err
    assert json.loads(file.read_text()) == expected

"""One loss curve and one order of batches on 1 device, on 8, in 2 processes, and across them."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.conftest import REPOSITORY, keep_compiled
from tests.test_train import metrics_of
from xlir import partition
from xlir.encoder import Encoder

STEPS = 20
TIMEOUT = 280

# Takes the place of Python in launch.sh: `python -m xlir.main` with something done before.
PYTHON = """#!{python}
import logging, os, sys
sys.path[0] = os.getcwd()
del sys.argv[1:3]  # -m xlir.main
# As main does it, and before libraries do it.
logging.basicConfig(format="%(message)s", level=logging.WARNING)
{script}
from xlir import main
main.leave(main.main())
"""
# Batches are read ahead, so more of them may be recorded than were trained on.
RECORD = """
import json, zlib
import jax
from input_pipeline import loader
read = loader.Batches.__getitem__
def read_and_record(self, step):
    batch = read(self, step)
    rows = [
        [place, batch["image_id"][row].item(), sum(zlib.crc32(x[row].tobytes()) for x in arrays)]
        for arrays in [batch.values()] for row, place in enumerate(self._places.tolist())
    ]
    with open("{folder}/batches-" + str(jax.process_index()), "a") as file:
        file.write(json.dumps([step, rows]) + "\\n")
    return batch
loader.Batches.__getitem__ = read_and_record
"""
# Every process calls `write` after each step, as --config.log_every=1, before anything is saved.
AFTER_STEP = """
import os, signal, time
import jax
from xlir.metric_log import MetricLog
def act_and_write(self, step, metrics, write=MetricLog.write):
    if "loss" in metrics and step == {step} and jax.process_index() == {process}:
        {action}
    elif step > {step}:
        time.sleep({pause})
    write(self, step, metrics)
MetricLog.write = act_and_write
"""


@dataclasses.dataclass
class Ended:
    """What a command has left.

    Attributes:
      code: exit code.
      out: standard output.
      err: standard error.
      end: when it ended, as `time.time()`.
    """

    code: int
    out: str
    err: str
    end: float


def after_step(step: int, action: str, *, process: int = 0, pause: float = 0) -> str:
    """A script that acts in one process after a step; all then pause after each step."""
    return AFTER_STEP.format(step=step, process=process, action=action, pause=pause)


def terminate(step: int, *, processes: int = 1) -> str:
    """A script that sends SIGTERM after a step: where there are several processes, to launch.sh."""
    if processes == 1:
        return after_step(step, "os.kill(os.getpid(), signal.SIGTERM)")
    # Which passes it on while steps are taken; not so many that the run would end before.
    return after_step(step, "os.kill(os.getppid(), signal.SIGTERM)", pause=1)


def run(
    folder: pathlib.Path,
    flags: list[str],
    *,
    script: str = "",
    processes: int = 1,
    devices: int = 1,
) -> Ended:
    """Runs xlir.main in `folder`/run, in processes of so many CPU devices each."""
    folder.mkdir(exist_ok=True)
    python = folder / f"python-{len(list(folder.glob('python-*')))}"
    python.write_text(PYTHON.format(python=sys.executable, script=script))
    python.chmod(0o755)
    command = [str(python), "-m", "xlir.main"]
    environment = {**os.environ, "PYTHON": str(python), **keep_compiled()}
    if processes > 1:
        command = ["./launch.sh", "local", f"--processes={processes}", f"--devices={devices}", "--"]
    else:
        environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    command += [*flags, f"--workdir={folder / 'run'}"]
    out, err = folder / "out", folder / "err"
    with out.open("w") as out_file, err.open("w") as err_file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=out_file, stderr=err_file
        )
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still runs after {TIMEOUT} s\n{out.read_text()}{err.read_text()}")
    finally:
        end = time.time()
        left = end_all(folder)
        process.wait()
    assert not left, f"processes are left behind: {left}"
    return Ended(code, out.read_text(), err.read_text(), end)


def end_all(folder: pathlib.Path) -> list[str]:
    """Ends what still runs in a folder; returns its command lines."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            if any(str(folder) in word for word in words):
                os.kill(int(path.name), signal.SIGKILL)
                found.append(" ".join(words))
        except (OSError, UnicodeDecodeError):  # has ended by itself
            continue
    return found


def curve_of(workdir: pathlib.Path, name: str) -> np.ndarray:
    """A metric at each step."""
    records = [record for record in metrics_of(workdir) if name in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return np.array([record[name] for record in records])


def assert_same_curves(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """The metrics of two runs at each step, and their evaluations."""
    for name, tolerance in (("loss", 1e-5), ("gradient_norm", 1e-4), ("learning_rate", 0)):
        got, wanted = (curve_of(folder, name) for folder in (workdir, expected))
        print(f"{name} within {np.max(np.abs(got - wanted) / np.maximum(wanted, 1e-9)):.1e}")
        np.testing.assert_allclose(got, wanted, rtol=tolerance)
    validations = [
        [record for record in metrics_of(folder) if "loss" not in record]
        for folder in (workdir, expected)
    ]
    assert validations[0] == validations[1]


def batches_of(folder: pathlib.Path, first: int, last: int, processes: int = 1) -> list[list]:
    """Rows of the batches of some steps, of all processes: [place, image id, checksum].

    The records are taken away, so that those of another leg of the run follow.
    """
    batches = [[] for _ in range(first, last)]
    for process in range(processes):
        file = folder / f"batches-{process}"
        records = dict(json.loads(line) for line in file.read_text().splitlines())
        file.unlink()
        for step in range(first, last):
            assert len(records[step]) == 16 // processes
            batches[step - first] += records[step]
    return [sorted(rows) for rows in batches]


def flags_of(photos: pathlib.Path) -> list[str]:
    """Of a run of toy towers, both trained, with augmentation and dropout."""
    return [
        "--config=configs/xlmr.py:tiny",
        f"--config.data.dir={photos}",
        "--config.evals={'multilingual_test': {'captions': 'multilingual_test'}}",
        "--config.text.head=mlp",
        "--config.text.hidden=(32,)",
        f"--config.steps={STEPS}",
        "--config.log_every=1",
    ]


@dataclasses.dataclass
class Run:
    """A finished run: its workdir, the batches it was trained on, and its last output."""

    workdir: pathlib.Path
    batches: list[list]
    out: str


def whole_run(folder: pathlib.Path, flags: list[str], **where: int) -> Run:
    ended = run(folder, flags, script=RECORD.format(folder=folder), **where)
    assert ended.code == 0, ended.err
    batches = batches_of(folder, 0, STEPS, where.get("processes", 1))
    return Run(folder / "run", batches, ended.out)


@functools.cache
def run_on_one_device(photos: pathlib.Path, folder: pathlib.Path) -> Run:
    """What all runs are compared with; also in test_faults.py, for which it is not run again."""
    return whole_run(folder, flags_of(photos))


@pytest.fixture(scope="session")
def flags(photos) -> list[str]:
    return flags_of(photos)


@pytest.fixture(scope="session")
def one_device(photos, tmp_path_factory) -> Run:
    return run_on_one_device(photos, tmp_path_factory.getbasetemp() / "one-device")


@pytest.fixture(scope="session")
def eight_devices(flags, tmp_path_factory) -> Run:
    return whole_run(tmp_path_factory.mktemp("eight"), [*flags, "--config.mesh.fsdp=8"], devices=8)


@pytest.fixture(scope="session")
def two_processes(flags, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("two")
    return whole_run(folder, [*flags, "--config.mesh.fsdp=4"], processes=2, devices=4)


@pytest.fixture(scope="session")
def interrupted(flags, tmp_path_factory) -> Run:
    """Stopped by SIGTERM on one device, then in two processes of four; ended on eight devices."""
    folder = tmp_path_factory.mktemp("interrupted")
    record = RECORD.format(folder=folder)
    ended = run(folder, flags, script=record + terminate(6))
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert "after step 6, which is saved" in ended.err
    batches = batches_of(folder, 0, 6)

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
    batches += batches_of(folder, step, STEPS)
    return Run(folder / "run", batches, ended.out)


# Of the two whole runs the interrupted one has the parts.
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
    """Photos, captions and what augmentation has made of them; no row is read twice."""
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


# The devices that a checkpoint was saved from -> those that it is loaded onto.
MOVES = [
    pytest.param("eight_devices", 1, marks=pytest.mark.slow),
    ("one_device", 8),
    pytest.param("two_processes", 1, marks=pytest.mark.slow),
    pytest.param("two_processes", 8, marks=pytest.mark.slow),
    ("interrupted", 1),
]


@pytest.mark.parametrize(("where", "devices"), MOVES)
def test_checkpoints_restore_onto_other_devices(where, devices, one_device, request):
    """Each device gets its part, and photos and captions their embeddings."""
    workdir = request.getfixturevalue(where).workdir
    mesh = partition.create_mesh({"data": 1, "fsdp": devices}, jax.devices()[:devices])
    encoder = Encoder.load(workdir, mesh=mesh)
    table = encoder.params["text_tower"]["embedding"].get_value()
    assert len(table.addressable_shards) == devices
    assert table.addressable_shards[0].data.shape == (260, 32 // devices)
    texts = ["A red circle, left.", "oben: das Quadrat ist blau"]
    expected = Encoder.load(one_device.workdir).encode_text(texts)
    np.testing.assert_allclose(encoder.encode_text(texts), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_evaluation_on_other_devices(eight_devices, tmp_path):
    """`eval` of a run that was split over more devices than there are."""
    folder = tmp_path / "copy"
    shutil.copytree(eight_devices.workdir, folder / "run")
    (file,) = (folder / "run" / "results").glob("*.json")
    expected = json.loads(file.read_text())
    file.unlink()
    ended = run(folder, ["eval"])
    assert ended.code == 0, ended.err
    assert json.loads(file.read_text()) == expected

"""Starts runs that several tests share, and reads their output."""

import contextlib
import dataclasses
import fcntl
import io
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Calls `make(folder)` once: if another worker has done it or is doing it, waits and returns.

    A file beside the folder records that the folder was made.
    """
    with open(f"{folder}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if lock.read() != "made":
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            lock.write("made")
    return folder


def run_main(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs the command line in this process, on one device; returns it as a finished process.

    This saves the seconds that a new process needs to import JAX. Tests that kill the program,
    replace modules or read output while it runs need a new process: the fixture `command`.
    """
    # Imported here, because jaxtyping's checks are installed after conftest.py is imported.
    import jax

    from xlir import data, main

    out, err = (io.TextIOWrapper(io.BytesIO(), "utf8", write_through=True) for _ in range(2))
    handler = logging.StreamHandler(err)
    logging.root.addHandler(handler)
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    data.open_data_set.cache_clear()  # as in a new process
    try:
        with (
            contextlib.chdir(REPOSITORY),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", ["xlir", *arguments]),
            mock.patch.object(jax, "devices", return_value=jax.devices()[:1]),
            mock.patch.object(jax, "device_count", return_value=1),
            mock.patch.object(sys, "unraisablehook", sys.unraisablehook),
            mock.patch.dict(os.environ),
            warnings.catch_warnings(),
        ):
            code = main.main()
    finally:
        logging.root.removeHandler(handler)
        for number, action in signals.items():
            signal.signal(number, action)
    printed = (file.buffer.getvalue().decode() for file in (out, err))
    process = subprocess.CompletedProcess(arguments, code, *printed)
    if check:
        assert code == 0, process.stdout + process.stderr
    return process


def interrupted_copy(run: pathlib.Path, folder: pathlib.Path, step: int) -> pathlib.Path:
    """A copy of a finished run, as if a process had ended after its checkpoint of `step`."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "results", ignore_errors=True)
    for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
        if int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    assert (folder / "checkpoints" / str(step)).is_dir()
    return folder


def metrics_of(workdir):
    """The records of a run, without values that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("examples_per_second", "seconds/")
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def checkpoint_of(workdir, step):
    """All arrays of a checkpoint."""
    import orbax.checkpoint as ocp  # here, because it imports JAX

    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        names = ("params", "optimizer")
        items = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
        return dict(manager.restore(step, args=items))


STEPS = 20
TIMEOUT = 280

# Replaces Python in launch.sh: runs a script, then `python -m xlir.main`.
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
# Batches are read ahead, so more batches may be recorded than were trained on.
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
# Every process calls `write` after each step (--config.log_every=1), before anything is saved.
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
    """A command that has ended.

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
    """A script that acts in one process after a step; then all processes pause at each step."""
    return AFTER_STEP.format(step=step, process=process, action=action, pause=pause)


def terminate(step: int, *, processes: int = 1) -> str:
    """A script that sends SIGTERM after a step; with several processes, to launch.sh."""
    if processes == 1:
        return after_step(step, "os.kill(os.getpid(), signal.SIGTERM)")
    # launch.sh forwards the signal. The pauses keep the run from ending before it arrives.
    return after_step(step, "os.kill(os.getppid(), signal.SIGTERM)", pause=1)


def run(
    folder: pathlib.Path,
    flags: list[str],
    *,
    script: str = "",
    processes: int = 1,
    devices: int = 1,
) -> Ended:
    """Runs xlir.main in `folder`/run; `devices` is the number of CPU devices per process."""
    folder.mkdir(exist_ok=True)
    python = folder / f"python-{len(list(folder.glob('python-*')))}"
    python.write_text(PYTHON.format(python=sys.executable, script=script))
    python.chmod(0o755)
    command = [str(python), "-m", "xlir.main"]
    environment = {**os.environ, "PYTHON": str(python)}
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
    """Kills processes whose command lines name a folder; returns these command lines."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            if any(str(folder) in word for word in words):
                os.kill(int(path.name), signal.SIGKILL)
                found.append(" ".join(words))
        except (OSError, UnicodeDecodeError):  # it has ended by itself
            continue
    return found


def curve_of(workdir: pathlib.Path, name: str) -> np.ndarray:
    """A metric at each step."""
    records = [record for record in metrics_of(workdir) if name in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return np.array([record[name] for record in records])


def assert_same_curves(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """Asserts that two runs have the same metrics at each step, and the same evaluations."""
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
    """Rows of the batches of some steps, over all processes: [place, image id, checksum].

    The records are deleted, so that the next part of the run starts a new file.
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
    """Flags of a run with toy towers, both trained, with augmentation and dropout."""
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
    """A run in `folder`, trained unless another worker has already done it."""

    def train(folder: pathlib.Path) -> list[list]:
        ended = run(folder, flags, script=RECORD.format(folder=folder), **where)
        assert ended.code == 0, ended.err
        return batches_of(folder, 0, STEPS, where.get("processes", 1))

    return run_once(folder, train)


def train_until_stopped(folder: pathlib.Path, flags: list[str], step: int = 6) -> list[list]:
    """Trains a run until SIGTERM arrives between two checkpoints; returns its batches."""
    ended = run(folder, flags, script=RECORD.format(folder=folder) + terminate(step))
    assert ended.code == 128 + signal.SIGTERM, ended.err
    said = f"stopped by SIGTERM after step {step}, which is saved"
    assert ended.err.splitlines()[-1] == f"xlir: {said}; run the same command again to resume"
    assert ended.err.count("SIGTERM") == 1
    assert "Traceback" not in ended.err
    return batches_of(folder, 0, step)


def run_once(folder: pathlib.Path, train: Callable[[pathlib.Path], list[list]]) -> Run:
    """The run that `train` writes to `folder`, done once; `train` returns the run's batches."""

    def write(folder: pathlib.Path) -> None:
        folder.mkdir()
        batches = train(folder)
        (folder / "batches.json").write_text(json.dumps(batches))

    once(folder, write)
    batches = json.loads((folder / "batches.json").read_text())
    return Run(folder / "run", batches, (folder / "out").read_text())

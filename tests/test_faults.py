"""What happens to a run when a process, a machine or a disk fails. Nothing saved is lost.

The tests run real processes; after a given step, one of them causes the fault.
"""

import dataclasses
import functools
import pathlib
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from tests.runs import (
    STEPS,
    Ended,
    after_step,
    assert_same_curves,
    checkpoint_of,
    flags_of,
    metrics_of,
    run,
    terminate,
)
from xlir.checkpoint import Checkpoints
from xlir.encoder import Encoder

# Seconds within which all processes must end after one of them has failed.
SOON = 60

# Runs before the fault: waits until the last checkpoint is complete, and records the time.
SAVED = "wait_for_checkpoint(10)"
DAMAGE = """
import os, pathlib, signal, time
folder = pathlib.Path({folder!r})
def wait_for_checkpoint(step):
    deadline = time.monotonic() + 60
    while not (folder / "run" / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (folder / "damage").write_text(str(time.time()))
def fill_disk(free):
    wait_for_checkpoint(10)
    # As another program would. (Not with truncate, which on tmpfs takes no space.)
    with open(folder / "run" / "ballast", "wb", buffering=0) as file:
        left = os.statvfs(folder / "run")
        size = left.f_bavail * left.f_bsize - free
        while size > 0:
            size -= file.write(bytes(min(size, 1 << 20)))
"""
# Sets parameters to NaN, as a diverged step does.
POISON = """
import jax
from xlir import train_step
def compile_poisoned(*arguments, compile_step=train_step.compile_step):
    layout, step = compile_step(*arguments)
    def poisoned(state, frozen, batch):
        if int(state.step) == 13:
            state.params = jax.tree.map(lambda x: x * float("nan"), state.params)
        return step(state, frozen, batch)
    return layout, poisoned
train_step.compile_step = compile_poisoned
"""
# Orbax writes a checkpoint under another name, then renames its parts, then its folder.
DIE_IN_SAVE = """
import sys
def die(event, arguments):
    if event == "os.rename" and "/20.orbax-checkpoint-tmp" in os.fspath(arguments[0]):
        (folder / "damage").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
"""


@dataclasses.dataclass
class Fault:
    """A fault of one of two processes.

    Attributes:
      script: causes the fault.
      codes: valid exit codes of launch.sh.
      line: the required message.
      resumes: the steps from which the run may resume.
    """

    script: str
    codes: set[int]
    line: str
    resumes: range = range(10, 11)


def killed(process: int) -> Fault:
    action = f"{SAVED}; os.kill(os.getpid(), signal.SIGKILL)"
    line = f"launch.sh: process {process} ended with exit code 137"
    # 1 and 134 are exit codes of the other process, if it fails at once and launch.sh sees that
    # first. 134 is SIGABRT: JAX's coordination service noticed the fault before a collective did.
    return Fault(after_step(13, action, process=process), {137, 1, 134}, line)


def killed_in_save() -> Fault:
    return Fault(DIE_IN_SAVE, {137, 1, 134}, "launch.sh: process 0 ended with exit code 137")


def interrupted() -> Fault:
    action = f"{SAVED}; os.kill(os.getppid(), signal.SIGINT)"
    line = "xlir: interrupted; run the same command again to resume"
    return Fault(after_step(13, action, pause=1), {130}, line)


def terminated() -> Fault:
    script = after_step(12, SAVED) + terminate(13, processes=2)
    line = "\nxlir: stopped by SIGTERM after step "
    return Fault(script, {128 + signal.SIGTERM}, line, range(13, STEPS))


def diverged() -> Fault:
    line = "at step 14 is nan: training diverged"
    return Fault(POISON + after_step(12, SAVED), {1}, line)


FAULTS = {
    "kill -9 of process 1": killed(1),
    "kill -9 of process 0": killed(0),
    "kill -9 in mid-save": killed_in_save(),
    "SIGTERM": terminated(),
    "Ctrl-C": interrupted(),
    "divergence": diverged(),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAULTS][1:]


def damaged(folder: pathlib.Path, flags: list[str], script: str, **where: int) -> Ended:
    """Runs a script that must fail, and checks that it ends soon after the fault."""
    ended = run(folder, flags, script=DAMAGE.format(folder=str(folder)) + script, **where)
    seconds = ended.end - float((folder / "damage").read_text())
    print(f"over {seconds:.1f} s after the damage, exit code {ended.code}\n{ended.err}")
    assert 0 < seconds < SOON
    return ended


@pytest.fixture(scope="session")
def flags(photos) -> list[str]:
    return flags_of(photos)


@pytest.fixture(scope="session")
def uninterrupted(one_device) -> pathlib.Path:
    """The workdir of a run on one device."""
    return one_device.workdir


def assert_bit_for_bit(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    """Compares all metrics of two runs, and all arrays of their last checkpoints."""
    assert metrics_of(workdir) == metrics_of(expected)
    checkpoints = [checkpoint_of(folder, STEPS) for folder in (workdir, expected)]
    jax.tree.map(np.testing.assert_array_equal, *checkpoints)


@pytest.mark.parametrize("name", [next(iter(FAULTS)), *SLOW])
def test_a_fault_of_one_of_two_processes(name, flags, uninterrupted, tmp_path):
    """Both processes end soon and say why; a run resumed by one process equals an unbroken one."""
    fault = FAULTS[name]
    ended = damaged(tmp_path, flags, fault.script, processes=2)
    assert ended.code in fault.codes
    assert fault.line in ended.err
    assert "Traceback" not in ended.err
    resumed = run(tmp_path, flags)
    assert resumed.code == 0, resumed.err
    (line,) = (line for line in resumed.err.splitlines() if line.startswith("resuming from step "))
    assert int(line.split()[-1]) in fault.resumes
    assert_same_curves(tmp_path / "run", uninterrupted)
    # Loads onto one device what two processes saved.
    trained = [
        Encoder.load(folder).parameters.trained for folder in (tmp_path / "run", uninterrupted)
    ]
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(compare, *trained)


def test_sigterm_loses_nothing(flags, stopped, uninterrupted, tmp_path):
    """A run that SIGTERM stopped and that was resumed equals an uninterrupted one bit for bit."""
    shutil.copytree(stopped.workdir, tmp_path / "run")
    resumed = run(tmp_path, flags)
    assert resumed.code == 0, resumed.err
    assert f"resuming from step {len(stopped.batches)}\n" in resumed.err
    assert_bit_for_bit(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_two_processes_agree_on_the_checkpoint_that_is_whole(flags, uninterrupted, tmp_path):
    """Reading the last checkpoint fails, so both processes use the previous one."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / str(STEPS) / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))
    resumed = run(tmp_path, flags, processes=2)
    assert resumed.code == 0, resumed.err
    assert "Traceback" not in resumed.err
    assert resumed.err.count(f"checkpoint {STEPS} is damaged (") == 1
    assert "resuming from step 10\n" in resumed.err
    assert (tmp_path / "run" / "checkpoints" / f"damaged-{STEPS}").is_dir()
    assert_same_curves(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("name", ["SIGHUP", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_other_signals_are_as_sigterm(name, flags, uninterrupted, tmp_path):
    """SIGHUP after a lost connection, and SIGUSR1 as a batch system's warning."""
    ended = run(tmp_path, flags, script=after_step(13, f"os.kill(os.getpid(), signal.{name})"))
    assert ended.code == 128 + signal.SIGTERM
    assert f"stopped by {name} after step 13, which is saved" in ended.err.splitlines()[-1]
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == 13


@pytest.mark.slow
def test_a_lost_connection_of_one_of_two_processes(flags, uninterrupted, tmp_path):
    script = after_step(13, "os.kill(os.getpid(), signal.SIGHUP)", process=1, pause=1)
    ended = run(tmp_path, flags, script=script, processes=2)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert run(tmp_path, flags, processes=2).code == 0
    assert_same_curves(tmp_path / "run", uninterrupted)


@pytest.fixture
def disk(tmp_path):
    """A small disk, mounted as the workdir."""
    folder = tmp_path / "run"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount(8)")
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# A checkpoint takes 400 kB, a record of metrics a few hundred bytes.
@pytest.mark.parametrize(
    ("free", "processes"),
    [
        (100_000, 1),
        pytest.param(0, 1, marks=pytest.mark.slow),
        pytest.param(100_000, 2, marks=pytest.mark.slow),
    ],
)
def test_full_disk(free, processes, flags, uninterrupted, disk, tmp_path):
    """Prints one line and keeps the last checkpoint; with more space, the command resumes."""
    script = after_step(13, f"fill_disk({free})")
    ended = damaged(tmp_path, flags, script, processes=processes)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.splitlines() if "the disk is full" in line]
    assert 1 <= len(lines) <= processes
    if processes == 1:
        assert ended.err.splitlines()[-1].startswith("xlir: the disk is full: free some space")
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    resumed = run(tmp_path, flags, processes=processes)
    assert resumed.code == 0, resumed.err
    assert "resuming from step 10\n" in resumed.err
    compare = assert_bit_for_bit if processes == 1 else assert_same_curves
    compare(disk, uninterrupted)

"""A run's folder: its configuration, who may write to it, and whether a run may go on in it."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import platform
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from input_pipeline import files
from xlir import partition
from xlir.config import check_config, upgrade

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
LOCK_FILE = ".lock"

# Fields that may change while a run goes on, as on another machine or in less memory: what it
# learns does not depend on them. (With other microbatches dropout draws other masks.)
FREE = re.compile(
    r"config\.(mesh\..*|evals\..*|profile\..*|log_every|save_every|data\.(prefetch|microbatches)|loss\.chunk"
    r"|.*\.remat)"
)


def tower_folder(workdir: pathlib.Path, side: str) -> pathlib.Path:
    """The folder of a tower's weights and description, and of the text tower's tokenizer."""
    return workdir / f"{side}_tower"


def is_run(workdir: pathlib.Path) -> bool:
    """Whether a run was started in the folder: config.json is written last."""
    return (workdir / CONFIG_FILE).exists()


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration that a run was started with; newer fields get their defaults.

    Raises:
      FileNotFoundError: the folder is not a run's.
      ValueError: the file is damaged, or a field is not what it may be.
    """
    file, config = workdir / CONFIG_FILE, base.get_config()
    if not file.is_file():
        raise FileNotFoundError(
            f"{workdir} is not the folder of a training run (it has no {CONFIG_FILE})"
        )
    files.check_sums(workdir, [CONFIG_FILE])
    try:
        config.update(upgrade(json.loads(file.read_text())))
        check_config(config)
        return config
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {error}") from error


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes the configuration, and the digests of it and of the towers' files, which are there."""
    content = json.dumps(config.to_dict(), indent=1)
    towers = (tower_folder(workdir, side) for side in ("text", "image"))
    found = (file for folder in towers for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(workdir)) for file in found]
    files.write_sums(workdir, names, {CONFIG_FILE: content})
    files.write_whole(workdir / CONFIG_FILE, content)


class Lock(contextlib.AbstractContextManager):
    """Keeps a second training run out of a folder. The system releases it when the process ends.

    The folder is made if it does not exist. If no run was started in it, it is removed at the end.
    Of several processes, which all have to enter, the first one holds the lock.

    Raises (on entering):
      ValueError: another process is training in the folder, or it can't be written to.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir

    def __enter__(self) -> "Lock":
        fault = self._acquire() if jax.process_index() == 0 else ""
        if not partition.agree_minimum(not fault):
            raise ValueError(fault or f"the first process can't use {self._workdir}")
        return self

    def _acquire(self) -> str:
        """Takes the lock; returns why that is not possible, or nothing."""
        if "\\" in str(self._workdir.absolute()):
            return (
                f"--workdir={self._workdir}: checkpoints can't be kept where a name has a backslash"
            )
        try:
            files.make_writable_folder(self._workdir)
            files.check_writable(self._workdir / LOCK_FILE)
            self._file = open(self._workdir / LOCK_FILE, "a+")  # noqa: SIM115
        except OSError as error:
            return f"{error}. Choose another --workdir"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            return (
                f"{self._workdir} is in use: {self._file.read().strip() or 'another process'} is "
                "training in it. Wait until it has ended, or choose another --workdir"
            )
        except OSError as error:
            log.warning("%s: no locks here (%s); train in it only once", self._workdir, error)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()
        return ""

    def __exit__(self, *exc_info: object) -> None:
        if jax.process_index():
            return
        if not is_run(self._workdir):
            (self._workdir / LOCK_FILE).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._workdir.rmdir()
        self._file.close()


def check_unchanged(started_with: ConfigDict, given: ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses to go on with a configuration that would learn something else.

    Raises:
      ValueError: a field that is not in FREE differs; the message names all such fields.
    """
    # Through JSON, in which a tuple is a list.
    old, new = (json.loads(config.to_json()) for config in (started_with, given))
    if differing := sorted(_differences(old, new)):
        raise ValueError(
            f"{workdir} was started with another configuration; it differs in "
            f"{', '.join(differing)}. Use another --workdir, or the old values to resume"
        )


def _differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """`config.a.b (old -> new)` for each field that differs and has to be the same."""
    found = []
    for name in old.keys() | new.keys():
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}.{name}")
        elif before != after and not FREE.fullmatch(f"{prefix}.{name}"):
            found.append(f"{prefix}.{name} ({before!r} -> {after!r})")
    return found


def check_data(workdir: pathlib.Path, data: dict[str, Any], *, accept_changes: bool) -> None:
    """Records what a run learns from, `<workdir>/data.json`, or compares it with the record.

    Args:
      workdir: the run's folder.
      data: describes the data, as JSON can hold it.
      accept_changes: record data that differ; the run is compared with them from now on.

    Raises:
      ValueError: they differ, or the record is damaged.
    """
    file = workdir / DATA_FILE
    try:
        before = json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: {error}. Delete it to go on without comparing the data"
        ) from error
    if before == data:
        return
    if before is not None and not accept_changes:
        raise ValueError(
            f"the data are not those that {workdir} was started with: {_describe(data)}; before: "
            f"{_describe(before)}. Restore the data to resume, start in a new --workdir, or go on "
            "with other data by --accept_changed_data"
        )
    if jax.process_index() == 0:
        files.write_whole(file, json.dumps(data, indent=1))


def _describe(data: Any) -> str:
    """The record of the data in a few words."""
    if not isinstance(data, dict):
        return repr(data)
    return ", ".join(f"{name} {value}" for name, value in data.items())


def results_folder(workdir: pathlib.Path) -> pathlib.Path | None:
    """Where results are written; None, and a warning, where they can't be."""
    folder = workdir / "results"
    try:
        files.make_writable_folder(folder)
        return folder
    except OSError as error:
        log.warning("results are shown and not kept: %s", error)
        return None


def check_seen(workdir: pathlib.Path) -> None:
    """Raises ValueError where not all processes see the folder that the first one has written."""
    partition.wait_for_all()
    for _ in range(60):  # seconds that a network file system may take
        if is_run(workdir):
            break
        time.sleep(1)
    if not partition.agree_minimum(is_run(workdir)):
        raise ValueError(f"--workdir={workdir} has to be a folder that all processes see")

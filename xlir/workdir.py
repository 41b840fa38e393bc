"""A run's folder: its configuration, its lock, and the checks before a run resumes in it."""

import contextlib
import copy
import fcntl
import json
import logging
import os
import pathlib
import platform
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from input_pipeline import files
from xlir import partition
from xlir.config import check_config

log = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
LOCK_FILE = ".lock"
# Files in the folder of each tower of a run.
WEIGHTS_FILE = "weights.safetensors"
SPEC_FILE = "tower.json"

# Fields that may change when a run resumes, for example on another machine or with less memory: the
# trained model does not depend on them. (Packing, or another number of microbatches, changes
# only the masks that dropout draws.)
FREE = re.compile(
    r"config\.(teacher|mesh\..*|evals\..*|profile\..*|log_every|save_every|data\.(prefetch|microbatches)|loss\.chunk"
    r"|text\.pack|.*\.remat)"
)


def tower_folder(workdir: pathlib.Path, side: str) -> pathlib.Path:
    """The folder of a tower's weights and description, and of the text tower's tokenizer."""
    return workdir / f"{side}_tower"


def is_run(workdir: pathlib.Path) -> bool:
    """Whether a run was started in the folder: config.json is written last."""
    return (workdir / CONFIG_FILE).exists()


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration that a run was started with; fields added since get their defaults.

    Raises:
      FileNotFoundError: the folder is not the folder of a run.
      ValueError: the file is damaged, or a field has an invalid value.
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
        raise ValueError(f"{file} is damaged or from another version: {error}") from error


def upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a run's config.json from any version to the current fields.

    Earlier versions had data.test_set (a list), data.test_images (one folder of photos for all),
    data.xtd10 and data.drop_junk instead of `evals`. This function checks no field.
    """
    fields = copy.deepcopy(dict(fields))
    data = fields.get("data")
    if isinstance(data, dict) and "test_set" in data:
        old = {name: data.pop(name, "") for name in ("test_set", "test_images", "xtd10")}
        fields["evals"] = _evals_of(old, data.get("dir", ""), data.pop("drop_junk", False))
    if isinstance(fields.get("evals"), dict):
        for name, test_set in fields["evals"].items():
            if isinstance(test_set, dict):
                fields["evals"][name] = base.test_set().to_dict() | test_set
    return fields


def _evals_of(old: Mapping[str, str], folder: str, drop_junk: bool) -> dict[str, dict[str, Any]]:
    """`config.evals` from the earlier fields of `config.data`, relative to `config.data.dir`."""
    text = old["test_set"]
    # The name of a folder may contain a comma.
    names = [text] if os.path.isdir(os.path.join(folder, text)) else text.split(",")
    evals: dict[str, dict[str, Any]] = {}
    # Unlike the captions, these two folders were not relative to data.dir.
    images, xtd10 = (path and os.path.abspath(path) for path in (old["test_images"], old["xtd10"]))
    for name in filter(None, names):
        folder, split = os.path.basename(os.path.abspath(name)), name.removeprefix("split:")
        if split != name:
            label, test_set = split, {"type": "split", "split": split}
        else:
            own = {"type": "xtd10", "captions": xtd10}
            label, test_set = folder, own if name == "xtd10" else {"captions": name}
            test_set |= {"images": images, "drop_junk": drop_junk}
        label = re.sub(r"[^\w-]", "_", label)
        while label in evals:  # several folders may have the same name
            label += "_"
        evals[label] = test_set
    return evals


def write_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes the configuration, and digests of it and of the towers' files, which must exist."""
    content = json.dumps(config.to_dict(), indent=1)
    towers = (tower_folder(workdir, side) for side in ("text", "image"))
    found = (file for folder in towers for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(workdir)) for file in found]
    files.write_sums(workdir, names, {CONFIG_FILE: content})
    files.write_whole(workdir / CONFIG_FILE, content)


class Lock(contextlib.AbstractContextManager):
    """Keeps a second training run out of a folder.

    The folder is created if it does not exist, and removed at the end if no run was started in it.
    With several processes, all must enter, and the first one holds the lock. The operating system
    releases the lock when the process ends.

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
        """Takes the lock; returns the reason if that is not possible, otherwise an empty string."""
        if "\\" in str(self._workdir.absolute()):
            return (
                f"--workdir={self._workdir}: checkpoints can't be saved if the path has a backslash"
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
            log.warning("%s can't be locked (%s): start no second run in it", self._workdir, error)
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
    """Refuses to resume with a configuration that would train another model.

    Raises:
      ValueError: a field that is not in FREE differs; the message names all such fields.
    """
    # Compared as JSON, in which tuples become lists.
    old, new = (json.loads(config.to_json()) for config in (started_with, given))
    if differing := sorted(_differences(old, new)):
        raise ValueError(
            f"{workdir} was started with another configuration; it differs in "
            f"{', '.join(differing)}. Use another --workdir, or resume with the old values"
        )


def _differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """`config.a.b (old -> new)` for each field that differs and is not in FREE."""
    found = []
    for name in old.keys() | new.keys():
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}.{name}")
        elif before != after and not FREE.fullmatch(f"{prefix}.{name}"):
            found.append(f"{prefix}.{name} ({before!r} -> {after!r})")
    return found


def check_data(workdir: pathlib.Path, data: dict[str, Any], *, accept_changes: bool) -> None:
    """Records a run's data in `<workdir>/data.json`, or compares the data with the record.

    Args:
      workdir: the run's folder.
      data: a description of the data, in types that JSON has.
      accept_changes: if the data differ, replace the record instead of raising an error.

    Raises:
      ValueError: the data differ from the record, or the record is damaged.
    """
    file = workdir / DATA_FILE
    try:
        before = json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged: {error}. Delete it to resume without comparing the data"
        ) from error
    if before == data:
        return
    if before is not None and not accept_changes:
        raise ValueError(
            f"the data differ from those that {workdir} was started with: {_describe(data)}; "
            f"before: {_describe(before)}. Restore the data to resume, start in a new --workdir, "
            "or resume with the new data and --accept_changed_data"
        )
    if jax.process_index() == 0:
        files.write_whole(file, json.dumps(data, indent=1))


def _describe(data: Any) -> str:
    """The record of the data as one line."""
    if not isinstance(data, dict):
        return repr(data)
    return ", ".join(f"{name} {value}" for name, value in data.items())


def results_folder(workdir: pathlib.Path) -> pathlib.Path | None:
    """The folder for results; None, with a warning, if it can't be written."""
    folder = workdir / "results"
    try:
        files.make_writable_folder(folder)
        return folder
    except OSError as error:
        log.warning("results are shown but not saved: %s", error)
        return None


def check_seen(workdir: pathlib.Path) -> None:
    """Raises ValueError if a process does not see the folder that the first process wrote."""
    partition.wait_for_all()
    for _ in range(60):  # a network file system may take up to 60 seconds
        if is_run(workdir):
            break
        time.sleep(1)
    if not partition.agree_minimum(is_run(workdir)):
        raise ValueError(f"--workdir={workdir} must be a folder that all processes see")

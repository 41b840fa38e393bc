"""Orbax checkpoints of a run: the latest two, to resume from, and the best one, to use.

A checkpoint holds trained parameters. Frozen towers do not change: they are written to the workdir
once, and are not in checkpoints. The items of a checkpoint are `params`, `optimizer`, `ema` if the
run keeps a moving average, and `record`. The record has the validation score, and a digest of every
array. The digests are compared when the arrays are restored.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from input_pipeline import files
from xlir import partition
from xlir.digests import digests
from xlir.models import parameter_names

log = logging.getLogger(__name__)

PyTree = Any
Items = dict[str, PyTree]
Record = dict[str, Any]

# Number of latest checkpoints to keep: if one is damaged, the run resumes from the other.
KEPT = 2


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in a workdir.

    Saving is asynchronous. A checkpoint appears under its step's name only once it is complete, so
    an interrupted save leaves earlier checkpoints untouched. Leaving the context waits for the last
    save.

    Args:
      workdir: the run's folder.
      read_only: create, move and delete nothing. Set this for every use except training.
    """

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False):
        self.folder = (workdir / "checkpoints").resolve()
        self._read_only = read_only
        self._records, self._damaged = {}, {}
        for step in self._list():
            try:
                self._records[step] = _read_record(self.folder / str(step))
            except ValueError as error:
                self._damaged[step] = str(error)
        with _without_warnings():
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(self),
                read_only=read_only,
                create=not read_only,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, items: Items, score: float | None = None) -> None:
        """Starts to save a checkpoint.

        Args:
          step: training steps taken.
          items: the trees to save, by name.
          score: selects the best checkpoint (higher is better). None if the state was not
            validated, for example because a signal stopped the run. A run can resume from such a
            checkpoint, but it counts as the best only while no checkpoint has a score.
        """
        record = {"score": score, "digests": digests(items), "names": parameter_names.VERSION}
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        arguments["record"] = ocp.args.JsonSave(files.with_digest(record))
        # Recorded before saving, because saving also deletes old checkpoints, and the preservation
        # policy needs this score.
        self._records[step] = record
        self._manager.save(step, args=ocp.args.Composite(**arguments))

    def steps(self) -> list[int]:
        """The steps saved, ascending."""
        return sorted(self._records | self._damaged)

    def restore(self, targets: Items, *, best: bool = False) -> tuple[int, Items]:
        """Reads items of the latest or the best checkpoint onto the devices.

        If that checkpoint is damaged, the next one is read. The log says so, and the damaged one is
        renamed to `damaged-STEP` unless `read_only` was set. With several processes, all must call
        this method.

        Args:
          targets: for each requested item, a tree of arrays (or of shapes with shardings) with the
            structure and shapes of the saved tree.
          best: read the checkpoint with the best score instead of the latest.

        Returns:
          The step, and the items.

        Raises:
          ValueError: no checkpoint can be restored. In this case, none is renamed.
        """
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, targets)
        damaged = dict(self._damaged)
        for step in sorted(self._records, key=self._score if best else None, reverse=True):
            items, fault = self._read(step, targets)
            if not partition.agree_minimum(not fault):
                damaged[step] = fault or "another process can't read it"
            elif differing := self._differing(step, items):
                damaged[step] = f"{differing[0]} differs from what was saved"
            else:
                self._set_aside(damaged, step)
                return step, parameter_names.tree_of_today(items, self._names(step))
        reasons = "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items()))
        raise ValueError(
            f"no checkpoint in {self.folder} can be restored. They are damaged, or belong to "
            f"another model than config.json describes ({reasons}). Restore them from a copy, "
            "or start in a new --workdir"
        )

    def _read(self, step: int, targets: Items) -> tuple[Items, str]:
        """The items of a checkpoint under their saved names, or the reason they can't be read."""
        targets = parameter_names.tree_of(self._names(step), targets)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**arguments))), ""
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # Orbax, TensorStore and parsers raise many types
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            return {}, " ".join((str(error) or type(error).__name__).split())[:200]

    def _differing(self, step: int, items: Items) -> list[str]:
        """The paths of arrays whose digests differ from the saved ones."""
        expected = self._records[step].get("digests")
        if expected is None:  # saved by a version that kept no digests
            return []
        return [name for name, digest in digests(items).items() if expected.get(name) != digest]

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        """Reports damaged checkpoints, and renames them so that their steps can be saved again."""
        if not damaged:
            return
        first = jax.process_index() == 0  # the only process that logs and renames
        for step, why in sorted(damaged.items()):
            if first:
                log.warning("checkpoint %d is damaged (%s)", step, why)
            if self._read_only:
                continue
            self._records.pop(step, None)
            if first:
                aside = self.folder / f"damaged-{step}"
                while aside.exists():  # the step was saved again, and damaged again
                    aside = aside.with_name(f"{aside.name}-again")
                (self.folder / str(step)).rename(aside)
                log.warning("checkpoint %d was moved to %s", step, aside)
        if first:
            log.warning("using the checkpoint of step %d", used)
        if self._read_only:
            return
        self._damaged = {}
        partition.wait_for_all()
        self._manager.reload()

    def _list(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return [int(name) for name in names if re.fullmatch("[0-9]+", name)]

    def _names(self, step: int) -> int:
        """The version of the parameter names in a checkpoint."""
        return self._records[step].get("names", 1)

    def _score(self, step: int) -> tuple[float, int]:
        """The sort key that orders checkpoints from worst to best."""
        score = self._records.get(step, {}).get("score")
        return (-math.inf if score is None else score, step)

    def __exit__(self, *exc_info: object) -> None:
        """Waits for the save in progress and frees the manager."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()


class _LatestAndBest:
    """Keeps the latest checkpoints and the best one (one of Orbax's preservation policies)."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Whether to keep each checkpoint."""
        steps = sorted(info.step for info in checkpoints)
        kept = {*steps[-KEPT:], max(steps, key=self._checkpoints._score)}
        return [info.step in kept for info in checkpoints]


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the warnings of Orbax, such as that a manager opened for reading only reads."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_record(folder: pathlib.Path) -> Record:
    """The record of a checkpoint. Versions of xlir without digests saved at most a score.

    Raises:
      ValueError: the record is damaged.
    """
    file = folder / "record" / "metadata"
    if not file.parent.is_dir():
        file = folder / "metrics" / "metrics"
        if not file.is_file():
            return {}
    try:
        record = json.loads(file.read_text())
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        return files.without_digest(record) if file.parent.name == "record" else record
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{file.relative_to(folder)}: {error}") from error

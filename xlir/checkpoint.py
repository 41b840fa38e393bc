"""Orbax checkpoints of a run: the latest, to go on from, and the best, to use.

What is saved is what is trained: frozen towers are written once, in the workdir, and are in no
checkpoint. Items of a checkpoint: `params`, `optimizer` and, where it is kept, `ema`.
"""

import contextlib
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

PyTree = Any


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints below a workdir.

    Saving is asynchronous. A checkpoint appears under its step's name once it is whole, so an
    interrupt in mid-save leaves the ones before it; leaving the context waits for the last.

    Args:
      workdir: the run's folder.
      read_only: for use without training; nothing is created.
    """

    def __init__(self, workdir: pathlib.Path, *, read_only: bool = False):
        best = BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(1), best]),
            best_fn=lambda metrics: metrics["score"],
            read_only=read_only,
            create=not read_only,
        )
        self.folder = (workdir / "checkpoints").resolve()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, items: dict[str, PyTree], score: float | None = None) -> None:
        """Starts to save; `score` decides which checkpoint is the best (higher is better).

        One without a score is there to go on from, and goes when there is a later one.
        """
        metrics = None if score is None else {"score": score}
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics)

    def latest_step(self) -> int | None:
        """The last step saved, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best score, the latest where none has one yet, or None."""
        best = self._manager.best_step()
        return self.latest_step() if best is None else best

    def items(self, step: int) -> set[str]:
        """The names of what a checkpoint holds."""
        return {path.name for path in (self.folder / str(step)).iterdir() if path.is_dir()}

    def restore(self, step: int, targets: dict[str, PyTree]) -> dict[str, PyTree]:
        """Reads items of a checkpoint onto the devices.

        Args:
          step: a step that was saved.
          targets: for each item wanted, a tree of arrays (or shape structs with shardings) of the
            same shape as what was saved.

        Raises:
          ValueError: the checkpoint does not fit the targets.
        """
        targets = jax.tree.map(ocp.utils.to_shape_dtype_struct, targets)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {self.folder / str(step)} does not fit the model that this workdir's "
                f"config.json describes: {str(error).splitlines()[0]}"
            ) from error

    def __exit__(self, *exc_info: object) -> None:
        """Waits for the save in progress and frees the manager."""
        try:
            self._manager.wait_until_finished()
        finally:
            self._manager.close()

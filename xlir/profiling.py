"""Traces of training steps, for TensorBoard or Perfetto."""

import contextlib
import logging
import pathlib
from typing import Any

import jax

log = logging.getLogger(__name__)


class Profile(contextlib.AbstractContextManager):
    """Traces steps on the first process only: the devices of other processes do the same work.

    Args:
      steps: the first and the last step to trace; (0, 0) for none.
      workdir: the run's folder; traces are written to its subfolder `profile`.
    """

    def __init__(self, steps: tuple[int, int], workdir: pathlib.Path):
        self._first, self._last = steps if jax.process_index() == 0 else (0, 0)
        self._folder, self._traces = workdir / "profile", False

    def __exit__(self, *exc_info: object) -> None:
        if self._traces:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Starts the trace; call this before each step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._traces = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace; call this after each step has been dispatched, with its outputs."""
        if self._traces and step >= self._last:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._traces = False
            log.info("steps %d to %d are traced in %s", self._first, self._last, self._folder)

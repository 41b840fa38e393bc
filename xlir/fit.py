"""Chooses microbatches and rematerialisation: the fastest step that fits a TPU's memory."""

import dataclasses
import logging
import time

from ml_collections import ConfigDict

from xlir import compile, cost

log = logging.getLogger(__name__)

# The largest number of microbatches to try.
MOST = 16


@dataclasses.dataclass(frozen=True)
class Trial:
    """A step that was compiled.

    Attributes:
      microbatches, remat: what was tried.
      report: None if the compiler gave up for lack of memory.
      needed: bytes of memory; 0 if the compiler gave up and does not say how much it needs.
    """

    microbatches: int
    remat: bool
    report: compile.Report | None
    needed: int

    @property
    def fits(self) -> bool:
        """Whether enough of a chip's memory stays free."""
        return self.report is not None and self.report.fits

    @property
    def seconds(self) -> float:
        """The shortest time that a step can take."""
        return self.report.times.overlapped if self.report else float("inf")

    def rules_out(self, microbatches: int, remat: bool, memory: float) -> bool:
        """Whether a step with more microbatches takes longer, or too much of the memory too.

        At best, the memory that a step needs falls as the number of microbatches rises.
        """
        if self.remat != remat:
            return False
        if self.fits:
            return self.microbatches > 1
        return self.needed * self.microbatches / microbatches > memory

    def __str__(self) -> str:
        """What was found, in a line."""
        if not self.needed:
            return "the compiler gives up for lack of memory"
        needed = f"needs {self.needed / compile.GIB:.2f} GiB"
        if self.report is None:
            return f"{needed}, for which the compiler gives up"
        verdict = "fits" if self.fits else "does not fit"
        return f"{needed}, {verdict}; a step takes at least {self.seconds:.3f} s"


def fit(config: ConfigDict, topology: str) -> list[Trial]:
    """Compiles steps that take ever less memory, until some fit.

    The towers run forward once or, with microbatches or rematerialisation, twice, or with both
    three times. The fewest runs that fit are the fastest, and with the same number of runs, the
    memory traffic decides.

    Args:
      config: its microbatches and rematerialisation are ignored.
      topology: see `compile.compile_for`.

    Returns:
      What was tried, in that order.

    Raises:
      ValueError: as `compile.compile_for`.
    """
    trials: list[Trial] = []
    started = time.monotonic()
    rounds = _rounds(config.data.batch_size // len(compile.devices(topology)))
    most = sum(len(steps) for steps in rounds)
    memory = (1 - compile.SPARE) * cost.chip(topology).hbm
    for steps in rounds:
        for microbatches, remat in steps:
            if any(trial.rules_out(microbatches, remat, memory) for trial in trials):
                continue
            left = ""
            if trials:
                each = (time.monotonic() - started) / len(trials) / 60
                left = f"; at most {each * (most - len(trials)):.0f} minutes are left"
            what = _describe(microbatches, remat)
            log.info("trial %d of at most %d: %s%s", len(trials) + 1, most, what, left)
            trials.append(_try(config, topology, microbatches, remat))
            log.info("%s: %s", what, trials[-1])
        if any(trial.fits for trial in trials):
            break
    return trials


def best(trials: list[Trial]) -> Trial | None:
    """The fastest step that fits; None if no step does."""
    return min((x for x in trials if x.fits), key=lambda x: x.seconds, default=None)


def table(trials: list[Trial]) -> str:
    """What was tried, as text."""
    lines = ["microbatches  remat  needed, GiB   free  a step, s  of peak"]
    chosen = best(trials)
    for trial in trials:
        cells = f"{trial.microbatches:12}  {'on' if trial.remat else 'off':>5}"
        if trial.report is None:
            lines.append(f"{cells}  {trial}")
            continue
        report, times = trial.report, trial.report.times
        mark = "  <- the fastest that fits" if trial is chosen else ""
        lines.append(
            f"{cells}  {report.needed / compile.GIB:11.2f}  {report.spare:5.0%}"
            f"  {times.overlapped:9.3f}  {times.compute / times.overlapped:7.0%}{mark}"
        )
    if chosen:
        flags = [f"--config.data.microbatches={chosen.microbatches}"]
        flags += [f"--config.{side}.remat={chosen.remat}" for side in ("text", "image")]
        lines += ["", " ".join(flags)]
    return "\n".join(lines)


def _rounds(pairs: int) -> list[list[tuple[int, bool]]]:
    """Microbatches and rematerialisation to try, by how often the towers run forward.

    Args:
      pairs: the number of pairs of a batch that each device has.
    """
    several, size = [], 2
    while size <= MOST and pairs % size == 0:
        several.append(size)
        size *= 2
    return [
        [(1, False)],
        [(1, True), *((size, False) for size in several)],
        [(size, True) for size in several],
    ]


def _describe(microbatches: int, remat: bool) -> str:
    parts = f"{microbatches} microbatch{'es' if microbatches > 1 else ''}"
    return f"{parts}, {'with' if remat else 'without'} rematerialisation"


def _try(config: ConfigDict, topology: str, microbatches: int, remat: bool) -> Trial:
    config = config.copy_and_resolve_references()
    config.data.microbatches = microbatches
    config.text.remat = config.image.remat = remat
    try:
        report = compile.compile_for(config, topology)
    except compile.OutOfMemoryError as error:
        return Trial(microbatches, remat, None, error.needed)
    return Trial(microbatches, remat, report, report.needed)

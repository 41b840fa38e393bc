"""Training metrics as JSON lines and for TensorBoard."""

import collections
import contextlib
import json
import logging
import pathlib
import re
import sys
import time
from collections.abc import Iterator

from input_pipeline.files import write_whole

# tensorboardX imports PyTorch if it is installed, for features that are not used here. That would
# take half of the time that training needs to start.
_hide = "torch" not in sys.modules
if _hide:
    sys.modules["torch"] = None
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    if _hide:
        del sys.modules["torch"]

log = logging.getLogger(__name__)

# Seconds between flushes of TensorBoard's file. A mounted bucket uploads the whole file each time.
FLUSH = 120


class MetricLog:
    """Writes metrics to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`.

    Args:
      workdir: the run's folder; None writes nothing.
      resume_at: the step that training resumes from. An interrupted run may have left records of
        later steps; they are dropped.
    """

    def __init__(self, workdir: pathlib.Path | None, resume_at: int):
        self._file = None
        if workdir is None:
            return
        self._file = workdir / "metrics.jsonl"
        _drop_after(self._file, resume_at)
        (workdir / "tensorboard").mkdir(exist_ok=True)
        # Not SummaryWriter, which writes in a thread: if the disk is full, only that thread fails,
        # and training waits for it forever.
        self._board = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._next_flush = 0.0
        if resume_at:
            started = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(step=resume_at + 1, session_log=started))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        if self._file is None:
            return
        # Closed each time, because a mounted bucket shows a file only after it is closed.
        with open(self._file, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            scalar = summary.scalar(name, value)
            self._board.write_event(Event(step=step, wall_time=time.time(), summary=scalar))
        if time.monotonic() >= self._next_flush:
            self._board.flush()
            self._next_flush = time.monotonic() + FLUSH

    def close(self) -> None:
        """Writes pending records."""
        if self._file is not None:
            self._board.close()


class Progress:
    """Measures the speed of a training loop and estimates the time left.

    Args:
      first: the step that the loop starts from.
      last: the last step.
      examples: number of examples per step.

    Attributes:
      counts: numbers that callers count from step to step, such as that of broken records.
    """

    def __init__(self, first: int, last: int, examples: int):
        self._last, self._examples = last, examples
        self.counts: dict[str, int] = {}
        self._mark(first)

    def _mark(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measures a part of the loop."""
        start = time.monotonic()
        yield
        self._seconds[part] += time.monotonic() - start

    def lap(self, step: int) -> dict[str, float]:
        """Speed since the last lap, and the seconds that each part of the loop took.

        `data` is the time per step spent waiting for the batch, and `step` is the rest of the time
        per step. `evaluation` and `save` (the time to start saving) are totals since the last lap.
        They are absent if nothing was evaluated or saved, and the speed does not include them.
        """
        steps = max(step - self._step, 1)
        waiting = self._seconds.pop("data", 0.0) / steps
        seconds = time.monotonic() - self._time - sum(self._seconds.values())
        self._per_step = max(seconds, 1e-9) / steps
        parts = {"data": waiting, "step": self._per_step - waiting, **self._seconds}
        self._mark(step)
        return {
            "examples_per_second": self._examples / self._per_step,
            **{f"seconds/{part}": seconds for part, seconds in parts.items()},
        }

    def remaining(self, step: int) -> str:
        """Time left at the speed of the last lap, as h:mm:ss."""
        seconds = round((self._last - step) * self._per_step)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Keeps the records up to a step.

    An interrupted run may leave a half-written last line for a later step, which is dropped. If
    that line belongs to an earlier step, or other lines are damaged, the log says so, and a copy of
    the file is kept.
    """
    if not file.exists():
        return
    content = file.read_bytes()
    *lines, half = content.split(b"\n")
    kept, damaged, last = [], [], 0
    for number, line in enumerate(lines, 1):
        try:
            last = json.loads(line)["step"]
            if last <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            damaged.append(number)
    started = re.match(rb'{"step": ([0-9]+),', half)
    if half and (int(started[1]) if started else last + 1) <= step:
        damaged.append(len(lines) + 1)
    if damaged:
        copy = file.with_name(f"{file.name}.damaged")
        write_whole(copy, content)
        log.warning(
            "%s: %d damaged records dropped, the first in line %d; the original is kept as %s",
            *(file, len(damaged), damaged[0], copy.name),
        )
    write_whole(file, b"".join(kept))

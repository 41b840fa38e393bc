"""Training metrics as JSON lines and for TensorBoard."""

import json
import pathlib
import time

import tensorboardX


class MetricLog:
    """`<workdir>/metrics.jsonl` and `<workdir>/tensorboard`, one record a call.

    Args:
      workdir: the run's folder.
      resume_at: the step that training goes on from; records of later steps, which an interrupted
        run may have left, are dropped.
    """

    def __init__(self, workdir: pathlib.Path, resume_at: int):
        file = workdir / "metrics.jsonl"
        _drop_after(file, resume_at)
        self._file = open(file, "a")  # noqa: SIM115 - closed in close()
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_at + 1 if resume_at else None
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is pending."""
        self._file.close()
        self._board.close()


class Progress:
    """Speed and time left of a loop.

    Args:
      first: the step that the loop starts from.
      last: the step that it ends with.
      examples: examples a step.
    """

    def __init__(self, first: int, last: int, examples: int):
        self._last, self._examples = last, examples
        self._mark(first)

    def _mark(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def lap(self, step: int) -> float:
        """Examples per second since the last lap."""
        speed = (step - self._step) * self._examples / max(time.monotonic() - self._time, 1e-9)
        self._mark(step)
        return speed

    def skip(self) -> None:
        """Leaves the time since the last lap (validation, saving) out of the next one."""
        self._time = time.monotonic()

    def remaining(self, step: int, speed: float) -> str:
        """Time left at a speed in examples per second, as h:mm:ss."""
        seconds = round((self._last - step) * self._examples / max(speed, 1e-9))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Keeps the records up to a step; a half-written last line goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    file.write_text("".join(kept))

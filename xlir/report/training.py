"""The sections about training: what was trained on what, the curves, speed and memory."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from xlir.machine import MACHINE_FILE
from xlir.report import charts
from xlir.report.markup import Markup, table, tag
from xlir.workdir import DATA_FILE

# The largest number of points of a curve, and of rows in its table.
POINTS, ROWS = 200, 25
# Metric of a validation -> the name of its curve.
VALIDATION = {
    "validation/en/text_to_image/R@10": "English",
    "validation/zero_shot/text_to_image/R@10": "mean of the other languages",
}


def facts(workdir: pathlib.Path, config: ConfigDict, step: int) -> Markup:
    """A table of what was trained on what."""
    data, found = _read_json(workdir / DATA_FILE), _read_json(workdir / MACHINE_FILE)
    rows = [
        ("Text side", _side(config, "text")),
        ("Image side", _side(config, "image")),
        ("Embedding", f"{config.embedding_dim} numbers"),
        ("Data", _data(config, data)),
        ("Loss", f"{config.loss.name}, batches of {config.data.batch_size:,}"),
        (
            "Steps",
            f"{config.steps:,}; the checkpoint after step {step:,} is the best, and is shown here",
        ),
        ("Learning rate", f"{config.optimizer.learning_rate:g} at most"),
        ("Seed", str(config.seed)),
    ]
    if config.teacher:
        rows.append(("Teacher", config.teacher))
    if config.init:
        rows.append(("Started from", config.init))
    if found:
        rows += [("Machine", _machine(found)), ("Versions", _versions(found))]
    return table("What was trained on what", ("Part", "Value"), rows, "words")


def _side(config: ConfigDict, side: str) -> str:
    part = config[side]
    tower = part.tower or "from another run"
    trained = "frozen" if part.frozen else "trained"
    sizes = ", ".join(f"{size:,}" for size in part.hidden)
    wide = f" ({sizes} wide)" if part.head == "mlp" and sizes else ""
    return f"{tower}, {trained}; head {part.head}{wide}"


def _data(config: ConfigDict, data: Mapping[str, Any]) -> str:
    place = f"{config.data.name or 'none'}, split {config.data.train}"
    if config.data.dir:
        place += f" of the folder {pathlib.Path(config.data.dir).name}"
    if "captions" in data:
        place += f": {data.get('photos', 0):,} photos, {data['captions']:,} captions"
    return place


def _machine(found: Mapping[str, Any]) -> str:
    processes = found.get("processes", 1)
    return (
        f"{found.get('devices')} × {found.get('kind')}, {found.get('cores')} cores"
        + (f", {processes} processes" if processes != 1 else "")
        + f"; {found.get('system')}"
    )


def _versions(found: Mapping[str, Any]) -> str:
    names = {"xlir": "xlir", "jax": "JAX", "python": "Python"}
    return ", ".join(f"{name} {found[key]}" for key, name in names.items() if found.get(key))


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; damaged lines are left out. Empty if there is no such file."""
    return list(_records(workdir / "metrics.jsonl"))


def _records(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            record = json.loads(line)
            if isinstance(record["step"], int):
                yield record
        except (ValueError, KeyError, TypeError):
            continue


def curves(found: Sequence[Mapping[str, Any]]) -> Markup:
    """Charts of the loss, the learning rate and the validation, each with a table."""
    parts = [
        _curve(found, "Loss", {"loss": "loss"}),
        _curve(found, "Learning rate", {"learning_rate": "learning rate"}),
        _curve(found, "Recall@10 of the validation set", VALIDATION, 100),
    ]
    return tag("div", *filter(None, parts), class_="charts")


def _curve(
    found: Sequence[Mapping[str, Any]], title: str, names: Mapping[str, str], scale: int = 1
) -> Markup | None:
    """A chart of some metrics; None if there are no records of them."""
    series = {
        label: [(one["step"], scale * one[name]) for one in found if _is_number(one.get(name))]
        for name, label in names.items()
    }
    series = {label: _thinned(points, POINTS) for label, points in series.items() if points}
    if not series:
        return None
    ends = "; ".join(
        f"{label} goes from {points[0][1]:.4g} at step {points[0][0]:,} "
        f"to {points[-1][1]:.4g} at step {points[-1][0]:,}"
        for label, points in series.items()
    )
    rows = []
    by_step: dict[float, dict[str, float]] = {}
    for label, points in series.items():
        for step, value in points:
            by_step.setdefault(step, {})[label] = value
    for step, values in _thinned(sorted(by_step.items()), ROWS):
        cells = (f"{values[label]:.4g}" if label in values else "" for label in series)
        rows.append((f"{step:,}", *cells))
    return tag(
        "figure",
        tag("figcaption", title + (", %" if scale == 100 else "")),
        charts.lines(title, f"{ends}.", series, "step"),
        _legend(list(series)) if len(series) > 1 else "",
        tag(
            "details",
            tag("summary", "As a table"),
            table(title, ("Step", *series), rows, "numbers"),
        ),
    )


def _legend(labels: Sequence[str]) -> Markup:
    items = [
        tag("li", tag("span", class_=f"key key-{place}"), label)
        for place, label in enumerate(labels)
    ]
    return tag("ul", *items, class_="legend")


def speed(workdir: pathlib.Path, found: Sequence[Mapping[str, Any]]) -> Markup | None:
    """A table of speed and memory; None if nothing was recorded."""
    rows = []
    rate, step, data = (
        [one[name] for one in found if _is_number(one.get(name))]
        for name in ("examples_per_second", "seconds/step", "seconds/data")
    )
    if rate:
        rows.append(("Examples per second", f"{np.median(rate):,.0f} (median)"))
    if step:
        waits = f", and waits {np.median(data):.3g} s for its batch" if data else ""
        rows.append(("One step", f"takes {np.median(step):.3g} s{waits} (medians)"))
    for name, label in (("evaluation", "All validations"), ("save", "Starting to save")):
        seconds = [
            one[f"seconds/{name}"] for one in found if _is_number(one.get(f"seconds/{name}"))
        ]
        if seconds:
            rows.append((label, f"{sum(seconds):,.3g} s in all"))
    memory = _read_json(workdir / MACHINE_FILE)
    for name, label in (("memory", "Memory of the process"), ("device_memory", "of its device")):
        if _is_number(memory.get(name)):
            rows.append((label, f"{memory[name] / 2**30:.2f} GiB at most"))
    if not rows:
        return None
    return table("Speed and memory", ("Part", "Value"), rows, "words")


def _thinned(points: Sequence, most: int) -> list:
    """At most that many of the points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(place)] for place in np.linspace(0, len(points) - 1, most)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """The fields of a JSON file; empty if it is missing or damaged."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

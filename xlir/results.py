"""Results of evaluations: their files in a run's folder, and their display as text.

`evaluate.retrieval` describes the results of retrieval, and `evaluate_tagging.evaluate_set` those
of tagging.
"""

import json
import pathlib

import numpy as np

from input_pipeline import files
from xlir.models.pretrained import read_json

DIRECTIONS = ("text_to_image", "image_to_text")
# The most languages besides English that `headline` names one by one.
NAMED = 5


def write(results: dict, folder: pathlib.Path) -> pathlib.Path:
    """Writes `<set>-<step>.json` into a folder and returns its path."""
    file = folder / f"{results['dataset']}-{results['step']}.json"
    content = json.dumps(results, indent=1)
    files.write_sums(folder, (), {file.name: content}, keep=True)
    files.write_whole(file, content)
    return file


def write_comparison(
    differences: dict, results: dict, other: str, folder: pathlib.Path
) -> pathlib.Path:
    """Writes a comparison with the run named `other` into a folder and returns its path.

    `differences` is the result of `comparison.compare`, and `results` are those of this run.
    """
    file = folder / f"{results['dataset']}-{results['step']}.against-{other}.json"
    head = {"dataset": results["dataset"], "step": results["step"], "against": other}
    files.write_whole(file, json.dumps(head | {"languages": differences}, indent=1))
    return file


def read(workdir: pathlib.Path, step: int, metric: str = DIRECTIONS[0]) -> list[dict]:
    """A run's results at a step, sorted by file name.

    Args:
      workdir: the run's folder.
      step: the training step.
      metric: what the results of each language have: "text_to_image" selects the results of
        retrieval, "predicted_tags" those of tagging.

    Raises:
      ValueError: a file is damaged.
    """
    folder = workdir / "results"
    found = sorted(folder.glob(f"*-{step}.json"))
    files.check_sums(folder, [file.name for file in found])
    return [content for content in map(read_json, found) if _has(content, metric)]


def _has(content: dict, metric: str) -> bool:
    languages = content.get("languages")
    return bool(languages) and all(metric in result for result in languages.values())


def mean(results: list) -> object:
    """The mean of each metric over results of the same form.

    Other values, such as names and counts, are those of the first result.
    """
    first = results[0]
    if isinstance(first, dict):
        return {key: mean([result[key] for result in results]) for key in first}
    return float(np.mean(results)) if isinstance(first, float) else first


def score(results: dict) -> float:
    """The score that selects the best checkpoint: zero-shot macro R@10, text to image.

    For a validation set with only English, it is the English R@10.
    """
    macro = results["zero_shot_macro"] or results["languages"]["en"]
    return macro["text_to_image"]["R@10"]


def table(results: dict) -> str:
    """The results as a table for the terminal, recalls in percent.

    Behind the last recall is half the width of its 95% interval, if there is one.
    """
    head = f"{results['dataset']}, step {results['step']}, {results['images']} images"
    some = next(iter(results["languages"].values()))["text_to_image"]
    names = [name for name in some if name.startswith("R@")]
    names.sort(key=lambda name: int(name.removeprefix("R@")))
    columns = "  ".join(f"{name:>4}" for name in names)
    width = len(columns) + (6 if "intervals" in some else 0)

    def cells(result: dict) -> str:
        text = "  ".join(f"{100 * result[name]:>{max(4, len(name))}.1f}" for name in names)
        if "intervals" in result:
            low, high = result["intervals"][names[-1]]
            text += f" ±{50 * (high - low):.1f}"
        return text

    lines = [
        f"{head:<36}  {'text to image':<{width}}      image to text",
        f"{'':<10}{'queries':>8}{'median rank':>14}      {columns:<{width}}      {columns}",
    ]

    def row(name: str, queries: object, median: object, result: dict) -> str:
        both = [cells(result[direction]) for direction in DIRECTIONS]
        return f"{name:<10}{queries:>8}{median:>14}      {both[0]:<{width}}      {both[1]}"

    for language, result in results["languages"].items():
        median = f"{result['text_to_image']['median_rank']:.0f}"
        lines.append(row(language, result["queries"], median, result))
    if results["zero_shot_macro"]:
        lines.append(row("zero-shot", "", "", results["zero_shot_macro"]))
    return "\n".join(lines)


def headline(results: dict) -> str:
    """Text-to-image R@10 of English, of the mean of the other languages, and of each of them.

    Of more than `NAMED` other languages, only the worst and the best are named.
    """
    found = {
        language: 100 * result["text_to_image"]["R@10"]
        for language, result in results["languages"].items()
    }
    parts = [f"en {found.pop('en'):.1f}"] if "en" in found else []
    if found:
        macro = 100 * results["zero_shot_macro"]["text_to_image"]["R@10"]
        if len(found) <= NAMED:
            each = ", ".join(f"{language} {value:.1f}" for language, value in found.items())
        else:
            worst, best = (end(found, key=found.get) for end in (min, max))
            each = f"{worst} {found[worst]:.1f} to {best} {found[best]:.1f}"
        parts.append(f"other languages {macro:.1f} ({each})")
    return "R@10 " + ", ".join(parts)


def scalars(results: dict) -> dict[str, float]:
    """The results as flat metrics: `validation/de/text_to_image/R@10` and so on."""
    sections = dict(results["languages"])
    if results["zero_shot_macro"]:
        sections["zero_shot"] = results["zero_shot_macro"]
    return {
        f"validation/{section}/{direction}/{name}": value
        for section, result in sections.items()
        for direction in DIRECTIONS
        for name, value in result[direction].items()
    }

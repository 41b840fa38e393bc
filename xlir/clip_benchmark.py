"""Results in the layout of CLIP_benchmark 1.6 (https://github.com/LAION-AI/CLIP_benchmark).

CLIP_benchmark writes one file for each language, and `clip_benchmark build` makes a table of them.
"""

import json
import pathlib
from collections.abc import Mapping

from input_pipeline import files

# Our names of test sets -> CLIP_benchmark's, where they differ.
NAMES = {"xtd10": "multilingual_mscoco_captions", "flickr30k_200": "flickr30k-200"}
RETRIEVAL, CLASSIFICATION = "zeroshot_retrieval", "zeroshot_classification"
# CLIP_benchmark names a direction by what is retrieved.
SIDES = {"text_to_image": "image", "image_to_text": "text"}
ACCURACIES = {
    "accuracy@1": "acc1",
    "accuracy@5": "acc5",
    "mean_per_class_recall": "mean_per_class_recall",
}


def layout(results: Mapping, model: str, task: str = RETRIEVAL) -> dict[str, dict]:
    """The content of a file for each language.

    Args:
      results: those of `evaluate.retrieval`, or of `evaluate_classification.evaluate_set`.
      model: the name of the run.
      task: `RETRIEVAL` or `CLASSIFICATION`.
    """
    metrics = _recalls if task == RETRIEVAL else _accuracies
    return {
        language: {
            "dataset": NAMES.get(results["dataset"], results["dataset"]),
            "model": model,
            "pretrained": f"step-{results['step']}",
            "task": task,
            "metrics": metrics(result),
            "language": language,
        }
        for language, result in results["languages"].items()
    }


def _recalls(result: Mapping) -> dict[str, float]:
    return {
        f"{side}_retrieval_recall@{name.removeprefix('R@')}": value
        for direction, side in SIDES.items()
        for name, value in result[direction].items()
        if name.startswith("R@")
    }


def _accuracies(result: Mapping) -> dict[str, float]:
    return {theirs: result[ours] for ours, theirs in ACCURACIES.items()}


def write(
    results: Mapping, folder: pathlib.Path, model: str, task: str = RETRIEVAL
) -> pathlib.Path:
    """Writes the files into a new folder in `folder`, and returns the new folder's path.

    Args:
      results, model, task: as for `layout`.
      folder: the folder of the run's results.
    """
    target = folder / f"{results['dataset']}-{results['step']}.clip_benchmark"
    target.mkdir(exist_ok=True)
    for language, content in layout(results, model, task).items():
        parts = (content["dataset"], content["pretrained"], model, language, task)
        files.write_whole(target / f"{'_'.join(parts)}.json", json.dumps(content, indent=1))
    return target

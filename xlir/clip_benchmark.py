"""Results in the layout of CLIP_benchmark 1.6 (https://github.com/LAION-AI/CLIP_benchmark).

CLIP_benchmark writes one file for each language, and `clip_benchmark build` makes a table of them.
"""

import json
import pathlib
from collections.abc import Mapping

from input_pipeline import files

# Our names of test sets -> CLIP_benchmark's, where they differ.
NAMES = {"xtd10": "multilingual_mscoco_captions", "flickr30k_200": "flickr30k-200"}
TASK = "zeroshot_retrieval"
# CLIP_benchmark names a direction by what is retrieved.
SIDES = {"text_to_image": "image", "image_to_text": "text"}


def layout(results: Mapping, model: str) -> dict[str, dict]:
    """The content of a file for each language; `model` is the name of the run."""
    return {
        language: {
            "dataset": NAMES.get(results["dataset"], results["dataset"]),
            "model": model,
            "pretrained": f"step-{results['step']}",
            "task": TASK,
            "metrics": {
                f"{side}_retrieval_recall@{name.removeprefix('R@')}": value
                for direction, side in SIDES.items()
                for name, value in result[direction].items()
                if name.startswith("R@")
            },
            "language": language,
        }
        for language, result in results["languages"].items()
    }


def write(results: Mapping, folder: pathlib.Path, model: str) -> pathlib.Path:
    """Writes the files into a new folder in `folder`, and returns the new folder's path."""
    target = folder / f"{results['dataset']}-{results['step']}.clip_benchmark"
    target.mkdir(exist_ok=True)
    for language, content in layout(results, model).items():
        parts = (content["dataset"], content["pretrained"], model, language, TASK)
        files.write_whole(target / f"{'_'.join(parts)}.json", json.dumps(content, indent=1))
    return target

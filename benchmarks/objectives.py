"""Does pushing texts apart help? Trains the recipe of configs/muse.py with every objective.

    python benchmarks/objectives.py --data_dir=PATH/flickr8k [--seeds=3] [--workdir=runs/objectives]

Trains each objective with and without `push_apart`, and M3L also without its own text term, and
prints text-to-image Recall@10 on the test set: the mean over the seeds and the largest deviation
from the mean. Finished runs are not run again, so the same command completes an interrupted table.
"""

import argparse
import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import muse
from xlir import train

PUSH = 0.25


def variants():
    """Name -> configuration."""
    for objective in muse.VARIANTS:
        for push in (0.0, PUSH):
            config = muse.get_config(objective)
            config.loss.push_apart = push
            yield f"{objective}{f' + {push} push_apart' if push else ''}", config
    config = muse.get_config("m3l")
    config.loss.text_weight = 0.0
    yield "m3l, image term alone", config


def recalls(config, workdir):
    """R@10 of the best checkpoint of a run, by language."""
    if not list(workdir.glob("results/*.json")):
        train.train(config, workdir)
    (file,) = workdir.glob("results/*.json")
    languages = json.loads(file.read_text())["languages"]
    return {name: 100 * result["text_to_image"]["R@10"] for name, result in languages.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/objectives"))
    arguments = parser.parse_args()
    rows = {}
    for name, config in variants():
        config.data.dir = arguments.data_dir
        runs = []
        for seed in range(arguments.seeds):
            config.seed = seed
            folder = name.replace(" ", "").replace(",", "-")
            runs.append(recalls(config, arguments.workdir / f"{folder}-{seed}"))
        rows[name] = {language: [run[language] for run in runs] for language in runs[0]}
        print(name, rows[name], flush=True)
    languages = list(next(iter(rows.values())))
    print(f"\n| objective | {' | '.join(languages)} |\n|---{'|---' * len(languages)}|")
    for name, row in rows.items():
        cells = []
        for language in languages:
            mean = statistics.mean(row[language])
            cells.append(f"{mean:.1f} (±{max(abs(x - mean) for x in row[language]):.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

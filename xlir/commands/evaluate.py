"""Evaluate the best checkpoint of a run on its own test sets, or on others.

With --task=tagging, the photos in a split of the run's data set are tagged with a vocabulary in
many languages, and the tags are evaluated. With --task=classification, photos are assigned to
classes by the classes' names, in each language of a test set.

Examples:
  python -m xlir.main eval --workdir=runs/flickr8k
  python -m xlir.main eval --workdir=runs/flickr8k --test_set=PATH/multilingual_test \\
      --images=PATH/images
  python -m xlir.main eval --workdir=runs/flickr8k --against=runs/baseline \\
      --predictions=best.jsonl
  python -m xlir.main eval --workdir=runs/flickr8k --task=tagging --test_set=split:val
  python -m xlir.main eval --workdir=runs/flickr8k --task=classification \\
      --test_set=babel_imagenet:PATH/Babel-ImageNet/data --images=PATH/imagenet/val
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from absl.flags import FlagValues

from input_pipeline import files
from xlir.commands import processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

# Task -> flags that only other tasks have.
RETRIEVAL = ("drop_junk", "k", "predictions", "against")
CLASSIFICATION = ("prompts", "languages")
FOREIGN = {
    "retrieval": ("vocabulary", *CLASSIFICATION),
    "tagging": (*RETRIEVAL, *CLASSIFICATION, "images", "layout"),
    "classification": ("vocabulary", *RETRIEVAL),
}


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.choice("task", "What to evaluate.", tuple(FOREIGN), default="retrieval")
    flags.test_set(several=True)
    flags.switch("drop_junk", "Leave out XTD10's six German captions that are not translations.")
    flags.string(
        "vocabulary",
        "Vocabulary for --task=tagging: coco, flickr8k, emoji, or a file (one tag per line, or a "
        "table of languages as in input_pipeline/vocabularies); default: the vocabulary of the "
        "run's data set.",
        default="",
    )
    flags.string(
        "prompts",
        "Prompts for --task=classification: a JSON file of lists of prompts by language, in which "
        "{} stands for the name of a class, or 'names' for bare names; default: the file of "
        "prompts in the test set's folder, if there is one.",
        default="",
    )
    flags.strings(
        "languages",
        "Languages for --task=classification, joined with commas. Default: all of the test set.",
        default="",
    )
    flags.strings("k", "More values of k for metrics such as R@k, besides 1, 5 and 10.", default="")
    flags.string("predictions", "File for the ten best answers to each query, as JSON lines.")
    flags.string(
        "against", "Folder of another run: its results are compared with this run's, by photo."
    )
    flags.choice(
        "layout",
        "Also write the results as other programs do: one JSON file for each language, as "
        "CLIP_benchmark.",
        ("clip_benchmark",),
    )
    processes.define(flags)


def run(values: FlagValues) -> None:
    """Evaluates."""
    for name in FOREIGN[values.task]:
        if values[name].value:
            raise UsageError(f"--{name} is not a flag of --task={values.task}")
    splits = _splits(values.test_set) if values.task == "tagging" else []
    at = [_whole(k) for k in values.k]
    if values.predictions:
        files.check_writable(pathlib.Path(values.predictions))
    processes.start_jax(values)
    import jax

    from xlir import data, evaluate, partition
    from xlir.encoder import Encoder
    from xlir.workdir import read_config

    workdir = pathlib.Path(values.workdir)
    mesh = partition.fitting_mesh(read_config(workdir).mesh)
    encoder = Encoder.load(workdir, mesh=mesh)
    if values.task == "tagging":
        _evaluate_tagging(encoder, workdir, values.vocabulary, splits)
        return
    if values.task == "classification":
        _classify(encoder, workdir, values)
        return
    test_sets = data.test_sets(
        encoder.config, values.test_set, values.images, drop_junk=values.drop_junk
    )
    with contextlib.ExitStack() as stack:
        extras = evaluate.Extras(at, clip_benchmark=values.layout == "clip_benchmark")
        if values.against:
            extras = dataclasses.replace(extras, against=pathlib.Path(values.against))
        if values.predictions and not jax.process_index():
            file = stack.enter_context(open(values.predictions, "w", encoding="utf8"))
            extras = dataclasses.replace(extras, predictions=file)
        for test_set in test_sets:
            evaluate.report(encoder, test_set, workdir, data.feature_cache(), extras)


def _whole(k: str) -> int:
    """A value of --k."""
    if not (k.isascii() and k.isdigit() and int(k)):
        raise UsageError(f"--k={k}: k must be a whole number, at least 1")
    return int(k)


def _splits(test_set: str) -> list[str]:
    """The names of the splits to tag, from --test_set."""
    names = (test_set or "split:test").split(",")
    for name in names:
        if not name.startswith("split:"):
            raise UsageError(f"--test_set={name}: --task=tagging needs split:NAME")
    return [name.removeprefix("split:") for name in names]


def _evaluate_tagging(
    encoder, workdir: pathlib.Path, vocabulary: str, splits: Sequence[str]
) -> None:
    from xlir import data, evaluate_tagging

    for split in splits:
        chosen = evaluate_tagging.tagging_set(encoder.config, vocabulary, split)
        evaluate_tagging.report(encoder, chosen, workdir, data.feature_cache())


def _classify(encoder, workdir: pathlib.Path, values: FlagValues) -> None:
    from xlir import data, evaluate_classification

    found = data.test_sets(
        encoder.config, values.test_set, values.images, task=values.task, prompts=values.prompts
    )
    if values.languages:
        found = [test_set.only(values.languages) for test_set in found]
    for test_set in found:
        evaluate_classification.report(
            *(encoder, test_set, workdir, data.feature_cache()),
            in_clip_benchmarks_layout=values.layout == "clip_benchmark",
        )

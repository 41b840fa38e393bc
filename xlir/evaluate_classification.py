"""Evaluation of zero-shot classification in the languages of a test set.

A photo is assigned to the class whose prompts are nearest to it: the embedding of a class is the
mean over its prompts, of unit length (Radford et al. 2021, section 3.1.4,
https://arxiv.org/abs/2103.00020). In each language, the classes are those with a name in it, and
the photos are those of these classes.
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Float

from input_pipeline.test_sets.classification_set import ClassificationSet
from xlir import clip_benchmark, evaluate, metrics, results, significance, tagging
from xlir.embed import Inputs
from xlir.encoder import Encoder
from xlir.significance import ByPhoto
from xlir.workdir import results_folder

# Values of k in accuracy@k.
AT = (1, 5)
METRICS = (*(f"accuracy@{k}" for k in AT), "mean_per_class_recall")


def evaluate_set(
    data: ClassificationSet,
    classes: Mapping[str, Float[np.ndarray, "_ dim"]],
    images: Float[np.ndarray, "photos dim"],
    step: int,
) -> dict:
    """Accuracy by language, 0 to 1.

    Args:
      data: the photos' classes.
      classes: language -> the embeddings of its classes.
      images: embeddings of the photos.
      step: the training step, for the record.

    Returns:
      The content of a results file. `accuracy@k` is the share of photos whose class is among the k
      nearest; equally near classes count as if they were in random order. `mean_per_class_recall`
      is the mean over classes of their photos' accuracy@1. `intervals` has the 95% bootstrap
      intervals of accuracies. `zero_shot_macro` is the mean of all languages except English, or
      None if there is only English.

    Raises:
      ValueError: an embedding is not finite.
    """
    found, by_photo = {}, {}
    for language, embeddings in classes.items():
        found[language], by_photo[language] = _evaluate_language(data, language, embeddings, images)
    macro = _zero_shot(found, by_photo)
    return {
        "dataset": data.name,
        "step": step,
        "images": len(images),
        "zero_shot_macro": macro,
        "languages": found,
    }


def _evaluate_language(
    data: ClassificationSet,
    language: str,
    classes: Float[np.ndarray, "classes dim"],
    images: Float[np.ndarray, "photos dim"],
) -> tuple[dict, dict[str, ByPhoto]]:
    """The results of a language without intervals, and its accuracies by photo."""
    present = data.classes[language]
    photos = np.flatnonzero(np.isin(data.class_of, present))
    own = data.class_of[photos]
    ranks = metrics.retrieval_ranks(images[photos], classes, own, present)
    right = [ranks.expectation(lambda rank, k=k: rank <= k) for k in AT]
    by_photo = {
        f"accuracy@{k}": ByPhoto.of(values, photos, len(images))
        for k, values in zip(AT, right, strict=True)
    }
    recall = np.bincount(own, right[0])[present] / np.bincount(own)[present]
    result = {
        "classes": len(present),
        "images": len(photos),
        "prompts": len(data.prompts(language)[0]),
    }
    result |= {name: metric.mean() for name, metric in by_photo.items()}
    return result | {"mean_per_class_recall": float(np.mean(recall))}, by_photo


def _zero_shot(
    languages: Mapping[str, dict], by_photo: Mapping[str, dict[str, ByPhoto]]
) -> dict | None:
    """Adds `intervals` to each language's results; returns the mean of all except English."""
    zero_shot = [language for language in languages if language != "en"]
    macro = {
        name: float(np.mean([languages[language][name] for language in zero_shot]))
        for name in METRICS
        if zero_shot
    }
    for name in METRICS[: len(AT)]:
        # All languages are measured on the same resamples of the photos.
        means = significance.resampled_means([of_one[name] for of_one in by_photo.values()])
        columns = dict(zip(by_photo, means.T, strict=True))
        for language, column in columns.items():
            languages[language].setdefault("intervals", {})[name] = significance.interval(column)
        if zero_shot:
            mean = np.mean([columns[language] for language in zero_shot], axis=0)
            macro.setdefault("intervals", {})[name] = significance.interval(mean)
    return macro or None


def table(found: dict) -> str:
    """The results as a table for the terminal, in percent.

    Behind accuracy@1 is half the width of its 95% interval.
    """
    lines = [
        f"{found['dataset']}, step {found['step']}, {found['images']:,} images",
        f"{'':<14}{'classes':>8}{'images':>8}{'prompts':>9}{'accuracy@1':>17}{'accuracy@5':>12}"
        f"{'mean per class recall':>23}",
    ]
    rows = dict(found["languages"])
    if found["zero_shot_macro"]:
        rows["zero-shot"] = found["zero_shot_macro"]
    for name, result in rows.items():
        low, high = result["intervals"]["accuracy@1"]
        counts = (result.get(count, "") for count in ("classes", "images", "prompts"))
        cells = "".join(f"{n:>{width}}" for n, width in zip(counts, (8, 8, 9), strict=True))
        first, fifth, recall = (100 * result[metric] for metric in METRICS)
        cells += f"{first:>11.1f} ±{50 * (high - low):4.1f}{fifth:>12.1f}{recall:>23.1f}"
        lines.append(f"{name:<14}{cells}")
    return "\n".join(lines)


def report(
    encoder: Encoder,
    data: ClassificationSet,
    workdir: pathlib.Path,
    cache: pathlib.Path,
    *,
    in_clip_benchmarks_layout: bool = False,
) -> None:
    """Evaluates and shows the results: a file, and a table in the terminal.

    Args:
      encoder: computes the embeddings.
      data: the test set.
      workdir: the run's folder.
      cache: the folder of the feature cache.
      in_clip_benchmarks_layout: also write the results as CLIP_benchmark does.
    """
    # Checked before evaluating, because the run's folder may be read-only.
    folder = results_folder(workdir)
    photos = Inputs(data.name, (), data.images, data.fingerprint)
    images = evaluate.embedded_images(encoder, photos, cache)
    classes = {
        language: tagging.embed_prompts(encoder, data.prompts(language), language)
        for language in data.names
    }
    if jax.process_index():
        return
    found = evaluate_set(data, classes, images, encoder.step)
    print(f"\n{table(found)}")
    if not folder:
        return
    print(f"\nwritten: {results.write(found, folder)}")
    if in_clip_benchmarks_layout:
        task = clip_benchmark.CLASSIFICATION
        print(f"\nwritten: {clip_benchmark.write(found, folder, workdir.name, task)}")

"""Evaluation of zero-shot tagging in the languages of a vocabulary, and display of its results.

The true tags of a photo come from the first of these sources that exists: the photo's own name, if
the run's data set is the emoji; COCO's instance labels, if the data folder has instances_*.json;
the English captions (`input_pipeline.labels`).
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from input_pipeline import labels, vocabularies
from input_pipeline.datasets.captioned_images import CaptionedImages
from xlir import data, evaluate, figures, metrics, reference_photos, results, tagging
from xlir.embed import Inputs
from xlir.encoder import Encoder
from xlir.reference_photos import Reference
from xlir.workdir import results_folder

# Number of tags that each photo gets for F1 and precision. Languages are compared at the
# percentile at which a held-out photo gets this number of tags on average.
TOP = 5
# The same for a stricter and for a looser percentile.
STRICT, LOOSE = 2, 20
# Languages on the contact sheet.
SHEET_LANGUAGES = 4


@dataclasses.dataclass(frozen=True)
class TaggingSet:
    """Photos and their true tags.

    Attributes:
      name: the set's name in results and in the name of their file.
      photos: the photos.
      vocabulary: the tags.
      positive: whether a photo has a tag.
      labels: the source of the true tags.
    """

    name: str
    photos: CaptionedImages
    vocabulary: vocabularies.Vocabulary
    positive: Bool[np.ndarray, "photos tags"]
    labels: str


def tagging_set(config: ConfigDict, vocabulary: str = "", split: str = "test") -> TaggingSet:
    """A split of the run's data set, with the true tags of its photos.

    Args:
      config: the run's configuration.
      vocabulary: a name or a file; default: the vocabulary of the data set.
      split: the name of the split.

    Raises:
      ValueError: no vocabulary is named and the data set has none, the vocabulary has no English,
        the split is unknown, or none of its photos has a tag; or as `vocabularies.load`.
      FileNotFoundError: the data set or the vocabulary is missing.
    """
    prepared = data.prepared_set(config)
    # The vocabulary of a data set has the data set's name.
    own = prepared.name if prepared.name in vocabularies.KNOWN else ""
    if not (vocabulary or own):
        raise ValueError(f"no vocabulary belongs to {prepared.name}: name one with --vocabulary")
    chosen = vocabularies.load(vocabulary or own)
    if "en" not in chosen.names:
        raise ValueError(
            f"vocabulary {chosen.name} is a list; evaluation needs a table with the column 'en'"
        )
    photos = data.split_photos(config, split)
    positive, source = _labels(config, chosen, photos, split)
    if not positive.any():
        raise ValueError(f"no photo of {prepared.name}-{split} has a tag of {chosen.name}")
    name = prepared.filed_under(split)
    name += "" if chosen.name == own else f"-{chosen.name}"
    return TaggingSet(f"{name}-tagging", photos, chosen, positive, source)


def _labels(
    config: ConfigDict, vocabulary: vocabularies.Vocabulary, photos: CaptionedImages, split: str
) -> tuple[Bool[np.ndarray, "photos tags"], str]:
    """The true tags of the photos, and their source."""
    prepared = data.prepared_set(config)
    if prepared.own_tags and vocabulary.name == prepared.name:
        return np.eye(len(vocabulary.tags), dtype=bool)[prepared.own_tags(split)], "names"
    files = labels.instance_files(pathlib.Path(config.data.dir)) if config.data.dir else []
    if vocabulary.name == "coco" and files:
        found = labels.instances(files, photos.image_ids, vocabulary.tags)
        return found, ", ".join(file.name for file in files)
    return labels.mentioned(photos.captions, vocabulary.tags), "captions"


def evaluate_set(
    data: TaggingSet,
    taggers: Mapping[str, tagging.Tagger],
    images: Float[np.ndarray, "photos dim"],
    reference: Reference,
    step: int,
) -> dict:
    """Metrics of each language, from the tagger's scores and (under `cosine`) from plain cosines.

    Args:
      data: the photos' true tags.
      taggers: language -> its tagger, created with `reference`.
      images: embeddings of the photos.
      reference: photos of the run.
      step: the training step, for the record.

    Returns:
      The content of a results file. `predicted_tags` is the mean number of tags per photo when all
      languages share one threshold. The threshold is the calibrated percentile at which a held-out
      photo gets 5 tags on average (also 2, and 20), or the cosine at which it gets 5 in English.
    """
    percentile, strict, loose = (
        max(0.0, 1 - count / len(data.vocabulary.tags)) for count in (TOP, STRICT, LOOSE)
    )
    english = next(iter(taggers.values())).embeddings
    one_cosine = np.quantile(reference.held_out @ english.T, percentile)
    # In float64, equal photos have equal cosines.
    exact = images.astype(np.float64)
    languages = {}
    for language, tagger in taggers.items():
        scores, cosines = tagger.scores(exact), exact @ tagger.embeddings.T
        prominences = tagger.prominences(images)
        predicted = {
            "one_percentile": prominences >= tagger.prominence_at(percentile),
            "one_strict_percentile": prominences >= tagger.prominence_at(strict),
            "one_loose_percentile": prominences >= tagger.prominence_at(loose),
            "one_cosine": cosines >= one_cosine,
        }
        languages[language] = {
            **metrics.tagging(metrics.rounded(scores), data.positive, TOP),
            "cosine": metrics.tagging(metrics.rounded(cosines), data.positive, TOP),
            "predicted_tags": {
                name: float(chosen.sum() / len(images)) for name, chosen in predicted.items()
            },
        }
    zero_shot = [result for language, result in languages.items() if language != "en"]
    return {
        "dataset": data.name,
        "step": step,
        "images": len(images),
        "vocabulary": data.vocabulary.name,
        "tags": len(data.vocabulary.tags),
        "labels": data.labels,
        "tags_per_image": float(data.positive.sum() / len(images)),
        "percentile": percentile,
        "zero_shot_macro": results.mean(zero_shot) if zero_shot else None,
        "languages": languages,
    }


def spread(results: dict, threshold: str) -> float:
    """The languages' largest mean number of tags per photo, divided by the smallest, minus 1."""
    counts = [one["predicted_tags"][threshold] for one in results["languages"].values()]
    return max(counts) / max(min(counts), 1e-9) - 1


def table(results: dict) -> str:
    """The results as a table for the terminal, in percent except for the tags per photo."""
    k = next(name for name in results["languages"]["en"] if name.startswith("precision")).split(
        "@"
    )[1]
    columns = ("mAP", f"precision@{k}", f"micro_F1@{k}", f"macro_F1@{k}", "hit@1", "hit@10")
    head = ("mAP", f"P@{k}", f"F1@{k} micro", "macro", "hit@1", "hit@10", "tags/photo")
    lines = [
        f"{results['dataset']}, step {results['step']}, {results['images']} images, "
        f"{results['tags']} tags, {results['tags_per_image']:.1f} true tags per image (from "
        f"{results['labels']})",
        f"{'':<10}{head[0]:>6}{head[1]:>7}{head[2]:>12}{head[3]:>7}{head[4]:>7}{head[5]:>8}{head[6]:>14}",
    ]
    rows = dict(results["languages"])
    if results["zero_shot_macro"]:
        rows["zero-shot"] = results["zero_shot_macro"]
    for name, result in rows.items():
        cells = "".join(
            f"{100 * result[column]:{width}.1f}"
            for column, width in zip(columns, (6, 7, 12, 7, 7, 8), strict=True)
        )
        lines.append(f"{name:<10}{cells}{result['predicted_tags']['one_percentile']:>14.2f}")
    calibrated, strict, loose, plain = (
        spread(results, name)
        for name in (
            "one_percentile",
            "one_strict_percentile",
            "one_loose_percentile",
            "one_cosine",
        )
    )
    lines.append(
        "Difference in tags per photo between the languages with the most and the fewest: "
        f"{calibrated:+.0%} with one percentile for all languages ({strict:+.0%} at {STRICT} tags "
        f"per photo, {loose:+.0%} at {LOOSE}), {plain:+.0%} with one cosine"
    )
    return "\n".join(lines)


def report(encoder: Encoder, data: TaggingSet, workdir: pathlib.Path, cache: pathlib.Path) -> None:
    """Evaluates and shows the results: a file, a table in the terminal and a contact sheet."""
    # Checked before evaluating, because the run's folder may be read-only.
    folder = results_folder(workdir)
    photos = Inputs(data.name, (), data.photos.images, data.photos.fingerprint)
    images = evaluate.embedded_images(encoder, photos, cache)
    reference = reference_photos.reference(encoder, workdir)
    taggers = {
        language: tagging.Tagger(encoder, data.vocabulary, language, reference)
        for language in data.vocabulary.languages()
    }
    if jax.process_index():
        return
    found = evaluate_set(data, taggers, images, reference, encoder.step)
    print(f"\n{table(found)}")
    if not folder:
        return
    file = results.write(found, folder)
    shown = min(tagging.SHEET_PHOTOS, len(images))
    rows = [place * len(images) // shown for place in range(shown)]
    tags = {
        language: [
            [tag.name for tag in found]
            for found in tagger.tag(images[rows], top_k=tagging.SHEET_TAGS)
        ]
        for language, tagger in taggers.items()
    }
    sheet = file.with_suffix(".tags.png")
    figures.plot_tags([data.photos.images[row] for row in rows], tags, sheet, SHEET_LANGUAGES)
    print(f"\nwritten: {file}\n         {sheet}")

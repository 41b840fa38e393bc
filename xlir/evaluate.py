"""Retrieval evaluation of an encoder on a multilingual set, and how its results are shown."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from input_pipeline import features, files
from input_pipeline.cache import fingerprint
from input_pipeline.test_sets.retrieval_set import RetrievalSet
from xlir import figures, metrics, partition
from xlir.encoder import FEATURE_BATCH, SIDES, Encoder
from xlir.workdir import results_folder

DIRECTIONS = ("text_to_image", "image_to_text")


class Evaluator:
    """Evaluates an encoder, as its parameters change, on one set.

    Outputs of frozen towers are computed once (and cached on disk).

    Args:
      encoder: the encoder whose current parameters each call uses.
      data: the images and captions.
      cache: the folder of the feature cache.
    """

    def __init__(self, encoder: Encoder, data: RetrievalSet, cache: pathlib.Path):
        self.encoder, self.data = encoder, data
        self._captions = [caption for texts in data.captions.values() for caption in texts]
        self._features = frozen_features(
            encoder, data.name, self._captions, data.images, data.fingerprint, cache
        )

    def embeddings(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Text embeddings by language, and image embeddings; all of unit length."""
        flat = self._embed("text", self._captions)
        texts, start = {}, 0
        for language, captions in self.data.captions.items():
            texts[language] = flat[start : start + len(captions)]
            start += len(captions)
        return texts, self._embed("image", self.data.images)

    def __call__(self) -> dict:
        """Results as described in `retrieval`, for the encoder's current parameters."""
        texts, images = self.embeddings()
        return retrieval(self.data, texts, images, self.encoder.step)

    def _embed(self, side: str, inputs: Sequence) -> np.ndarray:
        if side in self._features:
            batches = self.encoder.feature_batches(side, self._features[side])
        elif side == "text":
            batches = self.encoder.text_batches(inputs)
        else:
            batches = self.encoder.image_batches(inputs)
        return self.encoder.embed(side, batches, len(inputs))


def frozen_features(
    encoder: Encoder,
    label: str,
    captions: Sequence[str],
    images: Sequence,
    images_fingerprint: str,
    cache: pathlib.Path,
    sides: Sequence[str] = SIDES,
) -> dict[str, Float[np.ndarray, "rows dim"]]:
    """The outputs of frozen towers, by side, from the cache or computed into it.

    Args:
      encoder: what is frozen in its configuration counts.
      label: for the progress bar.
      captions: all texts.
      images: all images.
      images_fingerprint: identifies the images' content.
      cache: the folder of the feature cache.
      sides: those that are asked for.
    """
    inputs = {"text": captions, "image": images}
    sources = {"text": fingerprint({"texts": captions}), "image": images_fingerprint}
    batches = {"text": encoder.text_batches, "image": encoder.image_batches}

    def compute(side: str, start: int, stop: int) -> np.ndarray:
        part = [inputs[side][row] for row in range(start, stop)]
        return encoder.features(side, batches[side](part), stop - start)

    return {
        side: features.cached(
            cache,
            {**encoder.describe_tower(side), "source": sources[side]},
            (len(inputs[side]), encoder.feature_dims[side]),
            functools.partial(compute, side),
            label=f"{label} {side}s",
            block=FEATURE_BATCH * encoder.mesh.size,
            agree=partition.agree_minimum if jax.process_count() > 1 else None,
        )
        for side in sides
        if encoder.config[side].frozen
    }


def retrieval(
    data: RetrievalSet, texts: dict[str, np.ndarray], images: np.ndarray, step: int
) -> dict:
    """Retrieval metrics for each language and both directions.

    Args:
      data: the set, which says what belongs together.
      texts: language -> [captions, dim].
      images: [images, dim].
      step: the training step, for the record.

    Returns:
      The content of a results file. `zero_shot_macro` averages over the languages other than
      English, which training never saw; it is None where there are none.

    Raises:
      ValueError: an embedding is not finite.
    """
    image_ids = np.arange(len(images))
    languages = {}
    for language, text in texts.items():
        text_ids = data.image_of[language]
        # An image without a caption in this language is found or not, but asks for nothing.
        asking = np.isin(image_ids, text_ids)
        forward = metrics.retrieval_ranks(text, images, text_ids, image_ids)
        backward = metrics.retrieval_ranks(images[asking], text, image_ids[asking], text_ids)
        languages[language] = {
            "queries": len(text),
            "text_to_image": metrics.summarize(forward),
            "image_to_text": metrics.summarize(backward),
        }
    zero_shot = [result for language, result in languages.items() if language != "en"]
    macro = None
    if zero_shot:
        macro = {
            direction: {
                name: float(np.mean([result[direction][name] for result in zero_shot]))
                for name in ("R@1", "R@5", "R@10")
            }
            for direction in DIRECTIONS
        }
    return {
        "dataset": data.name,
        "step": step,
        "images": len(images),
        "zero_shot_macro": macro,
        "languages": languages,
    }


def folded_retrieval(
    data: RetrievalSet, texts: dict[str, np.ndarray], images: np.ndarray, step: int
) -> dict:
    """The mean of `retrieval` over `data.folds`: COCO's 1K protocol (Karpathy and Li 2015).

    The images are cut into equal parts, in order; each is searched with its own captions only.
    """
    name, count = data.folds
    size, results = len(images) // count, []
    for start in range(0, size * count, size):
        rows = {
            language: np.flatnonzero((image_of >= start) & (image_of < start + size))
            for language, image_of in data.image_of.items()
        }
        image_of = {language: data.image_of[language][rows[language]] - start for language in rows}
        fold = dataclasses.replace(data, name=name, image_of=image_of)
        fold_texts = {language: texts[language][rows[language]] for language in rows}
        results.append(retrieval(fold, fold_texts, images[start : start + size], step))
    return _mean(results)


def _mean(results: list) -> object:
    """Metrics are averaged; names and counts, which are the same, stay."""
    first = results[0]
    if isinstance(first, dict):
        return {key: _mean([result[key] for result in results]) for key in first}
    return float(np.mean(results)) if isinstance(first, float) else first


def score(results: dict) -> float:
    """What decides which checkpoint is best: zero-shot macro R@10, text to image.

    A validation set that has English only is judged by English.
    """
    macro = results["zero_shot_macro"] or results["languages"]["en"]
    return macro["text_to_image"]["R@10"]


def table(results: dict) -> str:
    """The results as a table for the terminal, recalls in percent."""
    head = f"{results['dataset']}, step {results['step']}, {results['images']} images"
    columns = "R@1   R@5  R@10"
    lines = [
        f"{head:<38}  text to image          image to text",
        f"{'':<10}{'queries':>8}{'median rank':>14}      {columns:<20}   {columns}",
    ]

    def row(name: str, queries: object, median: object, result: dict) -> str:
        cells = "       ".join(
            "  ".join(f"{100 * result[direction][k]:4.1f}" for k in ("R@1", "R@5", "R@10"))
            for direction in DIRECTIONS
        )
        return f"{name:<10}{queries:>8}{median:>14}      {cells}"

    for language, result in results["languages"].items():
        median = f"{result['text_to_image']['median_rank']:.0f}"
        lines.append(row(language, result["queries"], median, result))
    if results["zero_shot_macro"]:
        lines.append(row("zero-shot", "", "", results["zero_shot_macro"]))
    return "\n".join(lines)


def write(results: dict, folder: pathlib.Path) -> pathlib.Path:
    """Writes `<set>-<step>.json` into a folder and returns its path."""
    file = folder / f"{results['dataset']}-{results['step']}.json"
    content = json.dumps(results, indent=1)
    files.write_sums(folder, (), {file.name: content}, keep=True)
    files.write_whole(file, content)
    return file


def headline(results: dict) -> str:
    """The results in a few words: text-to-image R@10 of English and of the zero-shot mean."""
    parts = []
    if "en" in results["languages"]:
        parts.append(f"en {100 * results['languages']['en']['text_to_image']['R@10']:.1f}")
    if results["zero_shot_macro"]:
        macro = results["zero_shot_macro"]["text_to_image"]["R@10"]
        parts.append(f"other languages {100 * macro:.1f}")
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


def report(
    encoder: Encoder, data: RetrievalSet, workdir: pathlib.Path, cache: pathlib.Path
) -> None:
    """Evaluates and shows it: results file, table in the terminal, two pictures.

    Where the set has folds, a second file and table hold their mean. Of several processes, which
    all embed, the first one writes.
    """
    # Checked before the work: the run's folder may be read-only.
    folder = results_folder(workdir)
    texts, images = Evaluator(encoder, data, cache).embeddings()
    if jax.process_index():
        return
    results = retrieval(data, texts, images, encoder.step)
    print(f"\n{table(results)}")
    if folder:
        file = write(results, folder)
        recall, queries = (file.with_suffix(f".{what}.png") for what in ("recall", "queries"))
        figures.plot_recall(results, recall)
        figures.plot_queries(data.captions, data.image_of, texts, images, data.images, queries)
        print(f"\nwritten: {file}\n         {recall}\n         {queries}")
    if data.folds:
        results = folded_retrieval(data, texts, images, encoder.step)
        print(f"\n{table(results)}")
        if folder:
            print(f"\nwritten: {write(results, folder)}")

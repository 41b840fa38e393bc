"""Retrieval evaluation on a multilingual set."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import TextIO

import jax
import numpy as np
from jaxtyping import Float

from input_pipeline.test_sets.retrieval_set import RetrievalSet
from input_pipeline.tokenizers import languages
from xlir import (
    clip_benchmark,
    comparison,
    figures,
    metrics,
    predictions,
    results,
    significance,
)
from xlir.embed import SIDES, Inputs, Parameters
from xlir.encoder import Encoder
from xlir.results import DIRECTIONS
from xlir.retrieval_metrics import Ranked
from xlir.workdir import results_folder

Rankings = dict[str, dict[str, Ranked]]


@dataclasses.dataclass(frozen=True)
class Extras:
    """What `report` does besides evaluating.

    Attributes:
      at: values of k in metrics such as R@k, besides 1, 5 and 10.
      predictions: a file to which the best answers to each query are written as JSON lines.
      against: the folder of another run, which is compared with this one.
      clip_benchmark: also write the results in CLIP_benchmark's layout.
    """

    at: Iterable[int] = ()
    predictions: TextIO | None = None
    against: pathlib.Path | None = None
    clip_benchmark: bool = False


@dataclasses.dataclass(frozen=True)
class Embedded:
    """An encoder's embeddings of a test set.

    Attributes:
      data: the test set.
      texts: language -> embeddings of its captions, of unit length.
      images: embeddings of the images, of unit length.
    """

    data: RetrievalSet
    texts: dict[str, Float[np.ndarray, "_ dim"]]
    images: Float[np.ndarray, "images dim"]


class Evaluator:
    """Evaluates a dual encoder on one set, with the parameters passed to each call.

    The outputs of frozen towers are computed once, or read from the cache. If the tokenizer puts
    the token of a language before each text (NLLB), captions get the token of their own language.

    Args:
      encoder: computes the outputs of its frozen towers; later calls only use its embedder.
      data: the images and captions.
      cache: the folder of the feature cache.
      images: embeddings of unit length that take the place of those of the images; default: the
        images are embedded.
    """

    def __init__(
        self,
        encoder: Encoder,
        data: RetrievalSet,
        cache: pathlib.Path,
        images: Float[np.ndarray, "images dim"] | None = None,
    ):
        self._embedder, self._data = encoder.embedder, data
        self._captions = [
            caption
            for language, captions in data.captions.items()
            for caption in languages.marked(captions, language, encoder.tokenizer)
        ]
        inputs = Inputs(data.name, self._captions, data.images, data.fingerprint)
        self._images = images
        sides = SIDES if images is None else ("text",)
        self._features = encoder.frozen_features(inputs, cache, sides)

    def embeddings(
        self, parameters: Parameters
    ) -> tuple[dict[str, Float[np.ndarray, "captions dim"]], Float[np.ndarray, "images dim"]]:
        """Text embeddings by language, and image embeddings; all of unit length.

        Args:
          parameters: their frozen part must be that of the encoder passed to `__init__`.
        """
        flat = self._embed(parameters, "text", self._captions)
        texts, start = {}, 0
        for language, captions in self._data.captions.items():
            texts[language] = flat[start : start + len(captions)]
            start += len(captions)
        if self._images is not None:
            return texts, self._images
        return texts, self._embed(parameters, "image", self._data.images)

    def __call__(self, parameters: Parameters, step: int) -> dict:
        """The results that `retrieval` describes, for the parameters after a training step."""
        return retrieval(self._data, *self.embeddings(parameters), step)

    def _embed(
        self, parameters: Parameters, side: str, inputs: Sequence
    ) -> Float[np.ndarray, "inputs dim"]:
        if side in self._features:
            return self._embedder.embed_features(parameters, side, self._features[side])
        return self._embedder.embed(parameters, side, inputs)


def retrieval(
    data: RetrievalSet, texts: dict[str, np.ndarray], images: np.ndarray, step: int
) -> dict:
    """Retrieval metrics for each language and both directions.

    Args:
      data: the test set; it says which image each caption describes.
      texts: language -> [captions, dim].
      images: [images, dim].
      step: the training step, for the record.

    Returns:
      The content of a results file. `zero_shot_macro` averages over the languages that training
      never saw, which are all except English; it is None if there is only English.

    Raises:
      ValueError: an embedding is not finite.
    """
    return summary(data.name, rankings(data, texts, images), len(images), step)


def rankings(data: RetrievalSet, texts: dict[str, np.ndarray], images: np.ndarray) -> Rankings:
    """Language -> direction -> ranks of the positives; arguments and errors as for `retrieval`."""
    image_ids, found = np.arange(len(images)), {}
    for language, text in texts.items():
        text_ids = data.image_of[language]
        # Images without a caption in this language are candidates, but not queries.
        asking = np.flatnonzero(np.isin(image_ids, text_ids))
        forward = metrics.positive_ranks(text, images, text_ids, image_ids)
        backward = metrics.positive_ranks(images[asking], text, asking, text_ids)
        found[language] = dict(
            zip(DIRECTIONS, (Ranked(forward, text_ids), Ranked(backward, asking)), strict=True)
        )
    return found


def summary(name: str, ranked: Rankings, images: int, step: int) -> dict:
    """The results of `retrieval`, from the ranks; `images` is the number of images."""
    languages = {
        language: {"queries": len(directions["text_to_image"].photo)}
        | {name: metrics.summarize(one.ranks.best()) for name, one in directions.items()}
        for language, directions in ranked.items()
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
        "dataset": name,
        "step": step,
        "images": images,
        "zero_shot_macro": macro,
        "languages": languages,
    }


def detailed(name: str, ranked: Rankings, images: int, step: int, at: Sequence[int]) -> dict:
    """The results of `retrieval` with the metrics of `retrieval_metrics` and their intervals.

    `intervals` has the 95% bootstrap interval of each metric except the median rank.

    Args:
      name, ranked, images, step: as for `summary`.
      at: the values of k.
    """
    found = summary(name, ranked, images, step)
    zero_shot = {direction: [] for direction in DIRECTIONS}
    for language, directions in ranked.items():
        for direction, one in directions.items():
            by_photo = one.by_photo(images, at)
            result = found["languages"][language][direction]
            result |= {metric: values.mean() for metric, values in by_photo.items()}
            result["intervals"] = significance.intervals(by_photo)
            if language != "en":
                zero_shot[direction].append(by_photo)
    for direction, result in (found["zero_shot_macro"] or {}).items():
        means = {
            f"R@{k}": significance.macro([language[f"R@{k}"] for language in zero_shot[direction]])
            for k in at
        }
        result |= {metric: values.mean() for metric, values in means.items()}
        result["intervals"] = significance.intervals(means)
    return found


def folded_retrieval(
    data: RetrievalSet, texts: dict[str, np.ndarray], images: np.ndarray, step: int
) -> dict:
    """The mean of `retrieval` over `data.folds`: COCO's 1K protocol (Karpathy and Li 2015).

    The images are cut into consecutive equal parts, each searched with its own captions only.
    """
    name, count = data.folds
    size, folds = len(images) // count, []
    for start in range(0, size * count, size):
        rows = {
            language: np.flatnonzero((image_of >= start) & (image_of < start + size))
            for language, image_of in data.image_of.items()
        }
        image_of = {language: data.image_of[language][rows[language]] - start for language in rows}
        fold = dataclasses.replace(data, name=name, image_of=image_of)
        fold_texts = {language: texts[language][rows[language]] for language in rows}
        folds.append(retrieval(fold, fold_texts, images[start : start + size], step))
    return results.mean(folds)


def embedded(encoder: Encoder, data: RetrievalSet, cache: pathlib.Path) -> Embedded:
    """A test set with its embeddings; `cache` is the folder of the feature cache."""
    return Embedded(data, *Evaluator(encoder, data, cache).embeddings(encoder.parameters))


def embedded_images(
    encoder: Encoder, inputs: Inputs, cache: pathlib.Path
) -> Float[np.ndarray, "images dim"]:
    """Embeddings of images; the outputs of a frozen tower come from the cache.

    Args:
      encoder: computes the embeddings.
      inputs: the images; its texts are not used.
      cache: the folder of the feature cache.
    """
    features = encoder.frozen_features(inputs, cache, sides=("image",))
    if "image" in features:
        return encoder.embedder.embed_features(encoder.parameters, "image", features["image"])
    return encoder.encode_image(inputs.images)


def report(
    encoder: Encoder,
    data: RetrievalSet,
    workdir: pathlib.Path,
    cache: pathlib.Path,
    extras: Extras = Extras(),
) -> Embedded:
    """Evaluates on a set and shows the results: a file, a table in the terminal, two figures.

    If the set has folds, a second file and table hold their mean. With several processes, all
    compute embeddings, and the first one writes. Returns the embeddings.
    """
    # Checked before evaluating, because the run's folder may be read-only.
    folder = results_folder(workdir)
    ours, theirs = embedded(encoder, data, cache), None
    if extras.against:
        other = Encoder.load(extras.against, mesh=encoder.mesh)
        theirs = Evaluator(other, data, cache).embeddings(other.parameters)
    if jax.process_index():
        return ours
    texts, images = ours.texts, ours.images
    ranked, at = rankings(data, texts, images), sorted({*metrics.AT, *extras.at})
    found = detailed(data.name, ranked, len(images), encoder.step, at)
    print(f"\n{results.table(found)}")
    if folder:
        file = results.write(found, folder)
        recall, queries = (file.with_suffix(f".{what}.png") for what in ("recall", "queries"))
        figures.plot_recall(found, recall)
        figures.plot_queries(data.captions, data.image_of, texts, images, data.images, queries)
        print(f"\nwritten: {file}\n         {recall}\n         {queries}")
    if data.folds:
        folds = folded_retrieval(data, texts, images, encoder.step)
        print(f"\n{results.table(folds)}")
        if folder:
            print(f"\nwritten: {results.write(folds, folder)}")
    if folder and extras.clip_benchmark:
        print(f"\nwritten: {clip_benchmark.write(found, folder, workdir.name)}")
    if extras.predictions:
        predictions.write(extras.predictions, data, texts, images, ranked)
    if theirs:
        name = extras.against.name
        differences = comparison.compare(ranked, rankings(data, *theirs), len(images), at)
        print(f"\n{comparison.table(differences, workdir.name, name)}")
        if folder:
            print(f"\nwritten: {results.write_comparison(differences, found, name, folder)}")
    return ours

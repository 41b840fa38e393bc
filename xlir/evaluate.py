"""Retrieval evaluation on a multilingual set."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from input_pipeline.test_sets.retrieval_set import RetrievalSet
from input_pipeline.tokenizers import languages
from xlir import figures, metrics, results
from xlir.embed import SIDES, Inputs, Parameters
from xlir.encoder import Encoder
from xlir.results import DIRECTIONS
from xlir.workdir import results_folder


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
    image_ids = np.arange(len(images))
    languages = {}
    for language, text in texts.items():
        text_ids = data.image_of[language]
        # Images without a caption in this language are candidates, but not queries.
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


def report(
    encoder: Encoder, data: RetrievalSet, workdir: pathlib.Path, cache: pathlib.Path
) -> None:
    """Evaluates on a set and shows the results: a file, a table in the terminal, two figures.

    If the set has folds, a second file and table hold their mean. With several processes, all
    compute embeddings, and the first one writes.
    """
    # Checked before evaluating, because the run's folder may be read-only.
    folder = results_folder(workdir)
    texts, images = Evaluator(encoder, data, cache).embeddings(encoder.parameters)
    if jax.process_index():
        return
    found = retrieval(data, texts, images, encoder.step)
    print(f"\n{results.table(found)}")
    if folder:
        file = results.write(found, folder)
        recall, queries = (file.with_suffix(f".{what}.png") for what in ("recall", "queries"))
        figures.plot_recall(found, recall)
        figures.plot_queries(data.captions, data.image_of, texts, images, data.images, queries)
        print(f"\nwritten: {file}\n         {recall}\n         {queries}")
    if data.folds:
        found = folded_retrieval(data, texts, images, encoder.step)
        print(f"\n{results.table(found)}")
        if folder:
            print(f"\nwritten: {results.write(found, folder)}")

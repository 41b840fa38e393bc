"""Tags for images, in any language of the text encoder, from a vocabulary of names.

    encoder = xlir.Encoder.load(workdir)
    photos = reference_photos.reference(encoder, workdir)
    tagger = Tagger(encoder, vocabularies.load("coco"), "de", photos)
    tagger.tag(encoder.encode_image(["dog.jpg"]), top_k=3)

A tag's embedding is the mean over its names and over a few prompts ("a photo of a ..."; Radford et
al. 2021, section 3.1.4), each of unit length. Taking the best name instead of the mean is worse: a
name with a second sense also finds photos of that sense, and the more names a tag has, the nearer
the best of them is to any photo (measured in docs/results.md).

A score is the cosine of image and tag, each relative to its neighbourhood: cross-domain similarity
local scaling (Conneau et al. 2018, section 2.3), with training photos as the tag's neighbours. In a
large vocabulary, this removes the advantage of names that are near every image, and of names that
the run was trained on.

Whether an image has a tag is decided by the tag's prominence: how far it exceeds the mean of the
image's twenty best tags, after the tag's own neighbourhood is subtracted. Prominences and scores
rank the tags of one image in the same order. To rank photos by one tag, scores are better. As a
threshold, prominences are better: with a threshold on scores, some images get many tags and others
none (measured in docs/results.md).

Prominences are distributed differently in each language. A calibrated percentile means the same in
every language. It is a share of all pairs of a held-out photo (of the validation split) and a tag:
the share, 0 to 1, of pairs with a lower prominence.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

from input_pipeline import vocabularies
from input_pipeline.tokenizers import languages
from xlir import embed
from xlir.encoder import Encoder, encode_each
from xlir.reference_photos import Reference

# The prompts of each language: the bare name, and "a photo of" it.
TEMPLATES = {
    "en": ("{}", "a photo of a {}"),
    "ar": ("{}", "صورة {}"),
    "de": ("{}", "ein Foto: {}"),
    "es": ("{}", "una foto de {}"),
    "fa": ("{}", "عکس {}"),
    "fr": ("{}", "une photo de {}"),
    "id": ("{}", "foto {}"),
    "it": ("{}", "una foto di {}"),
    "ja": ("{}", "{}の写真"),
    "ko": ("{}", "{} 사진"),
    "pl": ("{}", "zdjęcie: {}"),
    "pt": ("{}", "uma foto de {}"),
    "ru": ("{}", "фото: {}"),
    "tr": ("{}", "{} fotoğrafı"),
    "zh": ("{}", "一张{}的照片"),
}
# Number of nearest neighbours in a neighbourhood, as in the paper.
NEIGHBOURS = 10
# Number of an image's best tags that prominence is relative to. With fewer, a threshold gives all
# images the same number. With more, the number depends on which photos a small set holds out.
BEST_TAGS = 20
# Images on a contact sheet, and tags per image and language.
SHEET_PHOTOS, SHEET_TAGS = 12, 4


@dataclasses.dataclass(frozen=True)
class Tag:
    """A tag of an image.

    Attributes:
      tag: the tag's identifier in the vocabulary.
      name: the tag's first name in the language.
      percentile: the calibrated percentile, 0 to 1: of all pairs of a held-out photo and a tag,
        the share with a lower prominence. None without held-out photos.
      cosine: the cosine similarity of image and tag, -1 to 1.
    """

    tag: str
    name: str
    percentile: float | None
    cosine: float


class Tagger:
    """Scores images against a vocabulary in one language.

    Args:
      encoder: embeds the names.
      vocabulary: the tags.
      language: the language of the names.
      reference: photos of the run. Without them, scores are plain cosines, and prominences and
        percentiles are not available.

    Attributes:
      tags: the identifier of each tag.
      names: the first name of each tag.
      embeddings: the tags' embeddings, of unit length.

    Raises:
      ValueError: the vocabulary has no names in that language.
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: vocabularies.Vocabulary,
        language: str,
        reference: Reference | None = None,
    ):
        names = vocabulary.names_in(language)
        self.tags, self.names = vocabulary.tags, [first for first, *_ in names]
        self.embeddings = embed_names(encoder, names, language)
        self._offset, self._curve = None, None
        if reference is not None:
            self._offset = _neighbourhood(self.embeddings @ reference.training.T) / 2
            self._curve = _percentile_curve(self.prominences(reference.held_out))

    def scores(self, images: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images tags"]:
        """Scores of embedded images of unit length; comparable within a language."""
        cosines = images @ self.embeddings.T
        if self._offset is None:
            return cosines
        return cosines - self._offset - _neighbourhood(cosines)[:, None] / 2

    def prominences(
        self, images: Float[np.ndarray, "images dim"]
    ) -> Float[np.ndarray, "images tags"]:
        """How far each tag exceeds the image's best tags; needs reference photos."""
        relative = images @ self.embeddings.T - self._offset
        return relative - _neighbourhood(relative, BEST_TAGS)[:, None]

    def percentiles(self, prominences: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The calibrated percentiles of prominences, 0 to 1; comparable between languages."""
        percentiles, of_percentile = self._curve
        return np.interp(prominences, of_percentile, percentiles)

    def prominence_at(self, percentile: float) -> float:
        """The prominence of a tag at a calibrated percentile.

        Raises:
          ValueError: there are no held-out photos, or the percentile is not between 0 and 1.
        """
        if self._curve is None:
            raise ValueError("a threshold needs the run's data set, which is missing")
        if not 0 <= percentile <= 1:
            raise ValueError(f"the threshold is {percentile}; it must be between 0 and 1")
        return float(np.interp(percentile, *self._curve))

    def tag(
        self,
        images: Float[np.ndarray, "images dim"],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[Tag]]:
        """The tags of embedded images, the best first.

        Args:
          images: embeddings of unit length.
          top_k: the largest number of tags for an image; None for all.
          threshold: tags with a lower calibrated percentile are left out; None leaves out none.

        Raises:
          ValueError: as `prominence_at`.
        """
        cosines = images @ self.embeddings.T
        calibrated = self._curve is not None
        # Without reference photos, scores are cosines.
        values = self.prominences(images) if calibrated else cosines
        least = -np.inf if threshold is None else self.prominence_at(threshold)
        found = []
        for row, value in enumerate(values):
            best = embed.top_k(value, top_k)
            best = best[value[best] >= least]
            shares = self.percentiles(value[best]).tolist() if calibrated else [None] * len(best)
            found.append(
                [
                    Tag(self.tags[column], self.names[column], share, float(cosines[row, column]))
                    for column, share in zip(best, shares, strict=True)
                ]
            )
        return found


def embed_names(
    encoder: Encoder, names: Sequence[vocabularies.Names], language: str
) -> Float[np.ndarray, "tags dim"]:
    """One unit-length embedding per tag: the mean over its names and the language's prompts.

    If the language has no prompts, the bare names are embedded.
    """
    templates = TEMPLATES.get(language, ("{}",))
    prompts = [
        [template.format(name) for name in of_tag for template in templates] for of_tag in names
    ]
    if language == "fr":
        # "de" is elided before a vowel: une photo d'arbre.
        prompts = [
            [re.sub(r"\bde (?=[aâeéèêiîoôœu])", "d'", prompt, flags=re.I) for prompt in of_tag]
            for of_tag in prompts
        ]
    return embed_prompts(encoder, prompts, language)


def embed_prompts(
    encoder: Encoder, prompts: Sequence[Sequence[str]], language: str
) -> Float[np.ndarray, "classes dim"]:
    """One unit-length embedding per class: the mean of the embeddings of its prompts.

    Args:
      encoder: computes the embeddings.
      prompts: the prompts of each class, at least one.
      language: the language of the prompts.
    """
    texts = [prompt for of_class in prompts for prompt in of_class]
    flat = encoder.encode_text(languages.marked(texts, language, encoder.tokenizer))
    starts = np.cumsum([0] + [len(of_class) for of_class in prompts[:-1]])
    sums = np.add.reduceat(flat, starts, axis=0)
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


def _neighbourhood(
    cosines: Float[np.ndarray, "rows others"], count: int = NEIGHBOURS
) -> Float[np.ndarray, " rows"]:
    """The mean of the `count` highest values of each row."""
    count = min(count, cosines.shape[1])
    return np.partition(cosines, -count, axis=1)[:, -count:].mean(axis=1)


def _percentile_curve(
    prominences: Float[np.ndarray, "held_out tags"],
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Percentiles, 0 to 1 and denser towards the ends, and the prominence at each.

    The prominence at a percentile is the mean of quantiles at half to twice its odds, because a
    single high quantile depends on few pairs. If the distribution has an exponential tail, this
    mean is the quantile itself.
    """
    odds = np.geomspace(1 / prominences.size, prominences.size, 300)
    around = np.multiply.outer(odds, np.geomspace(0.5, 2, 9))
    means = np.quantile(prominences, around / (1 + around)).mean(axis=1)
    percentiles = np.concatenate([[0], odds / (1 + odds), [1]])
    return percentiles, np.concatenate([[prominences.min()], means, [prominences.max()]])


def embed_files(
    encoder: Encoder, files: Iterable[pathlib.Path], skip: Callable[[str], None]
) -> Iterator[tuple[list[pathlib.Path], Float[np.ndarray, "images dim"]]]:
    """Files and their embeddings, one batch at a time, while threads decode the next files.

    Args:
      encoder: computes the embeddings.
      files: image files.
      skip: called with a one-line reason for each file that can't be read or decoded; the file is
        left out.
    """
    for batch, _, images in encode_each(
        encoder, files, lambda file: (encoder.embedder.decode(file), None), skip
    ):
        yield batch, images

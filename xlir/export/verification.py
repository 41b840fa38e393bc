"""Checks that an exported model reproduces the run's outputs for real captions and photos."""

import dataclasses
import importlib.util
import io
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int
from PIL import ExifTags, Image

from input_pipeline import images as image_io
from xlir import metrics
from xlir.data import RetrievalSet
from xlir.embed import SIDES
from xlir.encoder import Encoder

log = logging.getLogger(__name__)

# Largest allowed differences: in a coordinate of a unit-length embedding, and in a feature of a
# tower divided by the largest feature. In float32 the differences are 1e-6 at most.
TOLERANCE, TOWER_TOLERANCE = 1e-5, 1e-4
# Largest allowed difference in a pixel value, on the scale 0 to 255. Whole numbers must be equal.
# Where torchvision resizes in float32, it computes the filter's positions in float32 too, which
# changes values by 0.02 at 1,022 pixels a side.
PIXEL_TOLERANCE = 0.05
IMAGES, TEXTS = 32, 64
RECALL_AT = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Examples:
    """The inputs of the check: captions with their photos, then edge cases of texts and images.

    Attributes:
      name: the test set of the captions and photos.
      languages: the languages of the captions.
      texts: the captions, then the edge cases.
      image_of: for each caption, the row of its photo in `images`.
      images: the encoded photos, then the edge cases.
    """

    name: str
    languages: list[str]
    texts: list[str]
    image_of: Int[np.ndarray, " captions"]
    images: list[bytes]

    @property
    def photos(self) -> int:
        """The number of photos that have captions; they come first in `images`."""
        return int(self.image_of.max()) + 1


@dataclasses.dataclass(frozen=True)
class Report:
    """How far an exported model's outputs are from the run's.

    Attributes:
      examples: the inputs of both models.
      tokens: the number of texts whose token ids differ.
      pixels: the largest difference in a pixel value, on the scale 0 to 255.
      towers: by side, the largest difference in a tower's features, divided by the run's largest.
      embeddings: by side, the largest difference in a coordinate of the embeddings.
      cosine: by side, the smallest cosine between a run's embedding and the exported model's.
      recall: text-to-image Recall@K, of the run's embeddings and of the exported model's.
    """

    examples: Examples
    tokens: int
    pixels: float
    towers: Mapping[str, float]
    embeddings: Mapping[str, float]
    cosine: Mapping[str, float]
    recall: tuple[list[float], list[float]]

    def __str__(self) -> str:
        at = "/".join(map(str, RECALL_AT))
        ours, theirs = ("/".join(f"{100 * r:.1f}" for r in side) for side in self.recall)
        lines = [
            f"checked on {len(self.examples.image_of)} captions in "
            f"{', '.join(self.examples.languages)} and {self.examples.photos} photos of "
            f"{self.examples.name}, and on edge cases:",
            f"  tokens      {len(self.examples.texts) - self.tokens} of "
            f"{len(self.examples.texts)} texts equal",
            f"  pixels      largest difference {self.pixels:.1g} of 255",
        ]
        for side in SIDES:
            lines.append(
                f"  {side:<6}      largest difference: tower {self.towers[side]:.1e}, embedding "
                f"{self.embeddings[side]:.1e}; smallest cosine {self.cosine[side]:.7f}"
            )
        return "\n".join([*lines, f"  Recall@{at} run {ours}, exported {theirs}"])

    def first_difference(self) -> str:
        """The first stage whose outputs differ, from tokens to Recall@K; empty if none differs."""
        if self.tokens:
            return f"the tokens of {self.tokens} texts"
        if self.pixels > PIXEL_TOLERANCE:
            return f"the pixels (by up to {self.pixels:.3g} of 255)"
        for what, differences, tolerance in (
            ("tower", self.towers, TOWER_TOLERANCE),
            ("head", self.embeddings, TOLERANCE),
        ):
            for side in SIDES:
                if differences[side] > tolerance:
                    return f"the outputs of the {side} {what} (by up to {differences[side]:.1e})"
        if self.recall[0] != self.recall[1]:
            return f"Recall@K ({self.recall[0]} and {self.recall[1]}, because of near ties)"
        return ""


def check_packages(names: Sequence[str]) -> None:
    """Raises FileNotFoundError if a package is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        names = ", ".join(missing)
        raise FileNotFoundError(f"the export needs {names}: pip install 'xlir[export]'")


def examples(chosen: RetrievalSet) -> Examples:
    """Evenly spaced photos of a test set, each with two captions; the languages alternate.

    Edge cases follow: an empty text, a text long enough to be truncated, a photo with an EXIF
    rotation and a transparent photo.
    """
    count = min(len(chosen.images), IMAGES)
    rows = [row * len(chosen.images) // count for row in range(count)]
    texts, image_of, seen = [], [], set()
    turns = itertools.cycle(sorted(chosen.captions))
    for position, row in enumerate(rows):
        for number in range(TEXTS // IMAGES):
            language = next(turns)
            captions = np.flatnonzero(chosen.image_of[language] == row)
            if number < len(captions) or (len(chosen.captions) > 1 and len(captions)):
                seen.add(language)
                texts.append(chosen.captions[language][captions[number % len(captions)]])
                image_of.append(position)
    photos = [chosen.images[row] for row in rows]
    images = [x if isinstance(x, bytes) else pathlib.Path(x).read_bytes() for x in photos]
    texts += ["", " ".join(texts)]
    images += _hard_to_read(images[0])
    return Examples(chosen.name, sorted(seen), texts, np.array(image_of), images)


def _hard_to_read(photo: bytes) -> list[bytes]:
    """A photo with an EXIF rotation by 90 degrees, and a half-transparent photo."""
    image = Image.open(io.BytesIO(photo)).convert("RGBA").convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, transparent = io.BytesIO(), io.BytesIO()
    image.save(turned, "JPEG", exif=exif)
    image.putalpha(128)
    image.save(transparent, "PNG")
    return [turned.getvalue(), transparent.getvalue()]


def verify(encoder: Encoder, folder: pathlib.Path, format: str, pairs: Examples) -> Report:
    """Compares an exported folder's outputs with those of its run.

    Args:
      encoder: the run's encoder, in float32.
      folder: the exported folder.
      format: the folder's format.
      pairs: the inputs of both models.

    Raises:
      ValueError: the folder can't be loaded, or its outputs differ from the run's. The message
        names the first stage that differs.
    """
    theirs = _run(folder, format, pairs)
    ours = _reference(encoder, pairs)
    report = _compare(ours, theirs, pairs)
    if difference := report.first_difference():
        raise ValueError(
            f"the exported model differs from the run's, first in {difference}; "
            f"embeddings differ by up to {max(report.embeddings.values()):.1e}"
        )
    return report


def _reference(encoder: Encoder, pairs: Examples) -> dict[str, np.ndarray]:
    """The run's outputs."""
    tokens = encoder.tokenizer(pairs.texts, max_length=encoder.config.text.max_length)
    # Photos are decoded at full size, as by other libraries. Training decodes large JPEGs at a
    # reduced size.
    pixels = [image_io.decode(x, encoder.preprocessing, reduce=False) for x in pairs.images]
    outputs = {
        "tokens": np.concatenate(tokens),
        "lengths": np.array([len(ids) for ids in tokens]),
        "pixels": np.stack(pixels).astype(np.float32),
    }
    for side, inputs in (("text", pairs.texts), ("image", pixels)):
        # By default, GPUs and TPUs round the operands of a float32 matrix multiplication.
        with jax.default_matmul_precision("highest"):
            features = encoder.embedder.features(encoder.parameters, side, inputs)
            embeddings = encoder.embedder.embed(encoder.parameters, side, inputs)
        outputs[f"{side}_features"], outputs[f"{side}_embeddings"] = features, embeddings
    return outputs


def _run(folder: pathlib.Path, format: str, pairs: Examples) -> dict[str, np.ndarray]:
    """The exported model's outputs, computed in a new process."""
    with tempfile.TemporaryDirectory() as name:
        inputs, output = pathlib.Path(name), pathlib.Path(name) / "output.npz"
        (inputs / "texts.json").write_text(json.dumps(pairs.texts), encoding="utf8")
        (inputs / "images").mkdir()
        for row, image in enumerate(pairs.images):
            (inputs / "images" / f"{row:03d}").write_bytes(image)
        script = pathlib.Path(__file__).with_name("check.py")
        process = subprocess.run(
            # -P keeps the script's folder off sys.path, where its modules could hide others.
            [sys.executable, "-P", str(script), format, str(folder), name, str(output)],
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
        )
        if process.returncode:
            # Keep only the text after the last frame of the traceback.
            reason = " ".join(re.split(r"(?m)^ {2,}.*\n", process.stderr)[-1].split())
            raise ValueError(f"the exported model can't be run: {reason or 'it was killed'}")
        with np.load(output) as arrays:
            return dict(arrays)


def _compare(ours: Mapping, theirs: Mapping, pairs: Examples) -> Report:
    def tokens(outputs: Mapping) -> list[list[int]]:
        ends = np.cumsum(outputs["lengths"])[:-1]
        return [ids.tolist() for ids in np.split(outputs["tokens"], ends)]

    def largest(name: str) -> float:
        return float(np.abs(ours[name] - theirs[name]).max())

    equal = sum(a == b for a, b in zip(tokens(ours), tokens(theirs), strict=True))
    features = {side: f"{side}_features" for side in SIDES}
    embeddings = {side: f"{side}_embeddings" for side in SIDES}
    return Report(
        examples=pairs,
        tokens=len(pairs.texts) - equal,
        pixels=largest("pixels"),
        towers={s: largest(x) / float(np.abs(ours[x]).max()) for s, x in features.items()},
        embeddings={side: largest(name) for side, name in embeddings.items()},
        cosine={s: float((ours[x] * theirs[x]).sum(1).min()) for s, x in embeddings.items()},
        recall=(_recall(ours, pairs), _recall(theirs, pairs)),
    )


def _recall(outputs: Mapping[str, np.ndarray], pairs: Examples) -> list[float]:
    ranks = metrics.retrieval_ranks(
        outputs["text_embeddings"][: len(pairs.image_of)],
        outputs["image_embeddings"][: pairs.photos],
        pairs.image_of,
        np.arange(pairs.photos),
    )
    return [ranks.recall_at(k) for k in RECALL_AT]

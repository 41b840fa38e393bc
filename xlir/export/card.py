"""The model card of an exported folder, a README.md with the Hub's metadata."""

import pathlib
import re
import string
from collections.abc import Sequence

import numpy as np

from input_pipeline import datasets
from input_pipeline.preprocessing import Preprocessing
from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.export.plain import OPSET
from xlir.export.verification import Report

USE = {
    "sentence-transformers": """```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
# Without modality="text", a text that names an image file is read as that image.
texts = model.encode(["ein roter Apfel", "빨간 사과"], modality="text")
images = model.encode([Image.open("apple.jpg")])
print(model.similarity(texts, images))
```

`pip install 'sentence-transformers>=6.2' $vision`. First convert images to
8-bit RGB, with white behind transparent parts, and rotate them by their EXIF orientation.""",
    "transformers": """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER"$backend)
texts = ["ein roter Apfel", "빨간 사과"]
text = tokenizer(texts, padding=$padding, truncation=True, return_tensors="pt")
image = processor(Image.open("apple.jpg"), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**text, **image)
print(outputs.text_embeds @ outputs.image_embeds.T)
```

`pip install 'transformers>=5.23' torch $vision`. First convert images to
8-bit RGB, with white behind transparent parts, and rotate them by their EXIF orientation.""",
    "torch": """```
python example.py apple.jpg --texts "ein roter Apfel" "빨간 사과"
```

`pip install torch safetensors numpy pillow $tokenizer`. The modules are in `dual_encoder/`:
`load(FOLDER).encode_text([...])` and `.encode_image([...])` give embeddings of unit length.""",
    "onnx": """```
python example.py apple.jpg --texts "ein roter Apfel" "빨간 사과"
```

`pip install onnxruntime pillow $tokenizer`; PyTorch is not needed. Opset $opset; batch size and
text length are dynamic:

| file | inputs | features |
| --- | --- | --- |
| `text.onnx` | `input_ids`, `attention_mask`: int64 [batch, length] | [batch, $text] |
| `image.onnx` | `pixels`: $dtype [batch, $shape], RGB, 0 to 255 | [batch, $image] |

The outputs are `embeddings`, float32 [batch, $dim] of unit length, and the tower's `features`. A
graph of over 2 GiB has its weights in a separate file that ends in `.data`.""",
}
# The card lists a language as supported if its Recall@10 is at least this fraction of English's.
MIN_RECALL = 0.5


def write(
    encoder: Encoder, results: Sequence[dict], folder: pathlib.Path, format: str, report: Report
) -> None:
    """Writes the card of an exported folder.

    Args:
      encoder: the run's encoder.
      results: retrieval results of these weights, as in a run's results/.
      folder: the exported folder.
      format: the folder's format.
      report: the result of the folder's check.
    """
    config = encoder.config
    origin = "Published weights, imported by xlir.\n"
    if config.data.name:
        origin = (
            f"Trained with xlir on captions of {_name(config.data.dir) or config.data.name}; "
            "languages without training captions are zero-shot.\n"
        )
    parts = [
        _metadata(_supported_languages(results), format),
        "# Dual encoder for cross-lingual image retrieval\n",
        "Embeds images and texts in many languages in one space, for image search and tagging. "
        + origin,
        "## Use\n",
        _use(encoder, format),
        "\n## Model\n",
        f"| | text | image |\n| --- | --- | --- |\n{_table(encoder)}\n",
        f"Embeddings have {config.embedding_dim} dimensions. Weights of step {encoder.step}, "
        "float32.\n",
        "## Results\n",
        _measured(results) if results else "There are no results for these weights.\n",
        "The tables list every tested language, however low its recall. Other languages depend on "
        "the text tower's pre-training; in languages it has not seen, retrieval finds little.\n",
        "## Checked\n",
        "Loaded in a new process, without xlir or JAX, this model was compared with the run:\n\n"
        f"```\n{report}\n```\n",
        "## Terms\n",
        _terms(encoder, format),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf8")


def _supported_languages(results: Sequence[dict]) -> list[str]:
    """Languages whose Recall@10 is at least half of English's on the same test set."""
    supported = set()
    for result in results:
        recall = {
            language: scores["text_to_image"]["R@10"]
            for language, scores in result["languages"].items()
        }
        least = MIN_RECALL * recall.get("en", np.inf)
        supported |= {language for language, found in recall.items() if found >= least}
    return sorted(supported)


def _metadata(languages: list[str], format: str) -> str:
    lines = ["---", "pipeline_tag: feature-extraction", "license: other"]
    if format in ("sentence-transformers", "transformers"):
        lines.append(f"library_name: {format}")
    if languages:
        lines += ["language:", *(f"- {language}" for language in languages)]
    return "\n".join([*lines, "tags:", "- image-text-retrieval", "- xlir", "---\n"])


def _use(encoder: Encoder, format: str) -> str:
    padded = getattr(encoder.tokenizer, "padding", None) is not None
    # transformers resizes in float32 only with torchvision.
    floating = encoder.preprocessing.dtype == "float32"
    return string.Template(USE[format]).substitute(
        padding='"max_length"' if padded else True,
        tokenizer="tokenizers" if encoder.tokenizer.kind == "huggingface" else "sentencepiece",
        opset=OPSET,
        dim=encoder.config.embedding_dim,
        text=encoder.feature_dims["text"],
        image=encoder.feature_dims["image"],
        shape=", ".join(map(str, encoder.preprocessing.shape)),
        dtype=encoder.preprocessing.dtype,
        backend="" if floating else ', backend="pil"',
        vision="torchvision" if floating else "pillow",
    )


def _table(encoder: Encoder) -> str:
    sides = (encoder.config.text, encoder.config.image)
    rows = {
        "tower": [_tower(encoder, side) for side in SIDES],
        "pooling": [encoder.specs[side].pooling or "mean" for side in SIDES],
        "trained": ["no" if side.frozen else "yes" for side in sides],
        "head": [side.head for side in sides],
        "input": [
            f"{encoder.config.text.max_length} tokens at most",
            _input(encoder.preprocessing),
        ],
    }
    return "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())


def _input(preprocessing: Preprocessing) -> str:
    if preprocessing.patch:
        return f"{preprocessing.patches} patches at most, {preprocessing.patch} pixels a side"
    return f"{preprocessing.size} pixels a side"


def _measured(results: Sequence[dict]) -> str:
    parts = []
    for result in results:
        parts.append(
            f"{result['dataset']}, {result['images']:,} images, Recall in percent:\n\n"
            "| | text to image: R@1 | R@5 | R@10 | image to text: R@10 |\n"
            "| --- | --- | --- | --- | --- |"
        )
        for language, scores in result["languages"].items():
            recall = [scores["text_to_image"][f"R@{k}"] for k in (1, 5, 10)]
            recall.append(scores["image_to_text"]["R@10"])
            parts[-1] += f"\n| {language} | " + " | ".join(f"{100 * r:.1f}" for r in recall) + " |"
        parts[-1] += "\n"
    return "\n".join(parts)


def _terms(encoder: Encoder, format: str) -> str:
    """The terms of the towers and the training data; unknown terms refer to their source."""
    config, lines = encoder.config, []
    for side in SIDES:
        name = _tower(encoder, side)
        known = encoder.specs[side].family.terms or f"{name}: see the terms of that checkpoint"
        lines.append(f"- {side} tower: {known}")
    if config.data.name:
        name = _name(config.data.dir)
        known = datasets.find(config.data.name).terms or f"{name}: see the terms of that set"
        lines.append(f"- training data: {known}")
    if config.teacher:
        lines.append(f"- teacher of the text side: {_name(config.teacher)}: see its terms")
    if format in ("torch", "onnx"):
        lines.append("- code in this folder: Apache-2.0")
    return "\n".join(lines) + "\n"


def _tower(encoder: Encoder, side: str) -> str:
    """The name of a side's tower, or of the run that the side started from."""
    return _name(encoder.config[side].tower or encoder.config.init)


def _name(path: str) -> str:
    """A Hub id, or the last part of a folder's path: the full path would be private."""
    if cached := re.search(r"models--([^/]+?)--([^/]+?)/", path):
        return "/".join(cached.groups())
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not pathlib.Path(path).exists()
    return path if hub_id else pathlib.PurePath(path).name

"""The model card of an exported folder, a README.md with the Hub's metadata."""

import json
import pathlib
import string

from xlir.encoder import Encoder
from xlir.export.plain import OPSET
from xlir.export.verification import Report

# What is known of the terms of data sets and towers; anything else has to be looked up.
DATA_TERMS = {
    "emoji": "Twemoji pictures, CC BY 4.0; names from Unicode CLDR",
    "coco": "COCO captions, CC BY 4.0; the photos are under their Flickr licences",
    "coco_captions": "COCO captions, CC BY 4.0; the photos are under their Flickr licences",
}
TOWER_TERMS = {
    "muse": "mUSE, Apache-2.0",
    "efficientnet-lite0": "EfficientNet-lite, Apache-2.0",
    "efficientnet-lite2": "EfficientNet-lite, Apache-2.0",
}
USE = {
    "sentence-transformers": """```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
texts = model.encode(["ein roter Apfel", "빨간 사과"])
images = model.encode([Image.open("apple.jpg")])
print(model.similarity(texts, images))
```

`pip install 'sentence-transformers>=6.2' pillow`. Lay transparent images over white first, and turn
them as their EXIF orientation says.""",
    "transformers": """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionTextDualEncoderModel

model = VisionTextDualEncoderModel.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
processor = AutoImageProcessor.from_pretrained("FOLDER", backend="pil")
texts = ["ein roter Apfel", "빨간 사과"]
text = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
image = processor(Image.open("apple.jpg"), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**text, **image)
print(outputs.text_embeds @ outputs.image_embeds.T)
```

`pip install 'transformers>=5.23' torch pillow`. Lay transparent images over white first, and turn
them as their EXIF orientation says.""",
    "torch": """```
python example.py apple.jpg --texts "ein roter Apfel" "빨간 사과"
```

`pip install torch safetensors pillow $tokenizer`. The modules are in `dual_encoder/`:
`load(FOLDER).encode_text([...])` and `.encode_image([...])` give embeddings of unit length.""",
    "onnx": """```
python example.py apple.jpg --texts "ein roter Apfel" "빨간 사과"
```

`pip install onnxruntime pillow $tokenizer`; PyTorch is not needed. Opset $opset; all axes but the
pixels' are dynamic:

| file | inputs | features |
| --- | --- | --- |
| `text.onnx` | `input_ids`, `attention_mask`: int64 [batch, length] | [batch, $text] |
| `image.onnx` | `pixels`: uint8 [batch, $size, $size, 3], RGB | [batch, $image] |

The outputs are `embeddings`, float32 [batch, $dim] of unit length, and the tower's `features`.""",
}
LIBRARIES = {"sentence-transformers": "sentence-transformers", "transformers": "transformers"}


def write(
    encoder: Encoder, workdir: pathlib.Path, folder: pathlib.Path, format: str, report: Report
) -> None:
    """Writes the card of an exported folder.

    Args:
      encoder: the run's.
      workdir: the run's folder, for its results.
      folder: the exported folder.
      format: its format.
      report: of its check.
    """
    results = _results(workdir, encoder.step)
    languages = sorted({language for result in results for language in result["languages"]})
    config = encoder.config
    parts = [
        _metadata(languages, format),
        "# Dual encoder for cross-lingual image retrieval\n",
        "Texts in many languages and images in one space: search images with a text, or tag them. "
        + (
            "Trained with xlir on English captions only; in other languages it is zero-shot.\n"
            if config.data.name
            else "Published weights, imported by xlir.\n"
        ),
        "## Use\n",
        _use(encoder, format),
        "\n## Model\n",
        f"| | text | image |\n| --- | --- | --- |\n{_table(encoder)}\n",
        f"Embeddings have {config.embedding_dim} dimensions. Weights of step {encoder.step}, "
        "float32.\n",
        "## Results\n",
        _measured(results) if results else "The run has no results yet.\n",
        "The languages of these tables are those that were tested. Which others it speaks follows "
        "from the text tower's pre-training; in a language that it has not seen it finds "
        "nothing.\n",
        "## Checked\n",
        f"Loaded afresh, without the library that it was trained with:\n\n```\n{report}\n```\n",
        "## Terms\n",
        _terms(encoder),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf8")


def _metadata(languages: list[str], format: str) -> str:
    lines = ["---", "pipeline_tag: feature-extraction"]
    if format in LIBRARIES:
        lines.append(f"library_name: {LIBRARIES[format]}")
    if languages:
        lines += ["language:", *(f"- {language}" for language in languages)]
    return "\n".join([*lines, "tags:", "- image-text-retrieval", "- xlir", "---\n"])


def _use(encoder: Encoder, format: str) -> str:
    tokenizers = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece"}
    return string.Template(USE[format]).substitute(
        tokenizer=tokenizers[encoder.tokenizer.kind],
        opset=OPSET,
        dim=encoder.config.embedding_dim,
        text=encoder.feature_dims["text"],
        image=encoder.feature_dims["image"],
        size=encoder.preprocessing.size,
    )


def _table(encoder: Encoder) -> str:
    sides = (encoder.config.text, encoder.config.image)
    rows = {
        "tower": [_name(side.tower) for side in sides],
        "pooling": [side.pooling or "as published" for side in sides],
        "trained": ["no" if side.frozen else "yes" for side in sides],
        "head": [side.head for side in sides],
        "input": [
            f"{encoder.config.text.max_length} tokens at most",
            f"{encoder.preprocessing.size} pixels a side",
        ],
    }
    return "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in rows.items())


def _results(workdir: pathlib.Path, step: int) -> list[dict]:
    """Retrieval results of a step, in the order of their names."""
    files = sorted((workdir / "results").glob(f"*-{step}.json"))
    contents = [json.loads(file.read_text(encoding="utf8")) for file in files]
    return [content for content in contents if "zero_shot_macro" in content]


def _measured(results: list[dict]) -> str:
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


def _terms(encoder: Encoder) -> str:
    """What the weights derive from; whose terms are not known here has to be looked up."""
    config = encoder.config
    lines = []
    for side in ("text", "image"):
        name = _name(config[side].tower)
        known = TOWER_TERMS.get(name, f"{name}: see the terms of that checkpoint")
        lines.append(f"- {side} tower: {known}")
    if config.data.name:
        name = _name(config.data.dir)
        known = DATA_TERMS.get(config.data.name, f"{name}: see the terms of that set")
        lines.append(f"- training data: {known}")
    lines.append("- model code of the `torch` and `onnx` formats: Apache-2.0")
    return "\n".join(lines) + "\n"


def _name(path: str) -> str:
    """An id as it is; of a folder its name, as the rest of the path is nobody's business."""
    return pathlib.PurePath(path).name if pathlib.PurePath(path).is_absolute() else path

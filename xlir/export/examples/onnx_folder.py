"""Prints the cosine similarity of each text with each image; needs onnxruntime, not PyTorch.

python example.py IMAGE... --texts "ein roter Apfel" "빨간 사과"
"""

import argparse
import json
import pathlib

import numpy as np
import onnxruntime
from inputs import ImageReader, load_tokenizer, pad

parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="+")
parser.add_argument("--texts", nargs="+", default=["a dog", "ein Hund", "犬"])
arguments = parser.parse_args()

folder = pathlib.Path(__file__).parent
config = json.loads((folder / "config.json").read_text(encoding="utf8"))
tokenizer = load_tokenizer(folder, **config["tokenizer"])
reader = ImageReader(**config["preprocessing"])
ids, mask = pad(tokenizer(arguments.texts))
pixels = np.stack([reader(image) for image in arguments.images])

text, image = (onnxruntime.InferenceSession(folder / f"{side}.onnx") for side in ("text", "image"))
texts = text.run(["embeddings"], {"input_ids": ids, "attention_mask": mask.astype(np.int64)})[0]
images = image.run(["embeddings"], {"pixels": pixels})[0]
for name, row in zip(arguments.texts, texts @ images.T, strict=True):
    for file, cosine in zip(arguments.images, row, strict=True):
        print(f"{cosine:.3f}  {name}  {file}")

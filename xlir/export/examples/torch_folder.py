"""Prints the cosine similarity of each text with each image.

python example.py IMAGE... --texts "ein roter Apfel" "빨간 사과"
"""

import argparse
import pathlib

from dual_encoder import load

parser = argparse.ArgumentParser()
parser.add_argument("images", nargs="+")
parser.add_argument("--texts", nargs="+", default=["a dog", "ein Hund", "犬"])
arguments = parser.parse_args()

model = load(pathlib.Path(__file__).parent)
similarity = model.encode_text(arguments.texts) @ model.encode_image(arguments.images).T
for text, row in zip(arguments.texts, similarity, strict=True):
    for image, cosine in zip(arguments.images, row, strict=True):
        print(f"{cosine:.3f}  {text}  {image}")

"""Photos of 640 x 480 to batches of 224 x 224 pixels, compared with PyTorch's DataLoader.

    pip install -e . torch==2.13.0
    python benchmarks/decode.py PHOTOS [--images=N] [--rounds=N]

PHOTOS is a folder of JPEGs; they are resized to 640 x 480 and compressed again. Both sides read
them from memory and return the same pixels, uint8 in batches of 32: xlir by threads, with its
checks for damaged and huge files; PyTorch by 2 processes that call Pillow as torchvision's Resize
does. Rounds alternate; medians are printed.
"""

import argparse
import concurrent.futures
import io
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from input_pipeline import images
from input_pipeline.preprocessing import RESAMPLING, Preprocessing
from xlir import decoding

BATCH, WORKERS = 32, 2
PREPROCESSING = Preprocessing(size=224, mean=(0.5,) * 3, std=(0.5,) * 3)


def photos_of(folder, count):
    """Encoded photos of 640 x 480 pixels."""
    files = sorted(pathlib.Path(folder).rglob("*.jpg"))[:count]
    if not files:
        raise SystemExit(f"{folder} holds no .jpg files")
    encoded = []
    for file in files:
        buffer = io.BytesIO()
        Image.open(file).convert("RGB").resize((640, 480)).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


class Photos(torch.utils.data.Dataset):
    """Decodes with Pillow's functions, as torchvision's transforms do."""

    def __init__(self, encoded):
        self.encoded = encoded

    def __len__(self):
        return len(self.encoded)

    def __getitem__(self, row):
        image = Image.open(io.BytesIO(self.encoded[row])).convert("RGB")
        size = (PREPROCESSING.size,) * 2
        return torch.from_numpy(np.array(image.resize(size, RESAMPLING[PREPROCESSING.resample])))


def by_threads(encoded, threads):
    """Batches as `Embedder.image_batches` makes them."""
    decoding._POOL = concurrent.futures.ThreadPoolExecutor(threads)
    pixels = decoding.decode_all(
        lambda row: decoding.decode(
            encoded[row], "photo", lambda data: images.decode(data, PREPROCESSING)
        ),
        range(len(encoded)),
        ahead=2 * BATCH,
    )
    for start in range(0, len(encoded), BATCH):
        yield np.stack([next(pixels) for _ in encoded[start : start + BATCH]])


def rate(batches, count):
    """Photos a second."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    encoded = photos_of(flags.photos, flags.images)
    # The workers stay alive between the rounds, and are not started anew.
    loader = torch.utils.data.DataLoader(
        Photos(encoded), BATCH, num_workers=WORKERS, persistent_workers=True
    )
    reference = np.concatenate([batch.numpy() for batch in loader])
    ours = np.concatenate(list(by_threads(encoded, WORKERS)))
    assert (ours == reference).all(), "the pixels differ"
    ways = {f"PyTorch, {WORKERS} processes": lambda: loader}
    for threads in (1, 2):
        ways[f"xlir, {threads} threads"] = lambda threads=threads: by_threads(encoded, threads)
    rates = {name: [] for name in ways}
    for _ in range(flags.rounds):
        for name, batches in ways.items():
            rates[name].append(rate(batches(), len(encoded)))
    size = statistics.mean(map(len, encoded)) / 1e3
    print(f"{len(encoded)} photos of {size:.0f} kB on average, {os.cpu_count()} cores")
    first = next(iter(rates))
    for name, values in rates.items():
        ratios = [value / of for value, of in zip(values, rates[first], strict=True)]
        print(
            f"{name:<24}{statistics.median(values):8.0f} photos/s"
            f"{statistics.median(ratios):7.2f} of PyTorch's"
        )


if __name__ == "__main__":
    main()

"""Measures how many near copies of photos the perceptual hash finds, and its false alarms.

    python -m benchmarks.near_copies PHOTOS [PHOTOS ...]

PHOTOS are folders of JPEGs, searched at any depth. 500 photos are re-encoded, resized, cropped and
greyed; false alarms are counted over all pairs of different photos.
"""

import io
import pathlib
import random
import sys
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from input_pipeline import near_copies
from input_pipeline.kept_out import perceptual_hash

SAMPLE = 500
QUALITIES = (40, 55, 70, 85, 95)
SCALES = (0.3, 0.5, 0.75, 1.25, 1.5)
THRESHOLDS = (40, 48, 56, 60, 64, 68, 72, 80)


def changed(image: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Near copies of a photo: what was done to it, and its file."""
    width, height = image.size
    for quality in QUALITIES:
        yield "re-encoded, quality 40 to 95", jpeg(image, quality)
    for scale in SCALES:
        size = round(width * scale), round(height * scale)
        for resample in (Image.Resampling.BICUBIC, Image.Resampling.NEAREST):
            yield "resized to 0.3 to 1.5", jpeg(image.resize(size, resample), 75)
    across, down = round(width * 0.025), round(height * 0.025)
    centre = image.crop((across, down, width - across, height - down))
    yield "cropped by 5%, in the middle", jpeg(centre, 75)
    yield "cropped by 5%, at the left", jpeg(image.crop((2 * across, 0, width, height)), 75)
    yield "greyed", jpeg(image.convert("L"), 75)
    small = image.convert("L").resize((width // 2, height // 2))
    yield "greyed, halved, quality 40", jpeg(small, 40)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def main(folders: list[str]) -> None:
    paths = sorted(path for folder in folders for path in pathlib.Path(folder).rglob("*.jpg"))
    start = time.process_time()
    hashes = np.array([perceptual_hash(path.read_bytes()) for path in paths])
    seconds = (time.process_time() - start) / len(paths)
    print(f"{len(paths):,} photos; to decode and hash one takes {seconds * 1e3:.1f} ms\n")
    found: dict[str, list[int]] = {}
    for row in random.Random(0).sample(range(len(paths)), SAMPLE):
        image = Image.open(paths[row]).convert("RGB")
        for what, data in changed(image):
            bits = np.bitwise_count(perceptual_hash(data) ^ hashes[row]).sum()
            found.setdefault(what, []).append(int(bits))
    print(f"near copies found, of {SAMPLE} photos, by the number of bits that may differ")
    print(f"  {'':<30}" + "".join(f"{limit:>8}" for limit in THRESHOLDS) + "   most")
    for what, bits in found.items():
        shares = [np.mean(np.array(bits) <= limit) for limit in THRESHOLDS]
        print(f"  {what:<30}" + "".join(f"{s:>8.1%}" for s in shares) + f"{max(bits):>7}")
    alarms, nearest = np.zeros(len(THRESHOLDS), int), []
    for row in range(1, len(paths)):
        bits = np.bitwise_count(hashes[:row] ^ hashes[row]).sum(axis=1)
        alarms += [(bits <= limit).sum() for limit in THRESHOLDS]
        nearest += [
            (int(bits[other]), paths[row], paths[other])
            for other in np.flatnonzero(bits <= max(THRESHOLDS))
        ]
    print(f"  {'pairs of different photos':<30}" + "".join(f"{count:>8}" for count in alarms))
    print(f"\n{len(paths) * (len(paths) - 1) // 2:,} pairs; the nearest:")
    for bits, one, other in sorted(nearest)[:5]:
        print(f"  {bits:>3} bits  {one}  {other}")
    print(f"\nThe threshold is {near_copies.THRESHOLD} bits.")


if __name__ == "__main__":
    main(sys.argv[1:])

"""COCO 2014 with Karpathy and Li's splits; lists missing files and how to get them."""

import os
import pathlib

from input_pipeline.cache import cache_folder
from input_pipeline.datasets import captions, photo_files
from input_pipeline.datasets.captioned_images import PreparedSet
from input_pipeline.datasets.source import DataSet

IMAGES_URL = "http://images.cocodataset.org/zips"
CAPTIONS_URL = "http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Archive -> what it holds.
ARCHIVES = {"train2014.zip": "82,783 photos", "val2014.zip": "40,504 photos"}
CAPTIONS_MB = 37
ANNOTATIONS = "dataset_coco.json"
# Disk space of the prepared set.
PREPARED_GB = 20
TERMS = "COCO captions, CC BY 4.0; the photos are under their Flickr licences"


def missing(folder: str | os.PathLike, annotations: str = "") -> str:
    """Lists the files of COCO that a folder lacks, their sizes and the commands that get them.

    The photos may be extracted (train2014/, val2014/, also below images/) or in their archives.

    Args:
      folder: the folder of the photos.
      annotations: Karpathy's JSON, if it is not in the folder.

    Returns:
      A message; empty if no file is missing.
    """
    folder = pathlib.Path(folder or "PATH")
    lacking = []
    for archive, content in ARCHIVES.items():
        places = [folder / archive, folder / "images" / archive]
        if not any(place.exists() or place.with_suffix("").is_dir() for place in places):
            size = photo_files.PUBLISHED[archive]
            lacking.append((archive, f"{size / 1e9:.1f} GB", content, f"{IMAGES_URL}/{archive}"))
    places = (pathlib.Path(annotations), folder / ANNOTATIONS, folder / "caption_datasets.zip")
    if not any(place.is_file() for place in places):
        captions = "Karpathy's splits and captions (dataset_coco.json)"
        lacking.append(("caption_datasets.zip", f"{CAPTIONS_MB} MB", captions, CAPTIONS_URL))
    if not lacking:
        return ""
    lines = [f"{folder} (--config.data.dir=PATH) lacks these files of COCO 2014:"]
    lines += [f"  {name:<21}{size:>8}  {content}" for name, size, content, _ in lacking]
    lines += ["Nothing is downloaded automatically. Get them like this (archives can stay packed):"]
    lines += [f"  wget -c -P {folder} {url}" for *_, url in lacking]
    lines += [
        f"The prepared set takes another {PREPARED_GB} GB in {cache_folder()} ($XLIR_CACHE).",
        "TFDS's coco_captions, prepared as ArrayRecord, works too: "
        "--config.data.name=coco_captions --config.data.dir=TFDS_DATA_DIR",
    ]
    return "\n".join(lines)


def _open(folder: str, annotations: str) -> PreparedSet:
    if message := missing(folder, annotations):
        raise FileNotFoundError(message)
    builder = captions.prepare(folder, annotations or ANNOTATIONS)
    return PreparedSet(builder, builder.name)


DATA_SET = DataSet(_open, missing, terms=TERMS)

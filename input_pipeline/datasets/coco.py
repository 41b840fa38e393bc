"""COCO 2014 with Karpathy and Li's splits: what is missing of it, and TFDS's `coco_captions`."""

import json
import os
import pathlib

import tensorflow_datasets as tfds

from input_pipeline.cache import cache_folder
from input_pipeline.datasets import photo_files, records

IMAGES_URL = "http://images.cocodataset.org/zips"
CAPTIONS_URL = "http://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
# Archive -> what it holds.
ARCHIVES = {"train2014.zip": "82,783 photos", "val2014.zip": "40,504 photos"}
CAPTIONS_MB = 37
ANNOTATIONS = "dataset_coco.json"
# What the prepared set takes.
PREPARED_GB = 20


def missing(folder: str | os.PathLike, annotations: str = "") -> str:
    """What a folder lacks of COCO, how large it is and the commands that get it; empty: nothing.

    The photos may be extracted (train2014/, val2014/, also below images/) or in their archives.

    Args:
      folder: holds them.
      annotations: Karpathy's JSON, where it is not in the folder.
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
    lines = [f"{folder} (--config.data.dir=PATH) lacks, of COCO 2014:"]
    lines += [f"  {name:<21}{size:>8}  {content}" for name, size, content, _ in lacking]
    lines += ["Nothing is downloaded unasked. These commands get it; archives stay packed:"]
    lines += [f"  wget -c -P {folder} {url}" for *_, url in lacking]
    lines += [
        f"Prepared, it takes another {PREPARED_GB} GB in {cache_folder()} ($XLIR_CACHE).",
        "TFDS's own coco_captions, prepared as ArrayRecord, will do too: "
        "--config.data.name=coco_captions --config.data.dir=TFDS_DATA_DIR",
    ]
    return "\n".join(lines)


def open_tfds(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    """TFDS's `coco_captions`, as it was prepared elsewhere; read without TensorFlow.

    Its splits are train, val, test and restval.

    Args:
      data_dir: TFDS's `data_dir`, or the folder of the version itself.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it was prepared in another format than ArrayRecord.
    """
    data_dir = pathlib.Path(data_dir).expanduser()
    found = [*data_dir.glob("coco_captions/2014/*/dataset_info.json")]
    found += data_dir.glob("dataset_info.json")
    if not found:
        raise FileNotFoundError(
            f"there is no coco_captions/2014 in {data_dir} (config.data.dir); prepare it where "
            "TensorFlow is installed (TFDS downloads all of COCO, about 40 GB): "
            + _prepare_command(data_dir)
        )
    folder = max(found, key=_version).parent
    try:
        info = dict(json.loads((folder / "dataset_info.json").read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / 'dataset_info.json'} is damaged ({error}); prepare coco_captions anew with "
            f"TFDS, or restore {folder} from a copy"
        ) from error
    if info.get("name") != "coco_captions":
        raise ValueError(f"{folder} holds {info.get('name')}, not TFDS's coco_captions")
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    if "array_record" not in formats:
        raise ValueError(
            f"{folder} was prepared as {formats[0]}, which only TensorFlow reads; where it is "
            f"installed, convert it: tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record"
        )
    return records.open_prepared(folder)


def _prepare_command(data_dir: pathlib.Path) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"'coco_captions', data_dir='{data_dir}', file_format='array_record'"
        ').download_and_prepare()"'
    )


def _version(info: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in info.parent.name.split(".") if part.isdigit())

"""TFDS's `coco_captions`, prepared elsewhere by TFDS, and read here without TensorFlow."""

import json
import os
import pathlib

import tensorflow_datasets as tfds

from input_pipeline.datasets import coco, records
from input_pipeline.datasets.captioned_images import PreparedSet
from input_pipeline.datasets.source import DataSet


def prepared_by_tfds(data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    """The set that TFDS prepared, with the splits train, val, test and restval.

    Args:
      data_dir: TFDS's `data_dir`, or the folder of one version of the set.

    Raises:
      FileNotFoundError: there is no such set in the folder.
      ValueError: the set is damaged, or was prepared in another format than ArrayRecord.
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
            f"{folder / 'dataset_info.json'} is damaged ({error}); prepare coco_captions again "
            f"with TFDS, or restore {folder} from a copy"
        ) from error
    if info.get("name") != "coco_captions":
        raise ValueError(f"{folder} holds {info.get('name')}, not TFDS's coco_captions")
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    if "array_record" not in formats:
        raise ValueError(
            f"{folder} was prepared as {formats[0]}, which only TensorFlow reads; convert it where "
            f"TensorFlow is installed: tfds convert_format --dataset_version_dir={folder} "
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


def _open(folder: str, annotations: str) -> PreparedSet:
    # Results on COCO have the same name, whether TFDS or this package prepared the set.
    return PreparedSet(prepared_by_tfds(folder), "coco", keeps_order=False)


def _missing(folder: str, annotations: str) -> str:
    try:
        prepared_by_tfds(folder)
    except FileNotFoundError as error:
        return str(error)
    return ""


DATA_SET = DataSet(_open, _missing, terms=coco.TERMS)

"""Tags of photos for evaluation: from COCO's instance labels, or from English captions."""

import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from input_pipeline import nouns


def mentioned(
    captions: Sequence[Sequence[str]], tags: Sequence[str]
) -> Bool[np.ndarray, "photos tags"]:
    """For each photo, marks the tags that one of its captions has, in the singular or plural.

    A word that is the plural of a tag's last word counts as the singular (`nouns.singular`). All
    words of a tag have to be in the caption, next to each other.

    Args:
      captions: the English captions of each photo.
      tags: English, in lower case.
    """
    wanted = [tuple(_words(tag)) for tag in tags]
    last = {words[-1] for words in wanted if words}
    out = np.zeros((len(captions), len(tags)), bool)
    for row, texts in enumerate(captions):
        grams = set()
        for text in texts:
            words = _words(text)
            for end, word in enumerate(words, 1):
                one = nouns.singular(word, last)
                grams |= {(*words[start : end - 1], one) for start in range(max(end - 3, 0), end)}
        out[row] = [words in grams for words in wanted]
    return out


def instance_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """COCO's instances_*.json in a data set's folder or in its subfolder `annotations`."""
    return sorted([*folder.glob("instances_*.json"), *folder.glob("annotations/instances_*.json")])


def instances(
    files: Sequence[pathlib.Path], image_ids: Int[np.ndarray, " photos"], tags: Sequence[str]
) -> Bool[np.ndarray, "photos tags"]:
    """For each photo, marks the tags that COCO labels in it, as an instance or as a crowd.

    Args:
      files: COCO's instances_*.json.
      image_ids: COCO's ids of the photos.
      tags: COCO's names of the categories.

    Raises:
      ValueError: a file is not COCO's, a tag is not a category, or no file has a photo.
    """
    row_of = {int(image_id): row for row, image_id in enumerate(image_ids)}
    column_of = {tag: column for column, tag in enumerate(tags)}
    out, seen = np.zeros((len(image_ids), len(tags)), bool), set()
    for file in files:
        try:
            content = json.loads(file.read_text())
            column = {one["id"]: column_of.get(one["name"]) for one in content["categories"]}
            seen |= {image["id"] for image in content["images"]} & row_of.keys()
            pairs = [(one["image_id"], one["category_id"]) for one in content["annotations"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not COCO's instances_*.json ({error!r})") from error
        if lacking := set(column_of) - {one["name"] for one in content["categories"]}:
            raise ValueError(f"{file} has no category {', '.join(sorted(lacking)[:3])}")
        for image_id, category in pairs:
            if image_id in row_of and column.get(category) is not None:
                out[row_of[image_id], column[category]] = True
    if len(seen) < len(row_of):
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{len(row_of) - len(seen)} of {len(row_of)} photos are not in {names}")
    return out


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z][a-z'-]*", text.lower())

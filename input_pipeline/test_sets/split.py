"""A split of the run's data set as a test set, in English or in every language of the set.

COCO's test split is evaluated by the published protocol (Karpathy and Li 2015): with five captions
per photo, over all 5,000 photos at once, and as the mean of five folds of 1,000.
"""

import numpy as np

from input_pipeline.datasets.texts import Texts
from input_pipeline.test_sets.retrieval_set import Entry, Options, RetrievalSet, RunData

# Karpathy's test split of COCO: photos, folds of the 1K protocol, captions used per photo.
COCO_TEST, COCO_FOLDS, COCO_CAPTIONS = 5000, 5, 5


def read(options: Options, run: RunData) -> RetrievalSet:
    """The split that `options.split` names.

    Raises:
      ValueError: the data set has no such split, or the run has no data set.
      FileNotFoundError: the data set is missing.
    """
    data = run.open()
    source = data.source(options.split)
    name, captions, folds = data.filed_under(options.split), source.captions, None
    if data.translations:
        translated = data.translations(options.split)
        rows = np.arange(len(source))
        image_of = dict.fromkeys(translated, rows)
        return RetrievalSet(
            name, source.images, translated, image_of, source.fingerprint, source.filenames
        )
    if name == "coco-test" and len(source) == COCO_TEST:
        captions = [texts[:COCO_CAPTIONS] for texts in captions]
        name = "coco-test-5k"
        # The folds follow the order of Karpathy's file. TFDS's version of COCO is shuffled.
        folds = ("coco-test-1k", COCO_FOLDS) if data.keeps_order else None
    return RetrievalSet(
        name=name,
        images=source.images,
        captions={"en": [caption for texts in captions for caption in texts]},
        image_of={"en": np.repeat(np.arange(len(source)), [len(texts) for texts in captions])},
        fingerprint=source.fingerprint,
        filenames=source.filenames,
        folds=folds,
    )


def of_texts(name: str, source: Texts) -> RetrievalSet:
    """Parallel texts as a test set, in which each distinct English text stands for an image.

    Its embedding by a teacher takes the place of the image's: see `evaluate.Evaluator`.
    """
    _, first, image = np.unique(source.image_ids, return_index=True, return_inverse=True)
    by_language = source.by_language()
    return RetrievalSet(
        name=name,
        images=[source.english[row] for row in first],
        captions={language: texts for language, (texts, _) in by_language.items()},
        image_of={language: image[rows] for language, (_, rows) in by_language.items()},
        fingerprint=source.fingerprint,
    )


ENTRIES = {"split": Entry(read)}

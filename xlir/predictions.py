"""The best answers to each query of a test set, as JSON lines."""

import json
from collections.abc import Iterator, Mapping
from typing import TextIO

import numpy as np
from jaxtyping import Float

from input_pipeline.test_sets.retrieval_set import RetrievalSet
from xlir import metrics
from xlir.retrieval_metrics import Ranked

# The number of answers to a query.
BEST = 10


def write(
    file: TextIO,
    data: RetrievalSet,
    texts: Mapping[str, Float[np.ndarray, "captions dim"]],
    images: Float[np.ndarray, "images dim"],
    ranked: Mapping[str, Mapping[str, Ranked]],
) -> None:
    """Writes a line for each query, in both directions.

    Its fields are `dataset`, `language`, `direction`, `query`, `rank` (the expected rank of the
    first right answer) and `best`, a list of the ten best answers, each with its cosine and whether
    it is right. A photo is named by its file name, a caption by its text.

    Args:
      file: where the lines go.
      data: the test set.
      texts: language -> embeddings of unit length.
      images: embeddings of unit length.
      ranked: language -> direction -> the ranks, as of `evaluate.rankings`.
    """
    names = data.filenames or list(map(str, range(len(images))))
    for language, text in texts.items():
        photo_of, captions = data.image_of[language], data.captions[language]
        asking = ranked[language]["image_to_text"].photo
        directions = {
            "text_to_image": (text, captions, images, names, np.arange(len(images))),
            "image_to_text": (
                images[asking],
                [names[row] for row in asking],
                text,
                captions,
                photo_of,
            ),
        }
        for direction, (queries, asked, candidates, answers, answer_photo) in directions.items():
            one = ranked[language][direction]
            ranks = one.ranks.best().expected_rank()
            for row, (best, cosines) in enumerate(_best(queries, candidates)):
                found = [
                    {"answer": answers[place], "cosine": round(cosine, 6), "right": bool(right)}
                    for place, cosine, right in zip(
                        best, cosines.tolist(), answer_photo[best] == one.photo[row], strict=True
                    )
                ]
                line = {"dataset": data.name, "language": language, "direction": direction}
                line |= {"query": asked[row], "rank": float(ranks[row]), "best": found}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _best(
    queries: Float[np.ndarray, "queries dim"], candidates: Float[np.ndarray, "candidates dim"]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each query, the rows of the best candidates, best first, and their cosines."""
    count = min(BEST, len(candidates))
    for start in range(0, len(queries), metrics.CHUNK):
        cosines = queries[start : start + metrics.CHUNK] @ candidates.T
        rows = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, rows, axis=1), axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
        yield from zip(rows, np.take_along_axis(cosines, rows, axis=1), strict=True)

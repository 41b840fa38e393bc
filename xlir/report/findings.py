"""What the embeddings of a test set show: pure functions of arrays."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from xlir.embed import top_k

# The number of nearest photos that hubs and common neighbours are about, as in N_10.
NEAREST = 10
# Queries compared with all photos at once: bounds the matrix of cosines.
CHUNK = 512


def nearest(
    queries: Float[np.ndarray, "queries dim"],
    images: Float[np.ndarray, "images dim"],
    k: int = NEAREST,
) -> Int[np.ndarray, "queries k"]:
    """The rows of each query's k nearest images, best first; fewer if there are fewer images.

    Args:
      queries, images: embeddings of unit length.
      k: the number of neighbours.
    """
    k, found = min(k, len(images)), []
    for start in range(0, len(queries), CHUNK):
        cosines = queries[start : start + CHUNK] @ images.T
        rows = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        best = top_k(np.take_along_axis(cosines, rows, axis=1), k)
        found.append(np.take_along_axis(rows, best, axis=1))
    return np.concatenate(found)


def occurrences(
    neighbours: Int[np.ndarray, "queries k"], images: int
) -> Int[np.ndarray, " images"]:
    """N_k of each image: the number of queries that have it among their k nearest images.

    An image with a large N_k is a hub (Radovanović, Nanopoulos and Ivanović 2010,
    https://www.jmlr.org/papers/v11/radovanovic10a.html).
    """
    return np.bincount(neighbours.ravel(), minlength=images)


def skewness(values: np.ndarray) -> float:
    """The third standardized moment; 0 if all values are equal.

    Of N_k, it measures how strong the hubs are: it is near 0 if there are none (Radovanović et al.
    2010, section 2).
    """
    centred = values - np.mean(values)
    spread = np.sqrt(np.mean(centred**2))
    return float(np.mean((centred / spread) ** 3)) if spread else 0.0


def overlap(first: Int[np.ndarray, "queries k"], second: Int[np.ndarray, "queries k"]) -> float:
    """The mean share, 0 to 1, of a query's k neighbours that are also in the other list."""
    common = (first[:, :, None] == second[:, None, :]).any(axis=2)
    return float(common.mean())


def overlaps(
    neighbours: Mapping[str, Int[np.ndarray, "_ k"]],
    image_of: Mapping[str, Int[np.ndarray, " _"]],
) -> Float[np.ndarray, "languages languages"]:
    """`overlap` of each two languages, over the photos that have captions in both.

    The first caption of a photo in each language counts. In sets whose languages are translated
    line by line, the two captions are the same sentence. NaN: no photo has captions in both.
    """
    first = {language: np.unique(rows, return_index=True) for language, rows in image_of.items()}
    result = np.full((len(first), len(first)), np.nan)
    for i, (one, (one_photos, one_rows)) in enumerate(first.items()):
        for j, (other, (other_photos, other_rows)) in enumerate(first.items()):
            if j < i:
                result[i, j] = result[j, i]
                continue
            _, left, right = np.intersect1d(one_photos, other_photos, return_indices=True)
            if len(left):
                ours, theirs = neighbours[one][one_rows[left]], neighbours[other]
                result[i, j] = overlap(ours, theirs[other_rows[right]])
    return result


def extremes(
    ranks: Float[np.ndarray, " queries"], margins: Float[np.ndarray, " queries"], count: int
) -> tuple[Int[np.ndarray, " worst"], Int[np.ndarray, " best"]]:
    """The rows of the queries with the highest and with the lowest ranks, most extreme first.

    Args:
      ranks: the rank of each query's photo, 1 is best.
      margins: the cosine with the query's photo minus the highest cosine with another one. Of
        queries with equal ranks, the one with the larger margin is better.
      count: the number of queries of each kind; fewer if there are not twice as many queries.
    """
    order = np.lexsort((-margins, ranks))
    count = min(count, len(order) // 2)
    return order[len(order) - count :][::-1], order[:count]


def margins(
    queries: Float[np.ndarray, "queries dim"],
    images: Float[np.ndarray, "images dim"],
    image_of: Int[np.ndarray, " queries"],
) -> Float[np.ndarray, " queries"]:
    """The cosine with each query's photo minus the highest cosine with another photo."""
    found = []
    for start in range(0, len(queries), CHUNK):
        cosines = queries[start : start + CHUNK] @ images.T
        own = image_of[start : start + CHUNK, None]
        right = np.take_along_axis(cosines, own, axis=1)[:, 0]
        np.put_along_axis(cosines, own, -np.inf, axis=1)
        found.append(right - cosines.max(axis=1))
    return np.concatenate(found)


def disagreements(
    ranks: Mapping[str, Float[np.ndarray, " _"]],
    image_of: Mapping[str, Int[np.ndarray, " _"]],
    images: int,
) -> tuple[Int[np.ndarray, " photos"], dict[str, Int[np.ndarray, " photos"]]]:
    """Photos by how much their languages disagree about their rank, the most first.

    The measure is the largest rank of the photo's captions, one for each language, divided by the
    smallest.

    Returns:
      The rows of photos that have a caption in at least two languages; and, for each language, the
      row of the photo's first caption, or -1.
    """
    rows = {language: np.full(images, -1) for language in ranks}
    low, high = np.full(images, np.inf), np.full(images, -np.inf)
    count = np.zeros(images, int)
    for language, of in image_of.items():
        photos, first = np.unique(of, return_index=True)
        rows[language][photos] = first
        rank = np.log(ranks[language][first])
        low[photos] = np.minimum(low[photos], rank)
        high[photos] = np.maximum(high[photos], rank)
        count[photos] += 1
    several = np.flatnonzero(count > 1)
    order = several[np.argsort(-(high - low)[several], kind="stable")]
    return order, {language: found[order] for language, found in rows.items()}

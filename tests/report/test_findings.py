"""Numbers of the report against scikit-learn and SciPy."""

import numpy as np
import pytest

from tests.report.conftest import unit
from xlir.report import findings, languages


@pytest.fixture(scope="module")
def vectors():
    random = np.random.default_rng(1)
    return [unit(random.normal(size=(count, 12))) for count in (700, 60)]


def test_nearest_photos_are_those_of_scikit_learn(vectors):
    neighbours = pytest.importorskip("sklearn.neighbors")
    queries, images = vectors
    index = neighbours.NearestNeighbors(n_neighbors=10, metric="cosine").fit(images)
    expected = index.kneighbors(queries, return_distance=False)
    np.testing.assert_array_equal(findings.nearest(queries, images), expected)


def test_hubs_are_those_of_scikit_learn_and_scipy(vectors):
    """N_10 are the column sums of the graph of neighbours; its skewness is SciPy's."""
    neighbours, stats = (pytest.importorskip(name) for name in ("sklearn.neighbors", "scipy.stats"))
    queries, images = vectors
    index = neighbours.NearestNeighbors(n_neighbors=10, metric="cosine").fit(images)
    expected = np.asarray(index.kneighbors_graph(queries).sum(axis=0)).ravel()
    counts = findings.occurrences(findings.nearest(queries, images), len(images))
    np.testing.assert_array_equal(counts, expected)
    assert findings.skewness(counts) == pytest.approx(stats.skew(counts), rel=1e-12)
    assert findings.skewness(np.full(5, 3)) == 0


def test_neighbours_of_few_photos(vectors):
    queries, images = vectors
    assert findings.nearest(queries, images[:3]).shape == (700, 3)


def test_common_neighbours_of_the_same_photo():
    """The first caption of a photo counts, and photos without a caption in both do not."""
    neighbours = {
        "en": np.array([[0, 1], [5, 6], [2, 3]]),
        "de": np.array([[1, 0], [3, 4]]),
        "fr": np.array([[7, 8]]),
    }
    image_of = {"en": np.array([0, 0, 1]), "de": np.array([0, 1]), "fr": np.array([2])}
    found = findings.overlaps(neighbours, image_of)
    np.testing.assert_array_equal(
        found, [[1, 0.75, np.nan], [0.75, 1, np.nan], [np.nan, np.nan, 1]]
    )


def test_the_best_and_the_worst_queries(vectors):
    ranks = np.array([3.0, 1, 1, 20, 7])
    margins = np.array([-0.1, 0.2, 0.4, -0.5, -0.3])
    worst, best = findings.extremes(ranks, margins, 2)
    assert (worst.tolist(), best.tolist()) == ([3, 4], [2, 1])
    worst, best = findings.extremes(ranks[:1], margins[:1], 2)
    assert len(worst) == len(best) == 0
    queries, images = vectors
    image_of = np.arange(700) % 60
    cosines = queries @ images.T
    own = cosines[np.arange(700), image_of]
    others = np.where(np.arange(60) == image_of[:, None], -1, cosines).max(axis=1)
    np.testing.assert_allclose(findings.margins(queries, images, image_of), own - others, atol=1e-6)


def test_photos_about_which_languages_disagree():
    ranks = {"en": np.array([1.0, 4, 2, 9]), "de": np.array([3.0, 40, 5])}
    image_of = {"en": np.array([0, 1, 1, 2]), "de": np.array([0, 1, 3])}
    photos, rows = findings.disagreements(ranks, image_of, 4)
    assert photos.tolist() == [1, 0]  # 40 / 4 and 3 / 1; the others have one language
    assert {code: found.tolist() for code, found in rows.items()} == {"en": [1, 0], "de": [1, 0]}


def test_languages_are_grouped_by_family_and_script():
    groups = languages.grouped(["xx", "ja", "de", "ru", "en", "cs"])
    assert groups == {
        "Germanic, Latin script": ["en", "de"],
        "Balto-Slavic, Latin script": ["cs"],
        "Balto-Slavic, Cyrillic script": ["ru"],
        "Japonic, Japanese script": ["ja"],
        languages.OTHER: ["xx"],
    }
    assert (languages.name("de"), languages.name("xx")) == ("German (de)", "xx")

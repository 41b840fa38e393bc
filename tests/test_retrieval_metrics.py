"""Compares metrics of several positives with scikit-learn and with CLIP_benchmark."""

import itertools

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, ndcg_score

from xlir import metrics, retrieval_metrics

AT = (1, 3, 10, 40)


@pytest.fixture(scope="module")
def several():
    """Photos with one to four captions: embeddings, and the photo of each caption."""
    rng = np.random.default_rng(4)
    images, image_of = rng.normal(size=(40, 8)), np.repeat(np.arange(40), rng.integers(1, 5, 40))
    texts = images[image_of] + 2 * rng.normal(size=(len(image_of), 8))
    return images.astype(np.float32), texts.astype(np.float32), image_of


def ranked(scores, positive):
    """`PositiveRanks` of scores that are computed from embeddings, one positive after another."""
    places = np.full((len(scores), positive.sum(axis=1).max()), -1)
    for row, right in enumerate(positive):
        places[row, : right.sum()] = np.flatnonzero(right)
    fields = metrics._counts(scores, places)
    return metrics.PositiveRanks(*fields, real=places >= 0)


def test_metrics_of_several_positives_are_scikit_learns(several):
    """Without ties, in both directions; the first k of a list are those of rank k or better."""
    images, texts, image_of = several
    ids = np.arange(len(images))
    for pair in ((texts, images, image_of, ids), (images, texts, ids, image_of)):
        found = retrieval_metrics.values(metrics.positive_ranks(*pair), AT)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair[:2]]
        scores, positive = unit[0] @ unit[1].T, pair[2][:, None] == pair[3]
        ranks = rankdata(-scores, axis=1)
        for k in AT:
            first = ranks <= k
            for row, right in enumerate(positive):
                expected = {
                    f"nDCG@{k}": ndcg_score(right[None], scores[row, None], k=k),
                    f"recall@{k}": (right & first[row]).sum() / right.sum(),
                    f"precision@{k}": (right & first[row]).sum() / k,
                    f"R@{k}": float((right & first[row]).any()),
                    f"MRR@{k}": (first[row] / ranks[row])[right].max(),
                    f"MAP@{k}": 0,
                }
                if (right & first[row]).any():
                    share = (right & first[row]).sum() / right.sum()
                    within = average_precision_score(right & first[row], scores[row])
                    expected[f"MAP@{k}"] = share * within
                for name, value in expected.items():
                    assert found[name][row] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("seed", range(3))
def test_ties_count_as_the_mean_over_all_orders(seed):
    """Six candidates in all 720 orders; nDCG of ties is also what scikit-learn computes."""
    rng = np.random.default_rng(seed)
    scores, positive = rng.integers(0, 3, (8, 6)).astype(float), rng.random((8, 6)) < 0.4
    positive[:, 0] = True
    found = retrieval_metrics.values(ranked(scores, positive), (1, 2, 4))
    orders = np.array(list(itertools.permutations(range(6))))
    for row, (score, right) in enumerate(zip(scores, positive, strict=True)):
        # Equal scores stay in the order in which they come.
        ordered = right[orders][
            np.arange(len(orders))[:, None], np.argsort(-score[orders], axis=1, kind="stable")
        ]
        for k in (1, 2, 4):
            precision = np.cumsum(ordered, axis=1) / np.arange(1, 7)
            expected = {
                "precision": ordered[:, :k].mean(),
                "recall": ordered[:, :k].sum(axis=1).mean() / right.sum(),
                "MAP": (precision * ordered)[:, :k].sum(axis=1).mean() / right.sum(),
                "nDCG": ndcg_score(right[None], score[None], k=k),
            }
            for name, value in expected.items():
                assert found[f"{name}@{k}"][row] == pytest.approx(value, abs=1e-12), name


def test_one_positive_makes_recall_the_same_and_mrr_the_average_precision(several):
    images, texts, image_of = several
    ranks = metrics.positive_ranks(texts, images, image_of, np.arange(len(images)))
    found = retrieval_metrics.values(ranks, (5, len(images)))
    np.testing.assert_allclose(found["recall@5"], found["R@5"])
    np.testing.assert_allclose(found[f"MAP@{len(images)}"], found["mrr"])
    assert found["mean_rank"].mean() == pytest.approx(ranks.best().expected_rank().mean())


def test_several_captions_are_scored_as_clip_benchmark_does(several):
    """One to four captions per photo go through CLIP_benchmark's own evaluation."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'xlir[export]'")
    theirs = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_retrieval",
        reason="needs clip-benchmark: pip install --no-deps clip-benchmark==1.6.2",
    )
    images, texts, image_of = several

    class Model:
        encode_image = staticmethod(lambda rows: torch.tensor(images)[rows])
        encode_text = staticmethod(lambda rows: torch.tensor(texts)[rows])

    captions = [np.flatnonzero(image_of == photo).tolist() for photo in range(len(images))]
    batches = [(torch.arange(s, s + 10), captions[s : s + 10]) for s in range(0, len(images), 10)]
    expected = theirs.evaluate(
        Model, batches, torch.tensor, "cpu", amp=False, recall_k_list=[1, 5, 10]
    )
    ids = np.arange(len(images))
    differences = []
    for side, pair in (
        ("image", (texts, images, image_of, ids)),
        ("text", (images, texts, ids, image_of)),
    ):
        found = retrieval_metrics.values(metrics.positive_ranks(*pair), (1, 5, 10))
        for k in (1, 5, 10):
            differences.append(found[f"R@{k}"].mean() - expected[f"{side}_retrieval_recall@{k}"])
    print(f"largest difference {np.abs(differences).max():.1e}")
    assert np.abs(differences).max() <= 1e-6

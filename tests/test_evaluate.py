"""Retrieval results on embeddings made by hand, and the verb `eval`."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image

from tests.runs import run_main
from xlir import comparison, evaluate, figures
from xlir import results as results_files
from xlir.data import RetrievalSet

RECALLS = ("R@1", "R@5", "R@10")


def retrieval_set(*languages, image_of=range(12)):
    rows = np.array(image_of)
    return RetrievalSet(
        name="hand-made",
        images=[b""] * (rows.max() + 1),
        captions={language: [f"{language} {row}" for row in rows] for language in languages},
        image_of={language: rows for language in languages},
        fingerprint="",
    )


@pytest.fixture
def three_languages():
    """All English captions find their image, a quarter of the German ones, no French one."""
    images = np.eye(12, dtype=np.float32)
    german = np.roll(images, 1, axis=0)
    german[:3] = images[:3]
    texts = {"en": images, "de": german, "fr": np.roll(images, 1, axis=0)}
    return evaluate.retrieval(retrieval_set(*texts), texts, images, step=7)


def test_results_have_the_documented_form(three_languages):
    assert set(three_languages) == {"dataset", "step", "images", "zero_shot_macro", "languages"}
    assert three_languages["dataset"] == "hand-made"
    assert (three_languages["step"], three_languages["images"]) == (7, 12)
    assert list(three_languages["languages"]) == ["en", "de", "fr"]
    for result in three_languages["languages"].values():
        assert set(result) == {"queries", "text_to_image", "image_to_text"}
        assert result["queries"] == 12
        for direction in results_files.DIRECTIONS:
            assert set(result[direction]) == {*RECALLS, "median_rank", "mrr"}
    assert json.loads(json.dumps(three_languages)) == three_languages


def test_recall_by_language(three_languages):
    recall = {
        language: result["text_to_image"]["R@1"]
        for language, result in three_languages["languages"].items()
    }
    assert recall == {"en": 1.0, "de": 0.25, "fr": 0.0}


def test_zero_shot_macro_leaves_english_out(three_languages):
    macro = three_languages["zero_shot_macro"]
    assert set(macro) == set(results_files.DIRECTIONS)
    for direction in results_files.DIRECTIONS:
        parts = [three_languages["languages"][code][direction] for code in ("de", "fr")]
        assert set(macro[direction]) == set(RECALLS)
        for name in RECALLS:
            assert macro[direction][name] == pytest.approx(sum(part[name] for part in parts) / 2)
    assert macro["text_to_image"]["R@1"] == pytest.approx(0.125)


@pytest.mark.filterwarnings("error")
def test_english_only_has_no_macro_and_is_judged_by_english():
    images = np.eye(12, dtype=np.float32)
    results = evaluate.retrieval(retrieval_set("en"), {"en": images}, images, step=0)
    assert results["zero_shot_macro"] is None
    assert results_files.score(results) == 1.0
    assert "zero-shot" not in results_files.table(results)
    assert results_files.headline(results) == "R@10 en 100.0"


def test_the_headline_names_each_language(three_languages):
    line = results_files.headline(three_languages)
    found = {
        language: 100 * result["text_to_image"]["R@10"]
        for language, result in three_languages["languages"].items()
    }
    mean = (found["de"] + found["fr"]) / 2
    expected = f"en {found['en']:.1f}, other languages {mean:.1f} "
    assert line == f"R@10 {expected}(de {found['de']:.1f}, fr {found['fr']:.1f})"


def test_of_many_languages_the_headline_names_the_worst_and_the_best():
    recalls = {"en": 0.9, "ar": 0.5, "cs": 0.1, "de": 0.8, "fr": 0.4, "ja": 0.4, "ko": 0.2}
    results = {
        "languages": {code: {"text_to_image": {"R@10": x}} for code, x in recalls.items()},
        "zero_shot_macro": {"text_to_image": {"R@10": 0.4}},
    }
    expected = "R@10 en 90.0, other languages 40.0 (cs 10.0 to de 80.0)"
    assert results_files.headline(results) == expected


def test_score_is_zero_shot_recall_at_10(three_languages):
    expected = three_languages["zero_shot_macro"]["text_to_image"]["R@10"]
    assert results_files.score(three_languages) == expected < 1


@pytest.mark.parametrize("side", ["text", "image"])
def test_an_embedding_that_is_not_finite_raises(side):
    text, images = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)
    {"text": text, "image": images}[side][2, 1] = np.nan
    with pytest.raises(ValueError, match="2 is not finite"):
        evaluate.retrieval(retrieval_set("de", image_of=range(4)), {"de": text}, images, step=0)


def test_several_captions_an_image():
    """Each caption is a query for its image; for an image, its best caption counts."""
    images = np.eye(3, dtype=np.float32)
    text = images[[0, 0, 1, 2, 2]]
    text[1] = images[2]  # the second caption of image 0 is similar to image 2
    results = evaluate.retrieval(
        retrieval_set("en", image_of=[0, 0, 1, 2, 2]), {"en": text}, images, step=0
    )
    english = results["languages"]["en"]
    assert (english["queries"], results["images"]) == (5, 3)
    assert english["text_to_image"]["R@1"] == pytest.approx(4 / 5)
    # Two captions of image 2 tie with another caption, which is first in a third of the orders.
    assert english["image_to_text"]["R@1"] == pytest.approx((1 + 1 + 2 / 3) / 3)


def test_an_image_without_a_caption_in_a_language_is_left_out_of_its_mean():
    """For captions of other images, it still counts as a wrong answer."""
    images = np.eye(4, dtype=np.float32)
    data = retrieval_set("en", "de", image_of=range(4))
    data.image_of["de"] = np.array([0, 1, 3])
    data.captions["de"] = data.captions["de"][:3]
    # The third German caption finds the image without a caption first, then its own.
    german = np.stack([images[0], images[1], images[2] + 0.9 * images[3]])
    results = evaluate.retrieval(data, {"en": images, "de": german}, images, step=0)
    german = results["languages"]["de"]
    assert (german["queries"], results["images"]) == (3, 4)
    assert german["text_to_image"]["R@1"] == pytest.approx(2 / 3)
    assert german["image_to_text"]["R@1"] == 1
    assert results["languages"]["en"]["image_to_text"]["R@1"] == 1


def test_folds_are_searched_alone_and_averaged():
    """Each query ranks an image of the other fold first, so a joint search finds none."""
    images = np.eye(6, dtype=np.float32)
    text = 0.5 * np.repeat(images, 2, axis=0) + np.repeat(np.roll(images, 3, axis=0), 2, axis=0)
    text[0] += 0.7 * images[1]  # this query ranks another image of its own fold first
    data = dataclasses.replace(
        retrieval_set("en", image_of=np.repeat(np.arange(6), 2)), folds=("folded", 2)
    )
    together = evaluate.retrieval(data, {"en": text}, images, step=3)
    results = evaluate.folded_retrieval(data, {"en": text}, images, step=3)
    assert together["languages"]["en"]["text_to_image"]["R@1"] == 0
    assert results["languages"]["en"]["text_to_image"]["R@1"] == pytest.approx((5 / 6 + 1) / 2)
    assert results["languages"]["en"]["image_to_text"]["R@5"] == 1
    assert (results["dataset"], results["step"], results["images"]) == ("folded", 3, 3)
    assert results["languages"]["en"]["queries"] == 6
    assert results["zero_shot_macro"] is None
    assert results_files.table(results)


def test_intervals_and_comparison_go_by_photo(three_languages):
    images = np.eye(12, dtype=np.float32)
    german = np.roll(images, 1, axis=0)
    german[:3] = images[:3]
    data = retrieval_set("en", "de", "fr")
    texts = {"en": images, "de": german, "fr": np.roll(images, 1, axis=0)}
    ranked = evaluate.rankings(data, texts, images)
    found = evaluate.detailed(data.name, ranked, 12, 7, [1, 5, 10, 11])
    for language, result in three_languages["languages"].items():
        for direction in results_files.DIRECTIONS:
            details = found["languages"][language][direction]
            assert details.items() >= result[direction].items()
            assert set(details) - {"median_rank", "intervals"} == set(details["intervals"])
    low, high = found["languages"]["de"]["text_to_image"]["intervals"]["R@1"]
    assert 0 <= low < 0.25 < high < 0.6
    macro = found["zero_shot_macro"]["text_to_image"]
    assert macro["R@1"] == pytest.approx(0.125)
    # The macro average halves the German result, and its interval, because all French ones are 0.
    assert macro["intervals"]["R@1"] == pytest.approx([low / 2, high / 2])
    assert "R@11 ±" not in results_files.table(three_languages)
    assert "25.0" in results_files.table(found)

    worse = evaluate.rankings(data, texts | {"de": texts["fr"]}, images)
    differences = comparison.compare(ranked, worse, 12, [1, 10])
    assert list(differences) == ["en", "de", "fr", "zero-shot"]
    one = differences["de"]["text_to_image"]["R@1"]
    assert (one["first"], one["second"], one["mean"]) == (0.25, 0, 0.25)
    # Only three photos differ: all agree in a quarter of the exchanges, half of them as observed.
    assert one["p"] == pytest.approx(0.25, abs=0.03)
    assert differences["en"]["image_to_text"]["mrr"]["p"] == 1
    assert differences["zero-shot"]["text_to_image"]["R@1"]["mean"] == pytest.approx(0.125)
    assert " 25.0 -   0.0 = +25.0" in comparison.table(differences, "a", "b", "R@1")


def test_table_has_a_row_for_each_language(three_languages):
    lines = results_files.table(three_languages).splitlines()
    assert "hand-made, step 7, 12 images" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["en", "de", "fr", "zero-shot"]
    english, german = lines[2].split(), lines[3].split()
    assert english[1:] == ["12", "1", *["100.0"] * 6]
    assert german[1] == "12"
    assert german[3] == "25.0"


def test_scalars_name_language_direction_and_metric(three_languages):
    scalars = results_files.scalars(three_languages)
    assert scalars["validation/de/text_to_image/R@1"] == 0.25
    assert scalars["validation/zero_shot/text_to_image/R@1"] == 0.125


def test_pictures_of_a_set_smaller_than_a_row(photos, tmp_path):
    pictures = [photos / "images" / f"{number:02d}.jpg" for number in range(3)]
    images = np.eye(3, dtype=np.float32)
    data = retrieval_set("de", image_of=range(3))
    file = tmp_path / "queries.png"
    figures.plot_queries(data.captions, data.image_of, {"de": images}, images, pictures, file)
    with Image.open(file) as image:
        image.load()


def test_the_rank_in_a_picture_counts_ties(photos, tmp_path, monkeypatch):
    """Among twelve equal images, the expected rank is 6.5, as in the metrics."""
    monkeypatch.setattr(figures.pyplot, "close", lambda figure: None)
    same, data = np.ones((12, 3), np.float32), retrieval_set("de")
    pictures = [photos / "images" / "00.jpg"] * 12
    figures.plot_queries(
        data.captions, data.image_of, {"de": same}, same, pictures, tmp_path / "queries.png"
    )
    figure = figures.pyplot.gcf()
    monkeypatch.undo()
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    figures.pyplot.close(figure)
    ranks = [text for text in texts if text.startswith("right image")]
    assert ranks == ["right image: rank 6.5, tied with 11"] * figures.EXAMPLES
    results = evaluate.retrieval(data, {"de": same}, same, step=0)
    assert results["languages"]["de"]["text_to_image"]["median_rank"] == 6.5


@pytest.fixture(scope="module")
def odd_test_set(photos, tmp_path_factory):
    """A test set with XTD10's layout and names, CRLF line ends and byte order marks."""
    folder = tmp_path_factory.mktemp("sets") / "odd"
    folder.mkdir()
    source = photos / "multilingual_test"
    for name, target in (
        ("test_image_names.txt", "test_image_names.txt"),
        ("test_captions_en.txt", "test_1kcaptions_en.txt"),
        ("test_captions_de.txt", "test_1kcaptions_jp.txt"),
    ):
        lines = (source / name).read_text().splitlines()[:12]
        (folder / target).write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    return folder


def test_eval_of_another_test_set(workdir, photos, odd_test_set, cache):
    arguments = ["eval", f"--workdir={workdir}", f"--test_set={odd_test_set}"]
    arguments += [f"--images={photos / 'images'}"]
    first = run_main(*arguments)
    (file,) = (workdir / "results").glob("odd-*.json")
    results = json.loads(file.read_text())
    assert (results["dataset"], results["images"]) == ("odd", 12)
    assert file.name == f"odd-{results['step']}.json"
    assert set(results["languages"]) == {"en", "ja"}
    assert results["languages"]["en"]["text_to_image"]["R@5"] > 5 / 12  # chance
    assert results_files.table(results) in first.stdout
    for what in ("recall", "queries"):
        picture = file.with_suffix(f".{what}.png")
        assert str(picture) in first.stdout
        with Image.open(picture) as image:
            image.load()
            assert image.format == "PNG"
            assert 300 < image.width < 3000
            assert 300 < image.height < 3000
            assert len(image.convert("RGB").getcolors(1 << 24)) > 10

    # The towers' outputs are read from the cache, and the results are the same.
    assert "odd images: 100%" in first.stderr
    before = sorted(os.listdir(cache / "features"))
    second = run_main(*arguments)
    assert "odd images" not in second.stderr
    assert "odd texts" not in second.stderr
    assert sorted(os.listdir(cache / "features")) == before
    assert second.stdout == first.stdout


def test_eval_writes_predictions_a_comparison_and_clip_benchmarks_layout(
    workdir, photos, odd_test_set, tmp_path
):
    arguments = [f"--workdir={workdir}", f"--test_set={odd_test_set}", "--k=2,3"]
    arguments += [f"--images={photos / 'images'}", f"--predictions={tmp_path / 'best.jsonl'}"]
    done = run_main("eval", *arguments, f"--against={workdir}", "--layout=clip_benchmark")
    (file,) = (workdir / "results").glob("odd-[0-9]*[0-9].json")
    results = json.loads(file.read_text())
    recall = results["languages"]["ja"]["text_to_image"]
    assert {"R@2", "nDCG@3", "MAP@10", "MRR@5", "precision@1", "recall@3", "mean_rank"} <= set(
        recall
    )

    lines = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 12
    japanese = [
        line for line in lines if (line["language"], line["direction"]) == ("ja", "text_to_image")
    ]
    # No two photos are equal, so the first right answer is at the query's rank.
    hits = [any(answer["right"] for answer in line["best"][:3]) for line in japanese]
    assert np.mean(hits) == pytest.approx(recall["R@3"])
    assert {len(line["best"]) for line in lines} == {10}
    assert japanese[0]["best"][0]["answer"].endswith(".jpg")
    assert [line["rank"] <= 3 for line in japanese] == hits

    (against,) = (workdir / "results").glob("odd-*.against-*.json")
    differences = json.loads(against.read_text())["languages"]
    assert differences["ja"]["text_to_image"]["R@3"]["p"] == 1
    assert "with 95% intervals" in done.stdout
    (layout,) = (workdir / "results").glob("odd-*.clip_benchmark/*_ja_*.json")
    theirs = json.loads(layout.read_text())
    assert theirs["metrics"]["image_retrieval_recall@3"] == recall["R@3"]
    assert (theirs["dataset"], theirs["language"]) == ("odd", "ja")

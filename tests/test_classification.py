"""Compares zero-shot classification with CLIP_benchmark; tests `eval --task=classification`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from input_pipeline.test_sets.classification_set import ClassificationSet
from tests.conftest import COLOURS
from tests.runs import run_main
from tests.test_main import refusal
from tests.test_tagging import FakeEncoder, unit
from xlir import clip_benchmark, evaluate_classification, tagging

CLASSES, PHOTOS = 12, 90


@pytest.fixture(scope="module")
def classified():
    """A test set whose classes have unequal numbers of photos, and embeddings of its photos.

    German has no name for two classes. A photo is nearer to the prompts of its class than chance.
    """
    rng = np.random.default_rng(0)
    class_of = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, PHOTOS - CLASSES) // 2])
    present = {"en": np.arange(CLASSES), "de": np.array([3, 0, 1, 2, 5, 7, 8, 9, 10, 11])}
    names = {code: [f"{code}{number}" for number in some] for code, some in present.items()}
    templates = {"en": ["{}", "a photo of a {}"]}
    data = ClassificationSet("small", range(PHOTOS), class_of, present, names, templates, "x")
    english = tagging.embed_prompts(FakeEncoder(), data.prompts("en"), "en")
    german = tagging.embed_prompts(FakeEncoder(), data.prompts("de"), "de")
    images = unit(rng, PHOTOS, 8) + 0.8 * english[class_of]
    for row, number in enumerate(present["de"]):
        images[class_of == number] += 0.8 * german[row]
    return data, {"en": english, "de": german}, images / np.linalg.norm(images, axis=1)[:, None]


@pytest.mark.parametrize("language", ["en", "de"])
def test_accuracies_are_those_of_clip_benchmark(classified, language, monkeypatch):
    """Prompts and photos go through CLIP_benchmark's own evaluation."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'xlir[export]'")
    theirs = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_classification",
        reason="needs clip-benchmark: pip install --no-deps clip-benchmark==1.6.2",
    )
    # NumPy 2.4 does not convert an array with one element to a float, as its code does.
    monkeypatch.setattr(theirs, "float", lambda one: one.item(), raising=False)
    data, classes, images = classified

    class Texts(list):
        to = lambda self, device: self  # noqa: E731

    class Model:
        encode_image = staticmethod(lambda rows: torch.tensor(images)[rows])
        # Embeddings of any length: the evaluation scales them to unit length.
        encode_text = staticmethod(lambda texts: 3 * torch.tensor(FakeEncoder().encode_text(texts)))

    class Batches(list):
        class dataset:
            classes = data.names[language]

    present = data.classes[language].tolist()
    rows = np.flatnonzero(np.isin(data.class_of, present))
    targets = [present.index(number) for number in data.class_of[rows]]
    batches = Batches(
        (torch.tensor(rows[start : start + 7]), torch.tensor(targets[start : start + 7]))
        for start in range(0, len(rows), 7)
    )
    templates = [one.replace("{}", "{c}") for one in data.templates.get(language, ["{}"])]
    expected = theirs.evaluate(
        Model, batches, Texts, data.names[language], templates, "cpu", amp=False
    )
    found = evaluate_classification.evaluate_set(data, classes, images, 7)
    written = clip_benchmark.layout(found, "run", clip_benchmark.CLASSIFICATION)[language]
    assert written["metrics"].keys() == expected.keys()
    differences = [written["metrics"][name] - expected[name] for name in expected]
    print(f"{expected}; largest difference {np.abs(differences).max():.1e}")
    assert np.abs(differences).max() <= 1e-6
    assert 0.2 < expected["acc1"] < 0.95
    assert abs(expected["acc1"] - expected["mean_per_class_recall"]) > 0.01
    assert (written["task"], written["language"]) == ("zeroshot_classification", language)


def test_results_of_languages_their_mean_and_intervals(classified):
    data, classes, images = classified
    found = evaluate_classification.evaluate_set(data, classes, images, 7)
    english, german = found["languages"]["en"], found["languages"]["de"]
    assert (english["classes"], english["images"], english["prompts"]) == (12, PHOTOS, 2)
    assert (german["classes"], german["prompts"]) == (10, 1)
    assert german["images"] == np.isin(data.class_of, data.classes["de"]).sum() < PHOTOS
    for name in evaluate_classification.METRICS:
        assert found["zero_shot_macro"][name] == german[name]
    for result in (english, german):
        low, high = result["intervals"]["accuracy@1"]
        assert low < result["accuracy@1"] < high
        assert 0.05 < high - low < 0.35
    only = evaluate_classification.evaluate_set(data.only(["en"]), {"en": classes["en"]}, images, 7)
    assert only["zero_shot_macro"] is None
    assert only["languages"]["en"] == english
    assert "zero-shot" not in evaluate_classification.table(only)
    lines = evaluate_classification.table(found).splitlines()
    german, macro = (line.split() for line in lines[-2:])
    assert macro == ["zero-shot", *german[4:]]


def test_a_collapsed_encoder_is_at_chance(classified):
    """Classes with the same name tie as well."""
    data, classes, images = classified
    point = np.ones((1, 8), np.float32)
    same = {code: np.repeat(point, len(one), axis=0) for code, one in classes.items()}
    found = evaluate_classification.evaluate_set(data, same, images, 0)["languages"]
    for language, count in (("en", 12), ("de", 10)):
        assert found[language]["accuracy@1"] == pytest.approx(1 / count)
        assert found[language]["accuracy@5"] == pytest.approx(5 / count)
        assert found[language]["mean_per_class_recall"] == pytest.approx(1 / count)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Photos of one colour, in a folder for each, and names of the colours."""
    folder = tmp_path_factory.mktemp("sets") / "colours"
    for number, colour in enumerate(sorted(COLOURS)):
        (folder / colour).mkdir(parents=True)
        for size in range(40, 40 + 2 + number):
            Image.new("RGB", (size, 48), colour).save(folder / colour / f"{size}.jpg")
    german = [COLOURS[colour] for colour in sorted(COLOURS)]
    names = {"EN": [list(range(5)), sorted(COLOURS)], "DE": [list(range(4)), german[:4]]}
    (folder / "class_names.json").write_text(json.dumps(names))
    (folder / "prompts.json").write_text(json.dumps({"EN": ["A {} square.", "a {} circle"]}))
    return folder


def test_eval_of_classification(workdir, colours, tmp_path):
    workdir = shutil.copytree(workdir, tmp_path / "run")  # others expect only a run's own results
    arguments = ["eval", f"--workdir={workdir}", "--task=classification"]
    arguments += [f"--test_set=class_names:{colours}", f"--prompts={colours / 'prompts.json'}"]
    done = run_main(*arguments, "--layout=clip_benchmark")
    (file,) = (workdir / "results").glob("colours-prompts-*[0-9].json")
    found = json.loads(file.read_text())
    assert (found["dataset"], found["images"]) == ("colours-prompts", 2 + 3 + 4 + 5 + 6)
    english, german = found["languages"]["en"], found["languages"]["de"]
    assert (english["classes"], english["prompts"], english["images"]) == (5, 2, 20)
    assert (german["classes"], german["prompts"], german["images"]) == (4, 1, 14)
    assert english["accuracy@1"] >= 0.3  # chance: 0.2
    assert evaluate_classification.table(found) in done.stdout
    (layout,) = (workdir / "results").glob("colours-*.clip_benchmark/*_en_*.json")
    assert json.loads(layout.read_text())["metrics"]["acc1"] == english["accuracy@1"]
    one = run_main(*arguments[:3], arguments[3], "--languages=de", "--prompts=names")
    (file,) = (workdir / "results").glob("colours-names-*[0-9].json")
    assert json.loads(file.read_text())["languages"]["de"] == german
    assert str(file) in one.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--task=classification", "--vocabulary=coco"], 2, "--vocabulary is not a flag of --task"),
        (["--task=classification", "--against=x"], 2, "--against is not a flag of --task"),
        (["--prompts=names"], 2, "--prompts is not a flag of --task=retrieval"),
        (["--task=tagging", "--languages=de"], 2, "--languages is not a flag of --task=tagging"),
        (["--task=classification"], 1, "no test set for classification: name one with"),
        (["--test_set=class_names:COLOURS"], 1, "needs --task=classification"),
        (["--task=classification", "--test_set=split:val"], 1, "needs --task=retrieval"),
        (
            ["--task=classification", "--test_set=class_names:COLOURS", "--languages=de,xx"],
            1,
            "has no class names in xx; it has names in en de",
        ),
        (
            ["--task=classification", "--test_set=babel_imagenet:COLOURS"],
            1,
            "names such as n01440764, not 1,000: name the folder",
        ),
    ],
)
def test_refusals_are_one_line(workdir, colours, arguments, code, part):
    arguments = [one.replace("COLOURS", str(colours)) for one in arguments]
    assert part in refusal(run_main("eval", f"--workdir={workdir}", *arguments, check=False), code)

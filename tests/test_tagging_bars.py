"""Required tagging results of the published configurations; each test takes minutes."""

import json

import pytest

from xlir import evaluate_tagging

NINE = ("de", "es", "fr", "it", "ja", "ko", "ru", "tr", "zh")


def evaluated(command, run, *flags):
    """The results file of `eval --task=tagging` on a new run."""
    command(*flags, f"--workdir={run}", timeout=1200)
    command("eval", f"--workdir={run}", "--task=tagging", timeout=1200)
    (file,) = (run / "results").glob("*-tagging-*.json")
    return json.loads(file.read_text())


def check_calibration(results):
    """With one percentile for all languages, the number of tags differs by at most 15%."""
    assert evaluate_tagging.spread(results, "one_percentile") <= 0.15
    assert evaluate_tagging.spread(results, "one_percentile") < evaluate_tagging.spread(
        results, "one_cosine"
    )


@pytest.mark.slow
def test_emoji(command, tmp_path):
    results = evaluated(command, tmp_path / "run", "--config=configs/quickstart.py")
    hits = {language: one["hit@10"] for language, one in results["languages"].items()}
    assert hits["en"] >= 0.29
    assert sum(hits[language] for language in NINE) / len(NINE) >= 0.22
    check_calibration(results)


@pytest.mark.slow
def test_flickr8k(command, shared, tmp_path):
    flags = ["--config=configs/flickr8k.py", f"--config.data.dir={shared / 'flickr8k'}"]
    results = evaluated(command, tmp_path / "run", *flags)
    precision = {language: one["mAP"] for language, one in results["languages"].items()}
    assert precision["en"] >= 0.25
    share = {language: value / precision["en"] for language, value in precision.items()}
    assert min(share.values()) >= 0.85, share
    check_calibration(results)

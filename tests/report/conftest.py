"""A run whose test set has hostile captions, with embeddings made by hand."""

import dataclasses
import json

import numpy as np
import pytest

from input_pipeline.test_sets.retrieval_set import RetrievalSet

HOSTILE = '</script><script>document.title = "taken"</script><img src="http://evil.test/x.png">'
PHOTOS = 16


@pytest.fixture(scope="session")
def report_run(photos, tmp_path_factory):
    """A `writer.Run` of 16 photos with captions in three languages; tests must not change it."""
    from configs import flickr8k
    from xlir.report import writer

    workdir = tmp_path_factory.mktemp("report") / "run <b>one"
    (workdir / "results").mkdir(parents=True)
    records = [
        {"step": 10 * i, "loss": 5 / i, "learning_rate": 1e-3, "examples_per_second": 100.0}
        for i in range(1, 9)
    ]
    validation = {"validation/en/text_to_image/R@10": 0.5}
    lines = [json.dumps(record) for record in [*records, {"step": 80, **validation}]]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 90, "lo']))
    (workdir / "data.json").write_text(json.dumps({"photos": 1234, "captions": 5678}))
    (workdir / "machine.json").write_text(json.dumps({"kind": "cpu", "memory": 2**31}))
    predicted = {"one_percentile": 4.9, "one_cosine": 11.5}
    tags = {"mAP": 0.31, "micro_F1@5": 0.27, "predicted_tags": predicted}
    tagging = {"dataset": "flickr8k-tagging", "step": 80, "images": 9, "tags": 200}
    tagging |= {"tags_per_image": 2.5, "labels": "captions", "languages": {"en": tags}}
    (workdir / "results" / "flickr8k-tagging-80.json").write_text(json.dumps(tagging))
    config = flickr8k.get_config()
    config.data.dir = "/secret/flickr8k"
    return writer.Run(workdir, config, 80, [evaluated(photos)])


def evaluated(photos, noise: float = 0.3):
    """A test set whose German captions find their photos less often than the English ones do."""
    from xlir import evaluate

    random = np.random.default_rng(0)
    images = unit(random.normal(size=(PHOTOS, 8)))
    data = RetrievalSet(
        name="shapes",
        images=[photos / "images" / f"{row:02d}.jpg" for row in range(PHOTOS - 1)] + [b"broken"],
        captions={
            "en": [HOSTILE, *(f"a caption of photo {row}" for row in range(1, PHOTOS))],
            "de": [f"eine Überschrift {row}" for row in range(PHOTOS)],
            "ar": [f"صورة {row}" for row in range(PHOTOS)],
        },
        image_of={code: np.arange(PHOTOS) for code in ("en", "de", "ar")},
        fingerprint="",
    )
    texts = {
        code: unit(images + scale * random.normal(size=images.shape))
        for code, scale in (("en", noise), ("de", 3 * noise), ("ar", 9 * noise))
    }
    return evaluate.Embedded(data, texts, images)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def with_sets(run, *sets):
    return dataclasses.replace(run, sets=sets)

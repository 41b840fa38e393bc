"""A text tower that learns from a teacher: the loss, runs on captions and on texts, refusals."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base, xlmr
from input_pipeline.datasets import texts
from tests.conftest import COLOURS, PLACES, SHAPES
from tests.runs import checkpoint_of, interrupted_copy, metrics_of
from tests.test_losses_on_meshes import batch, mesh_of, on_mesh
from xlir import data, evaluate_tagging, losses, train
from xlir.config import check_config
from xlir.encoder import Encoder

TEMPERATURE = 0.05
METRICS = ("mse", "cosine", "contrastive")


def objective(metric: str, chunk: int = 0):
    """(text, teacher, ids) -> value and gradient with respect to text, compiled."""
    options = base.get_config().loss
    options.name, options.distill_metric, options.chunk = "distill", metric, chunk
    build = losses.build(options)
    return jax.jit(
        jax.value_and_grad(lambda text, teacher, ids: build(text, None, ids, None, None, teacher))
    )


@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_equals_that_of_pytorch(metric):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    text, teacher = rng.normal(size=(2, 12, 16)).astype(np.float32)
    teacher /= np.linalg.norm(teacher, axis=1, keepdims=True)
    # mse compares the student's embeddings as they are; the others do not depend on their length.
    student = torch.tensor(text, requires_grad=True)
    if metric == "mse":
        expected = torch.nn.MSELoss()(student, torch.tensor(teacher))
    elif metric == "cosine":
        same = torch.ones(len(text))
        expected = torch.nn.CosineEmbeddingLoss()(student, torch.tensor(teacher), same)
    else:
        unit = torch.nn.functional.normalize(student)
        logits, own = unit @ torch.tensor(teacher).T / TEMPERATURE, torch.arange(len(text))
        cross_entropy = torch.nn.CrossEntropyLoss()
        expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    expected.backward()
    value, gradient = objective(metric)(text, teacher, jnp.arange(len(text)))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("metric", "chunk"), [("mse", 0), ("contrastive", 0), ("contrastive", 8)])
def test_the_loss_does_not_depend_on_the_mesh_or_the_chunk(metric, chunk):
    text, teacher, ids, *_ = batch()
    expected = objective(metric)(text, teacher, ids)
    mesh = mesh_of((4, 2))
    with jax.set_mesh(mesh):
        sharded = objective(metric, chunk)(*on_mesh(mesh, (text, teacher, ids)))
    for ours, wanted in zip(sharded, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_the_term_is_added_to_another_loss():
    options = base.get_config().loss
    text, image, ids, scale, bias = map(jnp.asarray, batch())
    teacher = text[::-1]
    alone = losses.build(options)(text, image, ids, scale, bias)
    term, _ = objective("cosine")(text, teacher, ids)
    options.distill = 0.5
    together = losses.build(options)(text, image, ids, scale, bias, teacher)
    np.testing.assert_allclose(together, alone + 0.5 * term, rtol=1e-6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """English and German names of coloured shapes in the layout of a parallel corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = [
        (f"A {colour} {shape}, {place}.", f"{german_shape}, {german_colour}, {german_place}")
        for colour, german_colour in COLOURS.items()
        for shape, german_shape in SHAPES.items()
        for place, german_place in PLACES.items()
    ]
    for split, start, stop in (("train", 0, 48), ("val", 48, 60)):
        for language, own in zip(("en", "de"), zip(*lines[start:stop], strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("\n".join(own) + "\n")
    (folder / "README.md").write_text("Not a language.")
    return folder


def config_of(folder, name, teacher):
    config = xlmr.get_config("tiny")
    config.data.dir, config.data.name = str(folder), name
    config.steps, config.eval_every, config.log_every = 6, 3, 1
    config.loss.name, config.teacher = "distill", str(teacher)
    config.data.microbatches = 2
    config.image.update(frozen=True, min_area=0.0)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=0)
    return config


@pytest.fixture(scope="module")
def taught(corpus, toy_run, tmp_path_factory):
    """A run on parallel texts without photos."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    config = config_of(corpus, "texts", toy_run)
    train.train(config, folder)
    return folder, config


def test_texts_are_mapped_to_the_teachers_embeddings_of_the_english_lines(taught, toy_run, corpus):
    folder, _ = taught
    values = [line["loss"] for line in metrics_of(folder) if "loss" in line]
    assert values[-1] < 0.7 * values[0]
    german = (corpus / "val.de").read_text().splitlines()
    english = (corpus / "val.en").read_text().splitlines()
    wanted = Encoder.load(toy_run).encode_text(english)
    found = Encoder.load(folder, checkpoint="latest").encode_text(german)
    # The validation set's ranks are those of the German lines among the English lines.
    ranks = [(row > row[place]).sum() for place, row in enumerate(found @ wanted.T)]
    (logged,) = [x for x in metrics_of(folder) if x["step"] == 6 and "loss" not in x]
    recall = np.mean(np.array(ranks) < 5)
    assert logged["validation/de/text_to_image/R@5"] == pytest.approx(recall)
    assert {name.split("/")[1] for name in logged if "/R@" in name} == {"en", "de", "zero_shot"}


def test_the_image_side_is_left_alone(taught):
    folder, _ = taught
    start = Encoder.open(folder).parameters.trained
    state = checkpoint_of(folder, 6)
    jax.tree.map(np.testing.assert_array_equal, start["image_head"], state["params"]["image_head"])
    moved = jax.tree.map(
        lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(),
        start["text_head"],
        state["params"]["text_head"],
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_the_image_side_of_the_teacher(corpus, toy_run, photos, tmp_path):
    """With `config.init`, the finished run finds photos with the teacher's image side."""
    config = config_of(corpus, "texts", toy_run)
    config.init, config.image.tower = str(toy_run), ""
    test_set = {"captions": str(photos / "multilingual_test"), "images": str(photos)}
    config.evals.multilingual_test = base.test_set(**test_set)
    train.train(config, tmp_path / "run")
    files = sorted((photos / "images").iterdir())[:4]
    teacher, student = Encoder.load(toy_run), Encoder.load(tmp_path / "run")
    np.testing.assert_array_equal(student.encode_image(files), teacher.encode_image(files))
    assert list((tmp_path / "run" / "results").glob("multilingual_test-*.json"))


def test_captions_and_a_moved_teacher(photos, toy_run, tmp_path):
    """A run on captions is stopped and resumed, with the teacher in another place."""
    config = config_of(photos, "captions", toy_run)
    train.train(config, tmp_path / "straight")
    moved = shutil.copytree(toy_run, tmp_path / "moved")
    interrupted_copy(tmp_path / "straight", tmp_path / "run", 3)
    config.teacher = str(moved)
    train.train(config, tmp_path / "run")
    both = [checkpoint_of(tmp_path / name, 6) for name in ("straight", "run")]
    jax.tree.map(np.testing.assert_array_equal, *both)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "run")
    config.teacher = str(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"the data differ .* teacher"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": ""}, "teacher is ''; it must be the folder of a run, for config.loss.name"),
        ({"loss.name": "infonce"}, "distill is 0.0; it must be above 0 for config.teacher"),
        (
            {"loss.name": "infonce", "loss.distill": 0.5, "teacher": ""},
            "of a run, for config.loss.distill=0.5",
        ),
        ({"loss.distill": 0.5}, "distill is 0.5; it must be 0 with the loss"),
        ({"image.frozen": False}, "frozen is False; it must be True, because"),
        ({"loss.push_apart": 0.5, "data.name": "texts"}, "name is 'texts', which has no photos"),
        (
            {"data.name": "texts", "evals": {"mine": base.test_set("split").to_dict()}},
            "config.evals.mine is a split of 'texts', which has no",
        ),
    ],
)
def test_fields_that_do_not_fit_together(changes, message):
    config = config_of("somewhere", "captions", "teacher")
    for field, value in changes.items():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message) as raised:
        check_config(config)
    assert len(str(raised.value).splitlines()) == 1


def test_a_teacher_that_does_not_fit(corpus, toy_run, tmp_path):
    config = config_of(corpus, "texts", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"^config.teacher: .* is not the folder of a run"):
        train.train(config, tmp_path / "run")
    config.teacher, config.embedding_dim = str(toy_run), 8
    with pytest.raises(ValueError, match=r"have \d+ dimensions: set --config.embedding_dim="):
        train.train(config, tmp_path / "run")


def test_files_that_do_not_fit(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "corpus")
    with pytest.raises(FileNotFoundError, match=r"holds no test.en, .*: train, val"):
        texts.Texts(folder, "test")
    (folder / "val.de").write_text("eins\nzwei\n")
    with pytest.raises(ValueError, match=r"different numbers of lines: val.de 2, val.en 12"):
        texts.Texts(folder, "val")
    (folder / "val.de").write_text("eins\n\nzwei\n")
    with pytest.raises(ValueError, match=r"val.de: line 2 is empty"):
        texts.Texts(folder, "val")


def test_splits_with_different_languages(tmp_path):
    """Bilingual corpora that share English: a repeated English line is one line."""
    for name, lines in (
        ("news.de-en.en", "One.\nTwo.\n"),
        ("news.de-en.de", "Eins.\nZwei.\n"),
        ("talks.en-fr.en", "Two.\nThree.\n"),
        ("talks.en-fr.fr", "Deux.\nTrois.\n"),
    ):
        (tmp_path / name).write_text(lines)
    config = config_of(tmp_path, "texts", "teacher")
    config.data.train = config.data.validation = "news.de-en+talks.en-fr"
    source = data.training_photos(config)
    assert source.captions[2:] == [["Two.", "Deux."], ["Three.", "Trois."]]
    assert source.image_ids.tolist() == [0, 1, 1, 2]
    assert data.for_teacher(source)[2:6] == ["Two.", "Two.", "Two.", "Two."]
    chosen = data.validation_set(config)
    assert chosen.images == ["One.", "Two.", "Three."]
    assert chosen.captions["fr"] == ["Deux.", "Trois."]
    assert {k: v.tolist() for k, v in chosen.image_of.items()} == {
        "en": [0, 1, 1, 2],
        "de": [0, 1],
        "fr": [1, 2],
    }
    assert data.own_test_sets(config) == []
    with pytest.raises(ValueError, match=r"there is no test set: .* has no photos"):
        data.test_sets(config)
    with pytest.raises(ValueError, match="split:x has no photos"):
        data.test_sets(config, "split:x")
    assert "news.de-en        2 lines" in data.prepare(config)
    with pytest.raises(ValueError, match=r"split:news.de-en has no photos"):
        evaluate_tagging.tagging_set(config, "flickr8k", "news.de-en")

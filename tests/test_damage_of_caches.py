"""Random damage to caches and prepared sets, and kill -9 at random moments of their creation.

Each trial has its own seed. Damage must be reported in one line, repaired by computing again, or
change no number.
"""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from input_pipeline.datasets import captions, coco_captions, records
from input_pipeline.datasets.captioned_images import CaptionedImages
from tests.datasets import test_captions, test_coco, test_records
from tests.test_features import EXPECTED, build, build_together

# Fixtures.
cache, folder, prepared = test_captions.cache, test_captions.folder, test_records.prepared
tfds_data_dir = test_coco.tfds_data_dir

TRIALS = 120
KILLS = 40
pytestmark = pytest.mark.slow


def spoil(file: pathlib.Path, trial: int) -> bool:
    """Changes one byte or truncates the file at a random position; returns whether it truncated."""
    chance, data = random.Random(f"{file.name} {trial}"), bytearray(file.read_bytes())
    place = chance.randrange(len(data))
    data[place] ^= chance.randrange(1, 256)
    cut = trial % 4 == 0
    file.write_bytes(data[:place] if cut else data)
    return cut


@pytest.fixture
def whole(tmp_path):
    """A feature cache."""
    build(tmp_path / "whole", [], block=200)
    return tmp_path / "whole"


@pytest.mark.parametrize("suffix", ["npy", "sha256", "json"])
def test_a_damaged_feature_cache(whole, tmp_path, suffix):
    computed = 0
    for trial in range(TRIALS):
        place = tmp_path / str(trial)
        shutil.copytree(whole, place)
        (file,) = place.glob(f"*.{suffix}")
        cut = spoil(file, trial)
        calls = []
        np.testing.assert_array_equal(build(place, calls, block=200), EXPECTED)
        # A changed byte damages one block, or two if it is the newline between them.
        assert cut or len(calls) <= 2, "intact blocks were computed again"
        computed += bool(calls)
        np.testing.assert_array_equal(build(place, calls := [], block=200), EXPECTED)
        assert not calls, "the cache was not repaired"
        shutil.rmtree(place)
    print(f"{suffix}: {TRIALS} of {TRIALS}, computed again in {computed}")
    assert suffix == "json" or computed > TRIALS * 0.9


def test_damaged_feature_caches_of_processes_that_compute_together(whole, tmp_path):
    for trial in range(TRIALS // 4):
        folders = [tmp_path / f"{trial}-{process}" for process in range(3)]
        for process, place in enumerate(folders):
            shutil.copytree(whole, place)
            if (trial + process) % 3:
                (file,) = place.glob("*.npy" if trial % 2 else "*.sha256")
                spoil(file, trial * 3 + process)
        build_together(folders, block=200)
        assert build_together(folders, block=200) == []


def content_of(folder: pathlib.Path) -> tuple:
    """Everything that is read from a prepared set."""
    splits = [read(folder, split) for split in ("train", "val")]
    return [
        (
            images.filenames,
            images.image_ids.tolist(),
            images.captions,
            images.fingerprint,
            [images.images[row] for row in range(len(images))],
        )
        for images in splits
    ]


def read(folder: pathlib.Path, split: str) -> CaptionedImages:
    return CaptionedImages(captions.prepare(folder), split)


@pytest.mark.parametrize("name", [*test_records.SMALL, test_records.SHARD])
def test_a_damaged_set(folder, prepared, name):
    expected, noticed = content_of(folder), 0
    whole = (prepared / name).read_bytes()
    for trial in range(TRIALS):
        spoil(prepared / name, trial)
        line = ""
        try:
            assert content_of(folder) == expected
        except ValueError as error:
            line = str(error)
        if line:
            noticed += 1
            assert line.startswith(str(prepared))
            assert f"Delete {prepared}: the set is prepared again" in line
            assert "\n" not in line
        (prepared / name).write_bytes(whole)
    print(f"{name}: {TRIALS} of {TRIALS}, noticed {noticed}")
    # Most of a small shard is padding, and some digests belong to splits that are not read.
    assert noticed > TRIALS * (0.2 if name == test_records.SHARD else 0.9)
    assert content_of(folder) == expected


@pytest.mark.parametrize("pattern", ["*-00000-of-*", "*.shard.json"])
def test_a_damaged_part_of_an_interrupted_preparation(folder, cache, monkeypatch, pattern):
    entries = [test_captions.entry(f"{i}.jpg", "train" if i < 4 else "val") for i in range(6)]
    test_captions.write(folder, *entries)
    test_captions.run(test_captions.KILLED, folder)
    shutil.copytree(cache, left := folder.parent / "left")
    monkeypatch.setattr(records, "SHARD", 1)
    expected = content_of(folder)
    for trial in range(TRIALS):
        shutil.rmtree(cache)
        shutil.copytree(left, cache)
        file = min(cache.rglob(f"incomplete.*/{pattern}"))
        spoil(file, trial)
        assert content_of(folder) == expected


def test_damaged_rows_of_a_set_that_tfds_prepared(tfds_data_dir, cache):
    def content():
        images = CaptionedImages(coco_captions.prepared_by_tfds(tfds_data_dir), "train+restval")
        return images.filenames, images.image_ids.tolist(), images.captions, images.fingerprint

    expected = content()
    for trial in range(TRIALS):
        spoil(min(cache.glob("datasets/coco_captions/rows/*.json")), trial)
        assert content() == expected


# One process imports modules and forks the processes to kill, because imports are slow.
KILL_AT_RANDOM = """
import hashlib, json, os, pathlib, random, shutil, signal, sys, time
sys.path.insert(0, os.getcwd())
import numpy as np
from input_pipeline import features
from input_pipeline.datasets import captions, records
from input_pipeline.datasets.captioned_images import CaptionedImages

records.SHARD, kills, folder = 16, int(sys.argv[2]), pathlib.Path(sys.argv[3])
cache = folder.parent / "cache"
os.environ["XLIR_CACHE"] = str(cache)

def prepare():
    builder = captions.prepare(folder)
    digest = hashlib.sha256()
    for split in ("train", "val"):
        images = CaptionedImages(builder, split)
        digest.update(images.fingerprint.encode())
        for row in range(len(images)):
            digest.update(images.images[row])
    return digest.hexdigest()

def cached():
    def compute(start, stop):
        time.sleep(0.002)
        return np.random.default_rng(start).normal(size=(stop - start, 64))
    array = features.cached(cache, {}, (5000, 64), compute, label="x", block=50)
    return hashlib.sha256(array).hexdigest()

work = {"prepare": prepare, "cached": cached}[sys.argv[1]]

def start():
    child = os.fork()
    if not child:
        (folder.parent / "digest").write_text(work())
        os._exit(0)
    return child

def finished():
    assert os.waitpid(start(), 0)[1] == 0
    return (folder.parent / "digest").read_text()

def fresh():
    shutil.rmtree(cache, ignore_errors=True)

expected = finished()
fresh()
begun = time.monotonic()
assert finished() == expected
seconds = time.monotonic() - begun
same = stopped = parts = 0
for trial in range(kills):
    fresh()
    child = start()
    time.sleep(random.Random(trial).uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    stopped += os.waitpid(child, 0)[1] == signal.SIGKILL
    parts += any(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    same += finished() == expected
    assert finished() == expected
    assert not [*cache.rglob("*partial*"), *cache.rglob("incomplete*")]
print(json.dumps({"same": same, "stopped": stopped, "parts": parts, "seconds": seconds}))
"""


@pytest.mark.parametrize("work", ["prepare", "cached"])
def test_kill_at_a_random_moment(folder, work):
    entries = [test_captions.entry(f"{i}.jpg", "train" if i < 240 else "val") for i in range(300)]
    test_captions.write(folder, *entries)
    process = subprocess.run(
        [sys.executable, "-c", KILL_AT_RANDOM, work, str(KILLS), str(folder)],
        cwd=test_captions.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    print(work, result)
    assert result["same"] == KILLS
    assert result["stopped"] > KILLS // 2, "too few were killed before they ended"
    assert result["parts"] > KILLS // 2, "too few were killed while they worked"

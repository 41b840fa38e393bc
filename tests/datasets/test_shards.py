"""Training on shards: batches, broken photos, and a whole run."""

import json

import jax
import numpy as np
import pytest

from configs import xlmr
from input_pipeline import loader, shards
from input_pipeline.shards import Record
from tests.runs import checkpoint_of, interrupted_copy, metrics_of, run_main
from xlir import batches, data, partition, train
from xlir.encoder import Encoder

# First photo and number of photos of each split; "b" has two shards.
SPLITS = {"a": [(0, 10)], "b": [(10, 12), (22, 8)], "val": [(30, 6)]}


def write_web(photos, folder, kept_out=()):
    """Folders of shards of the small set's photos."""
    entries = json.loads((photos / "dataset_shapes.json").read_text())["images"]
    for split, parts in SPLITS.items():
        (folder / split).mkdir(parents=True)
        found = []
        for first, count in parts:
            records = []
            for entry in entries[first : first + count]:
                texts = [sentence["raw"] for sentence in entry["sentences"]]
                image = (photos / "images" / entry["filename"]).read_bytes()
                records.append(Record(entry["filename"], texts, ["en"] * len(texts), image))
            found.append(shards.write(folder / split / f"{first}.array_record", records))
        shards.write_index(folder / split, found, kept_out=list(kept_out))
    return folder


@pytest.fixture
def web(photos, tmp_path):
    return write_web(photos, tmp_path / "web")


@pytest.fixture
def config(web):
    config = xlmr.get_config("tiny")
    config.data.name, config.data.dir = "shards", str(web)
    config.data.train, config.data.weights = "a+b", (0.2, 0.8)
    config.steps, config.eval_every, config.log_every = 4, 2, 1
    return config


@pytest.fixture(scope="module")
def encoder(toy_config):
    return Encoder.create(toy_config)


def damage(web, split="b", file="10.array_record"):
    """Damages the first photo of a shard, in the middle of its record."""
    path = web / split / file
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 200] ^= 1
    path.write_bytes(content)


def batches_of(config, encoder, places, *, broken=True):
    photos = data.training_photos(config)
    sampler = batches.sampler(config, photos)
    read, features = batches.reader(encoder, photos, sampler, None)
    assert features == {}
    return loader.Batches(sampler, read, 6, places)


def test_batches_have_the_photos_and_captions_of_the_records(config, encoder):
    photos = data.training_photos(config)
    assert (len(photos), photos.caption_count, photos.sizes) == (30, 60, [10, 20])
    assert list(data.captions_of(photos))[::2] == [photos[row].texts[0] for row in range(30)]
    share = batches_of(config, encoder, np.arange(16))
    ids = np.concatenate([share[step]["image_id"] for step in range(5)])
    assert abs((ids < 10).sum() - 16) < 1
    # Twice the same row is twice the same photo, in different crops.
    batch = share[0]
    assert batch["image"].shape[0] == 16
    assert batch["text_ids"].dtype == np.int32
    assert batch[batches.BROKEN].sum() == 0
    texts = [photos[row].texts for row in batch["image_id"].tolist()]
    rows, turns = batches.sampler(config, photos)(0)
    np.testing.assert_array_equal(rows, batch["image_id"])
    used = [texts[place][turn % 2] for place, turn in enumerate(turns.tolist())]
    ids = encoder.tokenizer(used, max_length=64)
    for row, expected in enumerate(ids):
        assert batch["text_ids"][row][batch["text_mask"][row]].tolist() == list(expected)


def test_batches_are_the_same_on_any_number_of_processes_with_broken_photos(config, encoder, web):
    damage(web)
    (web / "a" / "0.array_record").rename(web / "away")
    # A photo that is whole as a record, and not as a JPEG.
    records = [data.training_photos(config)._folders[1][row] for row in range(1, 12)]
    bad = [record._replace(image=record.image[:300]) for record in records[:3]]
    entries = [shards.write(web / "a" / "0.array_record", [*bad, *records[3:]])]
    shards.write_index(web / "a", entries)
    config.data.train = "b+a"
    whole = batches_of(config, encoder, np.arange(16))
    parts = [batches_of(config, encoder, places) for places in np.arange(16).reshape(4, -1)]
    broken = 0
    for step in (5, 0, 3):
        expected = whole[step]
        broken += expected[batches.BROKEN].sum()
        for key, array in expected.items():
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(together, array)
        ids = expected["image_id"]
        assert 0 not in ids
        assert not np.isin(ids, [20, 21, 22]).any()
    assert broken > 3


def test_a_folder_of_only_broken_photos_ends_the_run(config, encoder, web):
    shards.write_index(
        web / "a",
        [shards.write(web / "a" / "0.array_record", [Record("a", ["x"], [""], b"no photo")])],
    )
    with pytest.raises(ValueError, match="more than 100 photos one after the other can't be read"):
        batches_of(config, encoder, np.arange(16))[0]


def test_a_run_trains_resumes_and_counts_broken_photos(config, web, photos, tmp_path):
    damage(web)
    damage(web, "a", "0.array_record")
    flags = [
        "--config=configs/xlmr.py:tiny",
        "--config.data.name=shards",
        f"--config.data.dir={web}",
        "--config.data.train=a+b",
        "--config.data.weights=(0.2,0.8)",
        "--config.evals={'val': {'type': 'split', 'split': 'val'}}",
        # A frozen tower runs in each step: nothing is cached.
        "--config.text.frozen=True",
        "--config.steps=4",
        "--config.eval_every=2",
        "--config.log_every=1",
    ]
    out = run_main(*flags, f"--workdir={tmp_path / 'straight'}")
    assert "30 training photos with 60 captions" in out.stderr
    assert "web-val" in out.stdout
    records = [line for line in metrics_of(tmp_path / "straight") if "loss" in line]
    assert [line["step"] for line in records] == [1, 2, 3, 4]
    assert records[-1]["broken_records"] >= 3
    assert "seconds/data" in (tmp_path / "straight" / "metrics.jsonl").read_text()
    again = interrupted_copy(tmp_path / "straight", tmp_path / "resumed", 2)
    run_main(*flags, f"--workdir={again}")
    whole, resumed = (checkpoint_of(tmp_path / name, 4) for name in ("straight", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, whole["params"], resumed["params"])


def test_shards_must_have_been_prepared_without_the_test_photos(config, photos, tmp_path):
    test_set = {"captions": str(photos / "multilingual_test"), "images": str(photos / "images")}
    config.evals = {"mine": test_set}
    with pytest.raises(ValueError, match=r"may hold photos of the test set 'mine': prepare"):
        data.training_photos(config)
    (fingerprint,) = (found.fingerprint for found in data.own_test_sets(config))
    config.data.dir = str(write_web(photos, tmp_path / "guarded", [fingerprint]))
    assert len(data.training_photos(config)) == 30


def test_missing_splits_and_folders(config, web):
    config.data.train = "a+c"
    with pytest.raises(
        ValueError, match=r"no complete folder of shards 'c' \(complete: a, b, val\)"
    ):
        data.training_photos(config)
    config.data.dir = str(web / "none")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        data.training_photos(config)


def test_the_folder_is_described(config, web):
    assert data.prepare(config).splitlines()[1].split() == ["a", "10", "photos", "20", "captions"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.weights": (1.0,)}, "weights has 1 numbers; it must have one for each of the 2"),
        ({"data.weights": (1.0, 0.0)}, "it must be numbers above 0"),
        ({"data.name": "captions"}, "it must be [(][)] unless config.data.name=shards"),
        ({"image.head": "center", "image.frozen": True}, "choose another head"),
        ({"teacher": "run", "loss.distill": 1.0}, "config.teacher must be empty"),
    ],
)
def test_fields_that_shards_do_not_have(config, change, message):
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        train.check_config(config)
    assert partition.total(3) == 3

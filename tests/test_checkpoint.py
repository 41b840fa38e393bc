"""Checkpoints: which are kept, how damage is detected, and which checkpoint is used then."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import NamedSharding, PartitionSpec

import xlir
from tests.runs import metrics_of
from xlir import partition, train
from xlir.checkpoint import Checkpoints
from xlir.digests import digests

TREE = {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "bias": np.ones(4, np.float32)}


def items(step: int) -> dict:
    return {"params": jax.tree.map(lambda x: jnp.asarray(x + step), TREE)}


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of steps 1, 2 and 3; step 1 is the best."""
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in ((1, 0.9), (2, 0.5), (3, 0.6)):
            checkpoints.save(step, items(step), score)
    return tmp_path


def restore(workdir, **options) -> tuple[int, dict]:
    with Checkpoints(workdir, **options) as checkpoints:
        return checkpoints.restore(items(0))


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.1, 0.2, 0.3, 0.4), [3, 4]),  # the last one is the best, and one more is kept
        ((0.9, 0.2, 0.3, 0.4), [1, 3, 4]),
        ((0.1, 0.9, 0.3, None), [2, 3, 4]),
        ((None, 0.0, None, None), [2, 3, 4]),  # the only one that was validated
        ((None, None, None, None), [3, 4]),
    ],
)
def test_two_and_the_best_are_kept(scores, kept, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step, score in enumerate(scores, 1):
            checkpoints.save(step, items(step), score)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == kept
        best = max(range(4), key=lambda i: (-1 if scores[i] is None else scores[i], i)) + 1
        assert checkpoints.restore(items(0))[0] == 4
        assert checkpoints.restore(items(0), best=True)[0] == best


def largest_file(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def cut(folder):
    file = largest_file(folder / "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(folder):
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.write_bytes(bytes(file.stat().st_size))


def remove_item(folder):
    shutil.rmtree(folder / "params")


def remove_manifest(folder):
    for file in (folder / "params").rglob("manifest.ocdbt"):
        file.unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def change_score(folder):
    file = folder / "record" / "metadata"
    file.write_text(file.read_text().replace('"score": 0', '"score": 1'))


def cut_record(folder):
    file = folder / "record" / "metadata"
    file.write_text(file.read_text()[:-9])


DAMAGES = [cut, zero, remove_item, remove_manifest, empty, change_score, cut_record]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_used(damage, saved, caplog):
    damage(saved / "checkpoints" / "3")
    step, restored = restore(saved, read_only=True)
    assert step == 2
    jax.tree.map(np.testing.assert_array_equal, restored, items(2))
    said = [record.getMessage() for record in caplog.records if record.name == "xlir.checkpoint"]
    assert said[0].startswith("checkpoint 3 is damaged (")
    assert said[1:] == ["using the checkpoint of step 2"]
    assert (saved / "checkpoints" / "3").is_dir()  # in read-only mode, nothing is moved


@pytest.mark.parametrize("damage", [cut, empty, cut_record])
def test_a_damaged_checkpoint_is_put_aside_and_its_step_saved_again(damage, saved):
    for name in ("damaged-3", "damaged-3-again"):
        damage(saved / "checkpoints" / "3")
        with Checkpoints(saved) as checkpoints:
            assert checkpoints.restore(items(0))[0] == 2
            checkpoints.save(3, items(3), 0.7)
        assert (saved / "checkpoints" / name).is_dir()
        assert restore(saved)[0] == 3


def test_where_none_is_whole_none_is_moved(saved):
    for step in (1, 2, 3):
        cut(saved / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be restored") as info:
        restore(saved)
    assert len(str(info.value).splitlines()) == 1
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]


def test_every_flipped_byte_of_the_arrays_is_noticed_or_without_effect(saved):
    folder = saved / "checkpoints" / "3"
    expected = items(3)["params"]
    used = []
    for file in (path for path in sorted(folder.rglob("*")) if path.is_file()):
        content = bytearray(file.read_bytes())
        for place in range(0, len(content), max(len(content) // 3, 1)):
            content[place] ^= 0x10
            file.write_bytes(content)
            step, restored = restore(saved, read_only=True)
            used.append(step)
            if step == 3:
                jax.tree.map(np.testing.assert_array_equal, restored["params"], expected)
            content[place] ^= 0x10
        file.write_bytes(content)
    assert 2 in used


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(saved, caplog):
    cut(saved / "checkpoints" / "1")
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.restore(items(0), best=True)[0] == 3
    assert "checkpoint 1 is damaged" in caplog.text


def test_checkpoints_of_the_version_before_digests(saved):
    """Such checkpoints have scores in Orbax's metrics, and no digests."""
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.6)):
        folder = saved / "checkpoints" / str(step)
        shutil.rmtree(folder / "record")
        (folder / "metrics").mkdir()
        (folder / "metrics" / "metrics").write_text(json.dumps({"score": score}))
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.restore(items(0))[0] == 3
        step, restored = checkpoints.restore(items(0), best=True)
        assert step == 1
        jax.tree.map(np.testing.assert_array_equal, restored, items(1))
        checkpoints.save(4, items(4), 0.95)
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.restore(items(0), best=True)[0] == 4


def test_an_array_has_one_digest_on_every_mesh():
    mesh = partition.create_mesh({"data": 2, "fsdp": 4})
    values = np.random.default_rng(0).normal(size=(3, 16, 64)).astype(np.float32)
    specs = [
        (),
        (None, "fsdp"),
        (None, None, "fsdp"),
        (None, "data", "fsdp"),
        (None, ("data", "fsdp")),
    ]
    found = {
        digests({"x": jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))})["['x']"]
        for spec in specs
    }
    assert len(found) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_every_change_of_one_element_changes_the_digest(dtype):
    values = np.random.default_rng(0).integers(0, 2, (7, 5)).astype(jnp.dtype(dtype))
    found = {digests([jnp.asarray(values)])["[0]"]}
    for place in range(values.size):
        changed = values.copy()
        changed.flat[place] = not changed.flat[place]
        found.add(digests([jnp.asarray(changed)])["[0]"])
    assert len(found) == values.size + 1
    swapped = values.copy()
    (one,), (other,) = (np.flatnonzero(values.flat == v)[:1] for v in (0, 1))
    swapped.flat[[one, other]] = swapped.flat[[other, one]]
    assert digests([jnp.asarray(swapped)])["[0]"] not in found


def test_training_resumes_from_the_older_checkpoint(toy_config, toy_run, tmp_path, caplog):
    """As after a power failure, the last checkpoint exists but is full of zeros."""
    run = shutil.copytree(toy_run, tmp_path / "run")
    zero(run / "checkpoints" / "6")
    with caplog.at_level(logging.INFO):
        train.train(toy_config, run)
    assert "resuming from step 4" in caplog.text
    assert (run / "checkpoints" / "damaged-6").is_dir()
    assert metrics_of(run) == metrics_of(toy_run)
    again, straight = (xlir.Encoder.load(folder, checkpoint="latest") for folder in (run, toy_run))
    assert again.step == straight.step == 6
    np.testing.assert_array_equal(again.encode_text(["rot"]), straight.encode_text(["rot"]))


def test_loading_says_which_step_it_uses(toy_run, tmp_path, caplog):
    run = shutil.copytree(toy_run, tmp_path / "run")
    best = xlir.Encoder.load(run).step
    zero(run / "checkpoints" / str(best) / "ema")
    other = xlir.Encoder.load(run).step
    assert other != best
    assert f"using the checkpoint of step {other}" in caplog.text
    shutil.rmtree(run / "checkpoints" / str(other) / "ema")  # no fallback to raw weights
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be restored"):
        xlir.Encoder.load(run)


def test_a_tokenizer_of_another_model(toy_run, tmp_path):
    """The tokenizer has another digest; without digests, it has more tokens than the tower."""
    run = shutil.copytree(toy_run, tmp_path / "run")
    file = run / "text_tower" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_tokens([f"piece{number}" for number in range(100)])
    tokenizer.save(str(file))
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged: its digest is not"):
        xlir.Encoder.load(run)
    (run / "SHA256SUMS").unlink()
    with pytest.raises(
        ValueError, match="the tokenizer has 360 tokens, but the tower's embedding has"
    ):
        xlir.Encoder.load(run)


def test_a_command_says_it_without_a_traceback(workdir, command, tmp_path):
    """Pending reads of the damaged checkpoint fail without output."""
    run = shutil.copytree(workdir, tmp_path / "run")
    best = xlir.Encoder.load(run).step
    for file in (run / "checkpoints" / str(best)).rglob("d/*"):
        file.write_bytes(b"")
    process = command("eval", f"--workdir={run}", "--test_set=split:val")
    assert f"checkpoint {best} is damaged (" in process.stderr
    assert "using the checkpoint of step " in process.stderr
    assert "Traceback" not in process.stderr
    assert "text to image" in process.stdout

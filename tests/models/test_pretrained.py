"""Weights: Hugging Face checkpoints, the strict merge, and the files of towers."""

import json
import pathlib
import pickle
import shlex
import socket

import huggingface_hub.constants
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from xlir.models import pretrained


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.statistics = nnx.BatchStat(jnp.zeros(3, jnp.bfloat16))


NAMES = [
    "layers.0.bias",
    "layers.0.kernel",
    "layers.1.bias",
    "layers.1.kernel",
    "statistics",
]


def test_flatten_names_weights_and_no_random_state():
    assert sorted(pretrained.flatten(Tower(nnx.Rngs(0)))) == NAMES


@pytest.mark.parametrize("abstract", [False, True])
def test_save_and_load(tmp_path, abstract):
    tower = Tower(nnx.Rngs(0))
    weights = {name: np.asarray(x) for name, x in pretrained.flatten(tower).items()}
    pretrained.save(weights, tmp_path / "tower.safetensors")
    other = nnx.eval_shape(lambda: Tower(nnx.Rngs(1))) if abstract else Tower(nnx.Rngs(1))
    pretrained.load(other, tmp_path / "tower.safetensors")
    expected = pretrained.flatten(tower)
    for name, value in pretrained.flatten(other).items():
        assert value.dtype == expected[name].dtype
        np.testing.assert_array_equal(value, expected[name])


def test_merge_lists_all_that_does_not_fit():
    tower = Tower(nnx.Rngs(0))
    before = {name: np.asarray(value) for name, value in pretrained.flatten(tower).items()}
    weights = dict(before)
    del weights["layers.0.bias"]
    weights["layers.1.kernel"] = weights["layers.1.kernel"].T
    weights["layers.1.bias"] = weights["layers.1.bias"].astype(np.float16)
    weights |= {f"extra.{i}": np.zeros(1) for i in range(9)}
    with pytest.raises(ValueError, match="do not fit Tower") as raised:
        pretrained.merge(tower, weights)
    message = str(raised.value)
    assert "unused extra.0, extra.1, extra.2, extra.3, extra.4 and 4 more" in message
    assert "missing layers.0.bias;" in message
    assert "layers.1.kernel float32[1,3] for float32[3,1]" in message
    assert "layers.1.bias float16[1] for float32[1]" in message
    for name, value in pretrained.flatten(tower).items():
        np.testing.assert_array_equal(value, before[name])


def test_load_names_the_damaged_file(tmp_path):
    file = tmp_path / "tower.safetensors"
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"tower\.safetensors: not a safetensors file"):
        pretrained.load(Tower(nnx.Rngs(0)), file)


def test_package_file():
    assert pretrained.package_file("flax", "nnx/__init__.py", "flax").is_file()
    for package, pattern in (("no_such_package_xyz", "*"), ("flax", "no/such/*.file")):
        with pytest.raises(FileNotFoundError, match=r"a-name .*pip install 'xlir\[quickstart\]'"):
            pretrained.package_file(package, pattern, "a-name")


WEIGHTS = {
    "embeddings.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "norm.bias": np.array([0.5, -2], ml_dtypes.bfloat16),
    "position_ids": np.arange(4)[None],
}


def assert_weights(read, expected=WEIGHTS):
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def write_shards(folder: pathlib.Path, suffix: str = "safetensors", write=None) -> pathlib.Path:
    """Two shards and their index; returns the index."""
    write = write or safetensors.numpy.save_file
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {f"{stem}-{i}-of-2.{suffix}": names for i, names in enumerate((NAMES_1, NAMES_2), 1)}
    for file, names in shards.items():
        write({name: WEIGHTS[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


NAMES_1, NAMES_2 = ["embeddings.weight"], ["norm.bias", "position_ids"]


def save_torch(weights, file):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    tensors = {
        name: torch.tensor(array.astype(np.float32)).bfloat16()
        if array.dtype == ml_dtypes.bfloat16
        else torch.tensor(array)
        for name, array in weights.items()
    }
    torch.save(tensors, file)


def test_reads_one_safetensors_file(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert_weights(pretrained.read_checkpoint(tmp_path))


def test_reads_safetensors_shards(tmp_path):
    write_shards(tmp_path)
    assert_weights(pretrained.read_checkpoint(tmp_path))


def test_reads_one_torch_file(tmp_path):
    save_torch(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert_weights(pretrained.read_checkpoint(tmp_path))


def test_reads_torch_shards(tmp_path):
    write_shards(tmp_path, "bin", save_torch)
    assert_weights(pretrained.read_checkpoint(tmp_path))


def test_reads_what_a_torch_module_saves(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    assert_weights(pretrained.read_checkpoint(tmp_path), expected)


def test_safetensors_come_before_pickles(tmp_path):
    safetensors.numpy.save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert_weights(pretrained.read_checkpoint(tmp_path))


def test_a_checkpoint_cannot_run_code(tmp_path):
    witness = tmp_path / "executed"

    class Command:
        def __reduce__(self):
            return eval, (f"open({str(witness)!r}, 'w').close()",)

    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps(Command(), 2))
    with pytest.raises(pickle.UnpicklingError, match=r"model\.bin: refused to load .*eval"):
        pretrained.read_checkpoint(tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "not a safetensors file"),
    ],
)
def test_damaged_weights_are_named(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        pretrained.read_checkpoint(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_truncated_safetensors_file_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
        pretrained.read_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2-of-2\.safetensors is missing"):
        pretrained.read_checkpoint(tmp_path)


def test_a_shard_without_its_tensors_is_named(tmp_path):
    write_shards(tmp_path)
    file = tmp_path / "model-2-of-2.safetensors"
    safetensors.numpy.save_file({"norm.bias": WEIGHTS["norm.bias"]}, file)
    with pytest.raises(ValueError, match=r"model-2-of-2\.safetensors lacks position_ids"):
        pretrained.read_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json (is damaged|lists no tensors)"):
        pretrained.read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../w.safetensors", "/etc/passwd", "sub/w.bin", "./w.bin"])
def test_a_shard_elsewhere_is_refused(tmp_path, shard):
    index = {"weight_map": {"w": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not the name of a file beside it"):
        pretrained.read_checkpoint(tmp_path)


def test_a_checkpoint_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights: none of model\.safetensors, "):
        pretrained.read_checkpoint(tmp_path)


def test_read_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.read_config(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            pretrained.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    assert pretrained.read_config(tmp_path) == {"vocab_size": 7}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty cache of the Hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def connect(*_):
        raise AssertionError("used the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    return tmp_path / "hub"


def write_snapshot(cache: pathlib.Path, *files: str) -> pathlib.Path:
    repository = cache / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text("0123abcd")
    folder = repository / "snapshots" / "0123abcd"
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def test_a_local_folder_is_a_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint: it has no config\.json"):
        pretrained.checkpoint_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert pretrained.checkpoint_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert pretrained.checkpoint_folder(f"~/{tmp_path.name}") == tmp_path


def test_a_downloaded_id_is_its_snapshot(hub_cache):
    folder = write_snapshot(hub_cache, "config.json", "pytorch_model.bin")
    assert pretrained.checkpoint_folder("someone/tiny") == folder


def test_an_id_that_was_not_downloaded_has_its_command(hub_cache):
    def command():
        with pytest.raises(FileNotFoundError) as raised:
            pretrained.checkpoint_folder("someone/tiny")
        assert "\n" not in str(raised.value)
        return shlex.split(str(raised.value).split(": ")[-1])

    assert command()[:5] == ["hf", "download", "someone/tiny", "--exclude", "*onnx*"]
    # The download is incomplete: a tool may have needed only the configuration.
    write_snapshot(hub_cache, "config.json")
    assert command()[:3] == ["hf", "download", "someone/tiny"]


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "a/b/c", "", "a b"])
def test_what_is_neither_folder_nor_id_is_named(hub_cache, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither a folder nor|not a checkpoint"):
        pretrained.checkpoint_folder(name)

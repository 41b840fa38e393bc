"""Reads the pooling and the dense layers of a sentence-transformers model.

Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084). LaBSE, for example, applies a dense
layer and tanh to the first token; without them its embeddings would be wrong.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from xlir.models import pretrained

MODULES_FILE = "modules.json"
# Modes of a Pooling module -> our poolings. Older versions have a boolean field for each mode.
POOLINGS = {"mean": "mean", "cls": "cls", "mean_tokens": "mean", "cls_token": "cls"}
ACTIVATIONS = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.linear.Identity": "identity",
}
SENTENCE = "sentence_embedding"
# Appended to every error about an unsupported module.
ALONE = "set config.text.pooling to use only its transformer"


class Modules(NamedTuple):
    """The modules of a sentence-transformers model after its transformer.

    Attributes:
      pooling: "mean" or "cls".
      dense: dense layers after the pooling, each with `features`, `dim`, `bias`, `activation`.
      folders: the folder with the weights of each dense layer.
    """

    pooling: str
    dense: list[dict[str, Any]]
    folders: list[pathlib.Path]


def read(folder: pathlib.Path, hidden: int) -> Modules | None:
    """Reads a folder's modules, or returns None if it is not a sentence-transformers model.

    A final normalisation is skipped: it only changes lengths, and embeddings are normalised anyway.

    Args:
      folder: the checkpoint's folder.
      hidden: width of its transformer.

    Raises:
      FileNotFoundError: a module's config.json is missing.
      ValueError: a file is damaged, or a module needs an unsupported feature.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    listed = _listed(folder)
    kinds = [kind for kind, _ in listed]
    dense = kinds[2:-1] if kinds[-1] == "Normalize" else kinds[2:]
    if kinds[:2] != ["Transformer", "Pooling"] or set(dense) - {"Dense"} or listed[0][1]:
        raise ValueError(
            f"{folder / MODULES_FILE} lists {', '.join(kinds)}; known: Transformer (in the folder "
            f"itself), Pooling, any number of Dense, Normalize; {ALONE}"
        )
    pooling = _pooling(folder / listed[1][1])
    layers, folders, width = [], [], hidden
    for kind, path in listed[2:]:
        if kind == "Dense":
            layers.append(_dense(folder / path, width))
            folders.append(folder / path)
            width = layers[-1]["dim"]
    return Modules(pooling, layers, folders)


def read_weights(modules: Modules) -> dict[str, np.ndarray]:
    """Reads the dense layers' weights as float32, with the names that `TextTransformer` uses.

    Raises:
      FileNotFoundError, ValueError, pickle.UnpicklingError: as `pretrained.read_checkpoint`.
    """
    renamed = {}
    for layer, folder in enumerate(modules.folders):
        weights = pretrained.in_float32(pretrained.read_checkpoint(folder))
        for name, value in weights.items():
            ours = {"linear.weight": "kernel", "linear.bias": "bias"}.get(name, name)
            renamed[f"dense.{layer}.{ours}"] = value.T
    return renamed


def _listed(folder: pathlib.Path) -> list[tuple[str, str]]:
    """The class and the folder of each module, in order."""
    file = folder / MODULES_FILE
    try:
        modules = json.loads(file.read_text(encoding="utf8"))
        listed = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: no list of modules with type and path") from error
    for _, path in listed:
        if not isinstance(path, str) or pathlib.PurePath(path).name != path:
            raise ValueError(f"{file}: path {path!r} is not the name of a folder beside it")
    if not listed:
        raise ValueError(f"{file} is damaged: it lists no modules")
    return listed


def _read_config(folder: pathlib.Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, but {MODULES_FILE} lists its folder")
    return pretrained.read_json(file)


def _pooling(folder: pathlib.Path) -> str:
    config = _read_config(folder)
    modes = config.get("pooling_mode")
    if modes is None:
        start = "pooling_mode_"
        modes = [name.removeprefix(start) for name in config if name.startswith(start)]
        modes = [mode for mode in modes if config[start + mode]]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"{folder / 'config.json'} pools by {' and '.join(map(str, modes)) or 'nothing'}; "
            f"known: mean or cls; {ALONE}"
        )
    if not config.get("include_prompt", True):
        raise ValueError(
            f"{folder / 'config.json'}: a pooling that leaves out the prompt (include_prompt "
            f"false) is not supported; {ALONE}"
        )
    return POOLINGS[modes[0]]


def _dense(folder: pathlib.Path, width: int) -> dict[str, Any]:
    config, file = _read_config(folder), folder / "config.json"
    features, dim = config.get("in_features"), config.get("out_features")
    if features != width or type(dim) is not int or dim < 1:
        raise ValueError(
            f"{file} describes a layer from {features!r} to {dim!r} features, but its input has "
            f"{width} features"
        )
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    known = {
        "activation_function": activation in ACTIVATIONS,
        "use_residual": not config.get("use_residual"),
        "module_input_name": config.get("module_input_name") in (None, SENTENCE),
        "module_output_name": config.get("module_output_name") in (None, SENTENCE),
        "bias": isinstance(config.get("bias", True), bool),
    }
    if unknown := [field for field, is_known in known.items() if not is_known]:
        field = unknown[0]
        raise ValueError(f"{file}: {field} {config[field]!r} is not supported; {ALONE}")
    return {
        "features": features,
        "dim": dim,
        "bias": config.get("bias", True),
        "activation": ACTIVATIONS[activation],
    }

"""A run's encoder as a JSON description and NumPy weights, for the modules of `pytorch/`."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.models.tensor_names import STACK


class HeadLayer(NamedTuple):
    """A layer of a head.

    Attributes:
      kind: "norm", "dense" or "gelu".
      weight: [features] for a norm, [dim, features] for a dense layer.
      bias: [dim], or None.
    """

    kind: str
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None


def head_layers(encoder: Encoder, side: str) -> list[HeadLayer]:
    """The layers of a side's head, all of which exist in PyTorch."""
    kind, weights = encoder.config[side].head, encoder.weights(f"{side}_head")
    if kind == "none":
        return []
    if kind == "center":
        mean = weights["mean"]
        return [HeadLayer("dense", np.eye(len(mean), dtype=np.float32), -mean)]
    if kind in ("linear", "affine"):
        return [HeadLayer("dense", weights["kernel"].T, weights.get("bias"))]
    layers, first = [], "input"
    if kind == "mlp":
        first = "input.linear"
        layers = [HeadLayer("norm", weights["input.scale"], weights["input.offset"])]
    for name in (first, *(f"layers.{i}" for i in range(len(encoder.config[side].hidden)))):
        bias = weights.get(f"{name}.bias")
        layers += [HeadLayer("dense", weights[f"{name}.kernel"].T, bias), HeadLayer("gelu")]
    return layers[:-1]


def tower_weights(encoder: Encoder, side: str) -> dict[str, np.ndarray]:
    """A tower's weights to export, under this package's names."""
    spec = encoder.specs[side]
    return spec.family.used_weights(spec, encoder.weights(f"{side}_tower"))


def describe(encoder: Encoder) -> dict:
    """The content of an exported config.json."""
    preprocessing = dataclasses.asdict(encoder.preprocessing)
    tokenizer: dict = {"kind": encoder.tokenizer.kind, "max_length": encoder.config.text.max_length}
    if prefix := getattr(encoder.tokenizer, "prefix", ""):
        tokenizer["prefix"] = prefix
    if padding := getattr(encoder.tokenizer, "padding", None):
        tokenizer["padding"] = padding._asdict()
    if languages := getattr(encoder.tokenizer, "languages", {}):
        tokenizer["languages"] = sorted(languages.values())
    return {
        "embedding_dim": encoder.config.embedding_dim,
        "logit_scale": encoder.scale,
        **{side: _side(encoder, side) for side in SIDES},
        "weights": encoder.digests(),
        "tokenizer": tokenizer,
        "preprocessing": {
            field: preprocessing[field]
            for field in ("size", "resize", "resample", "crop", "patch", "dtype")
        },
    }


def torch_weights(encoder: Encoder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All weights, with the names and shapes that the modules of `pytorch/` use.

    Args:
      encoder: the run's encoder.
      shapes: shapes of the PyTorch model's parameters and buffers, by name.

    Raises:
      ValueError: the encoder and the PyTorch model differ in a weight's name or shape.
    """
    renamed: dict[str, np.ndarray] = {}
    for side in SIDES:
        for name, value in tower_weights(encoder, side).items():
            prefix, stacked, suffix = name.partition(STACK)
            rows = enumerate(value) if stacked else ((None, value),)
            for layer, row in rows:
                ours = f"{prefix}layers.{layer}.{suffix}" if stacked else name
                theirs, fitted = _fitted(f"{side}_tower.{ours}", row, shapes)
                renamed[theirs] = fitted
        for index, layer in enumerate(head_layers(encoder, side)):
            for part in ("weight", "bias"):
                if (value := getattr(layer, part)) is not None:
                    renamed[f"{side}_head.{index}.{part}"] = value
    differing = {name for name in renamed if renamed[name].shape != shapes.get(name)}
    if differing := sorted(differing | (set(shapes) - set(renamed))):
        raise ValueError(f"weights do not fit the PyTorch model: {', '.join(differing[:5])} ...")
    return renamed


def _fitted(
    name: str, value: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, np.ndarray]:
    """A weight's name and layout in PyTorch: outputs, inputs, then positions in the kernel."""
    path, _, leaf = name.rpartition(".")
    if name in shapes:
        return name, value
    if leaf in ("kernel", "scale"):
        name = f"{path}.weight"
    elif leaf == "embedding":
        name = f"{name}.weight"
    if leaf == "kernel" and name in shapes:
        if value.ndim == 3 and len(shapes[name]) == 4:  # depthwise convolution
            value = value[..., None, :]
        value = np.moveaxis(value, (-1, -2), (0, 1)).reshape(shapes[name])
    return name, value


def _described_head(encoder: Encoder, side: str) -> list[list]:
    described: list[list] = []
    for layer in head_layers(encoder, side):
        if layer.kind == "norm":
            described.append(["norm", len(layer.weight)])
        elif layer.kind == "dense":
            dim, features = layer.weight.shape
            described.append(["dense", features, dim, layer.bias is not None])
        else:
            described.append([layer.kind])
    return described


def _side(encoder: Encoder, side: str) -> dict:
    spec = encoder.specs[side]
    tower = {"kind": spec.family.kind, **spec.family.torch_arguments(spec)}
    return {"tower": tower, "head": _described_head(encoder, side)}

"""Names of a stack's tensors in checkpoints: conversion to the parameters of a tower, and back."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Prefix of the names of a stack's parameters in a tower.
STACK = "layers.stacked."


class LayerNames(NamedTuple):
    """A checkpoint's names of the tensors in a stack of layers.

    Attributes:
      prefix: prefix of a layer's tensors, with `{}` for the layer's number.
      modules: our name of a dense layer or norm -> the checkpoint's modules that are concatenated
        to form it, such as query, key and value.
      vectors: our name of a parameter outside of these modules -> the checkpoint's name.
      widths: our name of a dense layer -> the widths of its modules, where these differ.
    """

    prefix: str
    modules: Mapping[str, tuple[str, ...]]
    vectors: Mapping[str, str] = {}
    widths: Mapping[str, tuple[int, ...]] = {}


def rename_layers(
    left: dict[str, np.ndarray], depth: int, names: LayerNames
) -> dict[str, np.ndarray]:
    """Converts the tensors of all layers to the stacked parameters of `Layers`.

    Args:
      left: a checkpoint's tensors; the converted ones are removed from it.
      depth: number of layers.
      names: the checkpoint's names.
    """
    renamed = {}
    prefixes = [names.prefix.format(layer) for layer in range(depth)]
    for ours, sources in names.modules.items():
        for suffix in ("weight", "bias"):
            wanted = [[f"{prefix}{source}.{suffix}" for source in sources] for prefix in prefixes]
            if not all(name in left for layer in wanted for name in layer):
                continue
            layers = [[left.pop(name).T for name in layer] for layer in wanted]
            ending = suffix
            if suffix == "weight":
                ending = "kernel" if layers[0][0].ndim == 2 else "scale"
            renamed[f"{STACK}{ours}.{ending}"] = np.stack(
                [np.concatenate(layer, axis=-1) for layer in layers]
            )
    for ours, theirs in names.vectors.items():
        wanted = [f"{prefix}{theirs}" for prefix in prefixes]
        if all(name in left for name in wanted):
            renamed[f"{STACK}{ours}"] = np.stack([left.pop(name) for name in wanted])
    return renamed


def restore_layers(left: dict[str, np.ndarray], names: LayerNames) -> dict[str, np.ndarray]:
    """The inverse of `rename_layers`.

    Args:
      left: a tower's weights; those of the stack are removed from it.
      names: the checkpoint's names.
    """
    restored = {}
    for ours, theirs in names.modules.items():
        ends = np.cumsum(names.widths[ours])[:-1] if ours in names.widths else len(theirs)
        for ending, suffix in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            for layer, value in enumerate(left.pop(f"{STACK}{ours}.{ending}", ())):
                parts = np.split(value, ends, axis=-1)
                for name, part in zip(theirs, parts, strict=True):
                    restored[f"{names.prefix.format(layer)}{name}.{suffix}"] = part.T
    for ours, theirs in names.vectors.items():
        for layer, value in enumerate(left.pop(f"{STACK}{ours}", ())):
            restored[f"{names.prefix.format(layer)}{theirs}"] = value
    return restored


def rename_modules(left: dict[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Converts dense layers, norms and patch convolutions outside of the stack to our names.

    The kernel of a patch convolution, [dim, 3, row, column], becomes a matrix
    [row * column * 3, dim] that is applied to flattened patches.

    Args:
      left: a checkpoint's tensors; the converted ones are removed from it.
      names: our name of a module -> the checkpoint's.
    """
    renamed = {}
    for ours, theirs in names.items():
        weight, bias = (left.pop(f"{theirs}.{suffix}", None) for suffix in ("weight", "bias"))
        if bias is not None:
            renamed[f"{ours}.bias"] = bias
        if weight is None:
            continue
        if weight.ndim == 4:
            weight = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
        renamed[f"{ours}.{'scale' if weight.ndim == 1 else 'kernel'}"] = weight.T
    return renamed


def restore_modules(left: dict[str, np.ndarray], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The inverse of `rename_modules`, except that convolutions stay matrices [dim, features].

    Args:
      left: a tower's weights; the converted ones are removed from it.
      names: our name of a module -> the checkpoint's.
    """
    restored = {}
    for ours, theirs in names.items():
        for ending, suffix in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if (value := left.pop(f"{ours}.{ending}", None)) is not None:
                restored[f"{theirs}.{suffix}"] = value.T
    return restored

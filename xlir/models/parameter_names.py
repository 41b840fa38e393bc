"""Names of parameters that have changed, so that runs of older versions can still be read.

A run holds parameters in two places: the safetensors files of its towers, and its checkpoints. A
checkpoint has trees of the parameters, of their moving average, and of the optimizer's moments.
"""

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any

# The version of the names; a renaming raises it by one. Records of checkpoints hold it from
# version 2 on.
VERSION = 2
# Module -> name of its part today -> name of that part in version 1.
_RENAMED = {"mlp": {"fc1": "inner", "fc2": "outer"}}
_TODAY = {module: {old: new for new, old in names.items()} for module, names in _RENAMED.items()}


def weights_of_today(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's weights by their names of today, from those of today or of version 1.

    Args:
      weights: by dotted path, such as `layers.stacked.mlp.inner.kernel`.
    """
    return {_renamed_path(name, _TODAY): value for name, value in weights.items()}


def weights_of(version: int, weights: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's weights, which have today's names, by the names of a version."""
    names = {} if version == VERSION else _RENAMED
    return {_renamed_path(name, names): value for name, value in weights.items()}


def tree_of_today(tree: PyTree, version: int) -> PyTree:
    """A checkpoint's tree, as it was saved with some version's names, with those of today."""
    return tree if version == VERSION else _renamed(tree, _TODAY)


def tree_of(version: int, tree: PyTree) -> PyTree:
    """The inverse of `tree_of_today`: today's tree with the names that a checkpoint has."""
    return tree if version == VERSION else _renamed(tree, _RENAMED)


def _renamed_path(name: str, names: Mapping[str, Mapping[str, str]]) -> str:
    """A dotted path, in which the parts of some modules have other names."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        parts[place] = names.get(parts[place - 1], {}).get(parts[place], parts[place])
    return ".".join(parts)


def _renamed(tree: PyTree, names: Mapping[str, Mapping[str, str]]) -> PyTree:
    """A tree of any containers, in which the parts of some modules have other names."""

    def holds_module(x: Any) -> bool:
        return isinstance(x, dict) and not names.keys().isdisjoint(x)

    def within(x: Any) -> Any:
        if not holds_module(x):
            return x
        return {key: part(key, value) for key, value in x.items()}

    def part(key: str, value: PyTree) -> PyTree:
        new = names.get(key, {})
        if not new:
            return _renamed(value, names)
        return {new.get(name, name): _renamed(x, names) for name, x in value.items()}

    return jax.tree.map(within, tree, is_leaf=holds_module)

"""Parameter names that changed between versions, so that older runs can still be loaded.

A run stores parameters in two places: the safetensors files of its towers, and its checkpoints. A
checkpoint holds trees of the parameters, of their moving average, and of the optimizer's moments.
"""

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any

# Version of the names; increase it with every renaming. Checkpoints record it since version 2.
VERSION = 2
# Module -> current name of a submodule -> its name in version 1.
_RENAMED = {"mlp": {"fc1": "inner", "fc2": "outer"}}
_TODAY = {module: {old: new for new, old in names.items()} for module, names in _RENAMED.items()}


def weights_of_today(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Renames a tower's weights to the current names.

    Args:
      weights: weights by dotted path, such as `layers.stacked.mlp.inner.kernel`, with the current
        names or those of version 1.
    """
    return {_renamed_path(name, _TODAY): value for name, value in weights.items()}


def weights_of(version: int, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Renames a tower's weights from the current names to those of a version."""
    names = {} if version == VERSION else _RENAMED
    return {_renamed_path(name, names): value for name, value in weights.items()}


def tree_of_today(tree: PyTree, version: int) -> PyTree:
    """Renames a checkpoint's tree from the names of a version to the current names."""
    return tree if version == VERSION else _renamed(tree, _TODAY)


def tree_of(version: int, tree: PyTree) -> PyTree:
    """Renames a tree from the current names to those of a version."""
    return tree if version == VERSION else _renamed(tree, _RENAMED)


def _renamed_path(name: str, names: Mapping[str, Mapping[str, str]]) -> str:
    """Renames submodules in a dotted path."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parts[i] = names.get(parts[i - 1], {}).get(parts[i], parts[i])
    return ".".join(parts)


def _renamed(tree: PyTree, names: Mapping[str, Mapping[str, str]]) -> PyTree:
    """Renames submodules in a tree of any containers."""

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

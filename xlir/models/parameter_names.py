"""Parameters that were renamed: files of runs that older versions wrote are still read.

Of towers these are safetensors files, of checkpoints whole trees: parameters, their moving average
and the optimizer's state, which holds a tree of the parameters' structure for each of its moments.
"""

from collections.abc import Mapping
from typing import Any

import jax

PyTree = Any

# Raised by one with each renaming. Checkpoints of version 1 do not say which they are of.
VERSION = 2
# Module -> names of its parts today -> those that they had in version 1.
_RENAMED = {"mlp": {"fc1": "inner", "fc2": "outer"}}
_TODAY = {module: {old: new for new, old in names.items()} for module, names in _RENAMED.items()}


def weights_of_today(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's weights by their names of today, from those of today or of version 1.

    Args:
      weights: by dotted path, such as `layers.stacked.mlp.inner.kernel`.
    """

    def renamed(name: str) -> str:
        parts = name.split(".")
        for place in range(1, len(parts)):
            parts[place] = _TODAY.get(parts[place - 1], {}).get(parts[place], parts[place])
        return ".".join(parts)

    return {renamed(name): value for name, value in weights.items()}


def tree_of_today(tree: PyTree, version: int) -> PyTree:
    """A checkpoint's tree, as it was saved with some version's names, with those of today."""
    return tree if version == VERSION else _renamed(tree, _TODAY)


def tree_of(version: int, tree: PyTree) -> PyTree:
    """The inverse of `tree_of_today`: today's tree with the names that a checkpoint has."""
    return tree if version == VERSION else _renamed(tree, _RENAMED)


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

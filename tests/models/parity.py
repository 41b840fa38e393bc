"""Comparing gradients of towers with those of PyTorch."""

from collections.abc import Mapping

import numpy as np


def become_gradients(theirs) -> None:
    """Sets each parameter of a PyTorch model to its gradient, or to 0 if it has none.

    The gradients can then be saved and renamed like weights.
    """
    import torch

    with torch.no_grad():
        for parameter in theirs.parameters():
            unused = torch.zeros_like(parameter)
            parameter.copy_(unused if parameter.grad is None else parameter.grad)


def assert_equal_gradients(
    name: str, computed: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    """Compares gradients relative to the largest element of each."""
    assert set(expected) == set(computed)
    differences = {
        name: np.abs(computed[name] - value).max() / np.abs(value).max()
        for name, value in expected.items()
    }
    print(f"{name}: largest relative difference {max(differences.values()):.1e}")
    assert max(differences.values()) <= 1e-4, differences

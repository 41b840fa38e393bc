"""A dual encoder for texts in many languages and images, in PyTorch: see `load`."""

from .encoder import DualEncoder, load

__all__ = ["DualEncoder", "load"]

"""A PyTorch dual encoder for images and texts in many languages; start with `load`."""

from .encoder import DualEncoder, load

__all__ = ["DualEncoder", "load"]

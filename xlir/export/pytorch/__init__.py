"""A PyTorch dual encoder for images and texts in many languages. `load` loads the model."""

from .encoder import DualEncoder, load

__all__ = ["DualEncoder", "load"]

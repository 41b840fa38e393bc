"""ONNX graphs, traced from the PyTorch modules."""

import logging
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import nn

from xlir.export.pytorch import DualEncoder
from xlir.export.pytorch.inputs import ImageReader

# Above this number of bytes, weights go into a separate file: a protocol buffer holds up to 2 GiB.
LARGE = 2**31 - 2**24
TEXT_AXES = {0: "batch", 1: "length"}


class _Side(nn.Module):
    """One side of the model; it returns the embeddings and the tower's features."""

    def __init__(self, model: DualEncoder, side: str):
        super().__init__()
        self.tower, self.head = getattr(model, f"{side}_tower"), getattr(model, f"{side}_head")

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.tower(*inputs)
        return nn.functional.normalize(self.head(features), dim=-1), features


class TextSide(_Side):
    """The text side; its mask is 0 for padding."""

    def forward(self, input_ids, attention_mask):
        """Maps ids and mask, int64 [batch, length], to [batch, dim] and [batch, features]."""
        return super().forward(input_ids, attention_mask != 0)


class ImageSide(_Side):
    """The image side, for the pixels of `ImageReader`."""

    def forward(self, pixels):
        """Maps a batch of pixels to [batch, dim] and [batch, features]."""
        return super().forward(pixels)


def write(
    config: Mapping, weights: Mapping[str, np.ndarray], folder: pathlib.Path, opset: int
) -> None:
    """Writes text.onnx and image.onnx.

    Args:
      config: the model's description from `architecture.describe`.
      weights: the weights from `architecture.torch_weights`.
      folder: the folder to write to.
      opset: the version of ONNX's operator set.
    """
    model = DualEncoder(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    blank = ImageReader(**config["preprocessing"])(Image.new("RGB", (64, 64)))
    # Two separate tensors: the exporter merges inputs that are the same object.
    ids, mask = torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    pixels = torch.from_numpy(np.stack([blank, blank]))
    text = {"input_ids": ids, "attention_mask": mask}
    _trace(TextSide(model, "text"), text, TEXT_AXES, folder / "text.onnx", opset)
    _trace(
        ImageSide(model, "image"), {"pixels": pixels}, {0: "batch"}, folder / "image.onnx", opset
    )


def _trace(
    module: nn.Module,
    inputs: dict[str, torch.Tensor],
    axes: Mapping[int, str],
    file: pathlib.Path,
    opset: int,
) -> None:
    dims = {axis: torch.export.Dim(name) for axis, name in axes.items()}
    # The exporter's messages are for authors of models, not for users of this command.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["embeddings", "features"],
            dynamic_shapes=dict.fromkeys(inputs, dims),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    graph.save(file, external_data=size > LARGE)

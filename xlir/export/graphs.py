"""ONNX graphs, traced from the PyTorch modules."""

import logging
import pathlib
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from xlir.export.pytorch import DualEncoder

# Weights of more bytes lie beside the graph: protocol buffers end at 2 GiB.
LARGE = 2**31 - 2**24
TEXT_AXES = {0: "batch", 1: "length"}


class _Side(nn.Module):
    """One side; the graph has the tower's features beside the embeddings."""

    def __init__(self, model: DualEncoder, side: str):
        super().__init__()
        self.tower, self.head = getattr(model, f"{side}_tower"), getattr(model, f"{side}_head")

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.tower(*inputs)
        return nn.functional.normalize(self.head(features), dim=-1), features


class TextSide(_Side):
    """Token ids and a mask, 0 where a row is padding."""

    def forward(self, input_ids, attention_mask):
        """int64 [batch, length] both, to [batch, dim] and [batch, features]."""
        return super().forward(input_ids, attention_mask != 0)


class ImageSide(_Side):
    """RGB pixels."""

    def forward(self, pixels):
        """uint8 [batch, size, size, 3] to [batch, dim] and [batch, features]."""
        return super().forward(pixels)


def write(
    config: Mapping, weights: Mapping[str, np.ndarray], folder: pathlib.Path, opset: int
) -> None:
    """Writes text.onnx and image.onnx.

    Args:
      config: as of `architecture.describe`.
      weights: as of `architecture.torch_weights`.
      folder: where they go.
      opset: version of the operators.
    """
    model = DualEncoder(config)
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    size = config["preprocessing"]["size"]
    # Two tensors: inputs that are the same object become one.
    ids, mask = torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
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
    # What it says is for those who write models, not for those who use them.
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

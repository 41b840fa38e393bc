"""The formats that use the model code in `pytorch/`: plain PyTorch, and ONNX traced from it."""

import json
import pathlib
import shutil

import numpy as np

from xlir.encoder import Encoder
from xlir.export import architecture
from xlir.models import pretrained

SOURCES = pathlib.Path(__file__).parent
# The name of the copy of `pytorch/` in an exported folder.
PACKAGE = "dual_encoder"
OPSET = 20


def write_torch(encoder: Encoder, folder: pathlib.Path) -> None:
    """Writes the modules' source code, weights, tokenizer, preprocessing and an example."""
    shutil.copytree(
        SOURCES / "pytorch", folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")
    )
    _, weights = _described(encoder, folder, "torch_folder.py")
    pretrained.save(weights, folder / "model.safetensors")


def write_onnx(encoder: Encoder, folder: pathlib.Path) -> None:
    """Writes one graph per side, tokenizer, preprocessing and an example without PyTorch."""
    from xlir.export import graphs

    config, weights = _described(encoder, folder, "onnx_folder.py")
    shutil.copy(SOURCES / "pytorch" / "inputs.py", folder)
    graphs.write(config, weights, folder, OPSET)


def _described(
    encoder: Encoder, folder: pathlib.Path, example: str
) -> tuple[dict, dict[str, np.ndarray]]:
    """Writes the files that both formats share; returns config.json's content and the weights."""
    import torch

    from xlir.export.pytorch import DualEncoder

    config = json.loads(json.dumps(architecture.describe(encoder)))
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf8")
    encoder.tokenizer.save_vocabulary(folder)
    shutil.copy(SOURCES / "examples" / example, folder / "example.py")
    with torch.device("meta"):
        state = DualEncoder(config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return config, architecture.torch_weights(encoder, shapes)

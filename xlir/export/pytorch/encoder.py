"""The dual encoder, which embeds raw texts and images."""

import json
import os
import pathlib

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from .convolutional import EfficientNet, ResNet
from .inputs import ImageReader, load_tokenizer, pad
from .muse import Muse
from .transformer import NaFlex, TextTransformer, ViT

TOWERS = {
    "transformer": TextTransformer,
    "muse": Muse,
    "vit": ViT,
    "naflex": NaFlex,
    "resnet": ResNet,
    "efficientnet": EfficientNet,
}
BATCH = 32


class DualEncoder(nn.Module):
    """Two towers with heads. Embeddings have unit length, so their dot products are cosines.

    Attributes:
      tokenizer: maps texts to lists of token ids.
      reader: maps an image to the pixels that the image tower takes.
      logit_scale: the inverse temperature that the model was trained with.
    """

    def __init__(self, config, tokenizer=None, reader=None):
        super().__init__()
        self.tokenizer, self.reader, self.dim = tokenizer, reader, config["embedding_dim"]
        self.logit_scale = config["logit_scale"]
        for side in ("text", "image"):
            tower = dict(config[side]["tower"])
            setattr(self, f"{side}_tower", TOWERS[tower.pop("kind")](**tower))
            setattr(self, f"{side}_head", head(config[side]["head"]))

    @torch.inference_mode()
    def encode_text(self, texts):
        """Embeddings, [texts, dim], of a list of strings."""
        if isinstance(texts, str):
            raise TypeError("encode_text takes a list of texts, not one string")
        batches = [torch.empty(0, self.dim, device=self.device)]
        for start in range(0, len(texts), BATCH):
            ids, mask = map(torch.from_numpy, pad(self.tokenizer(texts[start : start + BATCH])))
            batches.append(self.embed_text(ids.to(self.device), mask.to(self.device)))
        return torch.cat(batches)

    @torch.inference_mode()
    def encode_image(self, images):
        """Embeddings, [images, dim], of paths, encoded bytes, PIL images or the reader's pixels."""
        if isinstance(images, (str, bytes, os.PathLike)):
            raise TypeError("encode_image takes a list of images, not one")
        batches = [torch.empty(0, self.dim, device=self.device)]
        for start in range(0, len(images), BATCH):
            pixels = np.stack([self.reader(image) for image in images[start : start + BATCH]])
            batches.append(self.embed_image(torch.from_numpy(pixels).to(self.device)))
        return torch.cat(batches)

    def embed_text(self, ids, mask):
        """Embeddings of token ids, int [batch, length]; the bool mask is False for padding."""
        return unit(self.text_head(self.text_tower(ids, mask)))

    def embed_image(self, pixels):
        """Embeddings of a batch of the reader's pixels."""
        return unit(self.image_head(self.image_tower(pixels)))

    @property
    def device(self):
        """The device of the parameters."""
        return next(self.parameters()).device


def head(layers):
    """The head that maps a tower's output to embeddings, built from its entry in config.json."""
    modules = []
    for name, *arguments in layers:
        if name == "norm":
            modules.append(nn.LayerNorm(*arguments))
        elif name == "dense":
            features, dim, bias = arguments
            modules.append(nn.Linear(features, dim, bias=bias))
        else:
            modules.append({"gelu": nn.GELU}[name]())
    return nn.Sequential(*modules)


def unit(x):
    """The rows in float32, divided by their L2 norms."""
    return F.normalize(x.float(), dim=-1)


def load(folder):
    """Loads the model of an exported folder for inference."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    tokenizer = load_tokenizer(folder, **config["tokenizer"])
    model = DualEncoder(config, tokenizer, ImageReader(**config["preprocessing"]))
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return model.eval()

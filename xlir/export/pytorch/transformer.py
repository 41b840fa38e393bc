"""Text transformers (BERT, XLM-R, CLIP ...) and vision transformers (ViT, CLIP, DINO, SigLIP).

The exported weights fold constants in: a text's position table includes the token-type embedding
and XLM-R's position offset, and a class token includes its position embedding.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .layers import ACTIVATIONS, FeedForward, Layer, head_width, norm_layer, split

DENSE_ACTIVATIONS = {"tanh": torch.tanh, "identity": lambda x: x}


class TextTransformer(nn.Module):
    """Maps token ids to one vector per text.

    Pooling is "mean", "cls", "pooler" (a dense layer and tanh on the class token), "eos" (the first
    token with `eos_id`, or that with the highest id if `eos_id` is None) or "last" (a dense layer
    on the last token); the `dense` layers follow. If the config has a `pad_id`, that token gets no
    position embedding and is not counted in the positions of later tokens.
    """

    def __init__(self, config, pooling, dense):
        super().__init__()
        stack = config["transformer"]
        width = stack["width"]
        self.embedding = nn.Embedding(config["vocab_size"], width)
        self.scale, first = config["embedding_scale"], config["first_position"]
        self.thetas, self.angles = config["rope_thetas"], head_width(stack) // 2
        if self.thetas:
            self.position = None
        elif first is None:
            self.position = nn.Parameter(torch.zeros(config["max_length"], width))
        else:
            table = sinusoids(first, config["max_length"], width)
            self.register_buffer("position", table, persistent=False)
        before = config["input_norm"] or not stack["pre_norm"]
        self.embedding_norm = norm_layer(stack, width) if before else None
        self.layers = nn.ModuleList(Layer(stack, layer) for layer in range(stack["depth"]))
        self.norm = norm_layer(stack, width) if stack["pre_norm"] else None
        self.pooler = nn.Linear(width, width) if pooling == "pooler" else None
        head_dim = config["head_dim"] if pooling == "last" else None
        self.head = nn.Linear(width, head_dim) if head_dim else None
        self.dense = nn.ModuleList(Dense(**layer) for layer in dense)
        self.pooling, self.pad, self.eos = pooling, config["pad_id"], config["eos_id"]

    def forward(self, ids, mask):
        """Maps ids and mask, [batch, length], to [batch, dim]."""
        x = self.embedding(ids) * self.scale
        x = x if self.thetas else x + self.positions(ids)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        rotary = [self.position_angles(ids, theta) for theta in self.thetas] or [None]
        for layer in self.layers:
            x = layer(x, mask, rotary[-1 if layer.local else 0])
        x = x if self.norm is None else self.norm(x)
        x = self.pool(x, ids, mask)
        for layer in self.dense:
            x = layer(x)
        return x

    def positions(self, ids):
        """Rows of the position table, [length, width] or [batch, length, width]."""
        if self.pad is None:
            return self.position[: ids.shape[1]]
        counted = ids != self.pad
        rows = self.position[(counted.cumsum(1) - 1).clamp(min=0)]
        return rows * counted[..., None].to(rows.dtype)

    def position_angles(self, ids, theta):
        """Rotary angles, [length, head width / 2], of the tokens."""
        exponents = torch.arange(self.angles, device=ids.device) / self.angles
        return torch.arange(ids.shape[1], device=ids.device)[:, None] / theta**exponents

    def pool(self, x, ids, mask):
        """[batch, length, width] to [batch, dim]."""
        if self.pooling == "mean":
            weight = mask[..., None].to(x.dtype)
            return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.pooling == "eos":
            score = ids if self.eos is None else ids == self.eos
            x = token(x, torch.where(mask, score.to(torch.int32), -1).argmax(1))
        elif self.pooling == "last":
            x = token(x, (mask.sum(1) - 1).clamp(min=0))
        else:
            x = x[:, 0]
        x = x if self.head is None else self.head(x)
        return x if self.pooler is None else torch.tanh(self.pooler(x))


def sinusoids(first, count, width):
    """Fixed position embeddings, [count, width], of tokens that are numbered from `first`."""
    half = width // 2
    periods = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(first, first + count)[:, None] * periods
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class Dense(nn.Linear):
    """A dense layer with its activation."""

    def __init__(self, features, dim, bias, activation):
        super().__init__(features, dim, bias=bias)
        self.activation = (ACTIVATIONS | DENSE_ACTIVATIONS)[activation]

    def forward(self, x):
        """[..., features] to [..., dim]."""
        return self.activation(super().forward(x))


class ViT(nn.Module):
    """Maps pixels to one vector; pooling is "cls", "pooler", "attention" (SigLIP) or "mean"."""

    def __init__(self, config, pooling, mean, std):
        super().__init__()
        stack = config["transformer"]
        width, norm = stack["width"], functools.partial(nn.LayerNorm, eps=stack["epsilon"])
        self.patch, self.registers = config["patch_size"], None
        self.side, self.pooling = config["image_size"] // self.patch, pooling
        self.patches = nn.Linear(3 * self.patch**2, width, bias=config["patch_bias"])
        self.theta, self.angles = config["rope_theta"], head_width(stack) // 2
        table = self.theta is None
        self.position = nn.Parameter(torch.zeros(self.side**2, width)) if table else None
        self.class_token = nn.Parameter(torch.zeros(width)) if config["class_token"] else None
        if config["registers"]:
            self.registers = nn.Parameter(torch.zeros(config["registers"], width))
        self.input_norm = norm(width) if config["input_norm"] else None
        self.layers = nn.ModuleList(Layer(stack, layer) for layer in range(stack["depth"]))
        self.norm = norm(width)
        self.pooler = nn.Linear(width, width) if pooling == "pooler" else None
        self.attention_pool = AttentionPool(stack) if pooling == "attention" else None
        self.normalize = Normalize(mean, std)

    def forward(self, pixels):
        """Pixels, [batch, size, size, 3], to [batch, width]."""
        side, patch = self.side, self.patch
        x = self.normalize(pixels)[:, : side * patch, : side * patch]
        x = x.reshape(-1, side, patch, side, patch, 3).transpose(2, 3)
        x = self.patches(x.reshape(-1, side**2, 3 * patch**2))
        x = x if self.position is None else x + self.position
        tokens = [] if self.class_token is None else [self.class_token[None]]
        tokens += [] if self.registers is None else [self.registers]
        if tokens:
            tokens = torch.cat(tokens)
            x = torch.cat([tokens.expand(x.shape[0], -1, -1), x], dim=1)
        x = x if self.input_norm is None else self.input_norm(x)
        rotary = None if self.theta is None else self.patch_angles(x)
        for layer in self.layers:
            x = layer(x, rotary=rotary)
        x = self.norm(x)
        if self.attention_pool is not None:
            return self.attention_pool(x)
        if self.pooling == "mean":
            return x[:, -(side**2) :].mean(1)
        return x[:, 0] if self.pooler is None else torch.tanh(self.pooler(x[:, 0]))

    def patch_angles(self, x):
        """Rotary angles, [length, head width / 2], of the patches' rows and columns (DINOv3)."""
        index, side = functools.partial(torch.arange, device=x.device), self.side
        periods = self.theta ** (index(self.angles // 2) * 2 / self.angles)
        angles = 2 * math.pi * ((index(side)[:, None] + 0.5) * 2 / side - 1) / periods
        grid = [axis.expand(side, side, -1) for axis in (angles[:, None], angles[None])]
        patches = torch.cat(grid, dim=-1).flatten(0, 1)
        # The tokens before the patches are not rotated.
        return F.pad(patches, (0, 0, x.shape[1] - side**2, 0))


class NaFlex(ViT):
    """SigLIP 2's NaFlex: maps patches of images in their own proportions to one vector."""

    def forward(self, packed):
        """uint8 [batch, patches + 1, values], from `ImageReader.packed`, to [batch, width]."""
        header = packed[:, -1, :4].long()
        rows, columns = (256 * header[:, i] + header[:, i + 1] for i in (0, 2))
        rows, columns = rows[:, None], columns[:, None]
        index = torch.arange(packed.shape[1] - 1, device=packed.device)
        mask = index < rows * columns
        index = torch.where(mask, index, 0)
        down = bilinear_weights(index // columns, rows, self.side)
        across = bilinear_weights(index % columns, columns, self.side)
        weights = (down[..., :, None] * across[..., None, :]).flatten(2).to(self.position.dtype)
        pixels = self.normalize(packed[:, :-1].unflatten(-1, (-1, 3))).flatten(2)
        x = self.patches(pixels) + weights @ self.position
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)
        if self.attention_pool is not None:
            return self.attention_pool(x, mask)
        kept = mask[..., None].to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)


class AttentionPool(nn.Module):
    """SigLIP's pooling: one learned query attends to all patches, then a feed-forward block."""

    def __init__(self, config):
        super().__init__()
        width = config["width"]
        self.probe = nn.Parameter(torch.zeros(width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config["epsilon"])
        self.mlp = FeedForward(config)
        self.heads = config["num_heads"]

    def forward(self, x, mask=None):
        """[batch, length, width] to [batch, width]; tokens whose mask is False are left out."""
        mask = None if mask is None else mask[:, None, None, :]
        query = split(self.query(self.probe).expand(x.shape[0], 1, -1), self.heads)
        key, value = (split(part, self.heads) for part in self.key_value(x).chunk(2, dim=-1))
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.output(x.transpose(1, 2).flatten(2)[:, 0])
        return x + self.mlp(self.norm(x))


class Normalize(nn.Module):
    """Normalises pixels from 0 to 255 with the mean and deviation that a tower was trained with."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, pixels):
        """Maps pixels to the model's dtype; the last axis is red, green, blue."""
        return ((pixels.float() / 255 - self.mean) / self.std).to(self.mean.dtype)


def token(x, index):
    """One token of each text: [batch, length, width] and int64 [batch] to [batch, width]."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2]))[:, 0]


def bilinear_weights(index, new, old):
    """The weights, [batch, places, old], of `old` samples in the new ones at `index`.

    This is PyTorch's bilinear interpolation with antialiasing; `new`, [batch, 1], is the number of
    new samples.
    """
    scale = (old / new)[..., None]
    center = (index[..., None] + 0.5) * scale - 0.5
    distance = (torch.arange(old, device=index.device) - center).abs() / scale.clamp(min=1)
    weights = F.relu(1 - distance)
    return weights / weights.sum(-1, keepdim=True)

"""The layers that text and vision transformers share."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
}


class Layer(nn.Module):
    """Attention and a feed-forward block, each with a residual connection and norms.

    Attributes:
      local: tokens attend only to the tokens near them.
    """

    def __init__(self, config, number):
        super().__init__()
        width = config["width"]
        self.pre_norm = config["pre_norm"]
        # Where the norm is left out, its unused weights are still in the file.
        self.normed = config["first_norm"] or number > 0
        self.local = bool(config["local"]) and config["local"][number]
        self.attention = Attention(config, config["window"] if self.local else None)
        self.attention_norm = norm_layer(config, width)
        self.mlp = FeedForward(config)
        self.mlp_norm = norm_layer(config, width)
        outputs = config["output_norms"]
        self.attention_output_norm = norm_layer(config, width) if outputs else None
        self.mlp_output_norm = norm_layer(config, width) if outputs else None
        scale = config["layer_scale"]
        self.attention_scale = nn.Parameter(torch.ones(width)) if scale else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if scale else None

    def forward(self, x, mask=None, rotary=None):
        """[batch, length, width] to the same shape."""
        y = self.attention_norm(x) if self.pre_norm and self.normed else x
        y = self.attention(y, mask, rotary)
        y = y if self.attention_output_norm is None else self.attention_output_norm(y)
        y = y if self.attention_scale is None else y * self.attention_scale
        x = x + y if self.pre_norm else self.attention_norm(x + y)
        y = self.mlp(self.mlp_norm(x) if self.pre_norm else x)
        y = y if self.mlp_output_norm is None else self.mlp_output_norm(y)
        y = y if self.mlp_scale is None else y * self.mlp_scale
        return x + y if self.pre_norm else self.mlp_norm(x + y)


class Attention(nn.Module):
    """Multi-head self-attention; positions whose mask is False are not attended to.

    With a `window`, tokens attend only to tokens that are at most this far away.
    """

    def __init__(self, config, window):
        super().__init__()
        width, dim, self.heads = config["width"], head_width(config), config["num_heads"]
        self.kv_heads = config["num_kv_heads"] or self.heads
        shared = self.kv_heads * dim
        self.widths = {"query": self.heads * dim, "key": shared, "value": shared}
        self.qkv = nn.Linear(width, sum(self.widths.values()), bias=config["qkv_bias"])
        self.output = nn.Linear(self.heads * dim, width, bias=config["output_bias"])
        self.part_biases = config["part_biases"]
        for part in self.part_biases:
            bias = nn.Parameter(torch.zeros(self.widths[part]))
            self.register_parameter(f"{part}_bias", bias)
        self.query_norm = norm_layer(config, dim) if config["qk_norms"] else None
        self.key_norm = norm_layer(config, dim) if config["qk_norms"] else None
        self.scale = config["query_scale"]
        self.causal, self.window = config["causal"], window

    def forward(self, x, mask=None, rotary=None):
        """[batch, length, width] to the same shape."""
        sections = self.qkv(x).split(list(self.widths.values()), dim=-1)
        parts = dict(zip(self.widths, sections, strict=True))
        for part in self.part_biases:
            parts[part] = parts[part] + getattr(self, f"{part}_bias")
        query = split(parts["query"], self.heads)
        key, value = (split(parts[part], self.kv_heads) for part in ("key", "value"))
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotated(query, rotary), rotated(key, rotary)
        if self.kv_heads < self.heads:
            shared = self.heads // self.kv_heads
            key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        mask = self.seen(x, mask)
        x = F.scaled_dot_product_attention(query * self.scale, key, value, attn_mask=mask)
        return self.output(x.transpose(1, 2).flatten(2))

    def seen(self, x, mask):
        """Which tokens each token attends to, [batch or 1, 1, length or 1, length]; None: all."""
        mask = None if mask is None else mask[:, None, None, :]
        if not self.causal and self.window is None:
            return mask
        position = torch.arange(x.shape[1], device=x.device)
        distance = position[:, None] - position
        near = distance >= 0 if self.causal else distance.abs() <= self.window
        seen = near if mask is None else mask & near
        # Padding that is far from the text attends to itself: the softmax of nothing is NaN.
        return seen | (distance == 0)


class FeedForward(nn.Module):
    """Dense layer, activation, dense layer; if gated, the first layer also computes the gate."""

    def __init__(self, config):
        super().__init__()
        width, mlp_dim, self.gated = config["width"], config["mlp_dim"], config["gated"]
        bias = config["mlp_bias"]
        self.fc1 = nn.Linear(width, 2 * mlp_dim if self.gated else mlp_dim, bias=bias)
        self.fc2 = nn.Linear(mlp_dim, width, bias=bias)
        self.activation = ACTIVATIONS[config["activation"]]

    def forward(self, x):
        """[..., width] to the same shape."""
        if not self.gated:
            return self.fc2(self.activation(self.fc1(x)))
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.activation(gate) * x)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis, in float32, and scales."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x):
        """[..., width] to the same shape."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight).to(x.dtype)


def norm_layer(config, width):
    """A norm of the kind that a stack's config names."""
    if config["rms_norm"]:
        return RMSNorm(width, config["epsilon"])
    return nn.LayerNorm(width, config["epsilon"], bias=config["norm_bias"])


def head_width(config):
    """Width of an attention head of a stack."""
    return config["head_dim"] or config["width"] // config["num_heads"]


def split(x, heads):
    """[batch, length, width] to [batch, heads, length, width / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotated(x, angles):
    """Rotates dimensions i and i + dim / 2 of [batch, heads, length, dim] by each token's angles.

    The angles are float32 [length, dim / 2], in radians (Su et al. 2021, rotary positions).
    """
    cosines, sines = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1)

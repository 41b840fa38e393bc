"""mUSE, the multilingual Universal Sentence Encoder, version 3 (Yang et al. 2019)."""

import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-12


class Muse(nn.Module):
    """A deep averaging network over token embeddings and the outputs of three n-gram CNNs.

    Each branch is given as [n-gram order, tokens left of the centre]. The 8-bit embedding table
    has a scale and an offset for each of its `chunks`; row i belongs to chunk i modulo `chunks`.
    """

    def __init__(self, vocabulary, width, branch, branches, chunks, hidden, dim):
        super().__init__()
        joint = branch * len(branches)
        self.embedding = QuantizedEmbedding(vocabulary, width, chunks)
        self.projection = nn.Linear(width, joint)
        self.projection_norm = nn.LayerNorm(joint, EPSILON)
        self.branches = nn.ModuleList(NGramBranch(branch, *shape) for shape in branches)
        self.norm = nn.LayerNorm(width + joint, EPSILON)
        self.pool = nn.Linear(width + joint, width)
        self.hidden = ResidualBlock(width, hidden, hidden, F.relu)
        self.output = ResidualBlock(hidden, width, dim, torch.tanh)

    def forward(self, ids, mask):
        """Maps ids and mask, [batch, length], to [batch, dim], rows of unit length."""
        embedded, keep = self.embedding(ids), mask[..., None]
        parts = self.projection_norm(self.projection(embedded)).chunk(len(self.branches), dim=-1)
        grams = [branch(x, keep) for branch, x in zip(self.branches, parts, strict=True)]
        features = self.norm(torch.cat([embedded, *grams], dim=-1))
        # Pooling: the sum over tokens, divided by the square root of their number.
        length = keep.sum(1).to(features.dtype)
        mean = torch.where(keep, features, 0).sum(1) / length.clamp(min=1)
        x = self.output(self.hidden(self.pool(mean) * length.sqrt()))
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True).clamp(min=EPSILON))


class QuantizedEmbedding(nn.Module):
    """An embedding table that stays 8-bit in memory."""

    def __init__(self, rows, width, chunks):
        super().__init__()
        self.register_buffer("table", torch.zeros(rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(chunks))
        self.register_buffer("offset", torch.zeros(chunks))

    def forward(self, ids):
        """Maps [batch, length] to [batch, length, width]."""
        chunk = ids % len(self.scale)
        rows = self.table[ids].to(self.scale.dtype)
        return rows * self.scale[chunk, None] + self.offset[chunk, None]


class NGramBranch(nn.Module):
    """Two residual convolutions over `order` tokens, with zeros beyond a text's ends."""

    def __init__(self, dim, order, left):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, dim, order) for _ in range(2))
        self.padding = (left, order - 1 - left)

    def forward(self, x, keep):
        """Maps [batch, length, dim] to the same shape."""
        for convolution in self.convolutions:
            masked = torch.where(keep, x, 0).transpose(1, 2)
            x = x + F.relu(convolution(F.pad(masked, self.padding))).transpose(1, 2)
        return x


class ResidualBlock(nn.Module):
    """`activation(shortcut(x) + outer(relu(inner(x))))`."""

    def __init__(self, features, hidden, dim, activation):
        super().__init__()
        self.inner = nn.Linear(features, hidden, bias=False)
        self.outer = nn.Linear(hidden, dim, bias=False)
        self.shortcut = nn.Linear(features, dim, bias=False)
        self.activation = activation

    def forward(self, x):
        """Maps [batch, features] to [batch, dim]."""
        return self.activation(self.shortcut(x) + self.outer(F.relu(self.inner(x))))

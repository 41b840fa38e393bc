"""The text tower around the layers: maps token ids to one pooled vector."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from xlir.models.layers import Linear, dropout
from xlir.models.transformer import ACTIVATIONS, Layers, TransformerConfig, dense_layer
from xlir.partition import split_rows

# Activations of the dense layers that a sentence-transformers model has after the pooling.
DENSE_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh, "identity": lambda x: x}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A text tower.

    Attributes:
      transformer: the stack of layers.
      vocab_size: rows of the embedding table.
      max_length: rows of the position table: the longest text, in tokens.
      pad_id: the padding token's id, if positions depend on it as in RoBERTa: they start at
        `pad_id + 1` and count only tokens that are not padding. None for all other models.
      eos_id: the token at whose first occurrence "eos" pooling reads a text's features. None: the
        token with the highest id.
      head_dim: width of the dense layer after "last" pooling (SigLIP). None: there is none.
      embedding_scale: factor on the embeddings of tokens.
      first_position: number of the first token, if the position embeddings are `sinusoids`, which
        are not trained. None: they are a learned table.
      rope_thetas: instead of position embeddings, rotary positions with these bases: one for all
        layers, or one for layers that are not local and one for local layers. Empty: no rotation.
      input_norm: a pre-norm stack has a norm before the layers too (ModernBERT).
    """

    transformer: TransformerConfig
    vocab_size: int
    max_length: int
    pad_id: int | None = None
    eos_id: int | None = None
    head_dim: int | None = None
    embedding_scale: float = 1.0
    first_position: int | None = None
    rope_thetas: tuple[float, ...] = ()
    input_norm: bool = False

    @property
    def position_offset(self) -> int:
        """Number of unused rows at the start of the published position table."""
        return 0 if self.pad_id is None else self.pad_id + 1


class TextTransformer(nnx.Module):
    """Token ids to one pooled vector.

    A norm comes before a post-norm stack (BERT) and after a pre-norm stack (CLIP). Dropout is
    applied as in BERT. DistilBERT itself has no dropout after the attention.

    When weights are loaded, the embedding of token type 0 is added to the position table, and
    RoBERTa's unused first positions are removed from it. If a text itself contains RoBERTa's
    padding token, that token is not counted as a position. It always has the position embedding in
    row `pad_id` of the published table, and loading adds that row to the token's embedding.

    Args:
      config: widths, tables and positions.
      pooling: "mean" over the tokens, "cls" (the first token), "pooler" (the checkpoint's own dense
        layer and tanh over the first token), "eos" (the token that `config.eos_id` describes, or
        the first token if there is none), or "last" (the last token, and `config.head_dim`).
      dense: layers after the pooling, as `sentence_modules.read` describes them.
      dtype: the dtype of the layers (see `Layers`); results are float32.
      remat: see `Layers`.
      rngs: keys for the initial parameters.

    Attributes:
      dim: width of the output.
      max_length: the longest text, in tokens.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        pooling: str = "mean",
        dense: Sequence[Mapping] = (),
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        normal, stack = nnx.initializers.normal(0.02), config.transformer
        width = stack.width
        self.pooling, self.dropout = pooling, stack.dropout
        self.pad_id, self.eos_id = config.pad_id, config.eos_id
        self.max_length = config.max_length
        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, width)))
        self.embedding_scale, self.first_position = config.embedding_scale, config.first_position
        self.rope_thetas, self.head_width = config.rope_thetas, stack.head_width
        learned = self.first_position is None and not self.rope_thetas
        shape = (self.max_length, width)
        self.position = nnx.Param(normal(rngs.params(), shape)) if learned else None
        before = config.input_norm or not stack.pre_norm
        self.embedding_norm = stack.norm(width) if before else None
        self.layers = Layers(stack, dtype=dtype, remat=remat, rngs=rngs)
        self.norm = stack.norm(width) if stack.pre_norm else None
        pooler = pooling == "pooler"
        self.pooler = dense_layer(width, width, dtype=dtype, rngs=rngs) if pooler else None
        head_dim = config.head_dim if pooling == "last" else None
        self.head = dense_layer(width, head_dim, dtype=dtype, rngs=rngs) if head_dim else None
        # None instead of an empty list keeps the parameter tree of older checkpoints.
        self.dense = (
            nnx.List([Dense(**x, dtype=dtype, rngs=rngs) for x in dense]) if dense else None
        )
        self.dim = dense[-1]["dim"] if dense else head_dim or width

    def __call__(
        self,
        text_ids: Int32[Array, "batch length"],
        text_mask: Bool[Array, "batch length"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Encodes texts that are padded on the right.

        Args:
          text_ids: token ids; their values have no effect where the mask is False.
          text_mask: False where a row is padding.
          rngs: turns dropout on.

        Raises:
          ValueError: the texts are longer than the position table.
        """
        self._check_length(text_ids.shape[1])
        x = self._encode(text_ids, text_mask, None, rngs)
        if self.pooling == "mean":
            mask = text_mask[..., None]
            x = jnp.sum(x, axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        else:
            x = _tokens(x, self._pooled_token(text_ids, text_mask)[:, None])[:, 0]
        return self._finish(x)

    def encode_packed(
        self,
        text_ids: Int32[Array, "groups rows length"],
        text_positions: Int32[Array, "groups rows length"],
        text_starts: Int32[Array, "groups texts"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Encodes texts that share rows (`input_pipeline.packing`), group after group.

        The result is that of the texts in rows of their own; only dropout draws other masks. A
        token attends to the tokens of its own text. A group's tokens stay on its device.

        Args:
          text_ids: token ids. A row may be longer than the position table.
          text_positions: a token's position in its text; 0 at the padding, which is thereby a text
            of its own for every token.
          text_starts: the first token of each text, counted through the rows of its group.
          rngs: turns dropout on.
        """
        groups, rows, length = text_ids.shape
        ids, positions = (x.reshape(groups * rows, length) for x in (text_ids, text_positions))
        numbers = jnp.cumsum(positions == 0, axis=1)  # of a token's text in its row
        same = numbers[:, :, None] == numbers[:, None]
        x = self._encode(ids, same, positions, rngs)
        if self.pooling == "mean":
            # The mean over its text, at every token.
            count = jnp.sum(same, axis=2)[..., None]
            mean = functools.partial(jnp.einsum, "rqk,rkw->rqw", precision="highest")
            x, tokens = mean(same.astype(x.dtype), x) / count, text_starts
        else:
            tokens = text_starts + self._pooled_packed(text_ids, text_positions, text_starts)
        x = _tokens(x.reshape(groups, rows * length, -1), tokens)
        return self._finish(split_rows(x.reshape(-1, x.shape[-1])))

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"texts have {length} tokens, but this tower takes at most {self.max_length}"
            )

    def _encode(
        self,
        text_ids: Int32[Array, "batch length"],
        mask: Bool[Array, "batch length"] | Bool[Array, "batch length length"],
        positions: Int32[Array, "batch length"] | None,
        rngs: nnx.Rngs | None,
    ) -> Float[Array, "batch length width"]:
        """The tokens' final states. `positions` is None if each row is one text."""
        x = split_rows(self.embedding[...][text_ids]) * self.embedding_scale
        x = x if self.rope_thetas else x + self._positions(text_ids, positions)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        key = None if rngs is None else rngs.dropout()
        if key is not None:
            key, embedding_key = jax.random.split(key)
            x = dropout(x.reshape(-1, x.shape[-1]), self.dropout, embedding_key).reshape(x.shape)
        rotary = None
        if self.rope_thetas:
            rotary = position_angles(text_ids.shape[1], self.head_width // 2, self.rope_thetas)
            rotary = rotary if positions is None else jnp.asarray(rotary)[:, positions]
        x = self.layers(x, mask, rotary=rotary, key=key)
        return x if self.norm is None else self.norm(x)

    def _positions(
        self,
        text_ids: Int32[Array, "batch length"],
        positions: Int32[Array, "batch length"] | None,
    ) -> Float[Array, "... length dim"]:
        """Position embeddings of the tokens. RoBERTa counts only tokens that are not padding."""
        length = text_ids.shape[1]
        if self.position is None:
            width = self.embedding.shape[-1]
            table = jnp.asarray(sinusoids(self.first_position, self.max_length, width))
        else:
            table = self.position[...]
        if self.pad_id is None:
            return table[:length] if positions is None else split_rows(table[positions])
        counted = text_ids != self.pad_id
        rows = jnp.cumsum(counted, axis=1) - 1
        if positions is not None:
            starts = jnp.arange(length) - positions
            rows -= jnp.take_along_axis(rows + 1 - counted, starts, axis=1)
        rows = jnp.where(counted, rows, self.max_length)
        return split_rows(table.at[rows].get(mode="fill", fill_value=0))

    def _pooled_token(
        self, text_ids: Int32[Array, "batch length"], text_mask: Bool[Array, "batch length"]
    ) -> Int32[Array, " batch"]:
        """The token of each text that becomes its features, unless they are the mean."""
        if self.pooling == "eos":
            score = text_ids if self.eos_id is None else text_ids == self.eos_id
            return jnp.argmax(jnp.where(text_mask, score, -1), axis=1)
        if self.pooling == "last":
            return jnp.maximum(jnp.sum(text_mask, axis=1) - 1, 0)
        return jnp.zeros(len(text_ids), jnp.int32)

    def _pooled_packed(
        self,
        text_ids: Int32[Array, "groups rows length"],
        text_positions: Int32[Array, "groups rows length"],
        text_starts: Int32[Array, "groups texts"],
    ) -> Int32[Array, "groups texts"]:
        """`_pooled_token` of packed texts: their ids, but no activations, are unpacked."""
        offsets = jnp.arange(text_ids.shape[2])
        places = (text_starts[..., None] + offsets).reshape(len(text_starts), -1)

        def unpacked(x: Array) -> Array:
            x = x.reshape(len(x), -1)
            # Beyond the last row there is no token; the position -1 is then in no text.
            x = jnp.take_along_axis(x, places, axis=1, mode="fill", fill_value=-1)
            return x.reshape(-1, len(offsets))

        tokens = self._pooled_token(unpacked(text_ids), unpacked(text_positions) == offsets)
        return tokens.reshape(text_starts.shape)

    def _finish(self, x: Float[Array, "batch width"]) -> Float[Array, "batch dim"]:
        """The layers after the pooling."""
        x = x if self.head is None else self.head(x)
        x = x if self.pooler is None else jnp.tanh(self.pooler(x))
        for layer in self.dense or ():
            x = layer(x)
        return x


def sinusoids(first: int, count: int, width: int) -> Float[np.ndarray, "count width"]:
    """Position embeddings of Vaswani et al. 2017, in the form of fairseq and tensor2tensor.

    The first half of the dimensions are sines and the second half cosines; the wavelengths of both
    form a geometric progression from 2 pi to 20,000 pi tokens.

    Args:
      first: number of the first token.
      count: number of tokens.
      width: number of dimensions, at least 4. If it is odd, the last dimension is 0.
    """
    half = width // 2
    steps = np.arange(half, dtype=np.float32) * -np.float32(np.log(10_000) / (half - 1))
    angles = np.arange(first, first + count, dtype=np.float32)[:, None] * np.exp(steps)
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2)))


def position_angles(
    length: int, angles: int, thetas: Sequence[float]
) -> Float[np.ndarray, "kinds length angles"]:
    """The rotary angles of a text's tokens, in radians (Su et al. 2021).

    Angle i of token n is n / theta^(i / angles): https://arxiv.org/abs/2104.09864.

    Args:
      length: number of tokens.
      angles: number of angles of a token: half the width of a head.
      thetas: the base of each kind of layers.
    """
    exponents = np.arange(angles, dtype=np.float32) / np.float32(angles)
    frequencies = 1 / np.array(thetas, np.float32)[:, None] ** exponents
    return np.arange(length, dtype=np.float32)[:, None] * frequencies[:, None]


def _tokens(
    x: Float[Array, "batch length width"], tokens: Int32[Array, "batch texts"]
) -> Float[Array, "batch texts width"]:
    """Some tokens of each row, by their indices."""
    return jnp.take_along_axis(x, tokens[..., None], axis=1)


class Dense(Linear):
    """A sentence-transformers `Dense` module: a dense layer and an activation."""

    def __init__(
        self,
        features: int,
        dim: int,
        bias: bool,
        activation: str,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, dim, use_bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "rows features"]) -> Float[Array, "rows dim"]:
        """Applies the layer, then the activation."""
        return DENSE_ACTIVATIONS[self.activation](super().__call__(x))

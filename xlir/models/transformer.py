"""Transformer encoders: the stack of layers that text and image towers share, and BERT's kind.

Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762); BERT, Devlin et al. 2019
(https://arxiv.org/abs/1810.04805); XLM-R, Conneau et al. 2020 (https://arxiv.org/abs/1911.02116).

Activations are [batch * length, hidden] outside of the attention: on CPUs that is a third faster
than [batch, length, hidden], elsewhere it is the same. The layers' parameters are stacked along a
first axis and applied by a scan, which compiles one layer and not all of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, Key

from xlir.config import MOST_DROPPED, WIDEST, Choice, Divisor, Real, Whole, read_field
from xlir.models.layers import LayerNorm, Linear, dropout
from xlir.partition import split_rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# What numbers of a config.json may be.
WIDTH, RATE, EPSILON = Whole(1, WIDEST), Real(0, MOST_DROPPED), Real(0, 1)
POOLINGS = ("mean", "cls", "pooler")
# Of the dense layers that a sentence-transformers model has after the pooling.
DENSE_ACTIVATIONS = ACTIVATIONS | {"tanh": jnp.tanh, "identity": lambda x: x}
MODEL_TYPES = ("bert", "distilbert", "roberta", "xlm-roberta")

_BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_XLMR_BASE = _BERT_BASE | {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_MINILM = _BERT_BASE | {
    "model_type": "bert",
    "vocab_size": 250037,
    "hidden_size": 384,
    "intermediate_size": 1536,
}
# Hub id -> what its config.json says, as far as it matters here.
ARCHITECTURES: dict[str, dict] = {
    "FacebookAI/xlm-roberta-base": _XLMR_BASE,
    "FacebookAI/xlm-roberta-large": _XLMR_BASE | _LARGE,
    "google-bert/bert-base-multilingual-cased": _BERT_BASE
    | {"model_type": "bert", "vocab_size": 119547},
    "sentence-transformers/LaBSE": _BERT_BASE | {"model_type": "bert", "vocab_size": 501153},
    "microsoft/Multilingual-MiniLM-L12-H384": _MINILM,
    "intfloat/multilingual-e5-small": _MINILM,
    "intfloat/multilingual-e5-base": _XLMR_BASE,
    "intfloat/multilingual-e5-large": _XLMR_BASE | _LARGE,
    "distilbert/distilbert-base-multilingual-cased": {
        "model_type": "distilbert",
        "vocab_size": 119547,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "max_position_embeddings": 512,
        "activation": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
    },
}


class Shape(NamedTuple):
    """What the layers of a stack have in common.

    Attributes:
      hidden: width of the residual stream.
      heads: attention heads; they divide `hidden`.
      inner: width inside the feed-forward block.
      activation: a key of `ACTIVATIONS`.
      epsilon: of the layer norms.
      pre_norm: normalise the input of each block (ViT) and not the sum after it (BERT).
      dropout: rate on the output of each block.
      attention_dropout: rate on the attention weights.
      qkv_bias: queries, keys and values have a bias.
      layer_scale: each block's output is scaled by a learned vector (DINOv2).
      gated: the feed-forward block is SwiGLU (DINOv2 giant).
    """

    hidden: int
    heads: int
    inner: int
    activation: str
    epsilon: float
    pre_norm: bool
    dropout: float = 0.0
    attention_dropout: float = 0.0
    qkv_bias: bool = True
    layer_scale: bool = False
    gated: bool = False


class Layers(nnx.Module):
    """A stack of transformer layers.

    Args:
      depth: how many.
      shape: of each.
      dtype: of the operands of matrix products; everything else is float32.
      remat: keep only each layer's input for the backward pass, and compute the rest again.
    """

    def __init__(self, depth: int, shape: Shape, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(axis_size=depth)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(shape, dtype=dtype, rngs=rngs)

        self.stacked = stacked(rngs)
        self.depth = depth
        self.remat = remat

    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        mask: Bool[Array, "batch length"] | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length hidden"]:
        """Applies the layers.

        Args:
          x: a sequence of tokens a row.
          mask: False for tokens that none attends to.
          key: for dropout; without one there is none.
        """
        batch, length, hidden = x.shape
        graph, params = nnx.split(self.stacked)

        def apply(x: Array, inputs: tuple) -> tuple[Array, None]:
            params, key = inputs
            x = nnx.merge(graph, params)(split_rows(x), (batch, length), mask, key)
            return split_rows(x), None

        # Without remat the products' results are kept, and what lies between them computed again:
        # less memory, and on CPUs a tenth less time.
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = None if self.remat else saved
        apply = jax.checkpoint(apply, prevent_cse=False, policy=policy)
        keys = None if key is None else jax.random.split(key, self.depth)
        x, _ = jax.lax.scan(apply, x.reshape(batch * length, hidden), (params, keys))
        return x.reshape(batch, length, hidden)


class Layer(nnx.Module):
    """Self-attention, then a feed-forward block, each with a residual connection and a norm."""

    def __init__(self, shape: Shape, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.pre_norm, self.dropout = shape.pre_norm, shape.dropout
        self.attention = Attention(shape, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(shape.hidden, epsilon=shape.epsilon)
        self.mlp = FeedForward(shape, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(shape.hidden, epsilon=shape.epsilon)
        ones = functools.partial(jnp.ones, shape.hidden)
        self.attention_scale = nnx.Param(ones()) if shape.layer_scale else None
        self.mlp_scale = nnx.Param(ones()) if shape.layer_scale else None

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        size: tuple[int, int],
        mask: Bool[Array, "batch length"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens hidden"]:
        """Applies the layer to a batch of `size` (batch, length), flattened."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        attention = functools.partial(self.attention, size=size, mask=mask, key=keys[0])
        x = self._block(x, attention, self.attention_norm, self.attention_scale, keys[1])
        return self._block(x, self.mlp, self.mlp_norm, self.mlp_scale, keys[2])

    def _block(
        self,
        x: Array,
        function: Callable[[Array], Array],
        norm: LayerNorm,
        scale: nnx.Param | None,
        key: Key[Array, ""] | None,
    ) -> Array:
        y = function(norm(x) if self.pre_norm else x)
        y = y if scale is None else y * scale[...]
        y = y if key is None else dropout(y, self.dropout, key)
        return x + y if self.pre_norm else norm(x + y)


class Attention(nnx.Module):
    """Multi-head self-attention; the softmax is float32."""

    def __init__(self, shape: Shape, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(_dense, dtype=dtype, rngs=rngs)
        self.qkv = dense(shape.hidden, 3 * shape.hidden, use_bias=shape.qkv_bias)
        self.output = dense(shape.hidden, shape.hidden)
        self.heads, self.dropout, self.dtype = shape.heads, shape.attention_dropout, dtype

    def __call__(
        self,
        x: Float[Array, "tokens hidden"],
        size: tuple[int, int],
        mask: Bool[Array, "batch length"] | None,
        key: Key[Array, ""] | None,
    ) -> Float[Array, "tokens hidden"]:
        """Attends within each sequence of a batch of `size` (batch, length)."""
        query, key_, value = (
            part.reshape(*size, self.heads, -1) for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        attended = attend(query, key_, value, mask, self.dtype, self.dropout, key)
        return self.output(attended.reshape(x.shape))


def attend(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch length heads dim"],
    value: Float[Array, "batch length heads dim"],
    mask: Bool[Array, "batch length"] | None,
    dtype: DTypeLike,
    rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "batch queries heads dim"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Args:
      query: what attends.
      key: what is attended to.
      value: what is summed.
      mask: False for keys that none attends to; a row without any True averages over all of them.
      dtype: of the operands of both products; their sums and the softmax are float32.
      rate: dropout of the attention weights, where `dropout_key` is given.
      dropout_key: for that dropout.
    """
    query = query * query.shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("bqhd,bkhd->bhqk", query.astype(dtype), key.astype(dtype))
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    if dropout_key is not None and rate:
        flat = weights.reshape(-1, weights.shape[-1])
        weights = dropout(flat, rate, dropout_key).reshape(weights.shape)
    return product("bhqk,bkhd->bqhd", weights.astype(dtype), value.astype(dtype))


class FeedForward(nnx.Module):
    """`Dense -> activation -> Dense`; gated, the first is two, and one of them the gate."""

    def __init__(self, shape: Shape, *, dtype: DTypeLike, rngs: nnx.Rngs):
        dense = functools.partial(_dense, dtype=dtype, rngs=rngs)
        self.inner = dense(shape.hidden, (2 if shape.gated else 1) * shape.inner)
        self.outer = dense(shape.inner, shape.hidden)
        self.activation, self.gated = shape.activation, shape.gated

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        """Applies the block."""
        x, activation = self.inner(x), ACTIVATIONS[self.activation]
        if not self.gated:
            return self.outer(activation(x))
        gate, x = jnp.split(x, 2, axis=-1)
        return self.outer(activation(gate) * x)


class TextTransformer(nnx.Module):
    """BERT, DistilBERT and XLM-R: token ids to one pooled vector.

    Dropout is BERT's; DistilBERT's own leaves out the one after the attention.

    The row of the token type that a single text has, and XLM-R's offset of positions
    (`pad_token_id + 1`), are folded into the position table when weights are loaded. In XLM-R a
    padding token that is written out in a text counts as no position; the row of the published
    table that it has instead is folded into the embedding of that token.

    Args:
      config: the content of a config.json; its fields are those of `transformers`.
      pooling: "mean" over the tokens, "cls" (the first token), or "pooler" (the checkpoint's own
        dense layer and tanh over the first token).
      dense: layers after the pooling, as `sentence_modules.read` describes them.
      pad_id: id of the padding token where the vocabulary was trimmed; default: as in the config.
      dtype: of the operands of matrix products; everything else is float32.
      remat: see `Layers`.
      rngs: keys for the initial parameters.

    Attributes:
      dim: width of the output.
      max_length: the longest text, in tokens.

    Raises:
      ValueError: the pooling or something in the config is unknown.
    """

    def __init__(
        self,
        config: Mapping,
        *,
        pooling: str = "mean",
        dense: Sequence[Mapping] = (),
        pad_id: int | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        depth, shape = text_shape(config)
        check_pooling(config, pooling)
        normal, hidden = nnx.initializers.normal(0.02), shape.hidden
        self.pooling, self.dropout = pooling, shape.dropout
        self.pad_id = padding_id(config) if pad_id is None else pad_id
        self.max_length = longest_text(config)
        pieces = read_field(config, "vocab_size", Whole(1))
        self.embedding = nnx.Param(normal(rngs.params(), (pieces, hidden)))
        self.position = nnx.Param(normal(rngs.params(), (self.max_length, hidden)))
        self.embedding_norm = LayerNorm(hidden, epsilon=shape.epsilon)
        self.layers = Layers(depth, shape, dtype=dtype, remat=remat, rngs=rngs)
        self.pooler = (
            _dense(hidden, hidden, dtype=dtype, rngs=rngs) if pooling == "pooler" else None
        )
        # Without any there is no list: trees of parameters are as they were before there were some.
        self.dense = (
            nnx.List([Dense(**x, dtype=dtype, rngs=rngs) for x in dense]) if dense else None
        )
        self.dim = dense[-1]["dim"] if dense else hidden

    def __call__(
        self,
        text_ids: Int32[Array, "batch length"],
        text_mask: Bool[Array, "batch length"],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch dim"]:
        """Encodes texts that are padded on the right.

        Args:
          text_ids: token ids; what they are where the mask is False has no effect.
          text_mask: False where a row is padding.
          rngs: turns dropout on.

        Raises:
          ValueError: the texts are longer than the position table.
        """
        length = text_ids.shape[1]
        if length > self.max_length:
            raise ValueError(f"texts of {length} tokens, but this tower takes {self.max_length}")
        x = split_rows(self.embedding[...][text_ids]) + self._positions(text_ids)
        x = self.embedding_norm(x)
        key = None if rngs is None else rngs.dropout()
        if key is not None:
            key, embedding_key = jax.random.split(key)
            x = dropout(x.reshape(-1, x.shape[-1]), self.dropout, embedding_key).reshape(x.shape)
        x = self._pool(self.layers(x, text_mask, key=key), text_mask)
        for layer in self.dense or ():
            x = layer(x)
        return x

    def _positions(self, text_ids: Int32[Array, "batch length"]) -> Float[Array, "... length dim"]:
        """Rows of the position table; RoBERTa's count the tokens that are not padding."""
        length = text_ids.shape[1]
        if self.pad_id is None:
            return self.position[...][:length]
        counted = text_ids != self.pad_id
        rows = jnp.where(counted, jnp.cumsum(counted, axis=1) - 1, self.max_length)
        return split_rows(self.position[...].at[rows].get(mode="fill", fill_value=0))

    def _pool(
        self, x: Float[Array, "batch length hidden"], text_mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch hidden"]:
        if self.pooling == "mean":
            mask = text_mask[..., None]
            return jnp.sum(x, axis=1, where=mask) / jnp.maximum(jnp.sum(mask, axis=1), 1)
        x = x[:, 0]
        return x if self.pooler is None else jnp.tanh(self.pooler(x))


class Dense(Linear):
    """A dense layer of sentence-transformers, with its activation."""

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
        """Applies both."""
        return DENSE_ACTIVATIONS[self.activation](super().__call__(x))


def check_config(config: Mapping) -> None:
    """Refuses a checkpoint whose config.json asks for another computation than is done here.

    Raises:
      ValueError: it does, or a field is missing or not what it may be; the message names it.
    """
    for field in ("is_decoder", "add_cross_attention"):
        if config.get(field):
            raise ValueError(
                f"{field} is {config[field]!r}: decoders are not supported, only encoders, in "
                "which every token attends to all others"
            )
    text_shape(config)
    longest_text(config)


def check_pooling(config: Mapping, pooling: str) -> None:
    """Raises ValueError where a text model can't be pooled so."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; known: {', '.join(POOLINGS)}")
    if config["model_type"] == "distilbert" and pooling == "pooler":
        raise ValueError("DistilBERT has no pooler: set pooling to mean or cls")


def text_shape(config: Mapping) -> tuple[int, Shape]:
    """Depth and layer shape that a text model's config.json describes.

    Raises:
      ValueError: a field is missing, or is not what it may be.
    """
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"model_type {config.get('model_type')!r} of a text tower is not one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    read = functools.partial(read_field, config)
    if config["model_type"] == "distilbert":
        return read("n_layers", Whole(1)), Shape(
            hidden=read("dim", WIDTH),
            heads=read("n_heads", Divisor(config["dim"])),
            inner=read("hidden_dim", WIDTH),
            activation=read("activation", Choice(*ACTIVATIONS), "gelu"),
            epsilon=1e-12,
            pre_norm=False,
            dropout=read("dropout", RATE, 0.1),
            attention_dropout=read("attention_dropout", RATE, 0.1),
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"position_embedding_type {config['position_embedding_type']!r} is not supported, "
            "only absolute"
        )
    return read("num_hidden_layers", Whole(1)), Shape(
        hidden=read("hidden_size", WIDTH),
        heads=read("num_attention_heads", Divisor(config["hidden_size"])),
        inner=read("intermediate_size", WIDTH),
        activation=read("hidden_act", Choice(*ACTIVATIONS), "gelu"),
        epsilon=read("layer_norm_eps", EPSILON, 1e-12),
        pre_norm=False,
        dropout=read("hidden_dropout_prob", RATE, 0.1),
        attention_dropout=read("attention_probs_dropout_prob", RATE, 0.1),
    )


def position_offset(config: Mapping) -> int:
    """Rows of the published position table before a text's: RoBERTa's count from pad + 1."""
    pad_id = padding_id(config)
    return 0 if pad_id is None else pad_id + 1


def padding_id(config: Mapping) -> int | None:
    """The id of the padding token where positions depend on it, as RoBERTa's do; else None."""
    if "roberta" not in config["model_type"]:
        return None
    pad_id = config.get("pad_token_id", 1)
    if type(pad_id) is not int or pad_id < 0:
        raise ValueError(
            f"pad_token_id is {pad_id!r}; it has to be a token's id, as the positions of "
            f"{config['model_type']} are counted from it"
        )
    return pad_id


def longest_text(config: Mapping) -> int:
    """Tokens that the position table of a text model is for."""
    offset = position_offset(config)
    return read_field(config, "max_position_embeddings", Whole(offset + 1)) - offset


_BERT_LAYER = {
    "attention.qkv": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    "attention.output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "mlp.inner": ("intermediate.dense",),
    "mlp.outer": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_DISTILBERT_LAYER = {
    "attention.qkv": tuple(f"attention.{name}_lin" for name in "qkv"),
    "attention.output": ("attention.out_lin",),
    "attention_norm": ("sa_layer_norm",),
    "mlp.inner": ("ffn.lin1",),
    "mlp.outer": ("ffn.lin2",),
    "mlp_norm": ("output_layer_norm",),
}


def rename_text(
    weights: Mapping[str, np.ndarray], config: Mapping, pooling: str
) -> dict[str, np.ndarray]:
    """A published checkpoint's tensors under the names of `TextTransformer`.

    Heads of other tasks (`lm_head`, `cls`, `classifier`) are left out, and so is the pooler where
    it is not used. Whatever else is not known keeps its name, for the merge to complain about.
    """
    model_type = config["model_type"]
    prefix = {"xlm-roberta": "roberta."}.get(model_type, f"{model_type}.")
    left = {
        name.removeprefix(prefix)
        # What was converted from TensorFlow, such as Google's own BERT, has its names.
        .replace("LayerNorm.gamma", "LayerNorm.weight")
        .replace("LayerNorm.beta", "LayerNorm.bias"): value
        for name, value in weights.items()
        if not name.startswith(("lm_head.", "cls.", "classifier.", "vocab_", "qa_outputs."))
    }
    left.pop("embeddings.position_ids", None)  # a constant that older versions saved
    distilbert = model_type == "distilbert"
    renamed = rename_layers(
        left,
        text_shape(config)[0],
        "transformer.layer.{}." if distilbert else "encoder.layer.{}.",
        _DISTILBERT_LAYER if distilbert else _BERT_LAYER,
        "layers.stacked.",
    )
    moved = {"embedding": "embeddings.word_embeddings.weight"}
    moved |= {
        f"embedding_norm.{ours}": f"embeddings.LayerNorm.{theirs}"
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    }
    renamed |= {ours: left.pop(theirs) for ours, theirs in moved.items() if theirs in left}
    if "embeddings.position_embeddings.weight" in left:
        position = left.pop("embeddings.position_embeddings.weight")
        types = left.pop("embeddings.token_type_embeddings.weight", None)
        position = position if types is None else position + types[0]
        renamed["position"] = position[position_offset(config) :]
        pad_id, embedding = padding_id(config), renamed.get("embedding")
        if pad_id is not None and embedding is not None and position[pad_id].any():
            renamed["embedding"] = embedding.copy()
            renamed["embedding"][pad_id] += position[pad_id]
    for name, ours in (
        ("pooler.dense.weight", "pooler.kernel"),
        ("pooler.dense.bias", "pooler.bias"),
    ):
        value = left.pop(name, None)
        if value is not None and pooling == "pooler":
            renamed[ours] = value.T
    return renamed | left


def restore_text(weights: Mapping[str, np.ndarray], config: Mapping) -> dict[str, np.ndarray]:
    """The inverse of `rename_text`: a tower's weights under the names of `transformers`.

    What was folded into the position table stays there: the table of token types is zero.

    Args:
      weights: of a `TextTransformer`, by name.
      config: content of the config.json that goes with them.
    """
    distilbert, left = config["model_type"] == "distilbert", dict(weights)
    restored = restore_layers(
        left,
        text_shape(config)[0],
        "transformer.layer.{}." if distilbert else "encoder.layer.{}.",
        _DISTILBERT_LAYER if distilbert else _BERT_LAYER,
        "layers.stacked.",
    )
    restored["embeddings.word_embeddings.weight"] = left.pop("embedding")
    restored["embeddings.LayerNorm.weight"] = left.pop("embedding_norm.scale")
    restored["embeddings.LayerNorm.bias"] = left.pop("embedding_norm.bias")
    position = left.pop("position")
    unused = np.zeros((position_offset(config), position.shape[1]), position.dtype)
    restored["embeddings.position_embeddings.weight"] = np.concatenate([unused, position])
    if not distilbert:
        types = np.zeros((config.get("type_vocab_size", 2), position.shape[1]), position.dtype)
        restored["embeddings.token_type_embeddings.weight"] = types
    if "pooler.kernel" in left:
        restored["pooler.dense.weight"] = left.pop("pooler.kernel").T
        restored["pooler.dense.bias"] = left.pop("pooler.bias")
    return restored | left


def rename_layers(
    left: dict[str, np.ndarray],
    depth: int,
    prefix: str,
    table: Mapping[str, tuple[str, ...]],
    ours: str,
) -> dict[str, np.ndarray]:
    """Takes a stack's tensors out of `left`; returns them stacked, under the names of `Layers`.

    Args:
      left: the checkpoint's tensors; those used are removed.
      depth: layers.
      prefix: of a layer's tensors, with `{}` for its number.
      table: our name of a module -> the checkpoint's modules that are joined to it.
      ours: prefix of our names.
    """
    renamed = {}
    for module, sources in table.items():
        for suffix in ("weight", "bias"):
            names = [[f"{prefix.format(i)}{s}.{suffix}" for s in sources] for i in range(depth)]
            if not all(name in left for layer in names for name in layer):
                continue
            layers = [[left.pop(name).T for name in layer] for layer in names]
            ending = suffix
            if suffix == "weight":
                ending = "kernel" if layers[0][0].ndim == 2 else "scale"
            renamed[f"{ours}{module}.{ending}"] = np.stack(
                [np.concatenate(layer, axis=-1) for layer in layers]
            )
    return renamed


def restore_layers(
    left: dict[str, np.ndarray],
    depth: int,
    prefix: str,
    table: Mapping[str, tuple[str, ...]],
    ours: str,
) -> dict[str, np.ndarray]:
    """The inverse of `rename_layers`: takes the stack's weights out of `left`, by layer."""
    restored = {}
    for module, theirs in table.items():
        for ending, suffix in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            stacked = left.pop(f"{ours}{module}.{ending}", None)
            for layer in range(depth if stacked is not None else 0):
                parts = np.split(stacked[layer], len(theirs), axis=-1)
                for name, part in zip(theirs, parts, strict=True):
                    restored[f"{prefix.format(layer)}{name}.{suffix}"] = part.T
    return restored


def _dense(
    features: int, dim: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> Linear:
    """A dense layer with BERT's initial values."""
    return Linear(
        features,
        dim,
        use_bias=use_bias,
        dtype=dtype,
        initializer=nnx.initializers.truncated_normal(0.02),
        rngs=rngs,
    )

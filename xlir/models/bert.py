"""BERT, RoBERTa and XLM-R, and DistilBERT.

Devlin et al. 2019 (https://arxiv.org/abs/1810.04805); Conneau et al. 2020
(https://arxiv.org/abs/1911.02116); Sanh et al. 2019 (https://arxiv.org/abs/1910.01108).
"""

import functools
from collections.abc import Mapping

from xlir.config import Choice, Divisor, Whole, read_field
from xlir.models.tensor_names import LayerNames
from xlir.models.text_family import TextFamily
from xlir.models.text_transformer import TextConfig
from xlir.models.transformer import ACTIVATIONS, EPSILON, RATE, WIDTH, TransformerConfig

_BASE = {
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
_BERT = _BASE | {"model_type": "bert"}
_MINILM = _BERT | {"vocab_size": 250037, "hidden_size": 384, "intermediate_size": 1536}
_XLMR = _BASE | {
    "model_type": "xlm-roberta",
    "vocab_size": 250002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
_XLMR_LARGE = _XLMR | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_DISTILBERT = {
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
}


def _read_bert(config: Mapping) -> TextConfig:
    return TextConfig(
        _layers(config),
        read_field(config, "vocab_size", Whole(1)),
        read_field(config, "max_position_embeddings", Whole(1)),
    )


def _read_roberta(config: Mapping) -> TextConfig:
    """Positions start after the padding token's id, so the config needs a valid id."""
    pad_id = config.get("pad_token_id", 1)
    if type(pad_id) is not int or pad_id < 0:
        raise ValueError(
            f"pad_token_id is {pad_id!r}; it must be a token id, because the positions of "
            f"{config['model_type']} are counted from it"
        )
    positions = read_field(config, "max_position_embeddings", Whole(pad_id + 2))
    vocabulary = read_field(config, "vocab_size", Whole(1))
    return TextConfig(_layers(config), vocabulary, positions - pad_id - 1, pad_id)


def _layers(config: Mapping) -> TransformerConfig:
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(
            f"position_embedding_type {config['position_embedding_type']!r} is not supported, "
            "only absolute"
        )
    read = functools.partial(read_field, config)
    width = read("hidden_size", WIDTH)
    return TransformerConfig(
        depth=read("num_hidden_layers", Whole(1)),
        width=width,
        num_heads=read("num_attention_heads", Divisor(width)),
        mlp_dim=read("intermediate_size", WIDTH),
        activation=read("hidden_act", Choice(*ACTIVATIONS), "gelu"),
        epsilon=read("layer_norm_eps", EPSILON, 1e-12),
        pre_norm=False,
        dropout=read("hidden_dropout_prob", RATE, 0.1),
        attention_dropout=read("attention_probs_dropout_prob", RATE, 0.1),
    )


def _read_distilbert(config: Mapping) -> TextConfig:
    read = functools.partial(read_field, config)
    width = read("dim", WIDTH)
    layers = TransformerConfig(
        depth=read("n_layers", Whole(1)),
        width=width,
        num_heads=read("n_heads", Divisor(width)),
        mlp_dim=read("hidden_dim", WIDTH),
        activation=read("activation", Choice(*ACTIVATIONS), "gelu"),
        epsilon=1e-12,
        pre_norm=False,
        dropout=read("dropout", RATE, 0.1),
        attention_dropout=read("attention_dropout", RATE, 0.1),
    )
    positions = read("max_position_embeddings", Whole(1))
    return TextConfig(layers, read("vocab_size", Whole(1)), positions)


_BERT_LAYERS = LayerNames(
    "encoder.layer.{}.",
    {
        "attention.qkv": tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
        "attention.output": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
        "mlp_norm": ("output.LayerNorm",),
    },
)

BERT = TextFamily(
    name="bert",
    read=_read_bert,
    prefix="bert.",
    layer_names=_BERT_LAYERS,
    pooler_is_optional=True,
    architectures={
        "google-bert/bert-base-multilingual-cased": _BERT | {"vocab_size": 119547},
        "sentence-transformers/LaBSE": _BERT | {"vocab_size": 501153},
        "microsoft/Multilingual-MiniLM-L12-H384": _MINILM,
        "intfloat/multilingual-e5-small": _MINILM,
    },
    sentence_modules={
        "sentence-transformers/LaBSE": {
            "pooling": "cls",
            "dense": [{"features": 768, "dim": 768, "bias": True, "activation": "tanh"}],
        }
    },
)
ROBERTA = TextFamily(
    name="xlm-roberta",
    other_names=("roberta",),
    read=_read_roberta,
    prefix="roberta.",
    layer_names=_BERT_LAYERS,
    pooler_is_optional=True,
    architectures={
        "FacebookAI/xlm-roberta-base": _XLMR,
        "FacebookAI/xlm-roberta-large": _XLMR_LARGE,
        "intfloat/multilingual-e5-base": _XLMR,
        "intfloat/multilingual-e5-large": _XLMR_LARGE,
    },
)
DISTILBERT = TextFamily(
    name="distilbert",
    poolings=("mean", "cls"),
    read=_read_distilbert,
    prefix="distilbert.",
    layer_names=LayerNames(
        "transformer.layer.{}.",
        {
            "attention.qkv": tuple(f"attention.{name}_lin" for name in "qkv"),
            "attention.output": ("attention.out_lin",),
            "attention_norm": ("sa_layer_norm",),
            "mlp.fc1": ("ffn.lin1",),
            "mlp.fc2": ("ffn.lin2",),
            "mlp_norm": ("output_layer_norm",),
        },
    ),
    token_types=False,
    architectures={"distilbert/distilbert-base-multilingual-cased": _DISTILBERT},
)

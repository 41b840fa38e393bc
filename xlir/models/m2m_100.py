"""The encoders of M2M-100 and NLLB-200, which were trained to translate.

Fan et al. 2020 (https://arxiv.org/abs/2010.11125); NLLB team 2022
(https://arxiv.org/abs/2207.04672). Checkpoints hold an encoder and a decoder; only the encoder is
read. LayerDrop, which skips whole layers in training, is not supported.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from xlir.config import WIDEST, Choice, Divisor, Flag, Whole, read_field
from xlir.models.family import TowerSpec, Weights
from xlir.models.tensor_names import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)
from xlir.models.text_family import TextFamily
from xlir.models.text_transformer import TextConfig
from xlir.models.transformer import ACTIVATIONS, RATE, WIDTH, TransformerConfig

_MODULES = {"norm": "layer_norm"}
_EMBEDDING = "embed_tokens.weight"
# The table that the encoder, the decoder and the output layer of a whole model share.
_SHARED = "shared.weight"
# Dropped: the translation's other half, and the sinusoids that older versions saved.
_IGNORED = ("decoder.", "lm_head.", "final_logits_bias", "embed_positions.")
_M2M = {
    "vocab_size": 128112,
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
_NLLB = _M2M | {"vocab_size": 256206}
_NLLB_LARGE = _NLLB | {"encoder_layers": 24, "encoder_ffn_dim": 8192}


def _read(config: Mapping) -> TextConfig:
    """The same defaults as in `transformers`, except for the fields that give shapes."""
    read = functools.partial(read_field, config)
    width = read("d_model", Whole(4, WIDEST))
    layers = TransformerConfig(
        depth=read("encoder_layers", Whole(1)),
        width=width,
        num_heads=read("encoder_attention_heads", Divisor(width)),
        mlp_dim=read("encoder_ffn_dim", WIDTH),
        activation=read("activation_function", Choice(*ACTIVATIONS), "relu"),
        epsilon=1e-5,
        pre_norm=True,
        dropout=read("dropout", RATE, 0.1),
        attention_dropout=read("attention_dropout", RATE, 0.1),
    )
    pad_id = read("pad_token_id", Whole(0), 1)
    return TextConfig(
        layers,
        read("vocab_size", Whole(1)),
        read("max_position_embeddings", Whole(1), 1024),
        pad_id,
        embedding_scale=width**0.5 if read("scale_embedding", Flag(), True) else 1.0,
        first_position=pad_id + 1,
    )


class M2M100Family(TextFamily):
    """Encoders of translation models, alone or with their decoder."""

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        encoder = {
            name.removeprefix(self.prefix).removeprefix("encoder."): value
            for name, value in weights.items()
        }
        left = {name: value for name, value in encoder.items() if not name.startswith(_IGNORED)}
        renamed = rename_layers(left, self.read(config).transformer.depth, self.layer_names)
        renamed |= rename_modules(left, _MODULES)
        tables = [left.pop(name) for name in (_EMBEDDING, _SHARED) if name in left]
        return renamed | left | ({"embedding": tables[0]} if tables else {})

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`. The tensors are those of the encoder alone."""
        left = dict(weights)
        restored = restore_layers(left, self.layer_names) | restore_modules(left, _MODULES)
        return restored | {_EMBEDDING: left.pop("embedding")} | left

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`."""
        return dict(spec.config)


# AutoModel loads this encoder with its decoder. So the layouts that are loaded by AutoModel can't
# hold it, and `outputs` and `dual_encoder_pooling` are empty.
M2M_100 = M2M100Family(
    name="m2m_100",
    poolings=("mean", "cls"),
    read=_read,
    prefix="model.",
    layer_names=LayerNames(
        "layers.{}.",
        {
            "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
            "attention.output": ("self_attn.out_proj",),
            "attention_norm": ("self_attn_layer_norm",),
            "mlp.fc1": ("fc1",),
            "mlp.fc2": ("fc2",),
            "mlp_norm": ("final_layer_norm",),
        },
    ),
    outputs={},
    dual_encoder_pooling="",
    architectures={
        "facebook/m2m100_418M": _M2M,
        "facebook/nllb-200-distilled-600M": _NLLB,
        "facebook/nllb-200-distilled-1.3B": _NLLB_LARGE,
        "facebook/nllb-200-1.3B": _NLLB_LARGE,
        "facebook/nllb-200-3.3B": _NLLB_LARGE | {"d_model": 2048},
    },
)

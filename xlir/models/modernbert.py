"""ModernBERT and mmBERT.

Warner et al. 2024 (https://arxiv.org/abs/2412.13663); Marone et al. 2025
(https://arxiv.org/abs/2509.06888), which covers 1,800 languages. Published models have no dropout.
The rate `mlp_dropout` applies to the outputs of both blocks.
"""

import functools
from collections.abc import Mapping

import numpy as np

from xlir.config import Choice, Divisor, Flag, Whole, read_field
from xlir.models.family import Weights
from xlir.models.rotary_text_family import (
    RotaryTextFamily,
    check_head_width,
    local_layers,
    rope_thetas,
)
from xlir.models.tensor_names import LayerNames
from xlir.models.text_transformer import TextConfig
from xlir.models.transformer import ACTIVATIONS, EPSILON, RATE, WIDTH, TransformerConfig

# The norm that the first layer lacks. Towers have unused parameters in its place.
_FIRST_NORM = "layers.0.attn_norm."


def _read(config: Mapping) -> TextConfig:
    """The same defaults as in `transformers`, except for the fields that give shapes."""
    read = functools.partial(read_field, config)
    width, depth = read("hidden_size", WIDTH), read("num_hidden_layers", Whole(1))
    num_heads = read("num_attention_heads", Divisor(width))
    check_head_width(width // num_heads, f"num_attention_heads is {num_heads}")
    attention_bias = read("attention_bias", Flag(), False)
    interval = read("global_attn_every_n_layers", Whole(1), 3)
    layers = TransformerConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_dim=read("intermediate_size", WIDTH),
        activation=read("hidden_activation", Choice(*ACTIVATIONS), "gelu"),
        epsilon=read("norm_eps", EPSILON, 1e-5),
        pre_norm=True,
        dropout=read("mlp_dropout", RATE, 0.0),
        attention_dropout=read("attention_dropout", RATE, 0.0),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=read("mlp_bias", Flag(), False),
        gated=True,
        norm_bias=read("norm_bias", Flag(), False),
        first_norm=False,
        local=local_layers(config, [layer % interval > 0 for layer in range(depth)]),
        window=read("local_attention", Whole(0), 128) // 2,
    )
    fields = ("global_rope_theta", "local_rope_theta")
    return TextConfig(
        layers,
        read("vocab_size", Whole(1)),
        read("max_position_embeddings", Whole(1), 8192),
        rope_thetas=rope_thetas(config, fields, (160_000.0, 10_000.0)),
        input_norm=True,
    )


class ModernBertFamily(RotaryTextFamily):
    """Encoders whose first layer has no norm before its attention."""

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        stack = self.described(config).transformer
        unused = {f"{_FIRST_NORM}weight": np.ones(stack.width, np.float32)}
        if stack.norm_bias:
            unused[f"{_FIRST_NORM}bias"] = np.zeros(stack.width, np.float32)
        return super().rename(unused | weights, config, pooling)

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`."""
        restored = super().restore(weights, config)
        return {name: x for name, x in restored.items() if not name.startswith(_FIRST_NORM)}


_BASE = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
}
_MULTILINGUAL = _BASE | {"vocab_size": 256000, "local_rope_theta": 160_000.0}

MODERNBERT = ModernBertFamily(
    name="modernbert",
    read=_read,
    prefix="model.",
    layer_names=LayerNames(
        "layers.{}.",
        {
            "attention.qkv": ("attn.Wqkv",),
            "attention.output": ("attn.Wo",),
            "attention_norm": ("attn_norm",),
            "mlp.fc1": ("mlp.Wi",),
            "mlp.fc2": ("mlp.Wo",),
            "mlp_norm": ("mlp_norm",),
        },
    ),
    embedding_name="embeddings.tok_embeddings.weight",
    modules={"embedding_norm": "embeddings.norm", "norm": "final_norm"},
    ignored=("head.", "decoder.", "classifier."),
    outputs={
        "mean": ("last_hidden_state", "mean"),
        "cls": ("last_hidden_state", "cls"),
    },
    architectures={
        "answerdotai/ModernBERT-base": _BASE,
        "answerdotai/ModernBERT-large": _BASE
        | {
            "hidden_size": 1024,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 2624,
        },
        "jhu-clsp/mmBERT-small": _MULTILINGUAL | {"hidden_size": 384, "num_attention_heads": 6},
        "jhu-clsp/mmBERT-base": _MULTILINGUAL,
    },
)

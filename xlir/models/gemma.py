"""EmbeddingGemma: Gemma 3 as an encoder.

Schechter Vera et al. 2025 (https://arxiv.org/abs/2509.20354). Gemma's own models, in which tokens
attend only to the tokens before them, are not supported.
"""

import functools
from collections.abc import Mapping

import numpy as np

from xlir.config import WIDEST, Choice, Divisor, Flag, Real, Whole, read_field
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


def _read(config: Mapping) -> TextConfig:
    """The same defaults as in `transformers`, except for the fields that give shapes."""
    read = functools.partial(read_field, config)
    if not read("use_bidirectional_attention", Flag(), False):
        raise ValueError(
            "use_bidirectional_attention is not True: causal Gemma models are not supported, only "
            "encoders such as EmbeddingGemma"
        )
    if "attn_logit_softcapping" in config:
        raise ValueError("attn_logit_softcapping is not supported, only null")
    width, depth = read("hidden_size", WIDTH), read("num_hidden_layers", Whole(1))
    num_heads = read("num_attention_heads", Divisor(width))
    head_dim = read("head_dim", Whole(1, WIDEST), 256)
    check_head_width(head_dim, f"head_dim is {head_dim}")
    attention_bias = read("attention_bias", Flag(), False)
    interval = read(
        "_sliding_window_pattern", Whole(1), read("sliding_window_pattern", Whole(1), 6)
    )
    layers = TransformerConfig(
        depth=depth,
        width=width,
        num_heads=num_heads,
        mlp_dim=read("intermediate_size", WIDTH),
        activation=read("hidden_activation", Choice(*ACTIVATIONS), "gelu_pytorch_tanh"),
        epsilon=read("rms_norm_eps", EPSILON, 1e-6),
        pre_norm=True,
        attention_dropout=read("attention_dropout", RATE, 0.0),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=False,
        gated=True,
        rms_norm=True,
        output_norms=True,
        num_kv_heads=read("num_key_value_heads", Divisor(num_heads)),
        head_dim=head_dim,
        qk_norms=True,
        query_scale=(head_dim / read("query_pre_attn_scalar", Real(1e-3, 1e6), 256)) ** 0.5,
        local=local_layers(config, [(layer + 1) % interval > 0 for layer in range(depth)]),
        window=read("sliding_window", Whole(1), 4096) // 2,
    )
    return TextConfig(
        layers,
        read("vocab_size", Whole(1)),
        read("max_position_embeddings", Whole(1), 131_072),
        embedding_scale=width**0.5,
        rope_thetas=rope_thetas(config, ("rope_theta", "rope_local_base_freq"), (1e6, 1e4)),
    )


class GemmaFamily(RotaryTextFamily):
    """Encoders whose checkpoints hold the scales of norms minus 1."""

    def names(self, config: Mapping) -> LayerNames:
        """See `RotaryTextFamily.names`."""
        stack = self.described(config).transformer
        heads = (stack.num_heads, stack.num_kv_heads, stack.num_kv_heads)
        widths = tuple(count * stack.head_width for count in heads)
        return self.layer_names._replace(widths={"attention.qkv": widths})

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        return super().rename(_added(weights, np.float32(1)), config, pooling)

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`."""
        return _added(super().restore(weights, config), np.float32(-1))


def _added(weights: Weights, number: np.float32) -> dict[str, np.ndarray]:
    """The weights, with a number added to the scales of all norms."""
    return {
        name: np.asarray(value, np.float32) + number if name.endswith("norm.weight") else value
        for name, value in weights.items()
    }


GEMMA = GemmaFamily(
    name="gemma3_text",
    poolings=("mean",),
    read=_read,
    prefix="model.",
    layer_names=LayerNames(
        "layers.{}.",
        {
            "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
            "attention.query_norm": ("self_attn.q_norm",),
            "attention.key_norm": ("self_attn.k_norm",),
            "attention.output": ("self_attn.o_proj",),
            "attention_norm": ("input_layernorm",),
            "attention_output_norm": ("post_attention_layernorm",),
            "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.fc2": ("mlp.down_proj",),
            "mlp_norm": ("pre_feedforward_layernorm",),
            "mlp_output_norm": ("post_feedforward_layernorm",),
        },
    ),
    embedding_name="embed_tokens.weight",
    modules={"norm": "norm"},
    ignored=("lm_head.",),
    outputs={"mean": ("last_hidden_state", "mean")},
    terms="EmbeddingGemma, Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    architectures={
        "google/embeddinggemma-300m": {
            "vocab_size": 262144,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 1152,
            "max_position_embeddings": 2048,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "use_bidirectional_attention": True,
        }
    },
    sentence_modules={
        "google/embeddinggemma-300m": {
            "pooling": "mean",
            "dense": [
                {"features": 768, "dim": 3072, "bias": False, "activation": "identity"},
                {"features": 3072, "dim": 768, "bias": False, "activation": "identity"},
            ],
        }
    },
)

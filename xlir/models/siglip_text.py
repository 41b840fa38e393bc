"""The text towers of SigLIP and SigLIP 2.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343); Tschannen et al. 2025
(https://arxiv.org/abs/2502.14786).
"""

import dataclasses
from collections.abc import Mapping

from xlir.config import Whole, read_field
from xlir.models.clip_text import DualEncoderTextFamily
from xlir.models.text_transformer import TextConfig
from xlir.models.transformer import WIDTH
from xlir.models.vision_family import read_layers

_BASE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_LARGE = _BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_SO400M = _BASE | {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
}
_MULTILINGUAL = {"vocab_size": 250000}
_GEMMA = {"vocab_size": 256000}


def _read(config: Mapping) -> TextConfig:
    layers = read_layers(config)
    projection = {**config, "projection_size": config.get("projection_size") or layers.width}
    return TextConfig(
        layers,
        read_field(config, "vocab_size", Whole(1)),
        read_field(config, "max_position_embeddings", Whole(1)),
        head_dim=read_field(projection, "projection_size", WIDTH),
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SigLIPTextFamily(DualEncoderTextFamily):
    """Text towers whose tokens attend to the padding: every text has the same number of tokens."""

    def full_length(self, config: Mapping) -> int:
        """See `Family.full_length`."""
        return self.longest_text(config)


# `transformers` has a class of this tower, but AutoModel does not know it. So the layouts that load
# towers by AutoModel can't hold it, and `outputs` and `dual_encoder_pooling` are empty. Exports of
# both towers that were trained together are described in `xlir/export/dual_encoders.py`.
SIGLIP_TEXT = SigLIPTextFamily(
    name="siglip_text_model",
    other_names=("siglip", "siglip2_text_model", "siglip2"),
    poolings=("last",),
    defaults=_BASE,
    read=_read,
    outputs={},
    dual_encoder_pooling="",
    architectures={
        "google/siglip-base-patch16-224": _BASE,
        "google/siglip-base-patch16-256": _BASE,
        "google/siglip-base-patch16-256-multilingual": _BASE | _MULTILINGUAL,
        "google/siglip-large-patch16-256": _LARGE,
        "google/siglip-so400m-patch14-384": _SO400M,
        "google/siglip2-base-patch16-224": _BASE | _GEMMA,
        "google/siglip2-large-patch16-256": _LARGE | _GEMMA,
        "google/siglip2-so400m-patch14-384": _SO400M | _GEMMA,
        "google/siglip2-so400m-patch16-256": _SO400M | _GEMMA,
    },
)

"""DINOv2: Oquab et al. 2023 (https://arxiv.org/abs/2304.07193).

With registers: Darcet et al. 2024 (https://arxiv.org/abs/2309.16588).
"""

import dataclasses
from collections.abc import Mapping

from xlir.config import Flag, Real, Whole, read_field
from xlir.models.tensor_names import LayerNames
from xlir.models.transformer import WIDTH
from xlir.models.vision_family import EmbeddingNames, VisionFamily, read_layers
from xlir.models.vision_transformer import VisionConfig
from xlir.models.vit import ATTENTION, MODULES

_BASE = {
    "model_type": "dinov2",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_GIANT = {
    "hidden_size": 1536,
    "num_hidden_layers": 40,
    "num_attention_heads": 24,
    "use_swiglu_ffn": True,
}


def _is_gated(config: Mapping) -> bool:
    return read_field(config, "use_swiglu_ffn", Flag(), False)


def _read(config: Mapping) -> VisionConfig:
    """The feed-forward block is `mlp_ratio` times as wide as the residual stream."""
    mlp_dim = read_field(config, "hidden_size", WIDTH)
    mlp_dim = int(mlp_dim * read_field(config, "mlp_ratio", Real(1, 1000)))
    if gated := _is_gated(config):
        # SwiGLU has three matrices, not two: two thirds of the width give the same total size.
        mlp_dim = (int(mlp_dim * 2 / 3) + 7) // 8 * 8
    activation = {"hidden_act": "silu"} if gated else {}
    layers = read_layers({**config, "intermediate_size": mlp_dim, **activation})
    return VisionConfig(
        dataclasses.replace(layers, layer_scale=True, gated=gated),
        config["image_size"],
        config["patch_size"],
    )


def _layer_names(config: Mapping) -> LayerNames:
    fc1, fc2 = ("weights_in", "weights_out") if _is_gated(config) else ("fc1", "fc2")
    return LayerNames(
        "encoder.layer.{}.",
        ATTENTION
        | {
            "attention_norm": ("norm1",),
            "mlp.fc1": (f"mlp.{fc1}",),
            "mlp.fc2": (f"mlp.{fc2}",),
            "mlp_norm": ("norm2",),
        },
        {"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"},
    )


DINOV2 = VisionFamily(
    name="dinov2",
    defaults=_BASE | {"image_size": 224},
    read=_read,
    layer_names=_layer_names,
    embedding_names=EmbeddingNames(),
    modules=MODULES,
    prefixes=("dinov2.",),
    zeros={"embeddings.mask_token": (1,)},
    applied_at=224,
    # "mean" is missing because sentence-transformers would include the class token in the mean.
    outputs={"cls": ("last_hidden_state", "cls")},
    dual_encoder_pooling="cls",
    architectures={
        "facebook/dinov2-small": _BASE | _SMALL,
        "facebook/dinov2-base": _BASE,
        "facebook/dinov2-large": _BASE | _LARGE,
        "facebook/dinov2-giant": _BASE | _GIANT,
    },
)


def _read_with_registers(config: Mapping) -> VisionConfig:
    registers = read_field(config, "num_register_tokens", Whole(1))
    return dataclasses.replace(_read(config), registers=registers, antialias=True)


_WITH_REGISTERS = _BASE | {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
DINOV2_WITH_REGISTERS = dataclasses.replace(
    DINOV2,
    name="dinov2_with_registers",
    defaults=_WITH_REGISTERS | {"image_size": 224, "patch_size": 16},
    read=_read_with_registers,
    embedding_names=EmbeddingNames(registers="embeddings.register_tokens"),
    prefixes=("dinov2_with_registers.",),
    architectures={
        "facebook/dinov2-with-registers-small": _WITH_REGISTERS | _SMALL,
        "facebook/dinov2-with-registers-base": _WITH_REGISTERS,
        "facebook/dinov2-with-registers-large": _WITH_REGISTERS | _LARGE,
        "facebook/dinov2-with-registers-giant": _WITH_REGISTERS | _GIANT,
    },
)

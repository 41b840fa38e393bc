"""The vision transformers of DINOv3: Siméoni et al. 2025 (https://arxiv.org/abs/2508.10104).

DINOv3's convolutional networks (`model_type` "dinov3_convnext") are not supported.
"""

import dataclasses
from collections.abc import Mapping

from xlir.config import Flag, Real, Whole, read_field
from xlir.models.tensor_names import LayerNames
from xlir.models.vision_family import EmbeddingNames, VisionFamily, read_layers
from xlir.models.vision_transformer import VisionConfig

_BASE = {
    "model_type": "dinov3_vit",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_register_tokens": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "use_gated_mlp": False,
}
_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_HUGE = _GATED | {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
}
_7B = _GATED | {
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "query_bias": False,
    "value_bias": False,
}


def _read(config: Mapping) -> VisionConfig:
    flag = {name: read_field(config, name, Flag()) for name in _BASE if name.endswith("_bias")}
    parts = tuple(name for name in ("query", "key", "value") if flag[f"{name}_bias"])
    layers = read_layers({**config, "qkv_bias": len(parts) == 3})
    theta = read_field(config, "rope_theta", Real(1, 1e9))
    if layers.width // layers.num_heads % 4:
        raise ValueError(
            f"hidden_size {layers.width} with {layers.num_heads} heads is not supported: rotary "
            "positions need heads whose width is a multiple of 4"
        )
    layers = dataclasses.replace(
        layers,
        part_biases=() if len(parts) == 3 else parts,
        output_bias=flag["proj_bias"],
        mlp_bias=flag["mlp_bias"],
        layer_scale=True,
        gated=read_field(config, "use_gated_mlp", Flag()),
    )
    return VisionConfig(
        layers,
        config["image_size"],
        config["patch_size"],
        registers=read_field(config, "num_register_tokens", Whole(0)),
        rope_theta=theta,
    )


def _layer_names(config: Mapping) -> LayerNames:
    gate = ("mlp.gate_proj",) if config["use_gated_mlp"] else ()
    vectors = {"attention_scale": "layer_scale1.lambda1", "mlp_scale": "layer_scale2.lambda1"}
    for part in _read(config).transformer.part_biases:
        vectors[f"attention.{part}_bias"] = f"attention.{part[0]}_proj.bias"
    return LayerNames(
        "layer.{}.",
        {
            "attention.qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
            "attention.output": ("attention.o_proj",),
            "attention_norm": ("norm1",),
            "mlp.fc1": (*gate, "mlp.up_proj"),
            "mlp.fc2": ("mlp.down_proj",),
            "mlp_norm": ("norm2",),
        },
        vectors,
    )


DINOV3 = VisionFamily(
    name="dinov3_vit",
    terms="DINOv3, DINOv3 License: https://ai.meta.com/resources/models-and-libraries/dinov3-license",
    defaults=_BASE | _SMALL | {"num_register_tokens": 0},
    read=_read,
    layer_names=_layer_names,
    embedding_names=EmbeddingNames(position=None, registers="embeddings.register_tokens"),
    modules={"patches": "embeddings.patch_embeddings", "norm": "norm"},
    prefixes=("model.",),
    zeros={"embeddings.mask_token": (1, 1)},
    # "mean" is missing because sentence-transformers would include the other tokens in the mean.
    outputs={"cls": ("pooler_output", None)},
    dual_encoder_pooling="cls",
    photo_dtype="float32",
    architectures={
        "facebook/dinov3-vits16-pretrain-lvd1689m": _BASE | _SMALL,
        "facebook/dinov3-vits16plus-pretrain-lvd1689m": _BASE | _SMALL | _GATED,
        "facebook/dinov3-vitb16-pretrain-lvd1689m": _BASE,
        "facebook/dinov3-vitl16-pretrain-lvd1689m": _BASE | _LARGE,
        "facebook/dinov3-vith16plus-pretrain-lvd1689m": _BASE | _HUGE,
        "facebook/dinov3-vit7b16-pretrain-lvd1689m": _BASE | _7B,
    },
)

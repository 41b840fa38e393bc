"""ViT, as Google published it: Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929)."""

from collections.abc import Mapping

from xlir.models.tensor_names import LayerNames
from xlir.models.vision_family import EmbeddingNames, VisionFamily, read_layers
from xlir.models.vision_transformer import VisionConfig

_BASE = {
    "model_type": "vit",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
_LARGE = _BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
# ViT and DINOv2 use the same names for the attention and for modules outside of the layers.
ATTENTION = {
    "attention.qkv": tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    "attention.output": ("attention.output.dense",),
}
MODULES = {"patches": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_LAYERS = LayerNames(
    "encoder.layer.{}.",
    ATTENTION
    | {
        "attention_norm": ("layernorm_before",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
        "mlp_norm": ("layernorm_after",),
    },
)


def _read(config: Mapping) -> VisionConfig:
    if config.get("pooler_act", "tanh") != "tanh":
        raise ValueError(f"pooler_act {config['pooler_act']!r} is not supported, only tanh")
    if (config.get("pooler_output_size") or config["hidden_size"]) != config["hidden_size"]:
        raise ValueError("a pooler that changes the width (pooler_output_size) is not supported")
    return VisionConfig(read_layers(config), config["image_size"], config["patch_size"])


VIT = VisionFamily(
    name="vit",
    poolings=("cls", "pooler", "mean"),
    defaults=_BASE,
    read=_read,
    layer_names=lambda config: _LAYERS,
    embedding_names=EmbeddingNames(),
    modules=MODULES | {"pooler": "pooler.dense"},
    prefixes=("vit.",),
    # "mean" is missing because sentence-transformers would include the class token in the mean.
    outputs={"cls": ("last_hidden_state", "cls"), "pooler": ("pooler_output", None)},
    dual_encoder_pooling="pooler",
    pooler_is_optional=True,
    architectures={
        "google/vit-base-patch16-224": _BASE,
        "google/vit-base-patch16-224-in21k": _BASE,
        "google/vit-base-patch16-384": _BASE | {"image_size": 384},
        "google/vit-base-patch32-224-in21k": _BASE | {"patch_size": 32},
        "google/vit-large-patch16-224": _LARGE,
        "google/vit-large-patch16-224-in21k": _LARGE,
    },
)

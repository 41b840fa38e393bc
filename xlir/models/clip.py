"""The image towers of CLIP and of MetaCLIP 2, which have the same architecture.

Radford et al. 2021 (https://arxiv.org/abs/2103.00020); Chuang et al. 2025
(https://arxiv.org/abs/2507.22062).
"""

from collections.abc import Mapping

from xlir.models.tensor_names import LayerNames
from xlir.models.vision_family import EmbeddingNames, VisionFamily, read_layers
from xlir.models.vision_transformer import VisionConfig

_BASE = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_LARGE = _BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
}
# CLIP and SigLIP use the same names.
LAYERS = LayerNames(
    "encoder.layers.{}.",
    {
        "attention.qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "attention.output": ("self_attn.out_proj",),
        "attention_norm": ("layer_norm1",),
        "mlp.fc1": ("mlp.fc1",),
        "mlp.fc2": ("mlp.fc2",),
        "mlp_norm": ("layer_norm2",),
    },
)
MODULES = {"patches": "embeddings.patch_embedding", "norm": "post_layernorm"}
# Dropped: the text side, heads of other tasks, and a constant that older versions saved.
IGNORED = (
    "classifier.",
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_",
    "embeddings.position_ids",
)


def _read(config: Mapping) -> VisionConfig:
    return VisionConfig(
        read_layers(config),
        config["image_size"],
        config["patch_size"],
        patch_bias=False,
        input_norm=True,
    )


CLIP = VisionFamily(
    name="clip_vision_model",
    other_names=("clip", "metaclip_2"),
    defaults=_BASE | {"patch_size": 32},
    read=_read,
    layer_names=lambda config: LAYERS,
    embedding_names=EmbeddingNames(
        "embeddings.position_embedding.weight", "embeddings.class_embedding"
    ),
    modules=MODULES | {"input_norm": "pre_layrnorm"},  # spelled like this in transformers
    prefixes=("vision_model.",),
    ignored=IGNORED,
    # "mean" is missing because sentence-transformers would include the class token in the mean.
    outputs={"cls": ("pooler_output", None)},
    dual_encoder_pooling="cls",
    architectures={
        "openai/clip-vit-base-patch32": _BASE | {"patch_size": 32},
        "openai/clip-vit-base-patch16": _BASE,
        "openai/clip-vit-large-patch14": _LARGE,
        "openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
    },
)

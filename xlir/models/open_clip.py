"""Translates the image tower of an open_clip model (Ilharco et al. 2021) to CLIP's or SigLIP's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from input_pipeline.preprocessing import CLIP, Preprocessing
from xlir.config import LARGEST_IMAGE, Group, Real, Whole, read_field
from xlir.models import timm
from xlir.models.transformer import WIDTH

# Supported fields of an open_clip model's vision_cfg: fields that are used here, fields that only
# training uses, and fields with the one value that is supported. Anything else is an error.
VISION_FIELDS = ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio")
TRAINING_FIELDS = ("patch_dropout", "output_tokens")
VISION_VALUES = {"pool_type": "tok", "pos_embed_type": "learnable", "block_type": "default"}

Weights = dict[str, np.ndarray]


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a CLIP or SigLIP image tower with the architecture of open_clip's.

    Args:
      config: the content of open_clip_config.json.

    Raises:
      ValueError: a field is missing or invalid, or the image tower is not one of these.
    """
    model = read_field(config, "model_cfg", Group())
    vision = read_field(model, "vision_cfg", Group())
    if vision.get("timm_model_name"):
        return timm.vision_config(vision)
    for field, value in vision.items():
        known = field in VISION_FIELDS + TRAINING_FIELDS or value == VISION_VALUES.get(field)
        if value and not known:
            raise ValueError(f"an image tower with vision_cfg.{field} {value!r} is not supported")
    if isinstance(vision.get("layers"), list):
        raise ValueError("a ResNet image tower (vision_cfg.layers is a list) is not supported")
    size, width = vision.get("image_size", 224), read_field(vision, "width", WIDTH)
    size = size[0] if isinstance(size, list) and size[:1] * 2 == size else size
    read_field({"image_size": size}, "image_size", Whole(1, LARGEST_IMAGE))
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": read_field(vision, "layers", Whole(1)),
        "num_attention_heads": width // read_field(vision, "head_width", Whole(1, width), 64),
        "intermediate_size": int(width * read_field(vision, "mlp_ratio", Real(1, 1000), 4.0)),
        "image_size": size,
        "patch_size": read_field(vision, "patch_size", WIDTH),
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }


def preprocessing(config: Mapping[str, Any], size: int) -> Preprocessing:
    """The preprocessing of open_clip's evaluation; it ignores the size in preprocess_cfg.

    Args:
      config: the content of open_clip_config.json.
      size: pixels per side of the tower's images.

    Raises:
      ValueError: a field is invalid, or images would be padded.
    """
    given = config.get("preprocess_cfg") or {}
    if given:
        read_field(config, "preprocess_cfg", Group())
    crops = {"shortest": "center_rounded", "squash": "squash"}
    mode = given.get("resize_mode") or "shortest"
    if mode not in tuple(crops):
        raise ValueError(f"preprocess_cfg.resize_mode {mode!r} is not supported")
    return Preprocessing(
        size=size,
        resample="bilinear" if given.get("interpolation") == "bilinear" else "bicubic",
        crop=crops[mode],
        mean=given.get("mean") or CLIP["image_mean"],
        std=given.get("std") or CLIP["image_std"],
    )


# Names in the layers, which open_clip's image and text towers share -> those of `transformers`.
LAYERS = {
    "transformer.resblocks.": "encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.": "embeddings.patch_embedding.",
    "ln_pre.": "pre_layrnorm.",  # spelled like this in transformers
    "ln_post.": "post_layernorm.",
} | LAYERS


def hugging_face_names(weights: Weights) -> Weights:
    """The image tower's weights of an open_clip model, with the names of `transformers`."""
    prefix = "visual."
    visual = {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
    if any(name.startswith("trunk.") for name in visual):
        return renamed(timm.in_one_layout(visual), timm.NAMES)
    if (projection := visual.pop("proj", None)) is not None:
        visual["visual_projection.weight"] = projection.T
    return renamed(visual, _NAMES)


def renamed(weights: Weights, names: Mapping[str, str]) -> Weights:
    """The weights with parts of their names replaced, and with separate query, key and value.

    Args:
      weights: a tower's weights.
      names: part of a name -> what replaces it, in this order.
    """
    found = {}
    for name, array in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        module, joint, suffix = name.partition(".self_attn.in_proj_")
        if joint:
            for part, value in zip("qkv", np.split(array, 3), strict=True):
                found[f"{module}.self_attn.{part}_proj.{suffix}"] = value
        else:
            found[name] = array
    return found

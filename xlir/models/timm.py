"""Translates the image towers of SigLIP in timm to SigLIP's layout in `transformers`.

open_clip's models of SigLIP (Zhai et al. 2023, https://arxiv.org/abs/2303.15343) and of NLLB-SigLIP
(Visheratin 2023, https://arxiv.org/abs/2309.01859) have them.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# Name in timm's names of models -> width, depth, number of heads, width inside the MLP.
SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# Models of SigLIP 2 whose GELU is the approximation by tanh, as in `transformers`.
TANH = ("base_patch32", "large_patch16_siglip_512", "so400m_patch16", "giantopt")
# Fields of vision_cfg, each with its supported values; None: any, as only training uses it.
FIELDS = {
    "timm_model_name": None,
    "timm_model_pretrained": None,
    "timm_drop": None,
    "timm_drop_path": None,
    "timm_pool": ("map",),
    "timm_proj": ("none", "linear"),
    "timm_proj_bias": (False,),
    "image_size": None,
}
NAMES = {
    "head.proj.": "visual_projection.",
    "trunk.patch_embed.proj.": "embeddings.patch_embedding.",
    "trunk.pos_embed": "embeddings.position_embedding.weight",
    "trunk.blocks.": "encoder.layers.",
    "trunk.norm.": "post_layernorm.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.proj.": ".self_attn.out_proj.",
    ".attn.qkv.": ".self_attn.in_proj_",
    "trunk.attn_pool.latent": "head.probe",
    "trunk.attn_pool.proj.": "head.attention.out_proj.",
    "trunk.attn_pool.norm.": "head.layernorm.",
    "trunk.attn_pool.mlp.": "head.mlp.",
}


def vision_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a SigLIP image tower with the architecture of timm's.

    Args:
      vision: the vision_cfg in an open_clip_config.json.

    Raises:
      ValueError: it is not a SigLIP tower with attention pooling.
    """
    name = str(vision["timm_model_name"])
    found = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", name)
    if found is None or found[1] not in SIZES or vision.get("timm_pool") != "map":
        raise ValueError(
            f"an image tower with vision_cfg.timm_model_name {name!r} and timm_pool "
            f"{vision.get('timm_pool')!r} is not supported, only timm's SigLIP with pool 'map'"
        )
    for field, value in vision.items():
        values = FIELDS.get(field, (None,))
        if values is not None and value not in values:
            raise ValueError(f"an image tower with vision_cfg.{field} {value!r} is not supported")
    width, depth, heads, inner = SIZES[found[1]]
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "image_size": int(found[3]),
        "patch_size": int(found[2]),
        "hidden_act": "gelu_pytorch_tanh" if name[len("vit_") :].startswith(TANH) else "gelu",
        "layer_norm_eps": 1e-6,
    }


def in_one_layout(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights, with positions [length, width] and joint projections in the pooling."""
    changed = dict(weights)
    if "trunk.pos_embed" in changed:
        changed["trunk.pos_embed"] = changed["trunk.pos_embed"][0]
    for suffix in ("weight", "bias"):
        names = [f"trunk.attn_pool.{part}.{suffix}" for part in ("q", "kv")]
        if all(name in changed for name in names):
            parts = [changed.pop(name) for name in names]
            changed[f"head.attention.in_proj_{suffix}"] = np.concatenate(parts)
    return changed

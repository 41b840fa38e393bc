"""Translates open_clip's own text towers to those of CLIP, MetaCLIP 2 and SigLIP.

Ilharco et al. 2021 (https://doi.org/10.5281/zenodo.5143773).
"""

from collections.abc import Mapping
from typing import Any

from xlir.config import Choice, Divisor, Flag, Group, Real, Whole, read_field
from xlir.models.open_clip import LAYERS, Weights, renamed
from xlir.models.transformer import EPSILON, WIDTH

# Fields of text_cfg that change the architecture and are read here, and fields that do not change
# it. Any other field is an error, unless it is empty.
ARCHITECTURE = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
ARCHITECTURE += ("pool_type", "no_causal_mask", "proj_bias", "eos_id", "norm_kwargs", "act_kwargs")
OTHER_FIELDS = ("hf_tokenizer_name", "tokenizer_kwargs", "output_tokens", "pad_id")
# (pool_type, no_causal_mask, proj_bias) -> model_type of the text tower that is the same.
TOWERS = {
    ("argmax", False, False): "clip_text_model",
    ("eos", False, False): "metaclip_2_text_model",
    ("last", True, True): "siglip_text_model",
}
_NAMES = {
    "token_embedding.": "embeddings.token_embedding.",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.": "final_layer_norm.",
} | LAYERS


def text_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a text tower of `transformers` with the same architecture.

    Args:
      model: the model_cfg in an open_clip_config.json.

    Raises:
      ValueError: a field is missing or invalid, or no supported tower is the same.
    """
    text = read_field(model, "text_cfg", Group())
    for field, value in text.items():
        if value and field not in ARCHITECTURE + OTHER_FIELDS:
            raise ValueError(f"a text tower with text_cfg.{field} {value!r} is not supported")
    kind = (
        read_field(text, "pool_type", Choice("argmax", "eos", "last"), "argmax"),
        read_field(text, "no_causal_mask", Flag(), False),
        read_field(text, "proj_bias", Flag(), False),
    )
    if kind not in TOWERS:
        raise ValueError(
            "a text tower with text_cfg.pool_type {!r}, no_causal_mask {} and proj_bias {} is "
            "neither CLIP's nor SigLIP's: not supported".format(*kind)
        )
    width = read_field(text, "width", WIDTH, 512)
    config = {
        "model_type": TOWERS[kind],
        "vocab_size": read_field(text, "vocab_size", Whole(1), 49408),
        "hidden_size": width,
        "num_hidden_layers": read_field(text, "layers", Whole(1), 12),
        "num_attention_heads": read_field(text, "heads", Divisor(width), 8),
        "intermediate_size": int(width * read_field(text, "mlp_ratio", Real(1, 1000), 4.0)),
        "max_position_embeddings": read_field(text, "context_length", Whole(3), 77),
        "hidden_act": _activation(model, text),
        "layer_norm_eps": read_field(text.get("norm_kwargs") or {}, "eps", EPSILON, 1e-5),
        # In CLIP's config.json, 2 means the highest id of a text.
        "eos_token_id": read_field(text, "eos_id", Whole(0), 2) if kind[0] == "eos" else 2,
    }
    if kind[0] == "last":
        config["projection_size"] = read_field(model, "embed_dim", WIDTH)
    return config


def _activation(model: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    options = text.get("act_kwargs") or {}
    if options not in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise ValueError(f"a text tower with text_cfg.act_kwargs {options!r} is not supported")
    if model.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_pytorch_tanh" if options.get("approximate") == "tanh" else "gelu"


def hugging_face_names(weights: Weights) -> Weights:
    """The text tower's weights of an open_clip model, with the names of `transformers`."""
    found = {}
    for name, array in weights.items():
        name = name.removeprefix("text.")
        # The causal mask, which older versions saved, is a constant.
        if name == "text_projection":
            found["text_projection.weight"] = array.T
        elif not name.startswith(("visual.", "logit_", "attn_mask")):
            # With a bias, the projection is SigLIP's head, which is a part of the tower.
            found[name.replace("text_projection.", "head.")] = array
    return renamed(found, _NAMES)

"""The text towers of CLIP and of MetaCLIP 2.

Radford et al. 2021 (https://arxiv.org/abs/2103.00020); Chuang et al. 2025
(https://arxiv.org/abs/2507.22062).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from xlir.config import Whole, read_field
from xlir.models.clip import LAYERS
from xlir.models.family import TowerSpec, Weights
from xlir.models.tensor_names import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)
from xlir.models.text_family import TextFamily
from xlir.models.text_transformer import TextConfig
from xlir.models.vision_family import read_layers

_MODULES = {"norm": "final_layer_norm", "head": "head"}
_TABLES = {
    "embedding": "embeddings.token_embedding.weight",
    "position": "embeddings.position_embedding.weight",
}
# Dropped: the image side, projections that are no part of a tower, the temperature, and a constant
# that older versions saved.
_IGNORED = (
    "vision_model.",
    "text_projection.",
    "visual_projection.",
    "logit_",
    "embeddings.position_ids",
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DualEncoderTextFamily(TextFamily):
    """Text towers that were trained as half of a dual encoder, with CLIP's names of tensors.

    A checkpoint holds the text tower alone or the whole dual encoder. The projection that follows
    the tower is not a part of it but a head.

    Attributes:
      defaults: the defaults of `transformers` for fields that a config.json omits.
    """

    prefix: str = "text_model."
    layer_names: LayerNames = LAYERS
    defaults: Mapping[str, Any]

    def complete(self, config: Mapping) -> dict[str, Any]:
        """The text tower's part of a config.json, with the defaults filled in.

        Raises:
          ValueError: the part is not a JSON object.
        """
        if "text_config" in config or "vision_config" in config:
            config = config.get("text_config") or {}
            if not isinstance(config, Mapping):
                raise ValueError(f"text_config is {config!r}; it must hold the tower's fields")
        return {**self.defaults, **config, "model_type": self.name}

    def tokenizer_fields(self, config: Mapping) -> dict[str, Any]:
        """See `Family.tokenizer_fields`. Published files have wrong ids of tokens not used here."""
        described = self.described(config)
        fields = {"model_type": self.name, "vocab_size": described.vocab_size}
        return fields if described.eos_id is None else fields | {"eos_token_id": described.eos_id}

    def trimmed(self, spec: TowerSpec, kept: Int32[np.ndarray, " kept"]) -> TowerSpec:
        """See `Family.trimmed`."""
        config = self.complete(spec.config) | {"vocab_size": len(kept)}
        eos_id = self.described(spec.config).eos_id
        if eos_id is not None:
            config["eos_token_id"] = int(np.searchsorted(kept, eos_id))
        return dataclasses.replace(spec, config=config)

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        left = {name.removeprefix(self.prefix): value for name, value in weights.items()}
        left = {name: value for name, value in left.items() if not name.startswith(_IGNORED)}
        depth = self.described(config).transformer.depth
        renamed = rename_layers(left, depth, self.layer_names) | rename_modules(left, _MODULES)
        for ours, theirs in _TABLES.items():
            if theirs in left:
                renamed[ours] = left.pop(theirs)
        return renamed | left

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`."""
        left = dict(weights)
        restored = restore_layers(left, self.layer_names) | restore_modules(left, _MODULES)
        restored |= {theirs: left.pop(ours) for ours, theirs in _TABLES.items()}
        return restored | left

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`."""
        return self.complete(spec.config)


def _read(config: Mapping, eos_id: int | None) -> TextConfig:
    return TextConfig(
        dataclasses.replace(read_layers(config), causal=True),
        read_field(config, "vocab_size", Whole(1)),
        read_field(config, "max_position_embeddings", Whole(1)),
        eos_id=eos_id,
    )


def _read_clip(config: Mapping) -> TextConfig:
    """OpenAI's files give 2 as the id of EOS, which is wrong: it is the highest id of a text."""
    eos_id = read_field(config, "eos_token_id", Whole(0))
    return _read(config, None if eos_id == 2 else eos_id)


def _read_metaclip(config: Mapping) -> TextConfig:
    return _read(config, read_field(config, "eos_token_id", Whole(0)))


_BASE = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "intermediate_size": 2048,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_LARGE = _BASE | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_HUGE = {
    "vocab_size": 901629,  # that of XLM-V
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "eos_token_id": 2,
}

CLIP_TEXT = DualEncoderTextFamily(
    name="clip_text_model",
    other_names=("clip",),
    poolings=("eos", "mean"),
    defaults=_BASE,
    read=_read_clip,
    outputs={"eos": ("pooler_output", None), "mean": ("last_hidden_state", "mean")},
    dual_encoder_pooling="eos",
    architectures={
        "openai/clip-vit-base-patch32": _BASE,
        "openai/clip-vit-base-patch16": _BASE,
        "openai/clip-vit-large-patch14": _LARGE,
        "openai/clip-vit-large-patch14-336": _LARGE,
    },
)
# `transformers` has a class of this tower, but AutoModel does not know it. So the layouts that load
# towers by AutoModel can't hold it, and `outputs` and `dual_encoder_pooling` are empty. Exports of
# both towers that were trained together are described in `xlir/export/dual_encoders.py`.
METACLIP_2_TEXT = DualEncoderTextFamily(
    name="metaclip_2_text_model",
    other_names=("metaclip_2",),
    poolings=("eos", "mean"),
    defaults=_BASE,
    read=_read_metaclip,
    outputs={},
    dual_encoder_pooling="",
    terms="MetaCLIP 2, CC-BY-NC-4.0: not for commercial use",
    architectures={"facebook/metaclip-2-worldwide-huge-quickgelu": _BASE | _HUGE},
)

"""The image towers of SigLIP, and of SigLIP 2's models of one resolution.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343); Tschannen et al. 2025
(https://arxiv.org/abs/2502.14786).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from xlir.models.clip import IGNORED, LAYERS, MODULES
from xlir.models.family import TowerSpec
from xlir.models.vision_family import EmbeddingNames, VisionFamily, read_layers
from xlir.models.vision_transformer import VisionConfig

_BASE = {
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_LARGE = _BASE | {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 256,
}
_SO400M = _BASE | {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 384,
    "patch_size": 14,
}
_POOL = "attention_pool."


def _read(config: Mapping) -> VisionConfig:
    return VisionConfig(
        read_layers(config), config["image_size"], config["patch_size"], class_token=False
    )


class SigLIPFamily(VisionFamily):
    """Image towers with attention pooling."""

    def check_pooling(self, config: Mapping, pooling: str) -> None:
        """See `Family.check_pooling`. Some checkpoints have no attention pooling head."""
        super().check_pooling(config, pooling)
        pooling = pooling or self.default_pooling
        if pooling == "attention" and self.complete(config).get("vision_use_head") is False:
            raise ValueError(
                f"pooling is {pooling!r}, but this SigLIP tower has no attention pooling head: "
                "set pooling to mean"
            )

    def rename_pooling(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the learned query, and splits the joint query, key and value projection."""
        names = ("head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias")
        if not all(name in left for name in names):
            return {}
        probe, weight, bias = (left.pop(name) for name in names)
        dim = weight.shape[1]
        return {
            f"{_POOL}probe": probe.reshape(-1),
            f"{_POOL}query.kernel": weight[:dim].T,
            f"{_POOL}query.bias": bias[:dim],
            f"{_POOL}key_value.kernel": weight[dim:].T,
            f"{_POOL}key_value.bias": bias[dim:],
        }

    def restore_pooling(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `rename_pooling`."""
        if f"{_POOL}probe" not in left:
            return {}

        def joined(part: str) -> np.ndarray:
            names = ("query", "key_value")
            return np.concatenate([left.pop(f"{_POOL}{name}.{part}") for name in names], -1)

        return {
            "head.probe": left.pop(f"{_POOL}probe")[None, None],
            "head.attention.in_proj_weight": joined("kernel").T,
            "head.attention.in_proj_bias": joined("bias"),
        }

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`. With mean pooling, attention pooling is not exported."""
        config = super().hub_config(spec, pad_id)
        return config | {"vision_use_head": False} if spec.pooling == "mean" else config


SIGLIP = SigLIPFamily(
    name="siglip_vision_model",
    other_names=("siglip",),
    poolings=("attention", "mean"),
    defaults=_BASE,
    read=_read,
    layer_names=lambda config: LAYERS,
    embedding_names=EmbeddingNames("embeddings.position_embedding.weight", None),
    modules=MODULES
    | {
        f"{_POOL}output": "head.attention.out_proj",
        f"{_POOL}norm": "head.layernorm",
        f"{_POOL}mlp.fc1": "head.mlp.fc1",
        f"{_POOL}mlp.fc2": "head.mlp.fc2",
    },
    prefixes=("vision_model.",),
    ignored=IGNORED,
    outputs={"attention": ("pooler_output", None), "mean": ("last_hidden_state", "mean")},
    dual_encoder_pooling="attention",
    architectures={
        "google/siglip-base-patch16-224": _BASE,
        "google/siglip-base-patch16-256": _BASE | {"image_size": 256},
        "google/siglip-large-patch16-256": _LARGE,
        "google/siglip-so400m-patch14-384": _SO400M,
        "google/siglip2-base-patch16-224": _BASE,
        "google/siglip2-large-patch16-256": _LARGE,
        "google/siglip2-so400m-patch14-384": _SO400M,
        "google/siglip2-so400m-patch16-256": _SO400M | {"image_size": 256, "patch_size": 16},
    },
)

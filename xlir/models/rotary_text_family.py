"""`RotaryTextFamily`: text towers with rotary positions and layers of local attention."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xlir.config import Group, Real, read_field
from xlir.models.family import TowerSpec, Weights
from xlir.models.tensor_names import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)
from xlir.models.text_family import TextFamily

# Kinds of layers, and of their rotary positions: not local, local.
KINDS = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RotaryTextFamily(TextFamily):
    """A family of text towers without position embeddings.

    Attributes:
      embedding_name: a checkpoint's name of the embedding table.
      modules: our name of a norm outside of the layers -> the checkpoint's name.
      ignored: prefixes of tensors that belong to the heads of other tasks; they are dropped.
    """

    poolings: tuple[str, ...] = ("mean", "cls")
    dual_encoder_pooling: str = ""
    embedding_name: str
    modules: Mapping[str, str]
    ignored: tuple[str, ...]

    def complete(self, config: Mapping) -> dict[str, Any]:
        """The fields of a config.json that have a value; null stands for the default."""
        return {name: value for name, value in config.items() if value is not None}

    def names(self, config: Mapping) -> LayerNames:
        """A checkpoint's names of the layers' tensors."""
        return self.layer_names

    def tokenizer_fields(self, config: Mapping) -> dict[str, Any]:
        """See `Family.tokenizer_fields`. The towers use no ids of special tokens."""
        return {"model_type": self.name, "vocab_size": self.described(config).vocab_size}

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`."""
        left = {
            name.removeprefix(self.prefix): value
            for name, value in weights.items()
            if not name.startswith(self.ignored)
        }
        depth = self.described(config).transformer.depth
        renamed = rename_layers(left, depth, self.names(config))
        renamed |= rename_modules(left, self.modules)
        if self.embedding_name in left:
            renamed["embedding"] = left.pop(self.embedding_name)
        return renamed | left

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`."""
        left = dict(weights)
        restored = restore_layers(left, self.names(config)) | restore_modules(left, self.modules)
        return restored | {self.embedding_name: left.pop("embedding")} | left

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`."""
        return {**spec.config, "pad_token_id": pad_id}


def local_layers(config: Mapping, default: Sequence[bool]) -> tuple[bool, ...]:
    """For each layer, whether its attention is local.

    Args:
      config: a config.json.
      default: the answer if it has no `layer_types`.

    Raises:
      ValueError: `layer_types` does not name one kind for each layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(default)
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(default)
        or any(kind not in KINDS for kind in kinds)
    ):
        raise ValueError(
            f"layer_types is {kinds!r}; it must be a list of {len(default)} times "
            f"{' or '.join(KINDS)}, one for each layer"
        )
    return tuple(kind == KINDS[1] for kind in kinds)


def rope_thetas(config: Mapping, fields: tuple[str, str], defaults: tuple) -> tuple[float, float]:
    """The base of the rotary positions in layers that are not local, and in local layers.

    Args:
      config: a config.json. Since version 5 of `transformers`, `rope_parameters` has the bases.
      fields: names of the fields that older versions have instead.
      defaults: the bases if the config.json has neither.

    Raises:
      ValueError: a base is invalid, or positions are scaled.
    """
    if "rope_scaling" in config:
        raise ValueError(f"rope_scaling {config['rope_scaling']!r} is not supported, only null")
    parameters = read_field(config, "rope_parameters", Group(), {})
    if unknown := sorted(set(parameters) - set(KINDS), key=str):
        raise ValueError(
            f"rope_parameters has {', '.join(map(str, unknown))}; known: {', '.join(KINDS)}"
        )
    thetas = []
    for kind, field, default in zip(KINDS, fields, defaults, strict=True):
        given = read_field(parameters, kind, Group(), {})
        rest = {name: value for name, value in given.items() if name != "rope_theta"}
        if rest not in ({}, {"rope_type": "default"}):
            raise ValueError(
                f"rope_parameters.{kind} {rest!r} is not supported, only rope_type 'default'"
            )
        name, holder = ("rope_theta", given) if "rope_theta" in given else (field, config)
        thetas.append(float(read_field(holder, name, Real(1, 1e9), default)))
    return thetas[0], thetas[1]


def check_head_width(width: int, name: str) -> None:
    """Raises ValueError if rotary positions can't be applied to heads of this width."""
    if width % 2:
        raise ValueError(
            f"{name}: heads of width {width} are not supported; rotary positions need an even width"
        )

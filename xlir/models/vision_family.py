"""`VisionFamily`: the base of all families whose towers are a `VisionTransformer`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from xlir.config import Choice, Divisor, Flag, Whole, read_field
from xlir.models.family import Family, TowerSpec, Weights
from xlir.models.tensor_names import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)
from xlir.models.transformer import ACTIVATIONS, EPSILON, RATE, WIDTH, TransformerConfig
from xlir.models.vision_transformer import VisionConfig, VisionTransformer, resized_positions


@dataclasses.dataclass(frozen=True)
class EmbeddingNames:
    """A checkpoint's names of the position table, the class token and the register tokens.

    Attributes:
      position: shape [1, tokens, dim], or [tokens, dim] if the name ends in ".weight"; None if
        the tower has no position table.
      class_token: shape [1, 1, dim] or [dim]; None if the tower has no class token.
      registers: shape [1, registers, dim]; None if the tower has no registers.
    """

    position: str | None = "embeddings.position_embeddings"
    class_token: str | None = "embeddings.cls_token"
    registers: str | None = None

    @property
    def is_flat(self) -> bool:
        """Whether the tables are stored without a leading axis of size 1."""
        return self.position is not None and self.position.endswith(".weight")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VisionFamily(Family):
    """A family of vision transformers.

    Attributes:
      defaults: the defaults of `transformers` for fields that a config.json omits.
      read: converts a config with all defaults filled in (see `complete`) to a `VisionConfig`. It
        raises ValueError if a field is invalid.
      layer_names: returns the checkpoint's names of the layers' tensors; its argument is the
        config with all defaults filled in.
      embedding_names: names of the position table and the extra tokens in checkpoints.
      modules: our name of a module outside of the layers -> the checkpoint's name.
      prefixes: prefixes of the tower's tensor names in checkpoints that hold more than the tower.
      ignored: name prefixes of tensors that do not belong to the tower; they are dropped.
      zeros: tensors that only pre-training uses; exports write them as zeros. Name -> shape
        without the last axis (the width).
      tower: the class of the tower.
      applied_at: the image size, in pixels per side, that the published weights are used with, if
        it differs from the size that the position table is for; otherwise 0.
    """

    side: str = "image"
    kind: str = "vit"
    poolings: tuple[str, ...] = ("cls", "mean")
    below_layers: frozenset[str] = frozenset(
        ("patches", "position", "class_token", "registers", "input_norm")
    )
    defaults: Mapping[str, Any]
    read: Callable[[Mapping], VisionConfig]
    layer_names: Callable[[Mapping], LayerNames]
    embedding_names: EmbeddingNames
    modules: Mapping[str, str]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ("classifier.", "embeddings.mask_token")
    zeros: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    tower: type[VisionTransformer] = VisionTransformer
    applied_at: int = 0

    def complete(self, config: Mapping) -> dict[str, Any]:
        """The image tower's part of a config.json, with the defaults filled in.

        Raises:
          ValueError: a field is invalid, or needs an unsupported feature.
        """
        if config["model_type"] != self.name:
            config = config.get("vision_config") or {}
            if not isinstance(config, Mapping):
                raise ValueError(f"vision_config is {config!r}; it must hold the tower's fields")
        config = {**self.defaults, **config, "model_type": self.name}
        for side in ("image_size", "patch_size"):
            if isinstance(config[side], (list, tuple)):
                if len(config[side]) not in (1, 2) or config[side][0] != config[side][-1]:
                    raise ValueError(f"{side} {config[side]} is not square")
                config[side] = config[side][0]
            read_field(config, side, WIDTH)
        if config["patch_size"] > config["image_size"]:
            raise ValueError(
                f"patch_size {config['patch_size']} is above image_size {config['image_size']}"
            )
        if config.get("num_channels", 3) != 3:
            raise ValueError(
                f"images of {config['num_channels']} channels are not supported, only 3"
            )
        return config

    def vision_config(self, config: Mapping) -> VisionConfig:
        """The tower that a config.json describes; omitted fields take the defaults."""
        return self.read(self.complete(config))

    def check(self, config: Mapping) -> None:
        """See `Family.check`."""
        self.vision_config(config)

    def create(
        self, spec: TowerSpec, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs
    ) -> VisionTransformer:
        """See `Family.create`."""
        return self.tower(
            self.vision_config(spec.config),
            mean=spec.preprocessing.mean,
            std=spec.preprocessing.std,
            pooling=spec.pooling,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )

    def image_size(self, config: Mapping) -> int:
        """See `Family.image_size`."""
        return self.applied_at or self.complete(config)["image_size"]

    def smallest_image(self, config: Mapping) -> int:
        """See `Family.smallest_image`; an image must hold at least one patch."""
        return self.complete(config)["patch_size"]

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`. Modules that only other poolings use are dropped."""
        config = self.complete(config)
        left = {}
        for name, value in weights.items():
            for prefix in self.prefixes:
                name = name.removeprefix(prefix)
            if not name.startswith(self.ignored):
                left[name] = value
        depth = self.read(config).transformer.depth
        renamed = rename_layers(left, depth, self.layer_names(config))
        renamed |= self._rename_embeddings(left) | self.rename_pooling(left)
        renamed |= rename_modules(left, self.modules)
        modules = {"pooler": "pooler.", "attention": "attention_pool."}
        used_by = pooling or self.default_pooling
        unused = tuple(prefix for pooling, prefix in modules.items() if pooling != used_by)
        return {name: x for name, x in renamed.items() if not name.startswith(unused)} | left

    def rename_pooling(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the pooling's tensors that `modules` does not cover, and pops them from `left`.

        By default there are none.
        """
        return {}

    def restore_pooling(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `rename_pooling`."""
        return {}

    def _rename_embeddings(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts the tables of `EmbeddingNames`, with the class token's position added to it."""
        names, renamed = self.embedding_names, {}
        registers, token, position = (
            left.pop(name, None) for name in (names.registers, names.class_token, names.position)
        )
        # transformers saves a table without rows for a tower without registers.
        if registers is not None and registers.size:
            renamed["registers"] = registers.reshape(-1, registers.shape[-1])
        if token is not None:
            renamed["class_token"] = token.reshape(-1)
        if position is not None:
            renamed["position"] = position = position.reshape(-1, position.shape[-1])
        if position is not None and names.class_token is not None:
            renamed["position"] = position[1:]
            if token is not None:
                renamed["class_token"] = renamed["class_token"] + position[0]
        return renamed

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """See `Family.restore`.

        `rename` added the class token's position to the class token. The sum stays there, and the
        first row of the position table that is written is zero.
        """
        config, left = self.complete(config), dict(weights)
        restored = restore_layers(left, self.layer_names(config))
        restored |= self._restore_embeddings(left) | self.restore_pooling(left)
        restored |= restore_modules(left, self.modules)
        kernel = f"{self.modules['patches']}.weight"
        side = config["patch_size"]
        restored[kernel] = restored[kernel].reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        for name, shape in self.zeros.items():
            restored[name] = np.zeros((*shape, config["hidden_size"]), np.float32)
        return restored | left

    def _restore_embeddings(self, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names, restored = self.embedding_names, {}
        position, token = left.pop("position", None), left.pop("class_token", None)
        if token is not None:
            restored[names.class_token] = token if names.is_flat else token[None, None]
        if position is not None:
            if token is not None:
                position = np.concatenate([np.zeros_like(token)[None], position])
            restored[names.position] = position if names.is_flat else position[None]
        if "registers" in left:
            restored[names.registers] = left.pop("registers")[None]
        return restored

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`."""
        return self.complete(spec.config) | {"image_size": spec.preprocessing.size}

    def used_weights(self, spec: TowerSpec, weights: Weights) -> dict[str, np.ndarray]:
        """See `Family.used_weights`. Resizes the position table to the spec's image size."""
        if "position" not in weights:
            return dict(weights)
        config, size = self.vision_config(spec.config), spec.preprocessing.size
        return {**weights, "position": resized_positions(weights["position"], config, size)}

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        config = dataclasses.asdict(self.vision_config(spec.config))
        return {
            "config": config | {"image_size": spec.preprocessing.size},
            "pooling": spec.pooling,
            "mean": spec.preprocessing.mean,
            "std": spec.preprocessing.std,
        }


def read_layers(config: Mapping) -> TransformerConfig:
    """Reads the stack of layers from a completed config.json that has ViT's or CLIP's fields.

    Raises:
      ValueError: a field is missing or invalid.
    """
    read = functools.partial(read_field, config)
    width, attention_dropout = read("hidden_size", WIDTH), read("attention_dropout", RATE, 0.0)
    return TransformerConfig(
        depth=read("num_hidden_layers", Whole(1)),
        width=width,
        num_heads=read("num_attention_heads", Divisor(width)),
        mlp_dim=read("intermediate_size", WIDTH),
        activation=read("hidden_act", Choice(*ACTIVATIONS)),
        epsilon=read("layer_norm_eps", EPSILON),
        pre_norm=True,
        dropout=read("hidden_dropout_prob", RATE, 0.0),
        attention_dropout=read("attention_probs_dropout_prob", RATE, attention_dropout),
        qkv_bias=read("qkv_bias", Flag(), True),
    )

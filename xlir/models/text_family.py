"""Families of text towers that are a `TextTransformer`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Int32

from xlir.models.family import Family, TowerSpec, Weights
from xlir.models.text_transformer import TextConfig, TextTransformer
from xlir.models.transformer import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)

_MODULES = {"embedding_norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}
# Heads of other tasks.
_IGNORED = ("lm_head.", "cls.", "classifier.", "vocab_", "qa_outputs.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextFamily(Family):
    """A family of text transformers; checkpoints have BERT's names outside of the layers.

    Attributes:
      read: the content of a config.json -> the tower that it describes; it raises ValueError where
        a field is missing or not what it may be.
      prefix: of all names in checkpoints for other tasks.
      layer_names: of a checkpoint.
      token_types: the embedding has a table of token types.
      sentence_modules: Hub id -> fields of a `TowerSpec` that the modules.json of this
        sentence-transformers model gives, for shapes where the checkpoint is not at hand.
    """

    side: str = "text"
    kind: str = "transformer"
    poolings: tuple[str, ...] = ("mean", "cls", "pooler")
    below_layers: frozenset[str] = frozenset(("embedding", "embedding_norm", "position"))
    outputs: Mapping[str, tuple[str, str | None]] = dataclasses.field(
        default_factory=lambda: {
            "mean": ("last_hidden_state", "mean"),
            "cls": ("last_hidden_state", "cls"),
            "pooler": ("pooler_output", None),
        }
    )
    dual_encoder_pooling: str = "pooler"
    read: Callable[[Mapping], TextConfig]
    prefix: str
    layer_names: LayerNames
    token_types: bool = True
    sentence_modules: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)

    def check(self, config: Mapping) -> None:
        """Also decoders are refused, in which tokens do not attend to all others."""
        for field in ("is_decoder", "add_cross_attention"):
            if config.get(field):
                raise ValueError(
                    f"{field} is {config[field]!r}: decoders are not supported, only encoders, in "
                    "which every token attends to all others"
                )
        self.read(config)

    def create(
        self, spec: TowerSpec, *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs
    ) -> TextTransformer:
        """See `Family.create`."""
        return TextTransformer(
            self.text_config(spec),
            pooling=spec.pooling,
            dense=spec.dense,
            dtype=dtype,
            remat=remat,
            rngs=rngs,
        )

    def text_config(self, spec: TowerSpec) -> TextConfig:
        """The tower's config, in which the padding token has the id of a trimmed vocabulary."""
        config = self.read(spec.config)
        return config if spec.pad_id is None else dataclasses.replace(config, pad_id=spec.pad_id)

    def longest_text(self, config: Mapping) -> int:
        """Tokens that the position table is for."""
        return self.read(config).max_length

    def trimmed(self, spec: TowerSpec, kept: Int32[np.ndarray, " kept"]) -> TowerSpec:
        """The config stays as it is but for the number of rows: positions still begin after its
        padding token. Where that token has another id from now on, `pad_id` says which.
        """
        pad_id, new_id = self.read(spec.config).pad_id, None
        if pad_id is not None:
            new_id = int(np.searchsorted(kept, pad_id))
        return dataclasses.replace(
            spec,
            config={**spec.config, "vocab_size": len(kept)},
            pad_id=None if new_id == pad_id else new_id,
        )

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`. The pooler is left out where it is not used."""
        left = {
            name.removeprefix(self.prefix)
            # What was converted from TensorFlow, such as Google's own BERT, has its names.
            .replace("LayerNorm.gamma", "LayerNorm.weight")
            .replace("LayerNorm.beta", "LayerNorm.bias"): value
            for name, value in weights.items()
            if not name.startswith(_IGNORED)
        }
        left.pop("embeddings.position_ids", None)  # a constant that older versions saved
        read = self.read(config)
        renamed = rename_layers(left, read.transformer.depth, self.layer_names)
        renamed |= rename_modules(left, _MODULES)
        if "embeddings.word_embeddings.weight" in left:
            renamed["embedding"] = left.pop("embeddings.word_embeddings.weight")
        if "embeddings.position_embeddings.weight" in left:
            position = left.pop("embeddings.position_embeddings.weight")
            types = left.pop("embeddings.token_type_embeddings.weight", None)
            position = position if types is None else position + types[0]
            renamed["position"] = position[read.position_offset :]
            pad_id, embedding = read.pad_id, renamed.get("embedding")
            if pad_id is not None and embedding is not None and position[pad_id].any():
                renamed["embedding"] = embedding.copy()
                renamed["embedding"][pad_id] += position[pad_id]
        if pooling != "pooler":
            renamed = {name: x for name, x in renamed.items() if not name.startswith("pooler.")}
        return renamed | left

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """What was folded into the position table stays there: other tables are zero."""
        left, read = dict(weights), self.read(config)
        restored = restore_layers(left, self.layer_names) | restore_modules(left, _MODULES)
        restored["embeddings.word_embeddings.weight"] = left.pop("embedding")
        position = left.pop("position")
        unused = np.zeros((read.position_offset, position.shape[1]), position.dtype)
        restored["embeddings.position_embeddings.weight"] = np.concatenate([unused, position])
        if self.token_types:
            types = np.zeros((config.get("type_vocab_size", 2), position.shape[1]), position.dtype)
            restored["embeddings.token_type_embeddings.weight"] = types
        return restored | left

    def hub_config(self, spec: TowerSpec, pad_id: int) -> dict[str, Any]:
        """See `Family.hub_config`. RoBERTa's positions count from the padding token's id."""
        config, read = dict(spec.config), self.read(spec.config)
        if read.pad_id is not None:
            config["pad_token_id"] = pad_id
            config["max_position_embeddings"] = read.max_length + pad_id + 1
        return config

    def torch_arguments(self, spec: TowerSpec) -> dict[str, Any]:
        """See `Family.torch_arguments`."""
        return {
            "config": dataclasses.asdict(self.text_config(spec)),
            "pooling": spec.pooling,
            "dense": list(spec.dense),
        }

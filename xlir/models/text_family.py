"""`TextFamily`: the base of all families whose towers are a `TextTransformer`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Int32

from xlir.models.family import Family, TowerSpec, Weights
from xlir.models.tensor_names import (
    LayerNames,
    rename_layers,
    rename_modules,
    restore_layers,
    restore_modules,
)
from xlir.models.text_transformer import TextConfig, TextTransformer

_MODULES = {"embedding_norm": "embeddings.LayerNorm", "pooler": "pooler.dense"}
# Prefixes of checkpoint tensors that belong to the heads of other tasks; they are dropped.
_IGNORED = ("lm_head.", "cls.", "classifier.", "vocab_", "qa_outputs.")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextFamily(Family):
    """A family of text transformers.

    Tensors outside of the layers are named as in BERT, unless a subclass says otherwise.

    Attributes:
      read: converts the tower's part of a config.json (see `complete`) to a `TextConfig`. It raises
        ValueError if a field is missing or invalid.
      prefix: prefix of the tower's tensor names in checkpoints that hold more than the tower.
      layer_names: names of the layers' tensors in checkpoints.
      token_types: checkpoints have a table of token type embeddings.
      sentence_modules: Hub id of a sentence-transformers model -> the `TowerSpec` fields that its
        modules.json implies. They give the tower's shapes if the checkpoint was not downloaded.
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

    def complete(self, config: Mapping) -> Mapping[str, Any]:
        """The tower's part of a config.json."""
        return config

    def described(self, config: Mapping) -> TextConfig:
        """The tower that a config.json describes."""
        return self.read(self.complete(config))

    def check(self, config: Mapping) -> None:
        """See `Family.check`. Decoders are rejected: their tokens do not attend to all others."""
        config = self.complete(config)
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
        """The tower's config, with the padding id of the trimmed vocabulary if there is one."""
        config = self.described(spec.config)
        return config if spec.pad_id is None else dataclasses.replace(config, pad_id=spec.pad_id)

    def longest_text(self, config: Mapping) -> int:
        """See `Family.longest_text`. It is the number of rows of the position table."""
        return self.described(config).max_length

    def trimmed(self, spec: TowerSpec, kept: Int32[np.ndarray, " kept"]) -> TowerSpec:
        """See `Family.trimmed`.

        Only `vocab_size` changes in the config. Its `pad_token_id` stays, because it says which
        row of the published position table is the first; a new id of the padding token goes into
        the spec's `pad_id`.
        """
        pad_id, new_id = self.described(spec.config).pad_id, None
        if pad_id is not None:
            new_id = int(np.searchsorted(kept, pad_id))
        return dataclasses.replace(
            spec,
            config={**spec.config, "vocab_size": len(kept)},
            pad_id=None if new_id == pad_id else new_id,
        )

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """See `Family.rename`. The pooler is dropped unless `pooling` uses it."""
        left = {
            name.removeprefix(self.prefix)
            # Checkpoints converted from TensorFlow, such as Google's BERT, use its names.
            .replace("LayerNorm.gamma", "LayerNorm.weight")
            .replace("LayerNorm.beta", "LayerNorm.bias"): value
            for name, value in weights.items()
            if not name.startswith(_IGNORED)
        }
        left.pop("embeddings.position_ids", None)  # a constant that older versions saved
        read = self.described(config)
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
        """See `Family.restore`.

        `rename` added the token type embedding to the position table. It stays there, and the
        token type table that is written is zero.
        """
        left, read = dict(weights), self.described(config)
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
        """See `Family.hub_config`. RoBERTa counts positions from the padding token's id."""
        config, read = dict(spec.config), self.described(spec.config)
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

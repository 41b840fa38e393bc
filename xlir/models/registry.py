"""All families of towers, by their names.

To add one, write its file (or add to that of a close one), name it here, and compare it with its
published implementation in a test.
"""

from collections.abc import Mapping
from typing import Any

from input_pipeline.preprocessing import Preprocessing
from xlir.config import LARGEST_IMAGE, Choice, Group, Text, Whole, read_field
from xlir.models import bert, clip, dinov2, efficientnet, muse, resnet, siglip, vit
from xlir.models.family import Family, TowerSpec

FAMILIES: tuple[Family, ...] = (
    muse.MUSE,
    bert.BERT,
    bert.DISTILBERT,
    bert.ROBERTA,
    efficientnet.EFFICIENTNET,
    resnet.RESNET,
    vit.VIT,
    clip.CLIP,
    dinov2.DINOV2,
    siglip.SIGLIP,
)


def families(side: str) -> dict[str, Family]:
    """The families of one side whose checkpoints are read, by `model_type`."""
    return {
        name: family
        for family in FAMILIES
        if family.side == side and not family.packages
        for name in (family.name, *family.other_names)
    }


def family_of(side: str, config: Mapping) -> Family:
    """The family of a checkpoint by its config.json.

    Raises:
      ValueError: it is of no family of this side.
    """
    known, model_type = families(side), config.get("model_type")
    # A damaged file may hold anything, also what no dictionary can be asked for.
    if model_type not in tuple(known):
        raise ValueError(
            f"it is a model of type {model_type!r}; known {side} models: {', '.join(known)}"
        )
    return known[model_type]


def packages(side: str) -> dict[str, TowerSpec]:
    """The towers that come as packages on PyPI, by the name that a configuration gives them."""
    return {
        name: TowerSpec(family, config)
        for family in FAMILIES
        if family.side == side
        for name, config in family.packages.items()
    }


def architectures(side: str) -> dict[str, dict[str, Any]]:
    """Hub id -> the config.json of that checkpoint, as far as it matters here."""
    return {
        hub_id: {"model_type": family.name, **config}
        for family in FAMILIES
        if family.side == side
        for hub_id, config in family.architectures.items()
    }


def below_layers() -> frozenset[str]:
    """Names that towers give to what comes before their layers."""
    return frozenset().union(*(family.below_layers for family in FAMILIES))


def spec_from_json(side: str, content: Mapping[str, Any]) -> TowerSpec:
    """The spec of a tower from the content of a tower.json, as `TowerSpec.to_json` gives it.

    Raises:
      ValueError, TypeError: something is missing, or not what it may be.
    """
    by_kind = {family.kind: family for family in FAMILIES if family.side == side}
    family = by_kind[read_field(content, "kind", Choice(*sorted(by_kind)))]
    if family.packages:
        pooling = ""
        config = {name: x for name, x in content.items() if name not in ("kind", "preprocessing")}
    else:
        pooling, config = (
            read_field(content, "pooling", Text()),
            read_field(content, "config", Group()),
        )
        family = family_of(side, config)
    family.check(config)
    preprocessing = None
    if side == "image":
        fields = read_field(content, "preprocessing", Group())
        read_field(fields, "size", Whole(1, LARGEST_IMAGE))
        preprocessing = Preprocessing(**fields)
    dense, pad_id = content.get("dense", ()), content.get("pad_id")
    return TowerSpec(family, config, pooling, dense, pad_id, preprocessing)

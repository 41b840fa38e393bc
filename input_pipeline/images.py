"""Decodes images into arrays, with the preprocessing that a checkpoint was trained with."""

import calendar
import contextlib
import io
import math
import time

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from input_pipeline import photo_limits
from input_pipeline.preprocessing import RESAMPLING, Preprocessing

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if each side keeps at least this many times the
# pixels that it is resized to. Photos of 6 megapixels or more then take half the time or less.
# At 224 pixels, values (0 to 255) change by 0.1 to 0.3 on average and by at most 3; they change by
# more than 1 in 1.5% of a grainy photo's values and in 1 of 40,000 of a smooth photo's. A factor of
# 2 would change values by up to 5, and 3% of them by more than 1.
DRAFT_FACTOR = 4
# If one side of a photo is more than this many times the other, only its middle is resized.
MAX_ASPECT_RATIO = 32
# Pixels converted at a time: copies of a whole photo of 50 megapixels take 0.2 GB each.
CONVERTED_AT_ONCE = 1 << 18
# `check` decodes a photo as if to resize it to this many pixels, more than any tower takes.
CHECKED_SIZE = 1024
# A PNG without any of these has no EXIF and no XMP.
PNG_MARKS = (b"eXIf", b"Raw profile type", b"adobe.xmp")


class ImageError(ValueError):
    """The bytes can't be decoded into a complete image."""


def decode(
    data: bytes, preprocessing: Preprocessing, *, reduce: bool = True
) -> UInt8[np.ndarray, "..."]:
    """Decodes an image and resizes it: RGB, values 0 to 255.

    The result is a square, [size, size, 3], or `packed` patches.

    The EXIF orientation is applied, transparent pixels are blended with white, the first frame of
    an animation is taken, and colour profiles are ignored. The pixels equal those of transformers'
    image processors with Pillow, except for large JPEGs (`DRAFT_FACTOR`). DINOv3 has no processor
    with Pillow: see `preprocessing.PROCESSORS`.

    Args:
      data: a file's bytes, in one of `photo_limits.FORMATS`.
      preprocessing: size, crop and filter.
      reduce: decode large JPEGs at a fraction of their size, which takes half the time or less.

    Raises:
      ImageError: the data are damaged, truncated, of an unknown format, or would take too much
        memory (`photo_limits`).
    """
    return _array(_fitted(data, preprocessing, reduce), preprocessing)


def _fitted(data: bytes, preprocessing: Preprocessing, reduce: bool) -> Image.Image:
    """Decodes an image, resizes and crops it."""
    image, size, box = _upright_rgb(data, DRAFT_FACTOR * preprocessing.resize if reduce else 0)
    if preprocessing.patch:
        return _resized(image, _size_in_patches(size, preprocessing), preprocessing.resample, box)
    if preprocessing.crop != "squash":
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            image = _middle(image)
            size, box = image.size, None
        width, height = _shorter_side_to(preprocessing.resize, size)
    else:
        width = height = preprocessing.resize
    # Resize the whole image, then crop: resizing only the cropped part differs by up to 3 of 255.
    image = _resized(image, (width, height), preprocessing.resample, box)
    half = round if preprocessing.crop == "center_rounded" else math.floor
    left, top = (half((side - preprocessing.size) / 2) for side in (width, height))
    return image.crop((left, top, left + preprocessing.size, top + preprocessing.size))


def _array(image: Image.Image, preprocessing: Preprocessing) -> UInt8[np.ndarray, "..."]:
    """The pixels of a resized image, as `decode` returns them."""
    pixels = np.array(image)
    return packed(pixels, preprocessing) if preprocessing.patch else pixels


def packed(
    pixels: UInt8[np.ndarray, "height width 3"], preprocessing: Preprocessing
) -> UInt8[np.ndarray, "rows bytes"]:
    """The patches of an image with any number of rows and columns, in an array of one shape.

    A row of the array holds the red, green and blue values of a patch. The rows after the last
    patch are 0. The very last row begins with the number of rows of patches and that of columns,
    two bytes each, the higher one first.
    """
    patch, result = preprocessing.patch, np.zeros(preprocessing.shape, np.uint8)
    rows, columns = (side // patch for side in pixels.shape[:2])
    patches = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    result[: rows * columns] = patches.reshape(rows * columns, -1)
    result[-1, :4] = np.array([rows, columns], ">u2").view(np.uint8)
    return result


def _size_in_patches(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height, in whole patches, of the largest image that has not too many patches.

    The scale is found by bisection, as in transformers' `Siglip2ImageProcessor`: its precision
    decides whether a photo gets a further row or column.
    """
    patch, smallest, largest = preprocessing.patch, 1e-6, 100.0

    def grid(scale: float) -> list[int]:
        return [max(math.ceil(side * scale / patch), 1) for side in size]

    while largest - smallest >= 1e-5:
        scale = (smallest + largest) / 2
        if math.prod(grid(scale)) <= preprocessing.patches:
            smallest = scale
        else:
            largest = scale
    columns, rows = grid(smallest)
    return columns * patch, rows * patch


def decode_augmented(
    data: bytes,
    preprocessing: Preprocessing,
    generator: np.random.Generator,
    min_area: float,
    mirror: bool,
) -> UInt8[np.ndarray, "..."]:
    """A random part of an image, resized as by `decode` and randomly mirrored.

    The crop is Inception's (Szegedy et al. 2015, section 6): its area is uniform, its aspect ratio
    log-uniform between 3/4 and 4/3.

    Args:
      data: a file's bytes.
      preprocessing: size and filter; its crop applies only without a random crop.
      generator: draws the crop and whether to mirror.
      min_area: the smallest share of the area that is kept; 0 for no random crop.
      mirror: mirror each image with a probability of 1/2.

    Raises:
      ImageError: as `decode`.
    """
    if min_area:
        image, _, _ = _upright_rgb(data, DRAFT_FACTOR * preprocessing.size)
        box = _random_box(image.size, min_area, generator)
        size = (preprocessing.size, preprocessing.size)
        if preprocessing.patch:
            left, top, right, bottom = box
            size = _size_in_patches(
                (math.ceil(right - left), math.ceil(bottom - top)), preprocessing
            )
        image = _resized(image, size, preprocessing.resample, box)
    else:
        image = _fitted(data, preprocessing, reduce=True)
    if mirror and generator.random() < 0.5:
        image = ImageOps.mirror(image)
    return _array(image, preprocessing)


def check(data: bytes) -> None:
    """Checks that `decode` can decode an image for any tower.

    Raises:
      ImageError: as `decode`.
    """
    _upright_rgb(data, DRAFT_FACTOR * CHECKED_SIZE)


def preview(data: bytes, longest: int) -> UInt8[np.ndarray, "height width 3"]:
    """An upright image in its own proportions, with no side above `longest` pixels.

    Raises:
      ImageError: as `decode`.
    """
    image, _, _ = _upright_rgb(data, longest)
    image.thumbnail((longest, longest))
    return np.array(image)


def facts(data: bytes) -> tuple[int, int, int | None]:
    """Reads a photo's size and date, for most photos without decoding any pixels.

    Returns:
      Width and height in pixels, upright; and when the photo was taken (EXIF DateTimeOriginal), in
      seconds since 1970 by the clock of the camera, or None.

    Raises:
      ImageError: as `decode`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=photo_limits.FORMATS)
    except Exception as error:
        raise _image_error(data, error) from error
    taken = None
    width, height = image.size
    # Pillow's EXIF readers may raise anything on damaged data; a photo works without EXIF.
    with contextlib.suppress(Exception):
        if image.format == "PNG" and "exif" not in image.info:
            # Pillow decodes a PNG to find what comes after its pixels.
            if not any(mark in data for mark in PNG_MARKS):
                return width, height, None
            photo_limits.check_header(image, data, image.size)
        exif = image.getexif()
        # Pillow has already swapped width and height of a rotated TIFF.
        if image.format != "TIFF" and exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            width, height = height, width
        text = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        taken = calendar.timegm(time.strptime(text.strip("\0 ")[:19], "%Y:%m:%d %H:%M:%S"))
    return width, height, taken


def _random_box(
    size: tuple[int, int], min_area: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random part; the whole image if ten draws do not fit."""
    width, height = size
    for _ in range(10):
        area = generator.uniform(min_area, 1) * width * height
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left = generator.uniform(0, width - across)
            top = generator.uniform(0, height - down)
            return left, top, left + across, top + down
    return 0.0, 0.0, float(width), float(height)


def _upright_rgb(
    data: bytes, enough: int
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float] | None]:
    """Calls `_decoded` and turns any error into an ImageError."""
    try:
        return _decoded(data, enough)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        raise _image_error(data, error) from error


def _image_error(data: bytes, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.UnidentifiedImageError):
        reason = f"it is in none of the formats {', '.join(photo_limits.FORMATS)}"
    return ImageError(f"cannot decode image of {len(data)} bytes: {reason}")


def _decoded(
    data: bytes, enough: int
) -> tuple[Image.Image, tuple[int, int], tuple[float, float, float, float] | None]:
    """Decodes an image upright, in RGB.

    A JPEG may be reduced to a half, a quarter or an eighth of its size, with no side below
    `enough` pixels. If `enough` is 0, it is not reduced.

    Returns:
      The image; its upright width and height without reduction; and the box (left, top, right,
      bottom) of the picture in a reduced image, whose last row and column may be partly padding.
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
        # The padding is at the right and the bottom in the file; the orientation moves it.
        left = image.width - width if orientation in (2, 3, 6, 7) else 0.0
        top = image.height - height if orientation in (3, 4, 7, 8) else 0.0
        box = (left, top, left + width, top + height)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image, size, box
    photo_limits.check_copy(image, data, 4)
    return _rgb(image), size, box


def _rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB over white, some rows at a time."""
    result = Image.new("RGB", image.size)
    rows = max(CONVERTED_AT_ONCE // image.width, 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        part = image.crop((0, top, image.width, bottom))
        if part.mode.startswith("I"):
            # 16 bits per pixel: Pillow's conversion to RGB would clip the values, not scale them.
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
    """Resizes a part of an image.

    Pillow resizes the width first, which would take 900 MB for 1 x 1,000,000 pixels. Therefore the
    height of such narrow images is resized first.
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
    """The middle of a very long image, from which the center crop will be taken.

    Resizing all of 3 x 60,000 pixels to a width of 224 would take 3 GB.
    """
    width, height = (min(side, MAX_ASPECT_RATIO * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

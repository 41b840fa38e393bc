"""Decodes images into arrays, with the preprocessing that a checkpoint was trained with."""

import calendar
import contextlib
import io
import math
import time

import numpy as np
from jaxtyping import Float32, UInt8
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

# What a tower takes for an image: values 0 to 255, of the shape and dtype of its preprocessing.
Pixels = UInt8[np.ndarray, "..."] | Float32[np.ndarray, "..."]
# Left, top, right and bottom of a part of an image, in pixels.
Box = tuple[float, float, float, float]


class ImageError(ValueError):
    """The bytes can't be decoded into a complete image."""


def decode(data: bytes, preprocessing: Preprocessing, *, reduce: bool = True) -> Pixels:
    """Decodes an image and resizes it: RGB, values 0 to 255, of the dtype `preprocessing.dtype`.

    The result is a square, [size, size, 3], or `packed` patches.

    The EXIF orientation is applied, transparent pixels are blended with white, the first frame of
    an animation is taken, and colour profiles are ignored. The pixels equal those of transformers'
    image processors, except for large JPEGs (`DRAFT_FACTOR`): bit for bit those of processors with
    Pillow (uint8), and those of DINOv3's (float32) up to 0.005 at 224 pixels a side and in
    proportion at other sizes, because torch computes the filter's positions in float32.

    Args:
      data: a file's bytes, in one of `photo_limits.FORMATS`.
      preprocessing: size, crop, filter and dtype.
      reduce: decode large JPEGs at a fraction of their size, which takes half the time or less.

    Raises:
      ImageError: the data are damaged, truncated, of an unknown format, or would take too much
        memory (`photo_limits`).
    """
    return _finished(_fitted(data, preprocessing, reduce), preprocessing)


def _fitted(data: bytes, preprocessing: Preprocessing, reduce: bool) -> Pixels:
    """Decodes an image, resizes and crops it: [height, width, 3]."""
    image, size, box = _upright_rgb(data, DRAFT_FACTOR * preprocessing.resize if reduce else 0)
    if preprocessing.patch:
        return _resized(image, _size_in_patches(size, preprocessing), preprocessing, box)
    if preprocessing.crop != "squash":
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            image = _middle(image)
            size, box = image.size, None
        width, height = _shorter_side_to(preprocessing.resize, size)
    else:
        width = height = preprocessing.resize
    # Resize the whole image, then crop: resizing only the cropped part differs by up to 3 of 255.
    pixels = _resized(image, (width, height), preprocessing, box)
    half = round if preprocessing.crop == "center_rounded" else math.floor
    left, top = (half((side - preprocessing.size) / 2) for side in (width, height))
    return pixels[top : top + preprocessing.size, left : left + preprocessing.size]


def _finished(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """The pixels of a resized image, as `decode` returns them."""
    # Without the copy, all pixels would stay in memory as long as the part that is cropped.
    return packed(pixels, preprocessing) if preprocessing.patch else pixels.copy()


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
) -> Pixels:
    """A random part of an image, resized as by `decode` and randomly mirrored.

    The crop is Inception's (Szegedy et al. 2015, section 6): its area is uniform, its aspect ratio
    log-uniform between 3/4 and 4/3.

    Args:
      data: a file's bytes.
      preprocessing: size, filter and dtype; its crop applies only without a random crop.
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
        pixels = _resized(image, size, preprocessing, box)
    else:
        pixels = _fitted(data, preprocessing, reduce=True)
    if mirror and generator.random() < 0.5:
        pixels = pixels[:, ::-1]
    return _finished(pixels, preprocessing)


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


def _random_box(size: tuple[int, int], min_area: float, generator: np.random.Generator) -> Box:
    """A random part; the whole image if ten draws do not fit."""
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


def _upright_rgb(data: bytes, enough: int) -> tuple[Image.Image, tuple[int, int], Box | None]:
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


def _decoded(data: bytes, enough: int) -> tuple[Image.Image, tuple[int, int], Box | None]:
    """Decodes an image upright, in RGB.

    A JPEG may be reduced to a half, a quarter or an eighth of its size, with no side below
    `enough` pixels. If `enough` is 0, it is not reduced.

    Returns:
      The image; its upright width and height without reduction; and the box of the picture in a
      reduced image, whose last row and column may be partly padding.
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
    image: Image.Image, size: tuple[int, int], preprocessing: Preprocessing, box: Box | None
) -> Pixels:
    """Resizes a part of an image to a width and height: [height, width, 3].

    Pillow resizes the width first, which would take 900 MB for 1 x 1,000,000 pixels. Therefore the
    height of such narrow images is resized first.
    """
    box = box or (0.0, 0.0, *map(float, image.size))
    first = 1 if image.height > MAX_ASPECT_RATIO * image.width else 0
    filter_ = RESAMPLING[preprocessing.resample]
    if preprocessing.dtype == "float32":
        channels = (_resized_channel(image, c, size, box, filter_, first) for c in "RGB")
        return np.stack([np.asarray(channel) for channel in channels], axis=-1)
    if first:
        image = _along(image, first, size, box, filter_)
        box = (box[0], 0, box[2], size[1])
    return np.asarray(image.resize(size, filter_, box=box))


def _resized_channel(
    image: Image.Image, name: str, size: tuple[int, int], box: Box, filter_: int, first: int
) -> Image.Image:
    """One channel of a resized part of an image, in float32.

    Pillow has such images of one channel only. The axis `first` (0: width) is resized a strip at a
    time, so that the whole photo is never in memory in float32.
    """
    length = list(image.size)
    length[first] = size[first]
    result = Image.new("F", tuple(length))
    strip, step = [0, 0, *image.size], max(CONVERTED_AT_ONCE // image.size[first], 1)
    for start in range(0, image.size[1 - first], step):
        strip[1 - first], strip[3 - first] = start, min(start + step, image.size[1 - first])
        part = image.crop(tuple(strip)).getchannel(name).convert("F")
        result.paste(_along(part, first, size, box, filter_), tuple(strip[:2]))
    return _along(result, 1 - first, size, box, filter_)


def _along(
    image: Image.Image, axis: int, size: tuple[int, int], box: Box, filter_: int
) -> Image.Image:
    """Resizes one axis (0: width) of a part of an image; all of the other axis is kept."""
    length, part = list(image.size), [0, 0, *image.size]
    length[axis], part[axis::2] = size[axis], box[axis::2]
    return image.resize(tuple(length), filter_, box=tuple(part))


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

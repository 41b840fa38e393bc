"""Decoding: orientation, transparency, colour modes, crops, and damaged files."""

import io

import numpy as np
import pytest
from PIL import Image

from input_pipeline import images


def encoded(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def corners(width: int = 40, height: int = 24) -> Image.Image:
    """Red, green, blue and yellow quarters, row by row."""
    image = Image.new("RGB", (width, height))
    colours = ["red", "lime", "blue", "yellow"]
    for index, colour in enumerate(colours):
        left, top = index % 2 * width // 2, index // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def quarters(array: np.ndarray) -> list[str]:
    """Names of the colours in the middle of each quarter, row by row."""
    names = {(1, 0, 0): "red", (0, 1, 0): "lime", (0, 0, 1): "blue", (1, 1, 0): "yellow"}
    size = len(array)
    points = [(size * y // 4, size * x // 4) for y in (1, 3) for x in (1, 3)]
    return [names[tuple((array[point] > 128).astype(int).tolist())] for point in points]


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, "red lime blue yellow"),
        (2, "lime red yellow blue"),
        (3, "yellow blue lime red"),
        (4, "blue yellow red lime"),
        (5, "red blue lime yellow"),
        (6, "blue red yellow lime"),
        (7, "yellow lime blue red"),
        (8, "lime yellow red blue"),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_orientation(orientation, expected, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = images.decode(encoded(corners(), format, exif=exif), 32)
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8
    assert quarters(array) == expected.split()


def test_transparency_is_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (images.decode(encoded(image, "PNG"), 4) == 255).all()
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert np.abs(images.decode(encoded(image, "PNG"), 4).astype(int) - 127).max() <= 1
    gray = Image.new("LA", (8, 8), (0, 0))
    assert (images.decode(encoded(gray, "PNG"), 4) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (images.decode(encoded(palette, "PNG", transparency=1), 4) == 255).all()
    assert (images.decode(encoded(palette, "PNG", transparency=0), 4) == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("mode", "format", "colour", "expected"),
    [
        ("CMYK", "JPEG", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", "TIFF", (255, 0, 0, 0), (0, 255, 255)),
        ("L", "JPEG", 100, (100, 100, 100)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("P", "GIF", 0, (0, 0, 0)),
        ("I;16", "PNG", 0x8000, (128, 128, 128)),
        ("I;16", "TIFF", 0xFFFF, (255, 255, 255)),
        ("I", "TIFF", 0x4000, (64, 64, 64)),
        ("RGB", "WEBP", (0, 0, 255), (0, 0, 255)),
    ],
)
def test_colour_modes(mode, format, colour, expected):
    array = images.decode(encoded(Image.new(mode, (16, 16), colour), format), 8)
    assert np.abs(array.astype(int) - expected).max() <= 4


def test_crops():
    stripes = Image.new("RGB", (90, 30), "red")
    stripes.paste("lime", (30, 0, 60, 30))
    data = encoded(stripes, "PNG")
    assert (images.decode(data, 30, crop="center") == (0, 255, 0)).all()
    squashed = images.decode(data, 30)
    assert squashed[15, 2].tolist() == squashed[15, 27].tolist() == [255, 0, 0]
    assert squashed[15, 15].tolist() == [0, 255, 0]


def test_resampling_at_the_same_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    for resample in images.RESAMPLING:
        np.testing.assert_array_equal(images.decode(data, 32, resample), pixels)


def test_reduced_decoding_of_photos_is_sane(shared):
    photos = sorted(shared.rglob("*.jpg"))[:8]
    for photo in photos:
        with Image.open(photo) as image:
            whole = image.convert("RGB")
        large = encoded(whole.resize((2400, 1800), Image.Resampling.LANCZOS), "JPEG", quality=95)
        full = np.asarray(
            Image.open(io.BytesIO(large)).resize((224, 224), Image.Resampling.BICUBIC)
        )
        difference = np.abs(images.decode(large, 224).astype(int) - full)
        assert difference.mean() < 1
        np.testing.assert_array_equal(
            images.decode(photo.read_bytes(), 224),
            np.asarray(whole.resize((224, 224), Image.Resampling.BICUBIC)),
        )


PHOTO = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image format"),
        (b"<html>404</html>", "no image format"),
        (PHOTO[: len(PHOTO) // 2], "truncated"),
        (PHOTO[:-200], "truncated"),
        (PHOTO[:30], "Truncated"),
        (PHOTO[:2] + bytes(len(PHOTO)), "no image format"),
        (encoded(corners(), "PNG")[:-30], "truncated"),
    ],
)
def test_damaged_data(data, reason):
    with pytest.raises(images.ImageError, match=reason) as raised:
        images.decode(data, 32)
    assert str(raised.value).startswith(f"cannot decode image of {len(data)} bytes: ")
    assert "\n" not in str(raised.value)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(images.ImageError, match="decompression bomb"):
        images.decode(encoded(Image.new("1", (64, 64)), "PNG"), 32)


def test_unknown_options():
    with pytest.raises(ValueError, match="known: nearest, bilinear, bicubic, lanczos"):
        images.decode(PHOTO, 32, resample="cubic")
    with pytest.raises(ValueError, match="known: squash, center"):
        images.decode(PHOTO, 32, crop="random")

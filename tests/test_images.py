"""Decoding: orientation, transparency, colour modes, crops, and damaged files."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import images
from input_pipeline.preprocessing import CROPS, DTYPES, RESAMPLING, Preprocessing


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
    array = images.decode(encoded(corners(), format, exif=exif), Preprocessing(32))
    assert array.shape == (32, 32, 3)
    assert array.dtype == np.uint8
    assert quarters(array) == expected.split()


def test_transparency_is_over_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (images.decode(encoded(image, "PNG"), Preprocessing(4)) == 255).all()
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert (
        np.abs(images.decode(encoded(image, "PNG"), Preprocessing(4)).astype(int) - 127).max() <= 1
    )
    gray = Image.new("LA", (8, 8), (0, 0))
    assert (images.decode(encoded(gray, "PNG"), Preprocessing(4)) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert (images.decode(encoded(palette, "PNG", transparency=1), Preprocessing(4)) == 255).all()
    assert (
        images.decode(encoded(palette, "PNG", transparency=0), Preprocessing(4)) == (0, 0, 255)
    ).all()


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
    array = images.decode(encoded(Image.new(mode, (16, 16), colour), format), Preprocessing(8))
    assert np.abs(array.astype(int) - expected).max() <= 4


def test_crops():
    stripes = Image.new("RGB", (90, 30), "red")
    stripes.paste("lime", (30, 0, 60, 30))
    data = encoded(stripes, "PNG")
    assert (images.decode(data, Preprocessing(30, crop="center")) == (0, 255, 0)).all()
    squashed = images.decode(data, Preprocessing(30))
    assert squashed[15, 2].tolist() == squashed[15, 27].tolist() == [255, 0, 0]
    assert squashed[15, 15].tolist() == [0, 255, 0]


@pytest.mark.parametrize("margin", range(6))
def test_half_of_an_odd_margin(margin):
    """transformers crops at (size - crop) // 2, torchvision at round((size - crop) / 2)."""
    pixels = np.empty((8, 8 + margin, 3), np.uint8)
    pixels[:] = np.arange(8 + margin)[:, None]
    data = encoded(Image.fromarray(pixels), "PNG")
    for crop, left in (("center", margin // 2), ("center_rounded", round(margin / 2))):
        assert images.decode(data, Preprocessing(8, crop=crop))[0, 0, 0] == left


def test_resampling_at_the_same_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "PNG")
    for resample in RESAMPLING:
        np.testing.assert_array_equal(
            images.decode(data, Preprocessing(32, resample=resample)), pixels
        )


def test_reduced_decoding_of_photos_is_sane(shared):
    photos = sorted(shared.rglob("*.jpg"))[:8]
    for photo in photos:
        with Image.open(photo) as image:
            whole = image.convert("RGB")
        large = encoded(whole.resize((2400, 1800), Image.Resampling.LANCZOS), "JPEG", quality=95)
        full = np.asarray(
            Image.open(io.BytesIO(large)).resize((224, 224), Image.Resampling.BICUBIC)
        )
        difference = np.abs(images.decode(large, Preprocessing(224)).astype(int) - full)
        assert difference.mean() < 1
        np.testing.assert_array_equal(
            images.decode(photo.read_bytes(), Preprocessing(224)),
            np.asarray(whole.resize((224, 224), Image.Resampling.BICUBIC)),
        )


PHOTO = encoded(Image.effect_noise((200, 200), 80).convert("RGB"), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "in none of the formats"),
        (b"<html>404</html>", "in none of the formats"),
        (PHOTO[: len(PHOTO) // 2], "truncated"),
        (PHOTO[:-200], "truncated"),
        (PHOTO[:30], "Truncated"),
        (PHOTO[:2] + bytes(len(PHOTO)), "in none of the formats"),
        (encoded(corners(), "PNG")[:-30], "truncated"),
    ],
)
def test_damaged_data(data, reason):
    with pytest.raises(images.ImageError, match=reason) as raised:
        images.decode(data, Preprocessing(32))
    assert str(raised.value).startswith(f"cannot decode image of {len(data)} bytes: ")
    assert "\n" not in str(raised.value)


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(images.ImageError, match="decompression bomb"):
        images.decode(encoded(Image.new("1", (64, 64)), "PNG"), Preprocessing(32))


def test_unknown_options():
    with pytest.raises(ValueError, match="known: nearest, bilinear, bicubic, lanczos"):
        Preprocessing(32, resample="cubic")
    with pytest.raises(ValueError, match="known: squash, center"):
        Preprocessing(32, crop="random")


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
OLD = {"do_normalize": True, "do_resize": True}
NEW = {**OLD, "do_rescale": True, "rescale_factor": 0.00392156862745098}

# Name -> content of preprocessor_config.json, and the expected size, resize, crop and resample.
CHECKPOINTS = {
    "vit": (
        {**OLD, **HALF, "feature_extractor_type": "ViTFeatureExtractor", "size": 224},
        (224, 224, "squash", "bilinear"),
    ),
    "vit, new": (
        {**NEW, **HALF, "image_processor_type": "ViTImageProcessor", "resample": 2}
        | {"size": {"height": 384, "width": 384}},
        (384, 384, "squash", "bilinear"),
    ),
    "clip": (
        {**OLD, **OPENAI, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
        | {"do_center_crop": True, "size": 224, "crop_size": 224},
        (224, 224, "center", "bicubic"),
    ),
    "clip, new": (
        {**NEW, **OPENAI, "image_processor_type": "CLIPImageProcessorFast", "resample": 3}
        | {"do_center_crop": True, "do_convert_rgb": True, "size": {"shortest_edge": 335}}
        | {"crop_size": {"height": 335, "width": 335}},
        (335, 335, "center", "bicubic"),
    ),
    "dinov2": (
        {**NEW, **IMAGENET, "image_processor_type": "BitImageProcessor", "resample": 3}
        | {"do_center_crop": True, "do_convert_rgb": True, "size": {"shortest_edge": 256}}
        | {"crop_size": {"height": 224, "width": 224}},
        (224, 256, "center", "bicubic"),
    ),
    "siglip": (
        {**NEW, **HALF, "image_processor_type": "SiglipImageProcessor", "resample": 3}
        | {"do_convert_rgb": None, "size": {"height": 224, "width": 224}},
        (224, 224, "squash", "bicubic"),
    ),
    "deit": (
        {**OLD, **IMAGENET, "feature_extractor_type": "DeiTFeatureExtractor", "resample": 3}
        | {"do_center_crop": True, "size": 256, "crop_size": 224},
        (224, 256, "squash", "bicubic"),
    ),
    "resnet": (
        {**OLD, **IMAGENET, "feature_extractor_type": "ConvNextFeatureExtractor", "resample": 3}
        | {"crop_pct": 0.875, "size": 224},
        (224, 256, "center", "bicubic"),
    ),
    "convnext, odd": (
        {**NEW, **IMAGENET, "image_processor_type": "ConvNextImageProcessor", "resample": 2}
        | {"crop_pct": 0.9, "size": {"shortest_edge": 161}},
        (161, 178, "center", "bilinear"),
    ),
    "convnext, large": (
        {**NEW, **IMAGENET, "image_processor_type": "ConvNextImageProcessor", "resample": 3}
        | {"crop_pct": None, "size": {"shortest_edge": 384}},
        (384, 384, "squash", "bicubic"),
    ),
    "all defaults": (
        {"image_processor_type": "CLIPImageProcessor"},
        (224, 224, "center", "bicubic"),
    ),
}
# Width and height: landscape, portrait, odd, small, narrow and square.
SIZES = ((500, 333), (375, 501), (640, 427), (99, 71), (431, 97), (256, 256), (1203, 902))


def processor(config: dict):
    """The image processor of transformers that runs on Pillow and numpy."""
    transformers = pytest.importorskip("transformers")
    name = config.get("image_processor_type") or config["feature_extractor_type"]
    kind = name.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    return getattr(transformers, f"{kind}Pil")(**config)


def photographs(shared, width: int, height: int, quality: int = 90) -> list[bytes]:
    """Real photos in another size, as JPEG."""
    paths = sorted(shared.glob("flickr8k/images/*.jpg"))[:1]
    paths += sorted(shared.glob("coco_mini/*/*.jpg"))[:1]
    assert paths
    return [
        encoded(
            Image.open(path).convert("RGB").resize((width, height), Image.Resampling.LANCZOS),
            "JPEG",
            quality=quality,
        )
        for path in paths
    ]


def as_processed(config: dict, data: bytes, **options) -> np.ndarray:
    """A photo after the preprocessing of transformers, with the channels last."""
    image = Image.open(io.BytesIO(data))
    return processor(config)(image, **options)["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pixels_equal_those_of_transformers(shared, name):
    config, expected = CHECKPOINTS[name]
    preprocessing = Preprocessing.from_config(config)
    described = (preprocessing.size, preprocessing.resize, preprocessing.crop)
    assert (*described, preprocessing.resample) == expected
    for size in SIZES:
        for data in photographs(shared, *size):
            theirs = as_processed(config, data, do_rescale=False, do_normalize=False)
            assert theirs.dtype == np.uint8
            np.testing.assert_array_equal(images.decode(data, preprocessing), theirs, str(size))

    ours = images.decode(data, preprocessing).astype(np.float32) / 255
    ours = (ours - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    np.testing.assert_allclose(ours, as_processed(config, data), atol=1e-6)


@pytest.mark.parametrize(("name", "reduced"), [("siglip", True), ("resnet", False)])
def test_large_photos_differ_little_from_transformers(shared, name, reduced):
    """Decoding halves 2,000 rows if 4 * 224 are enough (siglip), but not for 4 * 256 (resnet).

    Grainy photos differ the most.
    """
    config, _ = CHECKPOINTS[name]
    for data in photographs(shared, 3000, 2000):
        pixels = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        pixels += np.random.default_rng(0).normal(0, 8, (2000, 3000, 1))
        grainy = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        data = encoded(grainy, "JPEG", quality=90)
        theirs = as_processed(config, data, do_rescale=False, do_normalize=False).astype(int)
        difference = np.abs(images.decode(data, Preprocessing.from_config(config)) - theirs)
        print(f"{difference.max()} {difference.mean():.3f} {np.mean(difference > 1):.5f}")
        assert (difference.max() > 0) == reduced
        assert difference.max() <= 3
        assert difference.mean() < 0.35
        assert np.mean(difference > 1) < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_keeps_proportions_and_edges(shared, monkeypatch, orientation):
    """Proportions follow the file's size, not the reduced size, which is rounded up."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, height in ((511, 257), (261, 1043)):
        image = Image.open(io.BytesIO(photographs(shared, width, height)[0]))
        data = encoded(image, "JPEG", exif=exif, quality=95)
        for crop in CROPS:
            preprocessing = Preprocessing(32, crop=crop)
            half = images.decode(data, preprocessing).astype(int)
            with monkeypatch.context() as patched:
                patched.setattr(images, "DRAFT_FACTOR", 1000)
                whole = images.decode(data, preprocessing)
            difference = np.abs(half - whole)
            print(width, height, crop, f"{difference.max()} {difference.mean():.3f}")
            assert 0 < difference.mean() < 0.4
            assert difference.max() <= 8


def test_strips():
    """Only the middle of 3 x 99,999 pixels is resized, which saves memory."""
    strip = Image.new("RGB", (3, 99_999), "red")
    strip.paste("lime", (0, 49_900, 3, 50_099))
    data = encoded(strip, "PNG")
    assert (images.decode(data, Preprocessing(224, 256, crop="center")) == (0, 255, 0)).all()
    turned = encoded(strip.transpose(Image.Transpose.ROTATE_90), "PNG")
    assert (images.decode(turned, Preprocessing(224, 256, crop="center")) == (0, 255, 0)).all()


def test_a_narrow_image_is_resized_as_pillow_does_it():
    """The height is resized first, so the intermediate values are rounded differently."""
    pixels = np.random.default_rng(0).integers(0, 256, (5000, 7, 3), np.uint8)
    image = Image.fromarray(pixels)
    for resample, filter_ in RESAMPLING.items():
        ours = images.decode(encoded(image, "PNG"), Preprocessing(64, resample=resample))
        difference = np.abs(ours.astype(int) - np.asarray(image.resize((64, 64), filter_)))
        print(resample, difference.max())
        assert difference.max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_large_images_are_converted_some_rows_at_a_time(monkeypatch, mode):
    """The pixels are the same as when the whole image is converted at once."""
    noise = Image.effect_noise((90, 70), 90)
    image = Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(45)])
    if mode == "P":
        image = image.convert("RGB").quantize(32)
        image.info["transparency"] = bytes(range(0, 256, 8))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(noise).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    data = encoded(image, "PNG")
    at_once = images.decode(data, Preprocessing(70))
    for pixels in (1, 91, 1000):
        monkeypatch.setattr(images, "CONVERTED_AT_ONCE", pixels)
        np.testing.assert_array_equal(images.decode(data, Preprocessing(70)), at_once)


@pytest.mark.parametrize("size", [(90, 70), (5, 300), (300, 5)])
def test_float_values_are_those_of_pillow_without_rounding(monkeypatch, size):
    """Whole channels in float32 give the same values as strips of them, at any crop."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image, box = Image.fromarray(pixels), (0, 0, *size)
    data = encoded(image, "PNG")
    for resample, filter_ in RESAMPLING.items():
        preprocessing = Preprocessing(40, 48, resample=resample, dtype="float32")
        channels = [channel.convert("F") for channel in image.split()]
        whole = np.stack([np.asarray(x.resize((48, 48), filter_, box)) for x in channels], -1)
        for at_once in (1 << 18, 91):
            monkeypatch.setattr(images, "CONVERTED_AT_ONCE", at_once)
            ours = images.decode(data, preprocessing)
            assert (ours.dtype, ours.shape, ours.flags.c_contiguous) == ("f4", (40, 40, 3), True)
            np.testing.assert_allclose(ours, whole[4:44, 4:44], rtol=0, atol=1e-4)


@pytest.mark.parametrize("min_area", [0.0, 0.25])
def test_float_values_of_augmented_images_are_of_the_same_part(min_area):
    arguments = {"min_area": min_area, "mirror": True}
    for seed in range(10):
        rounded, exact = (
            images.decode_augmented(
                gradient_image(),
                Preprocessing(32, dtype=dtype),
                np.random.default_rng(seed),
                **arguments,
            )
            for dtype in DTYPES
        )
        assert exact.dtype == np.float32
        assert 0 < np.abs(rounded - exact).max() <= 1.5


def test_a_preview_keeps_the_proportions():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.preview(encoded(corners(400, 240), "JPEG", exif=exif), 100).shape == (100, 60, 3)
    small = images.preview(encoded(corners(), "PNG"), 100)
    np.testing.assert_array_equal(small, np.asarray(corners()))
    with pytest.raises(images.ImageError, match="truncated"):
        images.preview(PHOTO[:-200], 100)


def test_another_resolution_keeps_the_proportions():
    config, _ = CHECKPOINTS["resnet"]
    preprocessing = Preprocessing.from_config(config)
    for size in (32, 161, 288):
        changed = preprocessing.resized(size)
        assert changed == Preprocessing.from_config(config | {"size": size})
        assert (changed.size, changed.resize) == (size, int(size / 0.875))
    assert preprocessing.resized(224) == preprocessing
    squashing = Preprocessing.from_config(CHECKPOINTS["vit"][0]).resized(96)
    assert (squashing.size, squashing.resize, squashing.crop) == (96, 96, "squash")


def test_other_ways_to_say_the_same():
    config, _ = CHECKPOINTS["dinov2"]
    expected = Preprocessing.from_config(config)
    assert Preprocessing.from_config({"image_processor": config}) == expected
    assert Preprocessing(**json.loads(json.dumps(dataclasses.asdict(expected)))) == expected
    assert Preprocessing.from_config(config | {"crop_size": [224, 224]}) == expected
    assert Preprocessing.from_config(config | {"image_mean": 0.5}).mean == (0.5, 0.5, 0.5)
    plain = Preprocessing.from_config(config | {"do_normalize": False})
    assert (plain.mean, plain.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"feature_extractor_type": None}, "has no image_processor_type; add one"),
        ("vit", {"feature_extractor_type": "SamImageProcessor"}, "unknown image processor 'Sam"),
        ("vit", {"do_resize": False}, "do_resize is false"),
        ("vit", {"do_rescale": False}, "do_rescale is false"),
        ("vit", {"rescale_factor": 1 / 127.5}, "only 1/255"),
        ("vit", {"do_pad": True}, "do_pad"),
        ("vit", {"size": {"height": 224, "width": 112}}, "a square is needed"),
        ("vit", {"size": {"shortest_edge": 224}}, "does not crop"),
        ("vit", {"size": {}}, "a square is needed"),
        ("vit", {"size": "224"}, "a square is needed"),
        ("vit", {"resample": 5}, r"resample is 5; known: 0 \(nearest\)"),
        ("clip", {"do_center_crop": False}, "does not crop: a square is needed; set"),
        ("clip", {"crop_size": 256}, "can't be cut out of images resized to 224"),
        ("clip", {"size": {"shortest_edge": 224, "longest_edge": 448}}, "a square is needed"),
        ("clip", {"image_std": [0.5, 0.5]}, "three numbers"),
        ("clip", {"image_std": [0, 1, 1]}, "must be above 0"),
        ("resnet", {"do_center_crop": True}, "crop_pct already"),
        ("resnet", {"size": {"height": 224, "width": 224}}, "not a shortest_edge"),
    ],
)
def test_configs_that_cannot_be_followed(name, change, message):
    with pytest.raises(ValueError, match=message) as raised:
        Preprocessing.from_config(CHECKPOINTS[name][0] | change)
    assert "\n" not in str(raised.value)


def gradient_image(width=80, height=60):
    """Red grows to the right and green downwards, so pixels show where a crop was taken."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([3 * x, 4 * y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def augmented(seed, min_area=0.25, mirror=False):
    return images.decode_augmented(
        gradient_image(), Preprocessing(size=32), np.random.default_rng(seed), min_area, mirror
    )


def test_augmentation_is_a_function_of_its_key():
    np.testing.assert_array_equal(augmented([0, 1, 2]), augmented([0, 1, 2]))
    assert (augmented([0, 1, 2]) != augmented([0, 1, 3])).any()
    assert (augmented([0, 1, 2]) != augmented([0, 2, 2])).any()


def part_shown(pixels):
    """Left, top, right and bottom of the part of `gradient_image` that a crop of it shows."""
    ends = []
    for profile, slope in ((pixels[..., 0].mean(0), 3), (pixels[..., 1].mean(1), 4)):
        # The filter is cut off at the crop's edges.
        inside = np.arange(4, 28)
        per_pixel, first = np.polyfit(inside + 0.5, profile[inside] / slope + 0.5, 1)
        assert np.abs(per_pixel * (inside + 0.5) + first - profile[inside] / slope - 0.5).max() < 1
        ends.append((first, first + 32 * per_pixel))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def test_random_crops_keep_area_and_proportions_within_bounds():
    shares, ratios = [], []
    for seed in range(300):
        left, top, right, bottom = part_shown(augmented(seed))
        assert -0.5 <= left < right <= 80.5
        assert -0.5 <= top < bottom <= 60.5
        shares.append((right - left) * (bottom - top) / 4800)
        ratios.append((right - left) / (bottom - top))
    assert 0.24 <= min(shares) < 0.3
    assert 0.85 < max(shares) <= 1.02
    assert min(ratios) > 0.73
    assert max(ratios) < 1.36


def test_half_of_the_photos_are_mirrored():
    plain = images.decode(gradient_image(), Preprocessing(size=32))
    results = [augmented(seed, min_area=0.0, mirror=True) for seed in range(40)]
    mirrored = [bool((result == plain[:, ::-1]).all()) for result in results]
    assert all((result == plain).all() or m for result, m in zip(results, mirrored, strict=True))
    assert 10 < sum(mirrored) < 30

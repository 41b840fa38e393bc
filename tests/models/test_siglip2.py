"""SigLIP 2's NaFlex models: patches, outputs and gradients equal those of transformers."""

import dataclasses
import io
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import xlmr
from input_pipeline import images as image_io
from input_pipeline.preprocessing import Preprocessing
from tests.models.parity import assert_equal_gradients, become_gradients
from tests.models.test_vit import TINY, count, flat, reference, rename, written
from tests.test_images import SIZES, encoded, photographs
from xlir import compile
from xlir.models import pretrained, registry, siglip2
from xlir.models.family import TowerSpec

NAFLEX = {name: x for name, x in TINY.items() if name != "image_size"} | {"num_patches": 16}
PREPROCESSING = Preprocessing(40, resample="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3, patch=8)
# Name -> fields of the config, pooling, the side of a square with the maximum number of patches.
CASES = {
    "attention": (NAFLEX, "attention", 40),
    "mean": (NAFLEX, "mean", 40),
    "larger table": (NAFLEX | {"num_patches": 81}, "attention", 40),
    "more patches": (NAFLEX | {"hidden_act": "gelu"}, "attention", 64),
    "small patches": (NAFLEX | {"patch_size": 3, "num_patches": 25}, "mean", 15),
    "wide": (NAFLEX | {"hidden_size": 48, "num_attention_heads": 2}, "attention", 40),
}
# Landscape, portrait, square, tiny, and so long that the grid has one row.
PHOTOS = ((50, 33), (31, 80), (40, 40), (5, 3), (400, 9))


def create_spec(config: dict, pooling: str = "", size: int = 40) -> TowerSpec:
    family = registry.family_of("image", config)
    patch = family.photo_patch(config)
    preprocessing = dataclasses.replace(PREPROCESSING, size=size, resize=size, patch=patch)
    return TowerSpec(family, config, pooling, preprocessing=preprocessing)


def create(*arguments, **options) -> siglip2.NaFlexTransformer:
    """A model that has shapes, but no values."""
    spec = create_spec(*arguments, **options)
    make = spec.family.create
    return nnx.eval_shape(lambda: make(spec, dtype=jnp.float32, remat=False, rngs=nnx.Rngs(0)))


def loaded(config: dict, weights: dict, pooling: str, size: int):
    model = create(config, pooling, size)
    pretrained.merge(model, rename(weights, config, pooling))
    return model


def photos_of(*sizes: tuple[int, int]) -> list[bytes]:
    """Smooth random photos."""
    coarse = np.random.default_rng(0).integers(0, 256, (len(sizes), 9, 9, 3), np.uint8)
    images = [Image.fromarray(x).resize(s) for x, s in zip(coarse, sizes, strict=True)]
    return [encoded(image, "PNG") for image in images]


def processed(photos: list[bytes], patch: int, most: int) -> dict:
    """The inputs of the torch model, from the processor of transformers for Pillow."""
    import transformers

    processor = transformers.Siglip2ImageProcessorPil(patch_size=patch, max_num_patches=most)
    images = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in photos]
    return processor(images, return_tensors="pt")


def pooled(theirs, inputs: dict, pooling: str):
    output = theirs(**inputs)
    if pooling == "attention":
        return output.pooler_output
    mask = inputs["pixel_attention_mask"][..., None]
    return (output.last_hidden_state * mask).sum(1) / mask.sum(1)


def prepared(fields: dict, size: int) -> tuple[np.ndarray, dict]:
    """The same photos as our tower and as the torch model take them."""
    patch = fields["patch_size"]
    photos = photos_of(*PHOTOS)
    ours = dataclasses.replace(PREPROCESSING, size=size, resize=size, patch=patch)
    images = np.stack([image_io.decode(photo, ours) for photo in photos])
    return images, processed(photos, patch, (size // patch) ** 2)


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    fields, pooling, size = CASES[case]
    theirs = reference("Siglip2VisionModel", fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling, size)
    images, inputs = prepared(fields, size)
    with torch.inference_mode():
        expected = pooled(theirs, inputs, pooling).numpy()
    assert np.abs(expected).max() > 0.3
    difference = np.abs(nnx.jit(lambda model, x: model(x))(ours, images) - expected).max()
    print(f"{case}: difference {difference:.1e}")
    assert difference <= 2e-5


@pytest.mark.parametrize("case", ["attention", "mean"])
def test_gradients_equal_torch(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    fields, pooling, size = CASES[case]
    theirs = reference("Siglip2VisionModel", fields)
    images, inputs = prepared(fields, size)
    seed = np.random.default_rng(2).normal(size=(len(PHOTOS), 32)).astype(np.float32)
    (pooled(theirs, inputs, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling, size)
    gradients = flat(nnx.jit(nnx.grad(lambda model: jnp.sum(model(images) * seed)))(ours))
    become_gradients(theirs)
    expected = rename(written(theirs, tmp_path / "gradients")[1], config, pooling)
    assert_equal_gradients(case, gradients, expected)


@pytest.mark.parametrize("most", [256, 64, 1024])
def test_patches_equal_those_of_transformers(shared, most):
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    pytest.importorskip("transformers")
    fields = {"image_processor_type": "Siglip2ImageProcessorFast", "max_num_patches": most}
    preprocessing = Preprocessing.from_config(fields)
    assert preprocessing.shape == (most + 1, 768)
    photos = [photo for size in SIZES for photo in photographs(shared, *size)]
    photos += photos_of((1, 1), (3000, 2), (2, 60))
    theirs = processed(photos, 16, most)
    for row, photo in enumerate(photos):
        ours = image_io.decode(photo, preprocessing, reduce=False)
        rows, columns = theirs["spatial_shapes"][row].tolist()
        assert ours[-1, :4].tolist() == [*divmod(rows, 256), *divmod(columns, 256)]
        pixels = ours[: rows * columns].astype(np.float32) / 127.5 - 1
        expected = theirs["pixel_values"][row, : rows * columns].numpy()
        np.testing.assert_allclose(pixels, expected, atol=1e-6, err_msg=f"photo {row}")
        assert not ours[rows * columns : -1].any()


def test_augmented_photos_are_patches_too():
    (photo,) = photos_of((90, 60))
    plain = image_io.decode(photo, PREPROCESSING)
    generator = np.random.default_rng(0)
    seen = [image_io.decode_augmented(photo, PREPROCESSING, generator, 0.0, True) for _ in range(9)]
    rows, columns = plain[-1, [1, 3]]
    mirrored = plain[: rows * columns].reshape(rows, columns, 8, 8, 3)[:, ::-1, :, ::-1]
    flat = mirrored.reshape(rows * columns, -1)
    assert {"plain", "mirrored"} == {
        "plain" if (x == plain).all() else "mirrored" if (x[: len(flat)] == flat).all() else "other"
        for x in seen
    }
    cropped = image_io.decode_augmented(photo, PREPROCESSING, generator, 0.1, False)
    assert cropped.shape == plain.shape
    assert 0 < math.prod(cropped[-1, [1, 3]]) <= 25


# Number of parameters of transformers' image tower, and of ours.
PARAMETERS = {
    "google/siglip2-base-patch16-naflex": 92_930_304,
    "google/siglip2-so400m-patch16-naflex": 427_888_064,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    model = create(registry.architectures("image")[hub_id], size=256)
    assert count(pretrained.flatten(model)) == PARAMETERS[hub_id]


def test_published_totals_and_defaults_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for hub_id, total in PARAMETERS.items():
        fields = registry.architectures("image")[hub_id]
        with torch.device("meta"):
            kind = transformers.Siglip2VisionModel
            theirs = kind(kind.config_class(**fields))
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total
    theirs = transformers.Siglip2VisionConfig().to_dict()
    ours = siglip2.NAFLEX.complete({"model_type": "siglip2_vision_model"})
    assert ours.pop("image_size") == 256
    assert {field: theirs[field] for field in ours} == ours


def test_restored_weights_are_renamed_to_the_same(tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    config, weights = written(reference("Siglip2VisionModel", NAFLEX), tmp_path)
    ours = rename(weights, config, "")
    restored = siglip2.NAFLEX.restore(ours, siglip2.NAFLEX.complete(config))
    assert set(restored) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(restored[name], value, name)


def test_shapes_are_known_without_a_checkpoint():
    config = xlmr.get_config("tiny")
    config.image.tower, config.image.frozen = "google/siglip2-base-patch16-naflex", False
    config.image.size, config.data.batch_size = 384, 8
    _, _, batch = compile.abstract(config)
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 577, 768), jnp.uint8)
    config.image.crop = "center"
    with pytest.raises(ValueError, match=r"crop is 'center', but .*naflex takes photos in their"):
        compile.abstract(config)


def test_specs_of_squares_are_as_before_there_were_patches():
    """The content of a tower.json is part of the key of cached features."""
    assert "patch" not in Preprocessing(32).to_json()
    spec = create_spec({"model_type": "siglip2_vision_model"} | NAFLEX)
    assert registry.spec_from_json("image", spec.to_json()).preprocessing == PREPROCESSING


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_patches is 15; it must be a square number"):
        create({"model_type": "siglip2_vision_model"} | NAFLEX | {"num_patches": 15})
    fields = {"image_processor_type": "Siglip2ImageProcessor"}
    for change, message in (
        ({"max_num_patches": 300}, "max_num_patches is 300, not a square number"),
        ({"patch_size": "16"}, "patch_size is '16'; it must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocessing.from_config(fields | change)
    config = {"model_type": "siglip2_vision_model"} | NAFLEX
    for family, fields, patch in (
        (siglip2.NAFLEX, config, 0),
        (siglip2.NAFLEX, config, 16),
        (registry.families("image")["vit"], TINY | {"model_type": "vit"}, 8),
    ):
        with pytest.raises(ValueError, match=r"the image processor .*, but .* needs one that"):
            TowerSpec(family, fields, preprocessing=Preprocessing(32, patch=patch))

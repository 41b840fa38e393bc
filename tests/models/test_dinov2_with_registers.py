"""DINOv2 with registers: its outputs equal torch's, and it can be trained and exported."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import xlmr
from tests.models.parity import become_gradients
from tests.models.test_vit import (
    MEAN,
    STD,
    TINY,
    create,
    flat,
    loaded,
    photos_of,
    reference,
    rename,
    written,
)
from xlir import compile, export, optimizer, partition, train
from xlir.encoder import Encoder
from xlir.models import pretrained, registry

REGISTERS = TINY | {"mlp_ratio": 2, "num_register_tokens": 3}
CASES = {
    "cls": (REGISTERS, "cls"),
    "mean": (REGISTERS, "mean"),
    "gated": (REGISTERS | {"use_swiglu_ffn": True}, "cls"),
    "one register": (REGISTERS | {"num_register_tokens": 1}, "mean"),
    "no biases": (REGISTERS | {"qkv_bias": False, "hidden_act": "relu"}, "cls"),
    "odd size": (REGISTERS | {"image_size": 45, "patch_size": 7, "mlp_ratio": 3}, "cls"),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    """Images have the position table's size, a larger and a smaller one, or are rectangles."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    fields, pooling = CASES[case]
    theirs = reference("Dinov2WithRegistersModel", fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    apply = nnx.jit(lambda model, images: model(images))
    side = fields["image_size"]
    for height, width in ((side, side), (side + 16, side + 16), (16, 16), (24, 56)):
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


def test_gradients_equal_torch(tmp_path):
    """Torch's gradients are saved and renamed like weights, and then compared with ours."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    theirs, images = reference("Dinov2WithRegistersModel", REGISTERS), photos_of(40, 27)
    seed = np.random.default_rng(2).normal(size=(2, 32)).astype(np.float32)
    (features(theirs, images, "cls") * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling="cls")
    gradients = flat(nnx.jit(nnx.grad(lambda model: jnp.sum(model(images) * seed)))(ours))
    become_gradients(theirs)
    config, expected = written(theirs, tmp_path / "gradients")
    # The class token and its position have the same gradient, which is that of our one parameter.
    expected["embeddings.cls_token"] = np.zeros_like(expected["embeddings.cls_token"])
    expected = rename(expected, config, "cls")
    assert set(expected) == set(gradients)
    for name, value in expected.items():
        assert np.abs(gradients[name] - value).max() <= 1e-4 * np.abs(value).max(), name


@pytest.fixture
def checkpoint(tmp_path):
    """A classifier's checkpoint in the format of the Hub."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    whole = reference("Dinov2WithRegistersForImageClassification", REGISTERS)
    whole.save_pretrained(tmp_path / "checkpoint")
    assert "dinov2_with_registers.embeddings.register_tokens" in whole.state_dict()
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
    }
    (tmp_path / "checkpoint" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "checkpoint"


@pytest.mark.slow
def test_a_checkpoint_is_trained_and_exported(checkpoint, photos, tmp_path, in_process):
    pytest.importorskip("onnxscript", reason="needs pip install 'xlir[export]'")
    config, run = xlmr.get_config("tiny"), tmp_path / "run"
    config.data.dir, config.image.tower = str(photos), str(checkpoint)
    config.steps = config.eval_every = 2
    config.image.layer_decay, config.text.head = 0.5, "linear"
    train.train(config, run)
    encoder = Encoder.load(run)
    trained = encoder.weights("image_tower")["registers"]
    published = pretrained.read_checkpoint(checkpoint)
    start = published["dinov2_with_registers.embeddings.register_tokens"][0]
    assert 0 < np.abs(trained - start).max() < 0.01
    test_set = {"test_set": str(photos / "multilingual_test"), "images": str(photos / "images")}
    for format in ("sentence-transformers", "torch", "onnx"):
        export.export(run, tmp_path / format, format, **test_set)


def test_shapes_are_known_without_a_checkpoint():
    config = xlmr.get_config("tiny")
    config.image.tower = "facebook/dinov2-with-registers-base"
    config.mesh.data, config.mesh.fsdp = 1, 8
    lines = compile.sharding_table(config, 8).splitlines()
    (registers,) = [line.split() for line in lines if line.startswith("image_tower.registers")]
    assert registers[1:3] == ["float32[4,768]", "-,fsdp"]
    compile.trace(config, partition.create_mesh(config.mesh))


# Number of parameters of transformers' model. In addition to ours, it has a mask token and a
# position of the class token.
PARAMETERS = {
    "facebook/dinov2-with-registers-small": 22_058_112,
    "facebook/dinov2-with-registers-base": 86_583_552,
    "facebook/dinov2-with-registers-large": 304_372_736,
    "facebook/dinov2-with-registers-giant": 1_136_486_912,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    model = create(registry.architectures("image")[hub_id])
    count = sum(math.prod(value.shape) for value in pretrained.flatten(model).values())
    assert count + 2 * model.dim == PARAMETERS[hub_id]


def test_published_totals_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for hub_id, total in PARAMETERS.items():
        config = transformers.AutoConfig.for_model(**registry.architectures("image")[hub_id])
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(config)
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total


def test_registers_lie_below_the_layers():
    params = {"registers": jnp.zeros((3, 4)), "layers": {"stacked": {"scale": jnp.zeros((2, 4))}}}
    assert optimizer.layer_scales(params, 0.5)["registers"] == 0.5**3

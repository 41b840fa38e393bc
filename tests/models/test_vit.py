"""Compares vision transformers with transformers' torch models, with random weights."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from input_pipeline.preprocessing import Preprocessing
from tests.models.parity import assert_equal_gradients, become_gradients
from xlir.models import pretrained, registry
from xlir.models.family import TowerSpec
from xlir.models.vision_transformer import VisionTransformer, bicubic_weights

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DINOV2 = TINY | {"mlp_ratio": 2}
TEXT = {
    "vocab_size": 10,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Name -> class of transformers, fields of the config, pooling.
CASES = {
    "ViT": ("ViTModel", TINY, "cls"),
    "ViT without biases": ("ViTModel", TINY | {"qkv_bias": False, "hidden_act": "relu"}, "cls"),
    "ViT's pooler": ("ViTModel", TINY, "pooler"),
    "CLIP": ("CLIPVisionModel", TINY, "cls"),
    "DINOv2": ("Dinov2Model", DINOV2, "cls"),
    "DINOv2 mean": ("Dinov2Model", DINOV2, "mean"),
    "DINOv2 gated": ("Dinov2Model", DINOV2 | {"use_swiglu_ffn": True}, "cls"),
    "SigLIP": ("SiglipVisionModel", TINY, "attention"),
    "SigLIP of odd size": ("SiglipVisionModel", TINY | {"image_size": 37}, "attention"),
    "SigLIP mean": ("SiglipVisionModel", TINY, "mean"),
}
# The size of the position table, another size, and two rectangles, one with incomplete patches.
SIZES = ((32, 32), (48, 48), (24, 56), (45, 31))
ALL_SIZES = ("ViT", "CLIP", "DINOv2", "SigLIP")


def reference(name: str, fields: dict):
    """The model of transformers; its random parameters all affect the outputs."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    create = getattr(transformers, name)
    model = create(create.config_class(**fields)).eval()
    for name, parameter in model.named_parameters():
        if not parameter.numel():  # the register tokens of a tower without any
            continue
        norm = "norm" in name and name.endswith("weight")
        if norm or "lambda" in name or "layrnorm.weight" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            embedding = any(part in name for part in ("position", "cls_token", "probe"))
            scale = 0.7 if embedding else 1.2 * math.prod(parameter.shape[1:]) ** -0.5
            torch.nn.init.normal_(parameter, std=scale)
    return model


def written(model, folder: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Saves a model; returns its config, and its tensors with the names used on the Hub."""
    model.save_pretrained(folder)
    return pretrained.read_config(folder), pretrained.read_checkpoint(folder)


def create(
    config: dict, *, pooling: str = "", dtype=jnp.float32, remat: bool = False
) -> VisionTransformer:
    """A model that has shapes, but no values."""
    family = registry.family_of("image", config)
    family.check_pooling(config, pooling)
    spec = TowerSpec(family, config, pooling, preprocessing=Preprocessing(32, mean=MEAN, std=STD))
    return nnx.eval_shape(lambda: family.create(spec, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))


def rename(weights: dict[str, np.ndarray], config: dict, pooling: str) -> dict[str, np.ndarray]:
    return registry.family_of("image", config).rename(weights, config, pooling)


def loaded(config: dict, weights: dict[str, np.ndarray], **options) -> VisionTransformer:
    model = create(config, **options)
    pretrained.merge(model, rename(weights, config, options.get("pooling", "")))
    return model


def random_model(fields: dict | None = None, **options) -> VisionTransformer:
    """A model with random parameters, made without torch."""
    model = create({"model_type": "dinov2"} | DINOV2 | (fields or {}), **options)
    generator = np.random.default_rng(0)
    weights = {
        name: generator.normal(size=value.shape, scale=value.shape[-1] ** -0.5)
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


def photos_of(height: int, width: int, count: int = 2) -> np.ndarray:
    """Smooth random images, similar to photos."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 9, 9, 3), np.uint8)
    return np.stack([Image.fromarray(image).resize((width, height)) for image in coarse])


def pooled(theirs, images: np.ndarray, pooling: str):
    """Pools the outputs of the torch model as its users do."""
    import torch

    pixels = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    kind = theirs.config.model_type
    # DINOv2 interpolates its positions without this option.
    output = theirs(inputs, **({} if kind == "dinov2" else {"interpolate_pos_encoding": True}))
    if pooling == "mean":
        return output.last_hidden_state[:, 0 if kind == "siglip_vision_model" else 1 :].mean(1)
    if (kind, pooling) == ("vit", "cls"):
        return output.last_hidden_state[:, 0]
    return output.pooler_output


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    name, fields, pooling = CASES[case]
    theirs = reference(name, fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    assert (ours.dim, ours.image_size) == (32, fields["image_size"])
    apply = nnx.jit(lambda model, images: model(images))
    for height, width in SIZES if case in ALL_SIZES else SIZES[::3]:
        images = photos_of(height, width)
        with torch.inference_mode():
            expected = pooled(theirs, images, pooling).numpy()
        assert np.abs(expected).max() > 0.3
        difference = np.abs(apply(ours, images) - expected).max()
        print(case, (height, width), f"max {expected.max():.1f}, difference {difference:.1e}")
        assert difference <= 2e-5


@pytest.mark.parametrize("case", ["ViT's pooler", "CLIP", "DINOv2", "DINOv2 gated", "SigLIP"])
def test_gradients_equal_torch(case, tmp_path):
    """Torch's gradients are saved and renamed like weights, and then compared with ours.

    The class token and its position have the same gradient, which is that of our one parameter.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    name, fields, pooling = CASES[case]
    theirs, images = reference(name, fields), photos_of(40, 27)
    seed = np.random.default_rng(2).normal(size=(2, 32)).astype(np.float32)
    (pooled(theirs, images, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling=pooling)
    gradients = flat(nnx.jit(nnx.grad(lambda model: jnp.sum(model(images) * seed)))(ours))

    become_gradients(theirs)
    config, expected = written(theirs, tmp_path / "gradients")
    for token in ("embeddings.cls_token", "embeddings.class_embedding"):
        if token in expected:
            assert np.abs(expected[token]).max() > 0
            expected[token] = np.zeros_like(expected[token])
    expected = rename(expected, config, pooling)
    assert_equal_gradients(case, gradients, expected)


def test_files_of_whole_models_and_of_older_versions_load(tmp_path):
    """Loads towers of CLIP and SigLIP, of classifiers, and with names before transformers 5."""
    clip = {"vision_config": TINY, "text_config": TEXT, "projection_dim": 8}
    siglip = {"vision_config": TINY, "text_config": TEXT}
    for name, fields, part, prefix in (
        ("CLIPModel", clip, "vision_model", "vision_model."),
        ("CLIPVisionModelWithProjection", TINY, "vision_model", "vision_model."),
        ("SiglipModel", siglip, "vision_model", "vision_model."),
        ("ViTForImageClassification", TINY, "vit", "vit."),
        ("Dinov2ForImageClassification", DINOV2, "dinov2", "dinov2."),
    ):
        whole = reference(name, fields)
        config, weights = written(whole, tmp_path / name)
        assert any(name.startswith(prefix) for name in weights), name
        if "CLIP" in name:
            weights[f"{prefix}embeddings.position_ids"] = np.arange(17)[None]
        model = loaded(config, weights)
        tower_config, tower = written(getattr(whole, part), tmp_path / f"{name} tower")
        assert not any(name.startswith(prefix) for name in tower)
        prefixed = {f"{prefix}{name}": value for name, value in tower.items()}
        for checkpoint in (tower, prefixed):
            alone = pretrained.flatten(loaded(tower_config, checkpoint))
            for weight, value in pretrained.flatten(model).items():
                np.testing.assert_array_equal(value, alone[weight])


def test_a_checkpoint_that_does_not_fit_is_reported(tmp_path):
    config, weights = written(reference("Dinov2Model", DINOV2), tmp_path)
    unknown = {name.replace("norm1", "norm3"): value for name, value in weights.items()}
    message = r"unused encoder\.layer\.0\.norm3\.bias.* missing layers\.stacked\.attention_norm"
    with pytest.raises(ValueError, match=message):
        loaded(config, unknown)
    registers = weights | {"embeddings.register_tokens": np.zeros((1, 4, 32), np.float32)}
    with pytest.raises(ValueError, match=r"unused embeddings\.register_tokens$"):
        loaded(config, registers)
    for depth, message in ((3, "missing layers.stacked"), (1, r"unused encoder\.layer\.1")):
        with pytest.raises(ValueError, match=message):
            loaded(config | {"num_hidden_layers": depth}, weights)
    with pytest.raises(ValueError, match=r"position float32\[16,32\] for float32\[36,32\]"):
        loaded(config | {"image_size": 48}, weights)
    del weights["embeddings.cls_token"]
    with pytest.raises(ValueError, match="missing class_token"):
        loaded(config, weights)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        (
            {"model_type": "swin"},
            {},
            "model_type 'swin' is not supported; known image models: resnet, vit, clip",
        ),
        ({"model_type": "vit", "num_channels": 1}, {}, "1 channels"),
        ({"model_type": "vit", "image_size": [32, 48]}, {}, "not square"),
        ({"model_type": "vit", "pooler_act": "gelu"}, {}, "pooler_act 'gelu'"),
        ({"model_type": "vit", "pooler_output_size": 8}, {}, "changes the width"),
        (
            {"model_type": "siglip_vision_model", "vision_use_head": False},
            {},
            "no attention pooling head",
        ),
        ({"model_type": "clip_vision_model"}, {"pooling": "pooler"}, "'pooler'; .*cls, mean"),
        ({"model_type": "siglip_vision_model"}, {"pooling": "cls"}, "'cls'; .*attention, mean"),
        ({"model_type": "vit", "num_attention_heads": 0}, {}, "num_attention_heads is 0; it must"),
        ({"model_type": "vit", "num_hidden_layers": -1}, {}, "num_hidden_layers is -1; it must be"),
        ({"model_type": "vit", "hidden_size": "32"}, {}, "hidden_size is '32'; it must be"),
        ({"model_type": "vit", "patch_size": 0}, {}, "patch_size is 0; it must be"),
        ({"model_type": "vit", "patch_size": 500}, {}, "patch_size 500 is above image_size"),
        ({"model_type": "vit", "image_size": []}, {}, r"image_size \[\] is not square"),
        ({"model_type": "dinov2", "mlp_ratio": "4"}, {}, "mlp_ratio is '4'; it must be"),
        ({"model_type": "clip", "vision_config": [1]}, {}, r"vision_config is \[1\]; it must hold"),
        ({"model_type": "vit", "hidden_act": "swish"}, {}, "'swish'; known: gelu"),
    ],
)
def test_what_is_not_known_is_refused(fields, options, message):
    with pytest.raises(ValueError, match=message):
        create(TINY | fields, **options)


def test_fields_that_a_config_lacks_have_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    for name in ("ViTConfig", "CLIPVisionConfig", "Dinov2Config", "SiglipVisionConfig"):
        theirs = getattr(transformers, name)().to_dict()
        family = registry.families("image")[theirs["model_type"]]
        ours = family.complete({"model_type": theirs["model_type"]})
        read = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
        assert all(not theirs.get(field) for field in read)
        # DINOv2 has mlp_ratio instead of intermediate_size.
        ours.pop("intermediate_size" if "mlp_ratio" in theirs else "mlp_ratio", None)
        assert {field: theirs[field] for field in ours} == ours


def test_resized_positions_equal_torch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    table = np.random.default_rng(0).normal(size=(1, 1, 7, 7)).astype(np.float32)
    for rows, columns in ((7, 7), (14, 3), (1, 20)):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(table), (rows, columns), mode="bicubic", align_corners=False
        )
        down, across = bicubic_weights(7, rows), bicubic_weights(7, columns)
        np.testing.assert_allclose(down @ table[0, 0] @ across.T, expected[0, 0], atol=1e-5)


def test_bfloat16_changes_little():
    images = photos_of(32, 32, 4)
    for fields in ({}, {"model_type": "siglip_vision_model"}):
        whole, half = (
            np.asarray(nnx.jit(lambda m: m(images))(random_model(fields, dtype=dtype)))
            for dtype in (jnp.float32, jnp.bfloat16)
        )
        assert half.dtype == np.float32
        lengths = np.linalg.norm(whole, axis=1) * np.linalg.norm(half, axis=1)
        assert 0.999 < np.min(np.sum(whole * half, 1) / lengths) < 1 - 1e-8


def test_rematerialisation_changes_nothing_and_takes_less_memory():
    images = photos_of(48, 48, 8)
    models = [random_model({"num_hidden_layers": 6}, remat=remat) for remat in (False, True)]
    values, temporaries = [], []
    for model in models:
        graph, params = nnx.split(model)
        step = jax.jit(
            jax.grad(lambda params, graph=graph: jnp.sum(jnp.sin(nnx.merge(graph, params)(images))))
        )
        compiled = step.lower(params).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        values.append(flat(compiled(params)))
    print(f"temporaries {temporaries[0] / 2**20:.2f} MiB, with remat {temporaries[1] / 2**20:.2f}")
    assert temporaries[1] < 0.6 * temporaries[0]
    for name, value in values[0].items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(values[1][name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def test_dropout_is_on_with_keys_only():
    images = photos_of(32, 32)
    model = random_model({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    plain = model(images)
    apply = nnx.jit(lambda model, key: model(images, rngs=nnx.Rngs(dropout=key)))
    first, second = (apply(model, jax.random.key(i)) for i in range(2))
    assert (np.asarray(first) != np.asarray(second)).all()
    assert (np.asarray(first) != np.asarray(plain)).all()
    np.testing.assert_array_equal(plain, model(images))


def count(weights: dict) -> int:
    return sum(math.prod(value.shape) for value in weights.values())


# Number of parameters of transformers' image tower, and of ours.
PARAMETERS = {
    "google/vit-base-patch16-224": (86_389_248, 85_797_888),
    "google/vit-base-patch16-224-in21k": (86_389_248, 85_797_888),
    "google/vit-base-patch16-384": (86_681_088, 86_089_728),
    "google/vit-base-patch32-224-in21k": (88_045_824, 87_454_464),
    "google/vit-large-patch16-224": (304_351_232, 303_300_608),
    "google/vit-large-patch16-224-in21k": (304_351_232, 303_300_608),
    "openai/clip-vit-base-patch32": (87_456_000, 87_455_232),
    "openai/clip-vit-base-patch16": (85_799_424, 85_798_656),
    "openai/clip-vit-large-patch14": (303_179_776, 303_178_752),
    "openai/clip-vit-large-patch14-336": (303_507_456, 303_506_432),
    "facebook/dinov2-small": (22_056_576, 22_055_808),
    "facebook/dinov2-base": (86_580_480, 86_578_944),
    "facebook/dinov2-large": (304_368_640, 304_366_592),
    "facebook/dinov2-giant": (1_136_480_768, 1_136_477_696),
    "google/siglip-base-patch16-224": (92_884_224, 92_884_224),
    "google/siglip-base-patch16-256": (92_930_304, 92_930_304),
    "google/siglip-large-patch16-256": (315_956_224, 315_956_224),
    "google/siglip-so400m-patch14-384": (428_225_600, 428_225_600),
    "google/siglip2-base-patch16-224": (92_884_224, 92_884_224),
    "google/siglip2-large-patch16-256": (315_956_224, 315_956_224),
    "google/siglip2-so400m-patch14-384": (428_225_600, 428_225_600),
    "google/siglip2-so400m-patch16-256": (427_888_064, 427_888_064),
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    """Ours has one vector for class token and position, and neither pooler nor mask token."""
    config = registry.architectures("image")[hub_id]
    model = create(config)
    weights = pretrained.flatten(model)
    assert {value.dtype for value in weights.values()} == {jnp.dtype("float32")}
    left_out = {
        "vit": model.dim + (model.dim + 1) * model.dim,
        "clip_vision_model": model.dim,
        "dinov2": 2 * model.dim,
        "siglip_vision_model": 0,
    }[config["model_type"]]
    assert (count(weights) + left_out, count(weights)) == PARAMETERS[hub_id]
    assert model.image_size == config["image_size"]


def test_published_totals_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    classes = {
        "vit": "ViTModel",
        "clip_vision_model": "CLIPVisionModel",
        "dinov2": "Dinov2Model",
        "siglip_vision_model": "SiglipVisionModel",
    }
    found = {}
    for hub_id in PARAMETERS:
        fields = registry.architectures("image")[hub_id]
        create = getattr(transformers, classes[fields["model_type"]])
        with torch.device("meta"):
            theirs = create(create.config_class(**fields))
        found[hub_id] = sum(parameter.numel() for parameter in theirs.parameters())
    assert found == {hub_id: published for hub_id, (published, _) in PARAMETERS.items()}

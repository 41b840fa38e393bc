"""The text towers of CLIP, MetaCLIP 2 and SigLIP: their outputs equal those of torch."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.parity import assert_equal_gradients, become_gradients
from tests.models.test_transformer import create, flat, loaded, randomized, rename, texts, written
from xlir.models import pretrained, registry
from xlir.models.family import TowerSpec

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "eos_token_id": 39,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}
# Class of transformers, fields of its config, pooling.
CASES = {
    "CLIP": ("CLIPTextModel", TINY, "eos"),
    "CLIP's mean": ("CLIPTextModel", TINY, "mean"),
    "CLIP with gelu": ("CLIPTextModel", TINY | {"hidden_act": "gelu"}, "eos"),
    "CLIP with the old id of EOS": ("CLIPTextModel", TINY | {"eos_token_id": 2}, "eos"),
    "CLIP whose EOS is not the highest id": ("CLIPTextModel", TINY | {"eos_token_id": 17}, "eos"),
    "CLIP, deep and narrow": (
        "CLIPTextModel",
        TINY | {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 4},
        "eos",
    ),
    "CLIP with another epsilon": ("CLIPTextModel", TINY | {"layer_norm_eps": 0.1}, "eos"),
    "all of CLIP": ("CLIPModel", TINY, "eos"),
    "MetaCLIP 2": ("MetaClip2TextModel", TINY | {"eos_token_id": 2}, "eos"),
    "MetaCLIP 2's mean": ("MetaClip2TextModel", TINY | {"eos_token_id": 2}, "mean"),
    "MetaCLIP 2 with gelu": (
        "MetaClip2TextModel",
        TINY | {"eos_token_id": 2, "hidden_act": "gelu"},
        "eos",
    ),
    "MetaCLIP 2 with another id of EOS": ("MetaClip2TextModel", TINY | {"eos_token_id": 9}, "eos"),
    "MetaCLIP 2, deep and narrow": (
        "MetaClip2TextModel",
        TINY | {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 5},
        "eos",
    ),
    "all of MetaCLIP 2": ("MetaClip2Model", TINY | {"eos_token_id": 2}, "eos"),
    "SigLIP": ("SiglipTextModel", TINY, "last"),
    "SigLIP with a wider head": ("SiglipTextModel", TINY | {"projection_size": 56}, "last"),
    "SigLIP with gelu": ("SiglipTextModel", TINY | {"hidden_act": "gelu"}, "last"),
    "SigLIP, deep and narrow": (
        "SiglipTextModel",
        TINY | {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 5},
        "last",
    ),
    "all of SigLIP": ("SiglipModel", TINY, "last"),
    "SigLIP 2": ("Siglip2TextModel", TINY, "last"),
    "all of SigLIP 2": ("Siglip2Model", TINY | {"projection_size": 16}, "last"),
}
CLASSES = {
    "clip_text_model": "CLIPTextModel",
    "metaclip_2_text_model": "MetaClip2TextModel",
    "siglip_text_model": "SiglipTextModel",
}
LONGEST, PAD = TINY["max_position_embeddings"], 1


def reference(name: str, fields: dict):
    """The model of transformers; its random parameters all affect the outputs."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    if "Text" in name:
        return randomized(kind(kind.config_class(**fields)))
    return randomized(kind(kind.config_class(text_config=fields, vision_config=VISION)))


def text_model(theirs):
    return getattr(theirs, "text_model", theirs)


def batches(fields: dict, pooling: str):
    """Ids and masks of texts, padded and not, that hold EOS once or several times, or not at all.

    SigLIP attends to the padding, so there it belongs to the text.
    """
    eos = fields["eos_token_id"]
    for lengths in ((7, 7, 7), (LONGEST, 12, 3, 1)):
        ids, mask = texts(lengths, max(lengths), PAD)
        ids = np.where(ids == eos, 5, ids)
        for row, length in enumerate(lengths[:-1]):
            ids[row, length - 1] = eos
        ids[0, 4] = eos
        yield ids, np.ones_like(mask) if pooling == "last" else mask


def pooled(theirs, ids: np.ndarray, mask: np.ndarray, pooling: str):
    """Pools the outputs of the torch model as its users do."""
    import torch

    mask = torch.from_numpy(mask).long()
    given = {} if pooling == "last" else {"attention_mask": mask}
    output = text_model(theirs)(input_ids=torch.from_numpy(ids.astype(np.int64)), **given)
    if pooling != "mean":
        return output.pooler_output
    return (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def assert_equal_outputs(case, theirs, ours, bar: float = 2e-5) -> None:
    import torch

    _, fields, pooling = CASES[case]
    apply = nnx.jit(lambda model, ids, mask: model(ids, mask))
    for ids, mask in batches(fields, pooling):
        with torch.inference_mode():
            expected = pooled(theirs, ids, mask, pooling).numpy()
        assert np.abs(expected).max() > 0.3
        # Neither the ids of masked padding nor its length have an effect.
        arbitrary = np.where(mask, ids, np.random.default_rng(1).integers(0, 40, ids.shape))
        wider = (0, 0), (0, LONGEST - ids.shape[1])
        for chosen, seen in ((arbitrary, mask), (np.pad(ids, wider), np.pad(mask, wider))):
            difference = np.abs(apply(ours, chosen.astype(np.int32), seen) - expected).max()
            print(f"{case} {chosen.shape} difference {difference:.1e}")
            assert difference <= bar


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    name, fields, pooling = CASES[case]
    theirs = reference(name, fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    assert ours.max_length == LONGEST
    assert_equal_outputs(case, theirs, ours)


@pytest.mark.parametrize(
    "case",
    ["CLIP", "CLIP's mean", "CLIP with the old id of EOS", "MetaCLIP 2", "SigLIP", "SigLIP 2"],
)
def test_gradients_equal_torch(case, tmp_path):
    """Torch's gradients are saved and renamed like weights, and then compared with ours."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    name, fields, pooling = CASES[case]
    theirs = reference(name, fields)
    _, (ids, mask) = batches(fields, pooling)
    seed = np.random.default_rng(2).normal(size=(len(ids), 32)).astype(np.float32)
    (pooled(theirs, ids, mask, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling=pooling)
    loss = nnx.grad(lambda model: jnp.sum(model(jnp.asarray(ids), jnp.asarray(mask)) * seed))
    gradients = flat(nnx.jit(loss)(ours))
    become_gradients(theirs)
    config, expected = written(theirs, tmp_path / "gradients")
    expected = rename(expected, config, pooling)
    assert_equal_gradients(case, gradients, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["CLIP", "all of MetaCLIP 2", "all of SigLIP"])
def test_half_precision_checkpoints(case, dtype, tmp_path):
    """Weights in half precision are computed with in float32, as in transformers."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    name, fields, pooling = CASES[case]
    theirs = reference(name, fields).to(getattr(torch, dtype))
    config, weights = written(theirs, tmp_path)
    assert {value.dtype.name for value in weights.values()} == {dtype}
    ours = loaded(config, pretrained.in_float32(weights), pooling=pooling)
    assert_equal_outputs(case, type(theirs).from_pretrained(tmp_path, dtype=torch.float32), ours)


@pytest.mark.parametrize("case", CASES)
def test_restored_towers_load_in_transformers(case, tmp_path):
    """The config.json and tensors of an export load as the text model alone."""
    transformers = pytest.importorskip("transformers")
    name, fields, pooling = CASES[case]
    config, weights = written(reference(name, fields), tmp_path / "theirs")
    ours = loaded(config, weights, pooling=pooling)
    family = registry.family_of("text", config)
    spec = TowerSpec(family, config, pooling)
    exported = family.hub_config(spec, pad_id=PAD)
    assert registry.family_of("text", exported) is family
    ours_by_name = {name: np.asarray(x) for name, x in pretrained.flatten(ours).items()}
    restored = family.restore(ours_by_name, exported)
    again = family.rename(restored, exported, pooling)
    assert set(again) == set(ours_by_name)
    for weight, value in ours_by_name.items():
        np.testing.assert_array_equal(again[weight], value)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(exported))
    pretrained.save(restored, tmp_path / "ours" / "model.safetensors")
    kind = getattr(transformers, CLASSES[exported["model_type"]])
    theirs, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs(case, theirs.eval(), ours)


def test_the_projection_of_a_dual_encoder_is_a_linear_head(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    name, fields, pooling = CASES["all of CLIP"]
    theirs = reference(name, fields)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    _, (ids, mask) = batches(fields, pooling)
    given = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask)}
    with torch.inference_mode():
        expected = theirs.get_text_features(**given).pooler_output.numpy()
    features = ours(jnp.asarray(ids), jnp.asarray(mask)) @ weights["text_projection.weight"].T
    np.testing.assert_allclose(features, expected, atol=2e-5, rtol=0)


# Number of parameters of transformers' model, which are the same as ours. The shapes are those of
# transformers' defaults and conversion scripts (convert_siglip_to_hf.py, convert_siglip2_to_hf.py
# and convert_metaclip_2_to_hf.py). With image towers and projections they add up to published
# sizes, for example to the 151,277,313 parameters of openai/clip-vit-base-patch32.
PARAMETERS = {
    "openai/clip-vit-base-patch32": 63_165_952,
    "openai/clip-vit-base-patch16": 63_165_952,
    "openai/clip-vit-large-patch14": 123_060_480,
    "openai/clip-vit-large-patch14-336": 123_060_480,
    "facebook/metaclip-2-worldwide-huge-quickgelu": 1_225_658_368,
    "google/siglip-base-patch16-224": 110_271_744,
    "google/siglip-base-patch16-256": 110_271_744,
    "google/siglip-base-patch16-256-multilingual": 277_695_744,
    "google/siglip-large-patch16-256": 336_194_560,
    "google/siglip-so400m-patch14-384": 449_734_896,
    "google/siglip2-base-patch16-224": 282_303_744,
    "google/siglip2-large-patch16-256": 565_570_560,
    "google/siglip2-so400m-patch14-384": 707_782_896,
    "google/siglip2-so400m-patch16-256": 707_782_896,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    config = registry.architectures("text")[hub_id]
    model = create(config)
    assert model.max_length == (64 if "siglip" in hub_id else 77)
    count = sum(math.prod(value.shape) for value in pretrained.flatten(model).values())
    assert count == PARAMETERS[hub_id]


def test_published_totals_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for hub_id, total in PARAMETERS.items():
        fields = registry.architectures("text")[hub_id]
        kind = getattr(transformers, CLASSES[fields["model_type"]])
        with torch.device("meta"):
            theirs = kind(kind.config_class(**fields))
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total, hub_id

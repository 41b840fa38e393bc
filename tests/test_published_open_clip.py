"""Compares imported models of open_clip with open_clip itself, from raw input, random weights.

open_clip needs torchvision, whose wheel breaks the import of transformers' models where PyTorch has
no CUDA. So these tests run in an environment of their own, outside of `.ci/run`.
"""

import functools
import re

import numpy as np
import pytest

import xlir
from tests.models.test_clip_text_checkpoints import clip_tokenizer, gemma_tokenizer, xlmr_tokenizer
from tests.models.test_m2m_100 import TINY, nllb_tokenizer
from tests.test_published import SCALE, edit, pictures, randomize, unit, write_json
from tests.test_published import TEXTS as CAPTIONS
from xlir import published
from xlir.models import timm as our_timm

torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
INSTALL = "needs pip install --no-deps open-clip-torch timm torchvision==0.28.0 ftfy wcwidth"
# torchvision's wheel on PyPI holds operators for CUDA, which a PyTorch without CUDA does not load.
# open_clip does not use them, but importing torchvision fails unless these two are declared.
operators = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    if not torch._C._dispatch_has_kernel(f"torchvision::{operator}"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

open_clip = pytest.importorskip("open_clip", reason=INSTALL)
timm = pytest.importorskip("timm", reason=INSTALL)

DIM, LENGTH, SIZE, BIAS = 24, 20, 32, -9.5
TEXTS = [*CAPTIONS, "Snake_case, PUNCTUATION! & “quotes”", "a  b\t c"]
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CLIP_VISION = {"image_size": SIZE, "layers": 2, "width": 48, "patch_size": 8, "head_width": 16}
MAP = {"timm_pool": "map", "timm_proj": "none", "image_size": SIZE}
SIGLIP_VISION = MAP | {"timm_model_name": "vit_tiny_patch8_siglip_32"}
SIGLIP_2_VISION = MAP | {"timm_model_name": "vit_tinytanh_patch8_siglip_32"}
NLLB = {"hf_model_name": "", "hf_proj_type": "linear", "hf_pooler_type": "cls_pooler"}
OWN = {"width": 32, "heads": 2, "layers": 2}
SIGLIP = OWN | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
SIGLIP |= {"norm_kwargs": {"eps": 1e-6}, "tokenizer_kwargs": {"clean": "canonicalize"}}
# Number of dimensions, vision_cfg, text_cfg, other fields of model_cfg, tokenizer.
LAYOUTS = {
    "NLLB-CLIP": (DIM, CLIP_VISION, NLLB, {}, None),
    "NLLB-SigLIP": (48, SIGLIP_VISION, NLLB, {"init_logit_bias": -10}, None),
    "NLLB-SigLIP, projected": (
        DIM,
        SIGLIP_VISION | {"timm_proj": "linear"},
        NLLB,
        {"init_logit_bias": -10},
        None,
    ),
    "SigLIP": (48, SIGLIP_VISION, SIGLIP, {"init_logit_bias": -10}, gemma_tokenizer),
    "SigLIP 2": (
        48,
        SIGLIP_2_VISION,
        SIGLIP | {"act_kwargs": {"approximate": "tanh"}},
        {"init_logit_bias": -10},
        gemma_tokenizer,
    ),
    "CLIP": (DIM, CLIP_VISION, OWN, {"quick_gelu": True}, clip_tokenizer),
    "MetaCLIP 2": (DIM, CLIP_VISION, OWN | {"pool_type": "eos"}, {}, xlmr_tokenizer),
}


def tiny_vit(activation, **options):
    options = {name: x for name, x in options.items() if name in ("num_classes", "global_pool")}
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        mlp_ratio=80 / 48,
        class_token=False,
        act_layer=activation,
        **{"global_pool": "map"} | options,
    )
    model.default_cfg = {}
    return model


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """Small towers beside timm's and ours."""
    with pytest.MonkeyPatch.context() as patch:
        entries = timm.models._registry._model_entrypoints
        for size, activation in (("tiny", None), ("tinytanh", "gelu_tanh")):
            name = f"vit_{size}_patch8_siglip_32"
            patch.setitem(entries, name, functools.partial(tiny_vit, activation))
            patch.setitem(our_timm.SIZES, size, (48, 2, 3, 80))
        patch.setattr(our_timm, "TANH", (*our_timm.TANH, "tinytanh"))
        yield


def write(name, folder):
    """Writes a model as open_clip does; returns the model, its preprocessing and tokenizer."""
    dim, vision, text, fields, make = LAYOUTS[name]
    tokenizer = nllb_tokenizer(folder) if make is None else make(transformers)
    text = text | {"context_length": LENGTH, "hf_tokenizer_name": str(folder)}
    if make is None:
        (folder / "base").mkdir()
        base = transformers.M2M100Config(**TINY | {"vocab_size": len(tokenizer)})
        base.save_pretrained(folder / "base")
        text |= {"hf_model_name": str(folder / "base"), "hf_model_pretrained": False}
    else:
        tokenizer.save_pretrained(folder)
        text["vocab_size"] = len(tokenizer)
    config = {"embed_dim": dim, "vision_cfg": vision, "text_cfg": text} | fields
    custom = "CLIP" if name in ("CLIP", "MetaCLIP 2") else "CustomTextCLIP"
    model = randomize(getattr(open_clip.model, custom)(**config))
    if model.logit_bias is not None:
        model.logit_bias.data.fill_(BIAS)
    preprocessing = HALF if "timm_pool" in vision else {}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors_torch.save_file(weights, folder / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": preprocessing}
    write_json(folder / "open_clip_config.json", described)
    clean = text.get("tokenizer_kwargs", {"clean": "lower" if name == "CLIP" else "whitespace"})
    theirs = open_clip.tokenizer.HFTokenizer(str(folder), context_length=LENGTH, **clean)
    transform = open_clip.transform
    prepare = transform.image_transform_v2(transform.PreprocessCfg(SIZE, **preprocessing), False)
    return model, prepare, theirs


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    """Name -> the imported encoder, and open_clip's model, preprocessing and tokenizer."""

    @functools.cache
    def make(name):
        folder, run = (tmp_path_factory.mktemp(x) for x in ("model", "run"))
        theirs = write(name, folder)
        published.import_model(str(folder), str(folder), run)
        return xlir.Encoder.load(run), *theirs

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_and_logits_as_in_open_clip(name, encoder_of):
    encoder, model, prepare, tokenizer = encoder_of(name)
    ours = encoder.encode_text(TEXTS), encoder.encode_image(pictures())
    with torch.inference_mode():
        pixels = torch.stack([prepare(image) for image in pictures()])
        texts, images = model.encode_text(tokenizer(TEXTS), True), model.encode_image(pixels, True)
        logits = model.get_logits(pixels, tokenizer(TEXTS))[0].numpy()
    cosines = ours[1].astype(np.float64) @ ours[0].astype(np.float64).T
    bias = 0.0 if model.logit_bias is None else float(encoder.parameters.trained["bias"])
    differences = [np.abs(a - unit(b)).max() for a, b in zip(ours, (texts, images), strict=True)]
    differences.append(np.abs(encoder.scale * cosines + bias - logits).max() / encoder.scale)
    print(f"{name}: texts, images, logits / scale differ by {np.array(differences)}")
    assert max(differences) <= 1e-5
    # Embeddings that are nearly equal would hide differences.
    assert min(np.ptp(x, axis=0).max() for x in ours) > 0.1


def test_languages_as_in_open_clip(encoder_of):
    encoder, model, _, tokenizer = encoder_of("NLLB-CLIP")
    # open_clip's set_language has no effect on a tokenizer of today's transformers.
    tokenizer.tokenizer.src_lang = "deu_Latn"
    with torch.inference_mode():
        expected = unit(model.encode_text(tokenizer(TEXTS)))
    tokenizer.tokenizer.src_lang = "eng_Latn"
    ours = encoder.encode_text([f"deu_Latn{text}" for text in TEXTS])
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    assert np.abs(ours - encoder.encode_text(TEXTS)).max() > 0.1


def test_the_configuration_says_what_it_is(encoder_of):
    encoder = encoder_of("NLLB-SigLIP")[0]
    config = encoder.config
    assert (config.text.head, config.image.head) == ("linear", "none")
    assert (config.text.pooling, config.text.max_length) == ("cls", LENGTH)
    assert (config.loss.name, config.loss.bias) == ("sigmoid", BIAS)
    assert encoder.parameters.trained["log_scale"] == pytest.approx(SCALE)


OPEN = "open_clip_config.json"
FAULTS = {
    "another timm model": (
        "NLLB-SigLIP",
        ("vision_cfg", "timm_model_name", "convnext_base"),
        "vision_cfg.timm_model_name 'convnext_base' and timm_pool 'map' is not supported",
    ),
    "another pool": ("NLLB-SigLIP", ("vision_cfg", "timm_pool", "avg"), "timm_pool 'avg' is not"),
    "a bias": ("NLLB-SigLIP", ("vision_cfg", "timm_proj_bias", True), "timm_proj_bias True is"),
    "pooler": (
        "NLLB-CLIP",
        ("text_cfg", "hf_pooler_type", "max_pooler"),
        "text_cfg.hf_pooler_type 'max_pooler' is not supported",
    ),
    "a class token": ("CLIP", ("text_cfg", "embed_cls", True), "text_cfg.embed_cls True is not"),
    "neither": (
        "SigLIP",
        ("text_cfg", "proj_bias", False),
        "no_causal_mask True and proj_bias False is neither CLIP's nor SigLIP's",
    ),
    "activation": ("CLIP", ("text_cfg", "act_kwargs", {"approximate": "x"}), "text_cfg.act_kwargs"),
    "cleaning": (
        "SigLIP",
        ("text_cfg", "tokenizer_kwargs", {"strip_sep_token": True}),
        "text_cfg.tokenizer_kwargs {'strip_sep_token': True} is not supported",
    ),
    "heads": ("CLIP", ("text_cfg", "heads", 5), "heads is 5; it must be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_are_refused(fault, tmp_path):
    name, (group, field, value), message = FAULTS[fault]
    (tmp_path / "model").mkdir()
    write(name, tmp_path / "model")
    edit(OPEN, "model_cfg", group, field, value=value)(tmp_path / "model")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        published.import_model(*[str(tmp_path / "model")] * 2, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("base_patch16_siglip_384", 93_176_064),
        ("base_patch32_siglip_256", 94_552_320),
        ("so400m_patch14_siglip_384", 428_225_600),
        ("giantopt_patch16_siglip_256", 1_163_168_256),
    ],
)
def test_published_image_towers(name, total):
    """The shapes of published sizes are those of timm's models."""
    config = our_timm.vision_config({"timm_model_name": f"vit_{name}", "timm_pool": "map"})
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{name}", num_classes=0)
        ours = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))
    counts = [sum(x.numel() for x in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1] == total
    activation = type(theirs.blocks[0].mlp.act).__name__
    assert {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}[activation] == config["hidden_act"]

"""Exports every tower and head, with random weights, to every format that supports it."""

import dataclasses
import io
import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image
from safetensors.numpy import load_file

pytest.importorskip("torch", reason="needs torch: pip install 'xlir[export]'")

from configs import base
from input_pipeline.preprocessing import Preprocessing
from input_pipeline.tokenizers import Padding, byte_tokenizer
from xlir import export
from xlir.data import RetrievalSet
from xlir.encoder import Encoder
from xlir.export import architecture, verification
from xlir.models import dual_encoder, pretrained, registry, towers

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = LAYERS | {"vocab_size": 260, "intermediate_size": 48, "max_position_embeddings": 66}
CLIP = TEXT | {"model_type": "clip_text_model", "hidden_act": "quick_gelu"}
# The tokenizer's id of EOS is 2, which in CLIP's config.json stands for the highest id of a text.
# So another token that occurs in the captions takes its place.
SPACE = int(byte_tokenizer()([" "])[0][1])
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 260}
VISION = LAYERS | {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
DINOV2 = VISION | {"model_type": "dinov2", "mlp_ratio": 2}
DINOV3 = VISION | {"model_type": "dinov3_vit", "num_register_tokens": 3}
NAFLEX = LAYERS | {"model_type": "siglip2_vision_model", "intermediate_size": 48}
NAFLEX |= {"patch_size": 8, "num_patches": 16}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}
MLP = {"head": "mlp", "hidden": (24, 20)}
# Name -> kind of the tower, its config, pooling, and fields of the configuration.
TEXTS = {
    "BERT": ("transformer", TEXT | {"model_type": "bert"}, "mean", MLP),
    "BERT's pooler": ("transformer", TEXT | {"model_type": "bert"}, "pooler", {}),
    "XLM-R": ("transformer", TEXT | {"model_type": "xlm-roberta", "pad_token_id": 1}, "cls", {}),
    "XLM-R with a prefix": (
        "transformer",
        TEXT | {"model_type": "xlm-roberta", "pad_token_id": 1, "hidden_act": "relu"},
        "mean",
        {"prefix": "query: "},
    ),
    "M-CLIP": (
        "transformer",
        TEXT | {"model_type": "xlm-roberta", "pad_token_id": 1},
        "mean",
        {"head": "affine"},
    ),
    "open_clip": (
        "transformer",
        TEXT | {"model_type": "xlm-roberta", "pad_token_id": 1},
        "mean",
        {"head": "plain_mlp", "hidden": (24,)},
    ),
    "dense layers": (
        "transformer",
        TEXT
        | {
            "model_type": "xlm-roberta",
            "pad_token_id": 1,
            "dense": [
                {"features": 32, "dim": 24, "bias": True, "activation": "tanh"},
                {"features": 24, "dim": 20, "bias": False, "activation": "identity"},
            ],
        },
        "mean",
        {"head": "affine"},
    ),
    "ModernBERT": (
        "transformer",
        TEXT | {"model_type": "modernbert", "local_attention": 8, "norm_bias": True},
        "mean",
        {},
    ),
    "EmbeddingGemma": (
        "transformer",
        TEXT
        | {
            "model_type": "gemma3_text",
            "num_key_value_heads": 2,
            "head_dim": 12,
            "sliding_window": 8,
            "use_bidirectional_attention": True,
            "dense": [{"features": 32, "dim": 24, "bias": False, "activation": "identity"}],
        },
        "mean",
        {},
    ),
    "NLLB": (
        "transformer",
        {
            "model_type": "m2m_100",
            "vocab_size": 260,
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
        },
        "cls",
        {},
    ),
    "DistilBERT": (
        "transformer",
        DISTILBERT | {"model_type": "distilbert", "max_position_embeddings": 64},
        "mean",
        {},
    ),
    "CLIP": ("transformer", CLIP | {"eos_token_id": SPACE}, "eos", {}),
    "CLIP's mean": ("transformer", CLIP, "mean", MLP),
    "CLIP of OpenAI": ("transformer", CLIP | {"eos_token_id": 2}, "eos", {"head": "affine"}),
    "MetaCLIP 2": (
        "transformer",
        TEXT | {"model_type": "metaclip_2_text_model", "eos_token_id": 2},
        "eos",
        {},
    ),
    "SigLIP": (
        "transformer",
        {
            "model_type": "siglip",
            "text_config": TEXT | {"projection_size": 24, "max_position_embeddings": 40},
        },
        "last",
        {"head": "affine"},
    ),
}
IMAGES = {
    "ViT": ("vit", VISION | {"model_type": "vit"}, "cls", {"head": "center"}),
    "ViT's pooler": ("vit", VISION | {"model_type": "vit", "qkv_bias": False}, "pooler", {}),
    "ViT's mean": ("vit", VISION | {"model_type": "vit"}, "mean", MLP),
    "ViT of another size": ("vit", VISION | {"model_type": "vit"}, "cls", {"size": 51}),
    "CLIP": ("vit", VISION | {"model_type": "clip_vision_model"}, "", {"head": "none"}),
    "CLIP of another size": (
        "vit",
        {"model_type": "clip", "vision_config": VISION},
        "",
        {"size": 47},
    ),
    "DINOv2": ("vit", DINOV2, "", {}),
    "DINOv2 gated": ("vit", DINOV2 | {"use_swiglu_ffn": True}, "", {}),
    "DINOv3": ("vit", DINOV3, "", {}),
    "DINOv3 gated": (
        "vit",
        DINOV3 | {"use_gated_mlp": True, "query_bias": False, "value_bias": False},
        "mean",
        {"size": 43},
    ),
    "SigLIP": ("vit", VISION | {"model_type": "siglip_vision_model"}, "", {}),
    "SigLIP's mean": ("vit", VISION | {"model_type": "siglip_vision_model"}, "mean", {"size": 29}),
    "NaFlex": ("naflex", NAFLEX, "", {}),
    "NaFlex's mean": ("naflex", NAFLEX | {"num_patches": 49}, "mean", {"size": 56}),
    "ResNet": ("resnet", RESNET, "", {}),
    "ResNet of basic blocks": ("resnet", RESNET | {"layer_type": "basic"}, "", MLP),
    "open_clip": (
        "vit",
        VISION | {"model_type": "clip_vision_model", "hidden_act": "gelu"},
        "",
        {"crop": "center_rounded"},
    ),
    "EfficientNet": ("efficientnet", {"variant": "lite0"}, "", {"head": "mlp", "hidden": (24,)}),
}
# Towers whose photos are resized in float32; transformers would need torchvision for it.
FLOATING = ("DINOv3 gated",)
# Text tower, image tower and formats to test; few cases test ONNX, because tracing takes long.
CASES = [
    ("BERT", "ViT", "sentence-transformers torch"),
    ("BERT's pooler", "ViT's pooler", "sentence-transformers transformers torch"),
    ("XLM-R with a prefix", "ViT's mean", "torch onnx"),
    ("XLM-R", "ViT of another size", "sentence-transformers torch"),
    ("XLM-R with a prefix", "CLIP", "sentence-transformers torch"),
    ("BERT's pooler", "DINOv2", "sentence-transformers transformers torch"),
    ("DistilBERT", "DINOv2 gated", "sentence-transformers torch"),
    ("BERT's pooler", "DINOv3", "sentence-transformers transformers torch"),
    ("DistilBERT", "DINOv3 gated", "torch onnx"),
    ("BERT's pooler", "SigLIP", "sentence-transformers transformers torch onnx"),
    ("XLM-R", "SigLIP's mean", "sentence-transformers torch"),
    ("BERT's pooler", "CLIP of another size", "sentence-transformers transformers torch"),
    ("BERT", "ResNet", "sentence-transformers torch"),
    ("M-CLIP", "CLIP", "sentence-transformers torch"),
    ("open_clip", "open_clip", "torch"),
    ("dense layers", "ResNet", "sentence-transformers torch"),
    ("BERT", "ResNet of basic blocks", "sentence-transformers torch"),
    ("ModernBERT", "ResNet", "sentence-transformers torch onnx"),
    ("EmbeddingGemma", "ResNet", "sentence-transformers torch onnx"),
    ("CLIP", "DINOv2", "sentence-transformers transformers torch onnx"),
    ("CLIP's mean", "ResNet", "sentence-transformers torch"),
    ("CLIP of OpenAI", "CLIP", "sentence-transformers torch"),
    ("MetaCLIP 2", "SigLIP", "torch"),
    ("MetaCLIP 2", "CLIP of another size", "transformers"),
    ("SigLIP", "SigLIP", "torch"),
    ("SigLIP", "NaFlex", "torch onnx"),
    ("SigLIP", "NaFlex's mean", "torch"),
]
# Their parts are traced for ONNX in the cases above, in other combinations.
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("DistilBERT", "DINOv2 gated", "sentence-transformers torch onnx"),
        ("BERT", "ResNet of basic blocks", "sentence-transformers torch onnx"),
        ("dense layers", "ResNet", "sentence-transformers torch onnx"),
        ("CLIP of OpenAI", "CLIP", "sentence-transformers torch onnx"),
        ("MetaCLIP 2", "SigLIP", "torch onnx"),
        ("SigLIP", "SigLIP", "torch onnx"),
    )
]
CAPTIONS = [
    "A red circle, left.",
    "Kreis",
    "빨간 사과",
    "",
    "Ein sehr langer Satz über einen schwarzen Strich, der oben im Bild zu sehen ist.",
    "🍎 naïve\ttext  with  spaces ",
    "Ein <pad> im Text<pad><pad>, und noch einer: <pad> ",
]


def random_encoder(text: str, image: str) -> Encoder:
    """An encoder with random parameters, so that each of them affects the outputs."""
    config, specs = base.get_config(), {}
    config.head_dtype = config.text.dtype = config.image.dtype = "float32"
    config.embedding_dim, config.text.max_length = 32, 40
    for side, (kind, shape, pooling, fields) in (("text", TEXTS[text]), ("image", IMAGES[image])):
        config[side].tower = kind
        config[side].head = "linear"
        config[side].update(fields)
        dense = {"dense": shape["dense"]} if "dense" in shape else {}
        plain = {name: value for name, value in shape.items() if name != "dense"}
        described = {"kind": kind, "config": plain, "pooling": pooling} | dense
        if kind == "efficientnet":
            described = {"kind": kind} | shape
        if side == "image":
            described["preprocessing"] = preprocessing(config.image)
            described["preprocessing"]["patch"] = 8 if kind == "naflex" else 0
            described["preprocessing"]["dtype"] = "float32" if image in FLOATING else "uint8"
        specs[side] = registry.spec_from_json(side, described)

    def create():
        rngs = nnx.Rngs(0)
        parts = [towers.create(specs[side], config[side], rngs=rngs) for side in specs]
        return dual_encoder.DualEncoder(config, *parts, rngs=rngs)

    model = nnx.eval_shape(create)
    generator = np.random.default_rng(0)
    weights = {}
    for name, value in pretrained.flatten(model).items():
        if value.ndim < 2 and name.endswith("scale"):
            weights[name] = generator.uniform(0.5, 1.5, value.shape)
        else:
            fan_in = np.prod(value.shape[-3:-1] if value.ndim > 2 else value.shape[:1])
            weights[name] = generator.normal(size=value.shape) / max(fan_in, 4) ** 0.5
    pretrained.merge(model, {n: np.asarray(x, np.float32) for n, x in weights.items()})
    tokenizer = byte_tokenizer(config.text.prefix)
    if length := specs["text"].family.full_length(specs["text"].config):
        tokenizer.padding = Padding(length, tokenizer.special_tokens()["<pad>"])
    return Encoder.from_model(config, model, tokenizer, specs)


def preprocessing(options) -> dict:
    """Resizes the shorter side, crops, and normalises each channel differently."""
    size = options.size or 32
    crop = {"crop": options.crop or "center", "resize": size + 5}
    fields = {"resample": "bilinear"} if options.size else crop
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    return dataclasses.asdict(Preprocessing(size=size, mean=mean, std=std, **fields))


def encoded(mode: str, size: tuple[int, int], format: str, **options) -> bytes:
    """A smooth random image."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, channels), np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode).resize(size)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pairs(photos) -> verification.Examples:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    images = [
        (photos / "images" / "00.jpg").read_bytes(),
        # Training decodes a photo of this size at a reduced size; an exported model does not.
        encoded("RGB", (600, 450), "JPEG"),
        encoded("RGB", (70, 90), "JPEG", exif=turned),
        encoded("RGBA", (64, 48), "PNG"),
        encoded("L", (64, 64), "PNG"),
        encoded("CMYK", (50, 80), "JPEG"),
    ]
    rows = np.arange(len(CAPTIONS)) % len(images)
    return verification.Examples("shapes", ["en", "de"], CAPTIONS, rows, images)


@pytest.mark.parametrize(("text", "image", "formats"), CASES)
def test_exported_towers_and_heads_are_the_runs(
    text, image, formats, pairs, tmp_path, in_process, monkeypatch
):
    encoder = random_encoder(text, image)
    fitting = [name for name, format in export.FORMATS.items() if not format.unfit(encoder)]
    assert {*fitting} == {*formats.split(), "torch", "onnx"}
    ours = verification._reference(encoder, pairs)
    monkeypatch.setattr(verification, "_reference", lambda encoder, pairs: ours)
    monkeypatch.setattr(verification, "TOLERANCE", 2e-6)
    monkeypatch.setattr(verification, "TOWER_TOLERANCE", 1e-5)
    for format in formats.split():
        (tmp_path / format).mkdir()
        export.FORMATS[format].write(encoder, tmp_path / format)
        report = verification.verify(encoder, tmp_path / format, format, pairs)
        assert report.pixels <= 1e-4
    # Embeddings must differ: otherwise a tower that ignores its input would pass.
    for side in ("text", "image"):
        embeddings = ours[f"{side}_embeddings"]
        assert np.abs(embeddings - embeddings[0]).max(axis=1)[1:].min() > 1e-4


@pytest.mark.parametrize("text", [name for name in TEXTS])
def test_restored_text_towers_are_renamed_to_the_same(text):
    encoder = random_encoder(text, "ResNet")
    weights = encoder.weights("text_tower")
    weights = {name: x for name, x in weights.items() if not name.startswith("dense.")}
    if text == "ModernBERT":  # its first layer has no norm before the attention
        for name, initial in (("scale", 1), ("bias", 0)):
            norms = f"layers.stacked.attention_norm.{name}"
            weights[norms] = np.concatenate([np.full((1, 32), initial), weights[norms][1:]])
    if text == "EmbeddingGemma":  # its files hold the scales of norms minus 1, which rounds them
        weights = restored_and_renamed(encoder, "text", weights)
    same(restored_and_renamed(encoder, "text", weights), weights)


@pytest.mark.parametrize("image", [name for name in IMAGES if name != "EfficientNet"])
def test_restored_image_towers_are_renamed_to_the_same(image):
    encoder = random_encoder("BERT", image)
    weights = architecture.tower_weights(encoder, "image")
    # 1 - 1e-5 + 1e-5 in float32 is off by its last bit.
    same(restored_and_renamed(encoder, "image", weights), weights, rtol=1e-6)


def restored_and_renamed(encoder: Encoder, side: str, weights: dict) -> dict:
    """Converts weights to the names of `transformers` and back; the padding id becomes 5."""
    spec = encoder.specs[side]
    config = spec.family.hub_config(spec, pad_id=5)
    published = spec.family.restore(weights, config)
    return spec.family.rename(published, config, spec.pooling)


def same(ours: dict, theirs: dict, rtol: float = 0.0) -> None:
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, err_msg=name)


@pytest.fixture(scope="module")
def bert_and_vit(pairs):
    """An encoder and its outputs."""
    encoder = random_encoder("BERT", "ViT")
    return encoder, verification._reference(encoder, pairs)


def damaged_json(name: str, change):
    """Changes a JSON file of a folder."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return damage


def damaged_weight(name: str):
    """Changes a weight of a folder's model by a hundredth."""

    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights[name] * np.float32(1.01)
        pretrained.save(weights, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            damaged_json("config.json", lambda c: c["tokenizer"].update(max_length=20)),
            "first in the tokens of 4 texts;",
        ),
        (
            damaged_json("config.json", lambda c: c["preprocessing"].update(resample="nearest")),
            "first in the pixels .by up to .* of 255.;",
        ),
        (damaged_weight("text_tower.layers.1.mlp.fc1.weight"), "outputs of the text tower"),
        (damaged_weight("image_tower.patches.weight"), "outputs of the image tower"),
        (damaged_weight("text_head.1.weight"), "outputs of the text head"),
        (damaged_weight("image_head.0.bias"), "outputs of the image head"),
    ],
)
def test_a_difference_is_named_by_its_stage(
    damage, message, bert_and_vit, pairs, tmp_path, in_process, monkeypatch
):
    encoder, ours = bert_and_vit
    monkeypatch.setattr(verification, "_reference", lambda encoder, pairs: ours)
    export.FORMATS["torch"].write(encoder, tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        verification.verify(encoder, tmp_path, "torch", pairs)


def test_a_folder_that_needs_jax_is_refused(pairs, tmp_path):
    encoder = random_encoder("BERT", "ResNet")
    export.FORMATS["torch"].write(encoder, tmp_path)
    source = tmp_path / "dual_encoder" / "muse.py"
    source.write_text("import jax\n" + source.read_text())
    with pytest.raises(ValueError, match="can't be run: ModuleNotFoundError: import of jax"):
        verification.verify(encoder, tmp_path, "torch", pairs)


@pytest.mark.parametrize(
    ("format", "text", "image", "reason"),
    [
        ("sentence-transformers", "BERT", "EfficientNet", "has no image tower 'efficientnet'"),
        ("sentence-transformers", "BERT", "ViT's mean", "mean over vit includes the class token"),
        ("transformers", "BERT", "ViT's pooler", "text pooling is 'pooler', not 'mean'"),
        ("transformers", "BERT", "ViT's pooler", "text head is a matrix .* not 'mlp'"),
        ("transformers", "BERT's pooler", "ResNet", "has no image tower 'resnet'"),
        ("transformers", "XLM-R with a prefix", "ViT", "text.prefix is 'query: '"),
        ("sentence-transformers", "open_clip", "open_clip", "processors round odd margins"),
        ("sentence-transformers", "SigLIP", "SigLIP", "has no text tower 'siglip_text_model'"),
        ("transformers", "MetaCLIP 2", "SigLIP", "text tower 'metaclip_2_text_model' in such"),
        ("sentence-transformers", "BERT", "DINOv3 gated", "ImageProcessor of .* needs torchvision"),
        ("transformers", "SigLIP", "SigLIP", "SiglipModel's text head is 'none', not 'affine'"),
    ],
)
def test_what_a_format_can_not_hold_is_named(format, text, image, reason, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    assert re.search(reason, export.FORMATS[format].unfit(random_encoder(text, image)))


def test_large_graphs_have_their_weights_beside_them(
    bert_and_vit, pairs, tmp_path, in_process, monkeypatch
):
    from xlir.export import graphs

    encoder, ours = bert_and_vit
    monkeypatch.setattr(verification, "_reference", lambda encoder, pairs: ours)
    monkeypatch.setattr(graphs, "LARGE", 0)
    export.FORMATS["onnx"].write(encoder, tmp_path)
    assert len(list(tmp_path.glob("*.data"))) == 2
    verification.verify(encoder, tmp_path, "onnx", pairs)


def test_the_reference_is_computed_in_full_float32(bert_and_vit, pairs, monkeypatch):
    encoder, _ = bert_and_vit
    seen = []
    for name in ("features", "embed"):
        monkeypatch.setattr(
            encoder.embedder, name, lambda *_: seen.append(jax.config.jax_default_matmul_precision)
        )
    verification._reference(encoder, pairs)
    assert seen == ["highest"] * 4


def test_what_runs_an_exported_folder_is_forgiving(bert_and_vit, tmp_path, in_process):
    import importlib

    import torch

    encoder, _ = bert_and_vit
    export.FORMATS["torch"].write(encoder, tmp_path)
    sys.path.insert(0, str(tmp_path))
    model = importlib.import_module("dual_encoder").load(tmp_path)
    assert model.encode_text([]).shape == model.encode_image([]).shape == (0, 32)
    for encode in (model.encode_text, model.encode_image):
        with pytest.raises(TypeError, match="takes a list"):
            encode("ein Hund")
    texts, pixels = ["Kreis", "a lone \ud800 surrogate"], np.zeros((32, 32, 3), np.uint8)
    np.testing.assert_allclose(model.encode_text(texts), encoder.encode_text(texts), atol=2e-6)
    # Only the middle of a strip is resized, because the whole would fill the memory.
    strip = encoded("RGB", (4, 300), "PNG")
    np.testing.assert_array_equal(model.reader(strip), encoder.embedder.decode(strip))
    half = model.to(torch.bfloat16)
    text, image = half.encode_text(texts[:1]), half.encode_image([pixels])
    np.testing.assert_allclose(text, encoder.encode_text(texts[:1]), atol=0.02)
    np.testing.assert_allclose(image, encoder.encode_image([pixels]), atol=0.02)


def test_examples_take_languages_in_turn():
    captions = {language: [f"{language}{i}" for i in range(100)] for language in ("de", "en", "tr")}
    rows = {language: np.arange(100) for language in captions}
    images = [encoded("RGB", (4 + i, 8), "PNG") for i in range(100)]
    chosen = RetrievalSet("s", images, captions, rows, "")
    examples = verification.examples(chosen)
    assert (len(examples.image_of), examples.photos) == (64, 32)
    assert (len(examples.texts), len(examples.images)) == (66, 34)
    assert {text[:2] for text in examples.texts[:3]} == {"de", "en", "tr"}
    for text, row in zip(examples.texts[:64], examples.image_of, strict=True):
        assert examples.images[row] == images[int(text[2:])]
    assert len(set(examples.texts)) == 66

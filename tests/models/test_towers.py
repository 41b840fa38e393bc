"""Compares towers of checkpoints, from raw input on, with transformers in torch."""

import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

import xlir
from configs import base
from tests.tokenizers.test_huggingface import CORPUS, OTHER, unigram
from xlir.models import pretrained, registry, towers
from xlir.models.family import TowerSpec
from xlir.models.torch_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
# torch's legacy format, with os.system("true") in place of the state dict.
MALICIOUS = b"".join(
    [
        pickle.dumps(LEGACY_MAGIC, protocol=2),
        pickle.dumps(LEGACY_PROTOCOL, protocol=2),
        pickle.dumps({"little_endian": True}, protocol=2),
        b"cos\nsystem\n(S'true'\ntR.",
    ]
)
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """An XLM-R and a CLIP vision checkpoint with random weights, as transformers writes them."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = unigram()
    config = transformers.XLMRobertaConfig(vocab_size=tokenizer.get_vocab_size(), **TEXT)
    text = transformers.XLMRobertaModel(config).eval()
    text.save_pretrained(folder / "text")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
    ).save_pretrained(folder / "text")
    config = transformers.CLIPVisionConfig(
        **{name: TEXT[name] for name in list(TEXT)[:4]}, image_size=32, patch_size=8
    )
    image = transformers.CLIPVisionModel(config).eval()
    image.save_pretrained(folder / "image")
    (folder / "image" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder, text, image


@pytest.fixture
def config(checkpoints):
    folder, *_ = checkpoints
    config = base.get_config()
    config.embedding_dim = 32
    for side in ("text", "image"):
        config[side].tower = str(folder / side)
        config[side].head = "none"
        config[side].dtype = "float32"
    config.text.prefix = "query: "
    config.text.max_length = 48
    return config


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_texts_as_in_torch(checkpoints, config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, model, _ = checkpoints
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text")
    texts = [*CORPUS, *OTHER]
    batch = tokenizer([f"query: {text}" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0].numpy()
    mask = batch["attention_mask"].numpy()[..., None]
    expected = unit((hidden * mask).sum(1) / mask.sum(1))
    encoder = xlir.Encoder.create(config)
    np.testing.assert_allclose(encoder.encode_text(texts), expected, atol=2e-5)


def test_images_as_in_torch(checkpoints, config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    *_, model = checkpoints
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 40), (70, 33)]
    images = [Image.fromarray(rng.integers(0, 256, (*s, 3)).astype(np.uint8)) for s in sizes]
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)(
        **PROCESSOR
    )
    pixels = torch.from_numpy(np.stack(processor(images)["pixel_values"]))
    with torch.no_grad():
        expected = unit(model(pixels).pooler_output.numpy())
    encoder = xlir.Encoder.create(config)
    np.testing.assert_allclose(encoder.encode_image(images), expected, atol=2e-5)


def test_saved_towers_need_no_checkpoint(config, tmp_path, monkeypatch):
    encoder = xlir.Encoder.create(config)
    encoder.save(tmp_path)
    monkeypatch.setattr(pretrained, "checkpoint_folder", None)
    opened = xlir.Encoder.open(tmp_path)
    np.testing.assert_array_equal(opened.encode_text(CORPUS), encoder.encode_text(CORPUS))
    photo = Image.new("RGB", (50, 40), "red")
    np.testing.assert_array_equal(opened.encode_image([photo]), encoder.encode_image([photo]))
    described = [e.embedder.describe_tower(e.parameters, "text") for e in (opened, encoder)]
    assert described[0] == described[1]


def test_a_trimmed_vocabulary_changes_no_embedding(config, tmp_path):
    whole = xlir.Encoder.create(config)
    (tmp_path / "de.txt").write_text("\n".join(CORPUS[4:]))
    config.data.dir, config.text.trim_vocab = str(tmp_path), "de.txt"
    trimmed = xlir.Encoder.create(config, [f"query: {text}" for text in CORPUS[:4]])
    embeddings = [
        encoder.parameters.frozen["text_tower"]["embedding"] for encoder in (whole, trimmed)
    ]
    assert len(embeddings[1]) < len(embeddings[0])
    np.testing.assert_allclose(trimmed.encode_text(CORPUS), whole.encode_text(CORPUS), atol=1e-6)
    trimmed.save(tmp_path / "run")
    opened = xlir.Encoder.open(tmp_path / "run")
    np.testing.assert_array_equal(opened.encode_text(OTHER), trimmed.encode_text(OTHER))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "text.tower",
            "image",
            r"config\.text\.tower .* 'clip_vision_model' is not supported; known text",
        ),
        (
            "image.tower",
            "text",
            r"config\.image\.tower .* 'xlm-roberta' is not supported; known image",
        ),
        ("text.tower", "", r"config\.text\.tower is ''; it must be the name"),
        ("text.tower", "nobody/nothing", r"config\.text\.tower: .* hf download nobody/nothing"),
        ("text.pooling", "max", r"^config\.text\.pooling is 'max'; .*known: mean, cls, pooler"),
        ("text.max_length", 65, r"^config\.text\.max_length is 65, but .* of at most 64 tokens$"),
        ("text.max_length", 2, r"^config\.text\.max_length is 2; it must be an integer"),
        (
            "image.pooling",
            "attention",
            r"^config\.image\.pooling is 'attention'; clip_vision_model supports",
        ),
        ("text.dtype", "float16", "dtype is 'float16'"),
        ("text.trim_vocab", "nowhere", r"trim_vocab: .*nowhere holds no \.txt files"),
        ("image.mirror", True, r"need a trained tower, --config\.image\.frozen=False"),
        ("image.min_area", 1.5, r"min_area is 1\.5; it must be a number"),
    ],
)
def test_refusals(checkpoints, config, field, value, message):
    folder, *_ = checkpoints
    side, name = field.split(".")
    (folder / "nowhere").mkdir(exist_ok=True)
    config.data.dir = str(folder)
    config[side][name] = str(folder / value) if value in ("image", "text") else value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        xlir.Encoder.create(config)


def test_a_size_of_ones_own(config):
    config.image.size = 48
    encoder = xlir.Encoder.create(config)
    assert encoder.embedder.decode(Image.new("RGB", (60, 50))).shape == (48, 48, 3)
    assert encoder.encode_image([Image.new("RGB", (60, 50))]).shape == (1, 32)


def test_squashing_shows_the_whole_photo(checkpoints, config, tmp_path):
    """This holds also if the checkpoint crops after resizing."""
    folder, *_ = checkpoints
    processor = PROCESSOR | {"size": {"shortest_edge": 40}}
    shutil.copytree(folder / "image", tmp_path / "image")
    (tmp_path / "image" / "preprocessor_config.json").write_text(json.dumps(processor))
    config.image.tower, config.image.crop = str(tmp_path / "image"), "squash"
    preprocessing = xlir.Encoder.create(config).preprocessing
    assert (preprocessing.size, preprocessing.resize, preprocessing.crop) == (32, 32, "squash")


def test_a_checkpoint_whose_size_is_below_its_patches(checkpoints, config, tmp_path):
    """The message has the checkpoint's size; config.image.size is 0."""
    folder, *_ = checkpoints
    processor = PROCESSOR | {"size": {"shortest_edge": 4}, "crop_size": {"height": 4, "width": 4}}
    shutil.copytree(folder / "image", tmp_path / "image")
    (tmp_path / "image" / "preprocessor_config.json").write_text(json.dumps(processor))
    config.image.tower = str(tmp_path / "image")
    message = "photos of 4 pixels a side are too small .* patches of 8: set config.image.size to at"
    with pytest.raises(ValueError, match=message):
        xlir.Encoder.create(config)


def embedded_by_torch(model, folder, texts) -> np.ndarray:
    """Mean-pooled, unit-length embeddings of a text model of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0].numpy()
    mask = batch["attention_mask"].numpy()[..., None]
    return unit((hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype, checkpoints, config, tmp_path):
    """Tensors are converted to float32 before they are added, as in transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder, *_ = checkpoints
    shutil.copytree(folder / "text", tmp_path / "text")
    whole = transformers.XLMRobertaModel.from_pretrained(folder / "text")
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "embeddings.position" in name or "token_type" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    whole.to(getattr(torch, dtype)).save_pretrained(tmp_path / "text")
    model = transformers.XLMRobertaModel.from_pretrained(tmp_path / "text", dtype=torch.float32)
    config.text.tower, config.text.prefix = str(tmp_path / "text"), ""
    texts = [*CORPUS, *OTHER]
    ours = xlir.Encoder.create(config).encode_text(texts)
    expected = embedded_by_torch(model.eval(), folder / "text", texts)
    np.testing.assert_allclose(ours, expected, atol=2.4e-6, rtol=0)


def test_a_padding_token_in_a_text(checkpoints, config, tmp_path):
    """The token has no position, wherever it is in the text. This also holds in padded batches,
    with a trimmed vocabulary, and after saving and loading.
    """
    transformers = pytest.importorskip("transformers")
    folder, *_ = checkpoints
    texts = [
        "<pad>",
        "Zwei <pad> Hunde",
        "Ball! <pad><pad> <pad> Ball!",
        "<pad> Gras " * 4,
        *CORPUS,
    ]
    model = transformers.XLMRobertaModel.from_pretrained(folder / "text").eval()
    expected = embedded_by_torch(model, folder / "text", texts)
    config.text.prefix = ""
    encoder = xlir.Encoder.create(config)
    np.testing.assert_allclose(encoder.encode_text(texts), expected, atol=2e-5, rtol=0)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    config.data.dir, config.text.trim_vocab = str(tmp_path), "texts.txt"
    trimmed = xlir.Encoder.create(config)
    np.testing.assert_allclose(trimmed.encode_text(texts), expected, atol=2e-5, rtol=0)
    trimmed.save(tmp_path / "run")
    opened = xlir.Encoder.open(tmp_path / "run")
    np.testing.assert_allclose(opened.encode_text(texts), expected, atol=2e-5, rtol=0)


def test_a_trimmed_vocabulary_may_move_the_padding():
    config = TEXT | {"model_type": "roberta", "vocab_size": 9, "pad_token_id": 4}
    family = registry.family_of("text", config)
    spec = family.trimmed(TowerSpec(family, config), np.int32([0, 2, 4, 7]))
    assert spec.pad_id == spec.to_json()["pad_id"] == 2
    assert spec.config == config | {"vocab_size": 4}
    spec = family.trimmed(TowerSpec(family, config), np.arange(6, dtype=np.int32))
    assert "pad_id" not in spec.to_json()


@pytest.mark.parametrize(("positions", "max_length"), [(79, 77), (66, 61)])
def test_texts_as_long_as_the_tower_takes(positions, max_length, checkpoints, config, tmp_path):
    """No batch is padded beyond `max_length`."""
    transformers = pytest.importorskip("transformers")
    folder, *_ = checkpoints
    shutil.copytree(folder / "text", tmp_path / "text")
    fields = json.loads((folder / "text" / "config.json").read_text())
    fields["max_position_embeddings"] = positions
    model = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "text")
    config.text.tower, config.text.prefix = str(tmp_path / "text"), ""
    config.text.max_length = max_length
    encoder = xlir.Encoder.create(config)
    long = "Hund " * 100
    cut = encoder.tokenizer([long], max_length=max_length)[0]
    assert len(cut) == max_length
    batches = list(encoder.embedder.text_batches([long, *CORPUS]))
    assert max(batch["text_ids"].shape[1] for _, batch in batches) == max_length
    ours = encoder.encode_text([long, *CORPUS])
    expected = embedded_by_torch(model, folder / "text", CORPUS)
    np.testing.assert_allclose(ours[1:], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("side", "name", "value", "message"),
    [
        ("text", "is_decoder", True, "is_decoder is True: decoders are not supported"),
        ("text", "add_cross_attention", True, "add_cross_attention is True: decoders"),
        ("text", "pad_token_id", None, "pad_token_id is None; it must be a token id"),
        (
            "text",
            "pad_token_id",
            65,
            "max_position_embeddings is 66; it must be an integer from 67",
        ),
        (
            "text",
            "num_attention_heads",
            0,
            "num_attention_heads is 0; it must be an integer of at least 1",
        ),
        ("text", "num_hidden_layers", -1, "num_hidden_layers is -1; it must be an integer"),
        ("text", "hidden_size", "32", "hidden_size is '32'; it must be an integer"),
        ("image", "num_attention_heads", 0, "num_attention_heads is 0; it must be an integer"),
        (
            "image",
            "num_attention_heads",
            3,
            "num_attention_heads is 3; it must be an integer of at least 1 that divides 32",
        ),
        ("image", "patch_size", 64, "patch_size 64 is above image_size 32"),
    ],
)
def test_a_config_json_that_asks_for_something_else(
    side, name, value, message, checkpoints, config, tmp_path
):
    """The error is one line that names the file and the field, before any work is done."""
    folder, *_ = checkpoints
    shutil.copytree(folder / side, tmp_path / side)
    file = tmp_path / side / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    config[side].tower = str(tmp_path / side)
    describe = {"text": towers.describe_text, "image": towers.describe_image}[side]
    with pytest.raises(ValueError, match=rf"/config\.json: {message}[^\n]*$"):
        describe(config[side])


@pytest.mark.parametrize("tower", ["muse", "efficientnet-lite0", "toy-resnet"])
def test_a_pooling_of_towers_that_have_their_own(tower, config):
    """An unknown pooling is refused even if the tower's package is not installed."""
    side = "text" if tower == "muse" else "image"
    config[side].tower, config[side].pooling = tower, "banana"
    describe = {"text": towers.describe_text, "image": towers.describe_image}[side]
    with pytest.raises(ValueError, match=rf"^config\.{side}\.pooling is 'banana'; [^\n]*$"):
        describe(config[side])
    config[side].pooling = "" if side == "text" else "mean"
    describe(config[side])


def test_damaged_checkpoints_are_one_line(checkpoints, config, tmp_path):
    folder, *_ = checkpoints
    shutil.copytree(folder / "text", tmp_path / "text")
    config.text.tower = str(tmp_path / "text")
    file = tmp_path / "text" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in fields.items() if k != "hidden_size"}))
    with pytest.raises(ValueError, match=r"config\.json: it lacks 'hidden_size'"):
        xlir.Encoder.create(config)
    file.write_text(json.dumps(fields))
    (tmp_path / "text" / "model.safetensors").unlink()
    (tmp_path / "text" / "pytorch_model.bin").write_bytes(MALICIOUS)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: refused to load os\.system"):
        xlir.Encoder.create(config)

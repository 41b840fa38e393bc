"""Compares published dual encoders with torch, from raw input, with random weights."""

import collections
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import xlir
from input_pipeline.preprocessing import CLIP
from tests.models.test_towers import MALICIOUS, PROCESSOR
from tests.runs import run_main
from tests.tokenizers.test_huggingface import CORPUS, OTHER, unigram
from xlir import published
from xlir.checkpoint import Checkpoints
from xlir.models import bert

torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
nn = torch.nn

DIM, LENGTH = 24, 20
BASE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
}
VISION = {
    "image_size": 32,
    "layers": 2,
    "width": 48,
    "patch_size": 8,
    "head_width": 16,
    "mlp_ratio": 2.5,
}
CLIP_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CLIP_TEXT = {
    "vocab_size": 10,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}
TEXTS = [*CORPUS, *OTHER, "  Ball, \t Hunde\n", "Zwei Hunde " * 20]
SCALE = 3.2


class Block(nn.Module):
    """A layer of open_clip's image tower."""

    def __init__(self, width: int, heads: int, inner: int, activation: nn.Module):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        steps = {"c_fc": nn.Linear(width, inner), "gelu": activation}
        steps["c_proj"] = nn.Linear(inner, width)
        self.mlp = nn.Sequential(collections.OrderedDict(steps))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Visual(nn.Module):
    """open_clip's image tower and projection."""

    def __init__(self, dim: int, activation: nn.Module):
        super().__init__()
        width, patch = VISION["width"], VISION["patch_size"]
        heads, inner = width // VISION["head_width"], int(width * VISION["mlp_ratio"])
        tokens = (VISION["image_size"] // patch) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = [Block(width, heads, inner, activation) for _ in range(VISION["layers"])]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.proj = nn.Parameter(torch.zeros(width, dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """An open_clip model with XLM-R; its parameters have the published names."""

    def __init__(self, projection: str, quick_gelu: bool):
        super().__init__()
        self.dim = 32 if projection == "none" else DIM
        self.visual = Visual(self.dim, QuickGELU() if quick_gelu else nn.GELU())
        self.text = nn.Module()
        self.text.transformer = xlmr()
        if projection == "mlp":
            first, last = nn.Linear(32, 28, bias=False), nn.Linear(28, self.dim, bias=False)
            self.text.proj = nn.Sequential(first, nn.GELU(), last)
        elif projection == "linear":
            self.text.proj = nn.Linear(32, self.dim, bias=False)
        else:
            self.text.proj = nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def encode_text(self, texts: list[str]):
        ids = tokenizer()(
            [" ".join(text.split()) for text in texts],
            padding="max_length",
            max_length=LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        mask = ids != 1
        return self.text.proj(mean(self.text.transformer(ids, attention_mask=mask)[0], mask))

    def encode_image(self, images: list[Image.Image]):
        return self.visual(torch.stack([self.preprocess(image) for image in images]))

    @staticmethod
    def preprocess(image: Image.Image, size: int = VISION["image_size"]):
        """Resizes the shorter side and crops, as torchvision does."""
        width, height = (int(size * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in (width, height))
        pixels = np.array(image.crop((left, top, left + size, top + size)), np.float32) / 255
        pixels = (pixels - CLIP["image_mean"]) / CLIP["image_std"]
        return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)


class MClip(nn.Module):
    """M-CLIP's text encoder."""

    def __init__(self):
        super().__init__()
        self.transformer = xlmr()
        self.LinearTransformation = nn.Linear(32, DIM)

    def encode_text(self, texts: list[str]):
        batch = tokenizer()(
            texts, padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        hidden = self.transformer(batch.input_ids, attention_mask=batch.attention_mask)[0]
        return self.LinearTransformation(mean(hidden, batch.attention_mask))


def mean(hidden, mask):
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def xlmr():
    config = transformers.XLMRobertaConfig(vocab_size=len(tokenizer()), **BASE)
    return transformers.XLMRobertaModel(config)


def tokenizer():
    special = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}
    special |= {"pad": "<pad>", "mask": "<mask>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER, **{f"{name}_token": token for name, token in special.items()}
    )


TOKENIZER = unigram()


def randomize(model):
    """Draws random parameters, so that each of them affects the outputs."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            parameter.data.fill_(SCALE)
        elif parameter.ndim == 1:
            norm = name.endswith("weight")
            nn.init.uniform_(parameter, 0.5, 1.5) if norm else nn.init.normal_(parameter, std=0.2)
        else:
            table = "embedding" in name and parameter.ndim == 2
            scale = 0.7 if table else 1.2 * math.prod(parameter.shape[1:]) ** -0.5
            nn.init.normal_(parameter, std=scale)
    return model.eval()


def save_weights(model, folder, stem: str, suffix: str):
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if suffix == "bin":
        # A constant that older versions saved.
        constant = f"{'text.' * hasattr(model, 'text')}transformer.embeddings.position_ids"
        weights[constant] = torch.arange(66)[None]
        torch.save(weights, folder / f"{stem}.bin")
    else:
        safetensors_torch.save_file(weights, folder / f"{stem}.safetensors")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A substitute for xlm-roberta-base on the Hub; only its configuration is read."""
    folder = tmp_path_factory.mktemp("base")
    xlmr().config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write_open_clip(tmp_path_factory, base_folder):
    def write(projection="mlp", quick_gelu=False, suffix="safetensors"):
        folder = tmp_path_factory.mktemp("open_clip")
        model = randomize(OpenClip(projection, quick_gelu))
        stem = "open_clip_pytorch_model" if suffix == "bin" else "open_clip_model"
        save_weights(model, folder, stem, suffix)
        tokenizer().save_pretrained(folder)
        text = {"hf_model_name": str(base_folder), "hf_tokenizer_name": str(base_folder)}
        text |= {"hf_pooler_type": "mean_pooler", "context_length": LENGTH}
        config = {"embed_dim": model.dim, "vision_cfg": VISION, "text_cfg": text}
        config |= {"quick_gelu": True} if quick_gelu else {}
        preprocessing = {"mean": CLIP["image_mean"], "std": CLIP["image_std"]}
        write_json(
            folder / "open_clip_config.json",
            {"model_cfg": config, "preprocess_cfg": preprocessing},
        )
        return folder, model

    return write


@pytest.fixture(scope="module")
def open_clip(write_open_clip):
    return write_open_clip()


@pytest.fixture(scope="module")
def write_m_clip(tmp_path_factory, base_folder):
    def write(suffix="bin"):
        folder = tmp_path_factory.mktemp("m_clip")
        model = randomize(MClip())
        save_weights(model, folder, "pytorch_model" if suffix == "bin" else "model", suffix)
        tokenizer().save_pretrained(folder)
        config = {"model_type": "M-CLIP", "modelBase": str(base_folder), "numDims": DIM}
        write_json(folder / "config.json", config | {"transformerDimensions": 32})
        return folder, model

    return write


@pytest.fixture(scope="module")
def m_clip(write_m_clip):
    return write_m_clip()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model as transformers writes it."""
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=DIM
    )
    model = randomize(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", PROCESSOR)
    return folder, model


def write_json(file, content):
    file.write_text(json.dumps(content))


def unit(x):
    x = x.detach().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pictures():
    """Some have margins of 3 or 1 pixels, which torchvision and transformers halve differently."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 40), (70, 33), (64, 70), (32, 33), (35, 32)]
    return [Image.fromarray(rng.integers(0, 256, (*s, 3)).astype(np.uint8)) for s in sizes]


def clip_images(model):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    pixels = processor(**PROCESSOR)(pictures())["pixel_values"]
    out = model.vision_model(torch.from_numpy(np.stack(pixels))).pooler_output
    return unit(model.visual_projection(out))


@pytest.fixture
def imported(tmp_path):
    """Imports folders; returns the encoder of the run's folder."""

    def run(text, image=None):
        published.import_model(str(text), str(image or text), tmp_path / "run")
        return xlir.Encoder.load(tmp_path / "run")

    return run


@pytest.mark.parametrize(
    ("projection", "quick_gelu", "suffix"),
    [
        ("mlp", False, "safetensors"),
        ("mlp", True, "bin"),
        ("linear", False, "bin"),
        ("none", False, "safetensors"),
    ],
)
def test_open_clip_as_in_torch(write_open_clip, imported, projection, quick_gelu, suffix):
    folder, model = write_open_clip(projection, quick_gelu, suffix)
    encoder = imported(folder)
    np.testing.assert_allclose(
        encoder.encode_text(TEXTS), unit(model.encode_text(TEXTS)), atol=2e-5
    )
    images = pictures()
    expected = unit(model.encode_image(images))
    np.testing.assert_allclose(encoder.encode_image(images), expected, atol=2e-5)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_m_clip_as_in_torch(write_m_clip, clip, imported, suffix):
    folder, model = write_m_clip(suffix)
    encoder = imported(folder, clip[0])
    np.testing.assert_allclose(
        encoder.encode_text(TEXTS), unit(model.encode_text(TEXTS)), atol=2e-5
    )
    np.testing.assert_allclose(encoder.encode_image(pictures()), clip_images(clip[1]), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_as_in_torch(dtype, write_open_clip, imported):
    """Tensors are converted to float32 before they are added."""
    folder, model = write_open_clip()
    save_weights(model.to(dtype), folder, "open_clip_model", "safetensors")
    model.float()
    encoder = imported(folder)
    images = pictures()
    for ours, theirs in (
        (encoder.encode_text(TEXTS), model.encode_text(TEXTS)),
        (encoder.encode_image(images), model.encode_image(images)),
    ):
        np.testing.assert_allclose(ours, unit(theirs), atol=2.4e-6, rtol=0)


def test_m_clip_with_an_image_tower_of_open_clip(m_clip, write_open_clip, imported):
    """The text tower in open_clip's folder is ignored."""
    folder, model = write_open_clip()
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] = {"context_length": 77, "width": 16}
    write_json(file, config)
    encoder = imported(m_clip[0], folder)
    expected = unit(m_clip[1].encode_text(TEXTS))
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected, atol=2e-5)
    images = pictures()
    expected = unit(model.encode_image(images))
    np.testing.assert_allclose(encoder.encode_image(images), expected, atol=2e-5)


def test_the_configuration_says_what_it_is(m_clip, clip, open_clip, tmp_path):
    both = {"m_clip": (m_clip[0], clip[0]), "open_clip": (open_clip[0], open_clip[0])}
    for name, (text, image) in both.items():
        published.import_model(str(text), str(image), tmp_path / name)
        encoder = xlir.Encoder.load(tmp_path / name, checkpoint="latest")
        config = encoder.config
        assert (config.text.tower, config.image.tower) == (str(text), str(image))
        assert (config.text.head, config.image.head) == (
            "affine" if name == "m_clip" else "plain_mlp",
            "linear",
        )
        assert config.text.max_length == (64 if name == "m_clip" else LENGTH)
        assert config.text.frozen
        assert config.image.frozen
        assert config.normalize
        assert config.embedding_dim == DIM
        assert config.loss.temperature == pytest.approx(math.exp(-SCALE))
        assert encoder.parameters.trained["log_scale"] == pytest.approx(SCALE)
        assert encoder.step == 0


def test_a_model_of_the_sigmoid_loss(write_open_clip, imported):
    folder, model = write_open_clip()
    model.logit_scale.data = model.logit_scale.data[None]
    model.logit_bias = nn.Parameter(torch.tensor([-9.5]))
    save_weights(model, folder, "open_clip_model", "safetensors")
    encoder = imported(folder)
    assert encoder.config.loss.name == "sigmoid"
    assert encoder.parameters.trained["bias"] == pytest.approx(-9.5)
    assert encoder.parameters.trained["log_scale"] == pytest.approx(SCALE)


@pytest.mark.parametrize("name", ["xlm-roberta-base", "FacebookAI/xlm-roberta-base"])
def test_published_architectures_need_no_files(
    name, base_folder, write_open_clip, imported, monkeypatch
):
    """A small model replaces XLM-R, whose id on the Hub once had no organisation."""
    small = json.loads((base_folder / "config.json").read_text())
    monkeypatch.setitem(bert.ROBERTA.architectures, "FacebookAI/xlm-roberta-base", small)
    folder, model = write_open_clip()
    edit(OPEN, *TEXT_CFG, "hf_model_name", value=name)(folder)
    encoder = imported(folder)
    assert encoder.config.text.max_length == LENGTH
    expected = unit(model.encode_text(TEXTS))
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected, atol=2e-5)


# Folders that are refused with a one-line error; no file is left behind.


def edit(name, *path, value):
    """A function that sets a field of a JSON file, or deletes it if `value` is None."""

    def change(folder):
        content = json.loads((folder / name).read_text())
        at = content
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value
        write_json(folder / name, content)

    return change


def edit_weights(file, change):
    def run(folder):
        weights = safetensors_torch.load_file(folder / file)
        change(weights)
        safetensors_torch.save_file(weights, folder / file)

    return run


def remove(name):
    return lambda folder: (folder / name).unlink()


def malicious(folder):
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(MALICIOUS)


OPEN, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
MODEL, TEXT_CFG = "model_cfg", ("model_cfg", "text_cfg")
# Values that a field of open_clip's config can't have.
ODD_VALUES = [
    ((MODEL,), [1]),
    (TEXT_CFG, "xlm-roberta-base"),
    ((*TEXT_CFG, "hf_model_name"), 3),
    ((*TEXT_CFG, "context_length"), "77"),
    ((*TEXT_CFG, "context_length"), 0),
    ((MODEL, "embed_dim"), 0),
    ((MODEL, "vision_cfg"), [1]),
    ((MODEL, "vision_cfg", "width"), "32"),
    ((MODEL, "vision_cfg", "layers"), -1),
    ((MODEL, "vision_cfg", "head_width"), 0),
    ((MODEL, "vision_cfg", "mlp_ratio"), "4"),
    ((MODEL, "vision_cfg", "patch_size"), 0),
    ((MODEL, "vision_cfg", "image_size"), {}),
    ((MODEL, "vision_cfg", "image_size"), [32, 64]),
    (("preprocess_cfg",), [1]),
]
OPEN_CLIP_FAULTS = {
    f"{'.'.join(path)}={value}": (
        edit(OPEN, *path, value=value),
        re.escape(f"{path[-1]} is {value!r}; it must be "),
    )
    for path, value in ODD_VALUES
} | {
    "no text_cfg": (edit(OPEN, *TEXT_CFG, value=None), "it lacks 'text_cfg'"),
    "no weights": (remove(WEIGHTS), r"has no weights: none of open_clip_model\.safetensors, "),
    "no config": (remove(OPEN), r"config\.json"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "code": (malicious, r"open_clip_pytorch_model\.bin: refused to load os\.system"),
    "damaged": (lambda folder: (folder / OPEN).write_text("{"), r"config\.json is damaged"),
    "no model_cfg": (edit(OPEN, MODEL, value=None), "it lacks 'model_cfg'"),
    "no width": (edit(OPEN, MODEL, "vision_cfg", "width", value=None), "lacks 'width'"),
    "unknown text": (
        edit(OPEN, *TEXT_CFG, "hf_model_name", value="nobody/nothing"),
        r"needs the config\.json of nobody/nothing: .*hf download nobody/nothing",
    ),
    "pooler": (edit(OPEN, *TEXT_CFG, "hf_pooler_type", value="max_pooler"), "'max_pooler' is not"),
    "lower case": (
        edit(OPEN, *TEXT_CFG, "tokenizer_kwargs", value={"clean": "lower"}),
        "text_cfg.tokenizer_kwargs .* is not supported",
    ),
    "timm": (
        edit(OPEN, MODEL, "vision_cfg", "timm_model_name", value="vit"),
        r"vision_cfg\.timm_model_name 'vit' and timm_pool None is not supported",
    ),
    "pooling": (edit(OPEN, MODEL, "vision_cfg", "pool_type", value="avg"), "pool_type 'avg'"),
    "ResNet": (edit(OPEN, MODEL, "vision_cfg", "layers", value=[3, 4, 6, 3]), "ResNet"),
    "letterbox": (edit(OPEN, "preprocess_cfg", "resize_mode", value="longest"), "'longest'"),
    "patches": (
        edit(OPEN, MODEL, "vision_cfg", "patch_size", value=16),
        r"do not fit VisionTransformer: wrong shape or dtype .*patches\.kernel",
    ),
    "dimensions": (
        edit(OPEN, MODEL, "embed_dim", value=20),
        "embeds texts in 20 dimensions and .* images in 24: they are not from the same model",
    ),
    "unused": (
        edit_weights(WEIGHTS, lambda weights: weights.update(token_embedding=torch.zeros(2))),
        "do not fit TextTransformer: unused token_embedding",
    ),
    "unused, image": (
        edit_weights(WEIGHTS, lambda w: w.update({"visual.attn_pool.query": torch.zeros(2)})),
        r"do not fit VisionTransformer: unused attn_pool\.query",
    ),
    "missing": (
        edit_weights(WEIGHTS, lambda weights: weights.pop("visual.ln_pre.bias")),
        r"do not fit VisionTransformer: missing input_norm\.bias",
    ),
    "missing head": (
        edit_weights(WEIGHTS, lambda weights: weights.pop("text.proj.2.weight")),
        r"its weights lack text\.proj\.2\.weight",
    ),
    "missing projection": (
        edit_weights(WEIGHTS, lambda weights: weights.pop("visual.proj")),
        r"its weights lack visual_projection\.weight",
    ),
    "other head": (
        edit_weights(WEIGHTS, lambda w: w.update({"text.proj.2.weight": torch.zeros(DIM, 9)})),
        r"do not fit MLP: wrong shape or dtype layers\.0\.kernel float32\[9,24\] for",
    ),
}


@pytest.mark.parametrize("fault", OPEN_CLIP_FAULTS)
def test_open_clip_folders_that_are_refused(open_clip, tmp_path, fault):
    change, message = OPEN_CLIP_FAULTS[fault]
    folder = shutil.copytree(open_clip[0], tmp_path / "model")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        published.import_model(str(folder), str(folder), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def another_tokenizer(folder):
    small = unigram()
    small.add_tokens([f"extra{i}" for i in range(9)])
    small.save(str(folder / "tokenizer.json"))


M_CLIP_FAULTS = {
    "no base": (edit("config.json", "modelBase", value=None), "lacks 'modelBase'"),
    "another type": (
        edit("config.json", "model_type", value="xlm-roberta"),
        "has no open_clip_config.json, and the model_type in its config.json is 'xlm-roberta'; "
        "known: M-CLIP",
    ),
    "tokenizer": (another_tokenizer, "tokens and the model .* not belong to the same"),
    "head": (
        edit_weights("model.safetensors", lambda w: w.pop("LinearTransformation.bias")),
        r"its weights lack LinearTransformation\.bias",
    ),
}


@pytest.mark.parametrize("fault", M_CLIP_FAULTS)
def test_m_clip_folders_that_are_refused(write_m_clip, clip, tmp_path, fault):
    change, message = M_CLIP_FAULTS[fault]
    folder, _ = write_m_clip("safetensors")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        published.import_model(str(folder), str(clip[0]), tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_folders_that_do_not_belong_together(m_clip, clip, write_open_clip, tmp_path):
    wider, _ = write_open_clip("none")
    run, vision = tmp_path / "run", shutil.copytree(clip[0], tmp_path / "vision")
    edit("config.json", "model_type", value="clip_vision_model")(vision)
    with pytest.raises(ValueError, match=r"texts in 24 dimensions and .* images in 32: they are"):
        published.import_model(str(m_clip[0]), str(wider), run)
    with pytest.raises(ValueError, match=r"--image: .* is 'M-CLIP'; known: clip, clip_v"):
        published.import_model(str(m_clip[0]), str(m_clip[0]), run)
    with pytest.raises(ValueError, match=r"--text: .* is 'clip_vision_model'; known: M-CLIP, clip"):
        published.import_model(str(vision), str(clip[0]), run)
    with pytest.raises(ValueError, match=r"\(clip\) has an image tower of its own.*leave out --im"):
        published.import_model(str(clip[0]), str(wider), run)
    with pytest.raises(FileNotFoundError, match=r"--image: .* folder .*absent; download it: hf "):
        published.import_model(str(m_clip[0]), str(tmp_path / "absent"), run)
    assert not run.exists()


def test_a_folder_in_use_is_left_alone(open_clip, tmp_path):
    folder, run = str(open_clip[0]), tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="run already exists: choose a new folder"):
        published.import_model(folder, folder, run)
    assert (run / "config.json").read_text() == "{}"
    (run / "config.json").unlink()
    published.import_model(folder, folder, run)
    assert xlir.Encoder.load(run).step == 0


def test_a_failure_half_way_leaves_nothing(open_clip, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        published.import_model(str(open_clip[0]), str(open_clip[0]), tmp_path / "run")
    assert not list(tmp_path.iterdir())


# From import to results, tags and export.


def test_import_eval_and_tag(command, m_clip, clip, photos, tmp_path):
    run = tmp_path / "run"
    process = command("import", f"--text={m_clip[0]}", f"--image={clip[0]}", f"--workdir={run}")
    assert process.stderr == f"{run}: texts of {m_clip[0]}, images of {clip[0]}, 24 dimensions\n"
    # From here on, the imported folders are not needed.
    test_set = f"--test_set={photos / 'multilingual_test'}"
    process = run_main("eval", f"--workdir={run}", test_set, f"--images={photos / 'images'}")
    results = json.loads((run / "results" / "multilingual_test-0.json").read_text())
    assert set(results["languages"]) == {"en", "de"}
    assert results["images"] == 20
    assert "multilingual_test, step 0, 20 images" in process.stdout
    photo = str(photos / "images" / "00.jpg")
    process = run_main("tag", f"--workdir={run}", "--vocabulary=coco", "--language=de", photo)
    (line,) = process.stderr.splitlines()
    assert line.startswith(
        "scores are plain cosines, because there are no calibrated percentiles: no data set is "
    )
    assert len(process.stdout.splitlines()) == 1
    for more in ([], ["--task=tagging"]):
        process = run_main("eval", f"--workdir={run}", *more, check=False)
        (line,) = process.stderr.splitlines()
        assert line.startswith("xlir: no data set is named")


def test_open_clip_in_one_folder(open_clip, tmp_path):
    run = tmp_path / "run"
    run_main("import", f"--text={open_clip[0]}", f"--workdir={run}")
    assert xlir.Encoder.load(run).encode_text(["Ball"]).shape == (1, DIM)
    process = run_main("import", f"--text={open_clip[0]}", f"--workdir={run}", check=False)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line == f"xlir: {run} already exists: choose a new folder with --workdir"


def test_what_is_imported_can_be_exported(m_clip, clip, photos, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs pip install 'xlir[export]'")
    from xlir import export

    run, to = tmp_path / "run", tmp_path / "exported"
    published.import_model(str(m_clip[0]), str(clip[0]), run)
    with pytest.raises(ValueError, match="no data set is named"):
        export.export(run, to)
    test_set, images = str(photos / "multilingual_test"), str(photos / "images")
    report = export.export(run, to, test_set=test_set, images=images)
    assert (to / "modules.json").is_file()
    assert not report.tokens
    card = (to / "README.md").read_text()
    assert "Published weights, imported by xlir" in card
    # The card has the names of the folders, but not their paths.
    assert str(m_clip[0].parent) not in card

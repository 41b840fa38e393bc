"""Compares imported dual encoders of `transformers` with the originals, with random weights."""

import functools
import io
import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest

import xlir
from configs import xlmr
from input_pipeline.preprocessing import CLIP, Preprocessing
from tests.models.test_clip_text_checkpoints import clip_tokenizer, gemma_tokenizer, xlmr_tokenizer
from tests.runs import checkpoint_of, interrupted_copy, metrics_of, run_main
from tests.test_published import (
    SCALE,
    TEXTS,
    edit,
    edit_weights,
    pictures,
    randomize,
    remove,
    unit,
    write_json,
)
from tests.tokenizers import test_siglip
from xlir import published, train
from xlir.models import dual_encoder

torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
transformers = pytest.importorskip("transformers")

DIM, LENGTH, SIZE, BIAS = 24, 20, 32, -9.5
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LENGTH,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": SIZE,
    "patch_size": 8,
}
WITH_CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
}
WITH_SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
}
NAFLEX = "SigLIP 2 of NaFlex"
WITH_NAFLEX = {
    "image_processor_type": "Siglip2ImageProcessor",
    "patch_size": 8,
    "max_num_patches": 25,
}


def siglip_tokenizer(_):
    return None


# Class of the model, fields of its text_config, tokenizer, image processor. The ids of special
# tokens are those of published files, some of which no tokenizer agrees with.
LAYOUTS = {
    "CLIP": (
        "CLIPModel",
        {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        clip_tokenizer,
        WITH_CLIP,
    ),
    "CLIP of today": (
        "CLIPModel",
        {"eos_token_id": 513, "hidden_act": "gelu"},
        clip_tokenizer,
        WITH_CLIP | {"size": {"shortest_edge": 36}, "image_mean": [0.4, 0.5, 0.6]},
    ),
    "MetaCLIP 2": ("MetaClip2Model", {"eos_token_id": 2}, xlmr_tokenizer, WITH_CLIP),
    "SigLIP": ("SiglipModel", {}, siglip_tokenizer, WITH_SIGLIP | {"resample": 3}),
    "SigLIP 2": ("SiglipModel", {"eos_token_id": 49407}, gemma_tokenizer, WITH_SIGLIP),
    NAFLEX: ("Siglip2Model", {}, gemma_tokenizer, WITH_NAFLEX),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def written(name, **saving):
        kind, fields, make, processor = LAYOUTS[name]
        kind, folder = getattr(transformers, kind), tmp_path_factory.mktemp("model")
        tokenizer, text = make(transformers), TEXT | fields
        if tokenizer is None:
            test_siglip.write_tokenizer(folder)
            text["vocab_size"] = transformers.SiglipTokenizer.from_pretrained(folder).vocab_size
        else:
            tokenizer.save_pretrained(folder)
            text["vocab_size"] = len(tokenizer)
        if is_siglip(name):
            vision = VISION
            if name == NAFLEX:
                vision = {x: VISION[x] for x in VISION if x != "image_size"} | {"num_patches": 16}
            config = kind.config_class(
                text_config=text | {"projection_size": VISION["hidden_size"]}, vision_config=vision
            )
        else:
            config = kind.config_class(text_config=text, vision_config=VISION, projection_dim=DIM)
        model = randomize(kind(config))
        if is_siglip(name):
            model.logit_bias.data.fill_(BIAS)
        model.save_pretrained(folder, **saving)
        write_json(folder / "preprocessor_config.json", processor)
        return folder, model

    return written


@pytest.fixture(scope="module")
def folders(write):
    """Name -> folder and model, as transformers writes them."""
    return {name: write(name) for name in LAYOUTS}


def is_siglip(name):
    return name.startswith("SigLIP")


def imported(folder, run):
    published.import_model(str(folder), str(folder), run)
    return xlir.Encoder.load(run)


def inputs(name, folder, texts, images):
    """The texts and images as transformers prepares them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if is_siglip(name) else True
    given = tokenizer(
        texts, padding=padding, max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    kind = getattr(transformers, f"{processor['image_processor_type']}Pil")
    return given, kind(**processor)(images, return_tensors="pt")


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_and_logits_as_in_torch(name, folders, tmp_path):
    folder, model = folders[name]
    texts, images = inputs(name, folder, TEXTS, pictures())
    encoder = imported(folder, tmp_path / "run")
    ours = encoder.encode_text(TEXTS), encoder.encode_image(pictures())
    with torch.inference_mode():
        expected = (
            unit(model.get_text_features(**texts).pooler_output),
            unit(model.get_image_features(**images).pooler_output),
        )
        logits = model(**texts, **images).logits_per_image.numpy()
    trained = encoder.parameters.trained
    cosines = ours[1].astype(np.float64) @ ours[0].astype(np.float64).T
    bias = float(trained["bias"]) if is_siglip(name) else 0.0
    differences = [np.abs(a - b).max() for a, b in zip(ours, expected, strict=True)]
    differences.append(np.abs(encoder.scale * cosines + bias - logits).max() / encoder.scale)
    print(f"{name}: texts, images, logits / scale differ by {np.array(differences)}")
    assert max(differences) <= 1e-5
    assert np.ptp(cosines) > 0.1
    # Embeddings that are nearly equal would hide differences.
    assert min(np.ptp(x, axis=0).max() for x in ours) > 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_configuration_says_what_it_is(name, folders, tmp_path):
    encoder = imported(folders[name][0], tmp_path / "run")
    config = encoder.config
    assert config.text.tower == config.image.tower == str(folders[name][0])
    assert config.text.head == config.image.head == ("none" if is_siglip(name) else "linear")
    assert config.text.max_length == LENGTH
    assert config.embedding_dim == (48 if is_siglip(name) else DIM)
    assert config.loss.name == ("sigmoid" if is_siglip(name) else "infonce")
    assert config.loss.temperature == pytest.approx(np.exp(-SCALE))
    assert encoder.parameters.trained["log_scale"] == pytest.approx(SCALE)
    if is_siglip(name):
        assert config.loss.bias == encoder.parameters.trained["bias"] == BIAS
    assert encoder.step == 0


@pytest.mark.parametrize(
    ("name", "log_scale", "expected"),
    [("SigLIP 2", 4.77, np.exp(4.77)), ("CLIP", 4.6052, 100), ("CLIP", 4.77, 100)],
)
def test_a_temperature_below_the_bound(name, log_scale, expected, folders, tmp_path):
    """SigLIP's published scales are above 100, which is CLIP's bound."""
    folder = shutil.copytree(folders[name][0], tmp_path / "model")
    edit_weights("model.safetensors", lambda w: w["logit_scale"].fill_(log_scale))(folder)
    encoder = imported(folder, tmp_path / "run")
    assert encoder.scale == pytest.approx(expected, rel=1e-6)
    # Training that goes on from here does not change it at once.
    clipped = dual_encoder.clipped(encoder.parameters.trained, encoder.config.loss)
    assert clipped["log_scale"] == pytest.approx(np.log(expected), rel=1e-6)


@pytest.mark.parametrize("name", ["CLIP", "SigLIP 2"])
def test_shards(name, write, folders, tmp_path):
    folder, _ = write(name, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    expected = imported(folders[name][0], tmp_path / "whole").encode_text(TEXTS)
    np.testing.assert_array_equal(imported(folder, tmp_path / "run").encode_text(TEXTS), expected)
    next(folder.glob("model-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"is missing; model\.safetensors\.index\.json"):
        imported(folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "CLIP",
            {"crop": "center", "mean": CLIP["image_mean"], "std": CLIP["image_std"]},
        ),
        ("SigLIP", {"crop": "squash", "mean": (0.5,) * 3, "std": (0.5,) * 3}),
    ],
)
def test_defaults_without_a_preprocessor(name, expected, folders, tmp_path, caplog):
    folder = shutil.copytree(folders[name][0], tmp_path / "model")
    remove("preprocessor_config.json")(folder)
    encoder = imported(folder, tmp_path / "run")
    assert encoder.preprocessing == Preprocessing(SIZE, resample="bicubic", **expected)
    (line,) = [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and record.name == "xlir.published"
    ]
    assert line.startswith(f"{folder} has no preprocessor_config.json: photos are prepared as by")


# Folders that are refused with a one-line error; no file is left behind.

TENSORS = "model.safetensors"
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"


def without(*names):
    return edit_weights(TENSORS, lambda weights: [weights.pop(name) for name in names])


FAULTS = {
    "squares for NaFlex": (
        NAFLEX,
        edit(PROCESSOR, "image_processor_type", value="SiglipImageProcessor"),
        "makes photos square, but siglip2_vision_model needs one that cuts photos into patches of",
    ),
    "patches of NaFlex": (
        "SigLIP 2",
        edit(PROCESSOR, "image_processor_type", value="Siglip2ImageProcessor"),
        "cuts photos into patches of 16 pixels, but siglip_vision_model needs one that makes",
    ),
    "another model": (
        "CLIP",
        edit(CONFIG, "model_type", value="align"),
        "model_type in its config.json is 'align'; known: M-CLIP, clip, metaclip_2, siglip",
    ),
    "no tokenizer": (
        "CLIP",
        lambda folder: [path.unlink() for path in folder.glob("*token*")],
        r"has no tokenizer: none of tokenizer\.json, ",
    ),
    "no weights": ("SigLIP", remove(TENSORS), r"has no weights: none of model\.safetensors, "),
    "no text projection": (
        "CLIP",
        without("text_projection.weight"),
        r"its weights lack text_projection\.weight",
    ),
    "no image projection": (
        "MetaCLIP 2",
        without("visual_projection.weight"),
        r"its weights lack visual_projection\.weight",
    ),
    "no scale": ("CLIP", without("logit_scale"), "its weights lack logit_scale"),
    "no scale and bias": (
        "SigLIP",
        without("logit_scale", "logit_bias"),
        "its weights lack logit_scale, logit_bias",
    ),
    "no text tower": (
        "CLIP",
        without("text_model.final_layer_norm.bias"),
        r"do not fit TextTransformer: missing norm\.bias",
    ),
    "no image tower": (
        "SigLIP 2",
        without("vision_model.post_layernorm.bias"),
        r"do not fit VisionTransformer: missing norm\.bias",
    ),
    "unused": (
        "SigLIP",
        edit_weights(TENSORS, lambda weights: weights.update(adapter=torch.zeros(2))),
        "do not fit TextTransformer: unused adapter",
    ),
    "no attention pooling": (
        "SigLIP",
        without("vision_model.head.probe"),
        r"do not fit VisionTransformer: .*missing attention_pool\.",
    ),
    "a projection of another width": (
        "CLIP",
        edit_weights(TENSORS, lambda w: w.update({"text_projection.weight": torch.zeros(8, 32)})),
        "embeds texts in 8 dimensions and .* images in 24: they are not from the same model",
    ),
    "odd text_config": (
        "SigLIP",
        edit(CONFIG, "text_config", value=3),
        "text_config is 3; it must hold",
    ),
    "odd vision_config": (
        "CLIP",
        edit(CONFIG, "vision_config", "patch_size", value=0),
        "patch_size is 0; it must",
    ),
    "vocabulary": (
        "CLIP",
        edit(CONFIG, "text_config", "vocab_size", value=9),
        "tokens and the model .* not belong to the same",
    ),
    "no resizing": (
        "CLIP",
        edit(PROCESSOR, "do_resize", value=False),
        "do_resize is false",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_are_refused(fault, folders, tmp_path):
    name, change, message = FAULTS[fault]
    folder = shutil.copytree(folders[name][0], tmp_path / "model")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        imported(folder, tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# From import to results, tags, an index and export.


@pytest.mark.parametrize("name", ["CLIP", NAFLEX])
def test_import_eval_and_tag(name, folders, photos, tmp_path):
    run, folder, images = tmp_path / "run", folders[name][0], photos / "images"
    process = run_main("import", f"--text={folder}", f"--workdir={run}")
    assert f"{run}: texts of {folder}, images of {folder}, " in process.stderr
    test_set = f"--test_set={photos / 'multilingual_test'}"
    process = run_main("eval", f"--workdir={run}", test_set, f"--images={images}")
    assert "multilingual_test, step 0, 20 images" in process.stdout
    photo = str(images / "00.jpg")
    process = run_main("tag", f"--workdir={run}", "--vocabulary=coco", "--language=de", photo)
    assert len(process.stdout.splitlines()) == 1


@pytest.mark.parametrize("name", ["CLIP", "SigLIP 2"])
def test_import_and_search(name, folders, photos, tmp_path):
    pytest.importorskip("lancedb", reason="needs pip install 'xlir[search]'")
    run, index = tmp_path / "run", tmp_path / "photos.index"
    encoder = imported(folders[name][0], run)
    made = run_main("index", f"--workdir={run}", f"--to={index}", str(photos / "images"))
    assert re.search(r"(\d+) photos \(\1 new", made.stdout)
    found = run_main("search", f"--index={index}", "--cutoff=0", "--output=-", "zwei Hunde")
    best = json.loads(found.stdout.splitlines()[0])["hits"][0]["cosine"]
    (text,) = encoder.encode_text(["zwei Hunde"])
    cosines = encoder.encode_image(sorted((photos / "images").glob("*.jpg"))) @ text
    assert best == pytest.approx(cosines.max(), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("CLIP", "modules.json"),
        ("MetaCLIP 2", "dual_encoder"),
        (NAFLEX, "dual_encoder"),
    ],
)
def test_what_is_imported_can_be_exported(name, file, folders, photos, tmp_path):
    pytest.importorskip("sentence_transformers", reason="needs pip install 'xlir[export]'")
    from xlir import export

    run, to = tmp_path / "run", tmp_path / "exported"
    published.import_model(*[str(folders[name][0])] * 2, run)
    test_set = {"test_set": str(photos / "multilingual_test"), "images": str(photos / "images")}
    export.export(run, to, **test_set)
    assert (to / file).exists()
    assert "Published weights, imported by xlir" in (to / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != NAFLEX])
def test_exported_as_the_class_that_it_was(name, folders, tmp_path, in_process, capsys):
    """The exported folder and its import give what the original model gives."""
    from xlir import export
    from xlir.export import card, verification

    folder, model = folders[name]
    encoder, to = imported(folder, tmp_path / "run"), tmp_path / "exported"
    to.mkdir()
    assert not export.FORMATS["transformers"].unfit(encoder)
    export.FORMATS["transformers"].write(encoder, to)
    photos = [png(picture) for picture in pictures()]
    rows = np.arange(len(TEXTS)) % len(photos)
    pairs = verification.Examples("random", ["en"], [*TEXTS, "", " ".join(TEXTS)], rows, photos)
    verification.verify(encoder, to, "transformers", pairs)

    loaded = transformers.AutoModel.from_pretrained(to).eval()
    assert type(loaded) is type(model)
    assert loaded.config.model_type == model.config.model_type
    assert loaded.config.text_config.eos_token_id == model.config.text_config.eos_token_id
    padding = "max_length" if is_siglip(name) else True
    processor = transformers.AutoProcessor.from_pretrained(to, backend="pil")
    mine = processor(
        text=TEXTS, images=pictures(), padding=padding, truncation=True, return_tensors="pt"
    )
    texts, images = inputs(name, folder, TEXTS, pictures())
    if is_siglip(name):
        texts.pop("attention_mask", None)
        assert "attention_mask" not in mine
    with torch.inference_mode():
        ours, expected = loaded(**mine), model(**texts, **images)
    scale = float(model.logit_scale.exp().detach())
    differences = [
        float((ours[output] - expected[output]).abs().max())
        for output in ("text_embeds", "image_embeds", "logits_per_text")
    ]
    differences[2] /= scale
    print(f"{name}: texts, images, logits / scale differ by {np.array(differences)}")
    assert max(differences) <= 1e-5

    again = imported(to, tmp_path / "again")
    for side in ("text", "image"):
        assert again.specs[side].family is encoder.specs[side].family
        for part in ("tower", "head"):
            before, after = (x.weights(f"{side}_{part}") for x in (encoder, again))
            assert before.keys() == after.keys()
            for weight in before:
                np.testing.assert_array_equal(after[weight], before[weight], err_msg=weight)
    assert again.preprocessing == encoder.preprocessing
    assert again.scale == pytest.approx(encoder.scale, rel=1e-6)
    np.testing.assert_array_equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))

    (code,) = re.findall("```python\n(.*?)```", card._use(encoder, "transformers"), re.DOTALL)
    photo = tmp_path / "apple.png"
    photo.write_bytes(photos[0])
    exec(code.replace("FOLDER", str(to)).replace("apple.jpg", str(photo)), {})
    assert "tensor([[" in capsys.readouterr().out


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# Adam's first updates have the size of the learning rate, however small the gradient, and only the
# gradient's sign, which rounding to bfloat16 flips where the gradient is nearly 0. An epsilon far
# above the gradients makes the updates proportional to them.
@pytest.mark.parametrize(
    ("name", "dtype", "rate", "epsilon"),
    [
        ("SigLIP 2", "float32", 1e-4, 1e-8),
        pytest.param("MetaCLIP 2", "float32", 1e-4, 1e-8, marks=pytest.mark.slow),
        pytest.param("SigLIP 2", "bfloat16", 1e-2, 1.0, marks=pytest.mark.slow),
    ],
)
def test_training_from_an_imported_model(
    name, dtype, rate, epsilon, folders, photos, tmp_path, monkeypatch
):
    """Trains both towers; the curve does not depend on the mesh and the microbatches.

    A resumed run, sharded and in microbatches, equals an uninterrupted one bit for bit.
    """
    monkeypatch.setattr(optax, "adamw", functools.partial(optax.adamw, eps=epsilon))
    start = imported(folders[name][0], tmp_path / "imported")
    config = xlmr.get_config("tiny")
    config.init, config.data.dir = str(tmp_path / "imported"), str(photos)
    config.text.tower = config.image.tower = ""
    config.text.dtype = config.image.dtype = dtype
    config.loss.name = "sigmoid" if name == "SigLIP 2" else "infonce"
    config.optimizer.learning_rate = rate
    config.steps, config.eval_every, config.save_every, config.log_every = 4, 4, 2, 1
    train.train(config, tmp_path / "one")
    config.update_from_flattened_dict({"mesh.data": 1, "mesh.fsdp": 8, "data.microbatches": 2})
    train.train(config, tmp_path / "other")
    train.train(config, interrupted_copy(tmp_path / "other", tmp_path / "resumed", 2))
    straight, resumed = (checkpoint_of(tmp_path / run, 4) for run in ("other", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "other")
    one, other = (
        np.array([line["loss"] for line in metrics_of(tmp_path / run) if "loss" in line])
        for run in ("one", "other")
    )
    print(f"within {np.max(np.abs(other / one - 1)):.1e}")
    np.testing.assert_allclose(other, one, rtol=1e-5)
    end = xlir.Encoder.load(tmp_path / "one")
    for part in ("text_tower", "image_tower"):
        before, after = start.weights(part), end.weights(part)
        assert {x for x in before if (before[x] == after[x]).all()} == set()

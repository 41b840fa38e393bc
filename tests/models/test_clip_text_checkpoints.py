"""Checkpoints with the text towers of CLIP, MetaCLIP 2 and SigLIP, from raw texts on."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

import xlir
from configs import base, xlmr
from input_pipeline.tokenizers import Padding
from tests.models.test_clip_text import LONGEST, TINY, reference, text_model
from tests.tokenizers.test_huggingface import CORPUS, OTHER, unigram
from xlir import compile, export, partition, train
from xlir.encoder import Encoder
from xlir.models import registry
from xlir.models.family import TowerSpec

TEXTS = [*CORPUS, *OTHER, "A BIG Dog"]


def clip_tokenizer(transformers):
    """A token for each byte, and one for each byte at the end of a word."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{x}</w>" for x in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={x: id for id, x in enumerate(tokens)}, merges=[])


def gemma_tokenizer(transformers):
    """A token for each letter and each byte; <pad> is 0, and <eos> is 1."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
    return transformers.GemmaTokenizer(
        vocab={x: id for id, x in enumerate(tokens)},
        merges=[],
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_input_names=["input_ids"],
    )


def xlmr_tokenizer(transformers):
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "unk": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=unigram(),
        pad_token="<pad>",
        mask_token="<mask>",
        **{f"{name}_token": token for name, token in names.items()},
    )


# Class of the model, fields of its config.json that are not TINY's, tokenizer. The ids of special
# tokens are those of published files, some of which no tokenizer agrees with.
CHECKPOINTS = {
    "CLIP": (
        "CLIPModel",
        {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        clip_tokenizer,
    ),
    "CLIP of today": ("CLIPTextModel", {"eos_token_id": 513}, clip_tokenizer),
    "MetaCLIP 2": ("MetaClip2Model", {"eos_token_id": 2}, xlmr_tokenizer),
    "SigLIP 2": ("SiglipModel", {"eos_token_id": 49407}, gemma_tokenizer),
    "SigLIP 2 of NaFlex": ("Siglip2Model", {}, gemma_tokenizer),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> folder and model, as transformers writes them."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    written = {}
    for name, (kind, fields, make) in CHECKPOINTS.items():
        folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), make(transformers)
        model = reference(kind, TINY | fields | {"vocab_size": len(tokenizer)})
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written[name] = folder, model
    return written


def configured(folder):
    config = base.get_config()
    config.embedding_dim, config.text.max_length = 32, LONGEST
    config.text.tower, config.image.tower = str(folder), "toy-vit"
    for side in (config.text, config.image):
        side.head, side.dtype = "none", "float32"
    return config


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_texts_as_in_torch(name, checkpoints, tmp_path):
    import torch
    import transformers

    folder, model = checkpoints[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = "max_length" if "SigLIP" in name else True
    batch = tokenizer(
        TEXTS, padding=padding, max_length=LONGEST, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = text_model(model)(**batch).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    encoder = Encoder.create(configured(folder))
    np.testing.assert_allclose(encoder.encode_text(TEXTS), expected, atol=2e-5, rtol=0)
    # A text means the same alone, where it is padded less, and after saving and loading.
    encoder.save(tmp_path)
    opened = xlir.Encoder.open(tmp_path)
    assert opened.fingerprint() == encoder.fingerprint()
    alone = np.concatenate([opened.encode_text([text]) for text in TEXTS[::3]])
    np.testing.assert_allclose(alone, expected[::3], atol=2e-5, rtol=0)


def test_padding_is_a_part_of_siglip_s_texts(checkpoints):
    folder, _ = checkpoints["SigLIP 2"]
    config = configured(folder)
    config.text.pooling = "last"
    encoder = Encoder.create(config)
    assert encoder.tokenizer.padding == Padding(LONGEST, 0)
    assert [len(ids) for ids in encoder.tokenizer(TEXTS, LONGEST)] == [LONGEST] * len(TEXTS)
    for length in (8, 128):
        config.text.max_length = length
        with pytest.raises(ValueError, match=r"max_length is \d+, but .* padded to 20 tokens: set"):
            Encoder.create(config)


def test_padding_on_the_left_is_refused(checkpoints, tmp_path):
    """The tokens of SigLIP attend to the padding, so its side matters."""
    folder = shutil.copytree(checkpoints["SigLIP 2 of NaFlex"][0], tmp_path / "checkpoint")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    with pytest.raises(ValueError, match="the tokenizer pads on the left; only the right is"):
        Encoder.create(configured(folder))


def test_a_trimmed_vocabulary_changes_no_embedding(checkpoints, tmp_path):
    folder, _ = checkpoints["MetaCLIP 2"]
    config = configured(folder)
    config.text.pooling = "eos"
    whole = Encoder.create(config)
    (tmp_path / "de.txt").write_text("\n".join(TEXTS))
    config.data.dir, config.text.trim_vocab = str(tmp_path), "de.txt"
    trimmed = Encoder.create(config)
    assert trimmed.tokenizer.vocab_size < whole.tokenizer.vocab_size
    np.testing.assert_allclose(trimmed.encode_text(TEXTS), whole.encode_text(TEXTS), atol=1e-6)


def test_trimming_may_move_eos():
    config = {"model_type": "metaclip_2", "text_config": TINY | {"eos_token_id": 9}}
    family = registry.family_of("text", config)
    spec = family.trimmed(TowerSpec(family, config), np.int32([0, 2, 9, 17]))
    assert (spec.config["vocab_size"], spec.config["eos_token_id"]) == (4, 2)
    assert registry.spec_from_json("text", spec.to_json()).config == spec.config


def test_a_checkpoint_is_trained_and_exported(checkpoints, photos, tmp_path, in_process):
    folder, _ = checkpoints["SigLIP 2"]
    config, run = xlmr.get_config("tiny"), tmp_path / "run"
    config.data.dir, config.text.tower = str(photos), str(folder)
    config.text.max_length, config.steps, config.eval_every = LONGEST, 2, 2
    config.text.layer_decay = 0.5
    before = Encoder.create(config).weights("text_tower")
    train.train(config, run)
    after = Encoder.load(run).weights("text_tower")
    for weight in ("embedding", "position", "norm.scale", "layers.stacked.mlp.fc1.kernel"):
        assert 0 < np.abs(after[weight] - before[weight]).max() < 0.02, weight
    test_set = {"test_set": str(photos / "multilingual_test"), "images": str(photos / "images")}
    export.export(run, tmp_path / "torch", "torch", **test_set)


@pytest.mark.parametrize(
    ("hub_id", "length"),
    [
        ("openai/clip-vit-base-patch32", 77),
        ("facebook/metaclip-2-worldwide-huge-quickgelu", 77),
        ("google/siglip2-base-patch16-224", 64),
    ],
)
def test_shapes_are_known_without_a_checkpoint(hub_id, length):
    config = xlmr.get_config("tiny")
    config.text.tower, config.text.max_length = hub_id, length
    config.mesh.data, config.mesh.fsdp = 1, 8
    lines = [line.split() for line in compile.sharding_table(config, 8).splitlines()]
    rows = {line[0]: line[1:3] for line in lines if line and line[0].startswith("text_tower.")}
    width = registry.architectures("text")[hub_id]["hidden_size"]
    assert rows["text_tower.position"] == [f"float32[{length},{width}]", "-,fsdp"]
    assert rows["text_tower.norm.scale"][0] == f"float32[{width}]"
    compile.trace(config, partition.create_mesh(config.mesh))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "clip", "text_config": 3}, "text_config is 3; it must hold"),
        ({"model_type": "clip_text_model", "eos_token_id": [1]}, r"eos_token_id is \[1\]; it must"),
        ({"model_type": "siglip_text_model", "projection_size": -1}, "projection_size is -1; it"),
        ({"model_type": "siglip_text_model", "hidden_act": "swish"}, "hidden_act is 'swish'"),
        ({"model_type": "clip", "text_config": {"num_attention_heads": 7}}, "divides 512"),
        ({"model_type": "siglip2", "text_config": {"vocab_size": 0}}, "vocab_size is 0"),
    ],
)
def test_what_is_not_known_is_refused(config, message):
    family = registry.family_of("text", config)
    with pytest.raises(ValueError, match=message):
        family.check(config)
    with pytest.raises(ValueError, match=r"pooling is 'cls'; \w+ supports "):
        family.check_pooling({}, "cls")


def test_terms_of_metaclip_are_known():
    family = registry.family_of("text", {"model_type": "metaclip_2"})
    assert "CC-BY-NC" in family.terms

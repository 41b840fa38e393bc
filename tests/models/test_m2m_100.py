"""M2M-100 and NLLB-200: outputs, gradients and tokens equal those of transformers."""

import json
import math
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import nnx

from input_pipeline.tokenizers import (
    HuggingFaceTokenizer,
    M2M100Tokenizer,
    byte_tokenizer,
    from_checkpoint,
    languages,
    load_tokenizer,
)
from tests.models.parity import assert_equal_gradients, become_gradients
from tests.models.test_transformer import (
    create,
    flat,
    loaded,
    pooled,
    randomized,
    rename,
    texts,
    written,
)
from tests.tokenizers.test_huggingface import CORPUS, OTHER, rows_of
from xlir.models import pretrained, registry
from xlir.models.family import TowerSpec
from xlir.models.text_transformer import sinusoids

TINY = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 20,
}
# Fields of the config, pooling, class of transformers.
CASES = {
    "mean": (TINY, "mean", "M2M100Model"),
    "cls": (TINY, "cls", "M2M100Model"),
    "with the output layer": (TINY, "mean", "M2M100ForConditionalGeneration"),
    "the encoder alone": (TINY, "mean", "M2M100Encoder"),
    "embeddings that are not scaled": (TINY | {"scale_embedding": False}, "cls", "M2M100Model"),
    "another padding id": (TINY | {"pad_token_id": 3}, "mean", "M2M100Model"),
    "gelu": (TINY | {"activation_function": "gelu"}, "mean", "M2M100Model"),
    "deep and narrow": (
        TINY | {"d_model": 24, "encoder_attention_heads": 3, "encoder_layers": 4},
        "mean",
        "M2M100Model",
    ),
    "odd width": (
        TINY | {"d_model": 21, "encoder_attention_heads": 3, "decoder_attention_heads": 3},
        "cls",
        "M2M100Model",
    ),
}


def reference(case: str):
    """The model of transformers; its random parameters all affect the outputs."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    module = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
    fields, _, name = CASES[case]
    return randomized(getattr(module, name)(module.M2M100Config(**fields)))


def encoder_of(theirs):
    return theirs if type(theirs).__name__ == "M2M100Encoder" else theirs.get_encoder()


def assert_equal_outputs(case, theirs, ours) -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    pooling, pad_id = CASES[case][1], theirs.config.pad_token_id
    apply = nnx.jit(lambda model, ids, mask: model(ids, mask))
    for lengths in ((7, 7, 7), (20, 12, 3, 1)):
        ids, mask = texts(lengths, max(lengths), pad_id)
        ids[0, 4] = pad_id  # a padding token in a text is not counted as a position
        mask[0, 4] = False
        with torch.inference_mode():
            expected = pooled(encoder_of(theirs), ids, mask, pooling).numpy()
        assert np.abs(expected).max() > 0.3
        wider = (0, 0), (0, 20 - ids.shape[1])
        difference = np.abs(apply(ours, np.pad(ids, wider), np.pad(mask, wider)) - expected).max()
        print(f"{case} {lengths} difference {difference:.1e}")
        assert difference <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    theirs = reference(case)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=CASES[case][1])
    assert ours.max_length == 20
    assert_equal_outputs(case, theirs, ours)


@pytest.mark.parametrize("case", ["mean", "cls"])
def test_gradients_equal_torch(case, tmp_path):
    """Torch's gradients are saved and renamed like weights, and then compared with ours."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    theirs, pooling = reference(case), CASES[case][1]
    ids, mask = texts((11, 4, 1), 12, theirs.config.pad_token_id)
    seed = np.random.default_rng(2).normal(size=(3, 32)).astype(np.float32)
    (pooled(encoder_of(theirs), ids, mask, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, tmp_path / "weights")
    ours = loaded(config, weights, pooling=pooling)
    loss = nnx.grad(lambda model: jnp.sum(model(jnp.asarray(ids), jnp.asarray(mask)) * seed))
    gradients = flat(nnx.jit(loss)(ours))
    become_gradients(theirs)
    config, expected = written(theirs, tmp_path / "gradients")
    expected = rename(expected, config, pooling)
    assert_equal_gradients(case, gradients, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype, tmp_path):
    """Weights in half precision are computed with in float32, as in transformers."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    theirs = reference("mean").to(getattr(torch, dtype))
    config, weights = written(theirs, tmp_path)
    assert {value.dtype.name for value in weights.values()} == {dtype}
    # Older versions saved the sinusoids.
    weights["model.encoder.embed_positions.weights"] = np.zeros((22, 32))
    ours = loaded(config, pretrained.in_float32(weights))
    theirs = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal_outputs("mean", theirs, ours)


@pytest.mark.parametrize("case", ["mean", "the encoder alone"])
def test_restored_towers_load_in_transformers(case, tmp_path):
    theirs = reference(case)
    config, weights = written(theirs, tmp_path)
    ours = {name: np.asarray(x) for name, x in pretrained.flatten(loaded(config, weights)).items()}
    family = registry.family_of("text", config)
    exported = family.hub_config(TowerSpec(family, config), pad_id=1)
    restored = family.restore(ours, exported)
    again = family.rename(restored, exported, "mean")
    assert set(again) == set(ours)
    for name, value in ours.items():
        np.testing.assert_array_equal(again[name], value)
    expected = encoder_of(theirs).state_dict()
    assert {name: value.shape for name, value in restored.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }


@pytest.mark.parametrize("width", [32, 1024])
def test_sinusoids_equal_those_of_transformers(width):
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    m2m = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
    expected = m2m.M2M100SinusoidalPositionalEmbedding.get_embedding(514, width, 1)[2:]
    np.testing.assert_allclose(sinusoids(2, 512, width), expected.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers is 0; it must be"),
        ({"d_model": 2}, "d_model is 2; it must be"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads is 5; .* divides 32"),
        ({"activation_function": "swish"}, "activation_function is 'swish'; known: "),
        ({"pad_token_id": -1}, "pad_token_id is -1; it must be"),
        ({"scale_embedding": 3}, "scale_embedding is 3; it must be"),
        ({"is_decoder": True}, "decoders are not supported"),
    ],
)
def test_what_is_not_known_is_refused(fields, message):
    family = registry.families("text")["m2m_100"]
    with pytest.raises(ValueError, match=message):
        family.check(TINY | {"model_type": "m2m_100"} | fields)
    with pytest.raises(ValueError, match=r"'pooler'; m2m_100 supports mean, cls$"):
        create(TINY | {"model_type": "m2m_100"}, pooling="pooler")


# Number of parameters of transformers' encoder, which are the same as ours.
PARAMETERS = {
    "facebook/m2m100_418M": 282_343_424,
    "facebook/nllb-200-distilled-600M": 413_511_680,
    "facebook/nllb-200-distilled-1.3B": 766_091_264,
    "facebook/nllb-200-1.3B": 766_091_264,
    "facebook/nllb-200-3.3B": 1_733_312_512,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    model = create(registry.architectures("text")[hub_id])
    assert model.max_length == 1024
    count = sum(math.prod(value.shape) for value in pretrained.flatten(model).values())
    assert count == PARAMETERS[hub_id]


def test_published_totals_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    module = pytest.importorskip("transformers.models.m2m_100.modeling_m2m_100")
    for hub_id, total in PARAMETERS.items():
        fields = registry.architectures("text")[hub_id]
        with torch.device("meta"):
            theirs = module.M2M100Encoder(module.M2M100Config(**fields))
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total, hub_id


# Tokens.

RAW = [
    *CORPUS,
    *OTHER,
    "😀👍🏽 ok",
    "שלום עולם",
    "a  b\tc\n",
    "</s> <pad>",
    "x" * 300,
    "Zwei " * 90,
]


def nllb_tokenizer(folder):
    """A small BPE vocabulary in NLLB's layout, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=160, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.save(str(folder / "trained.json"))
    model = pretrained.read_json(folder / "trained.json")["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    theirs = transformers.NllbTokenizer(vocab=model["vocab"], merges=merges)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def nllb(tmp_path_factory):
    """Our tokenizer and that of transformers."""
    folder = tmp_path_factory.mktemp("nllb")
    theirs = nllb_tokenizer(folder)
    fields = {"vocab_size": len(theirs), "pad_token_id": 1, "eos_token_id": 2}
    return from_checkpoint(folder, fields), theirs


def test_tokens_equal_transformers(nllb):
    ours, theirs = nllb
    assert rows_of(ours(RAW)) == theirs(RAW).input_ids
    cut = theirs(RAW, truncation=True, max_length=12).input_ids
    assert rows_of(ours(RAW, max_length=12)) == cut


@pytest.mark.parametrize("length", [None, 12])
def test_a_text_can_begin_with_the_token_of_its_language(nllb, length, tmp_path):
    ours, theirs = nllb
    theirs.src_lang = "deu_Latn"
    expected = theirs(RAW, truncation=bool(length), max_length=length).input_ids
    theirs.src_lang = "eng_Latn"
    spaced = rows_of(ours([f"deu_Latn {text}" for text in CORPUS], length))
    assert spaced == expected[: len(CORPUS)]
    assert rows_of(ours(languages.marked(RAW, "de", ours), length)) == expected
    prefixed = HuggingFaceTokenizer(ours._serialized, "deu_Latn")
    prefixed.save(tmp_path / "saved")
    assert rows_of(load_tokenizer(tmp_path / "saved")(RAW, length)) == expected


@pytest.mark.parametrize("length", [20, 12])
def test_exported_tokenizers_know_languages(nllb, length, tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    from xlir.export.pytorch.inputs import FastTokenizer

    ours = nllb[0]
    ours.save_vocabulary(tmp_path)
    given = (tmp_path / "tokenizer.json", length, "", None, ours.languages.values())
    marked = [text for raw in RAW for text in (raw, f"deu_Latn{raw}")]
    assert FastTokenizer(*given)(marked) == rows_of(ours(marked, length))


def test_languages_have_tokens(nllb):
    ours = nllb[0]
    assert len(ours.languages) == 202
    assert set(languages.NLLB.values()) <= set(ours.languages)
    assert languages.marked(["Hund"], "de", ours) == ["deu_LatnHund"]
    assert languages.marked(["Hund"], "tlh", ours) == ["Hund"]
    assert languages.marked(["Hund"], "de", byte_tokenizer()) == ["Hund"]


# M2M-100's own tokenizer, which transformers has only in Python.


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def m2m(request, tmp_path_factory):
    """Our tokenizer and that of transformers; the dictionary lacks every fifth piece."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("m2m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(folder / "sentencepiece.bpe"),
        model_type=request.param,
        vocab_size=190,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file = folder / "sentencepiece.bpe.model"
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(id) for id in range(3, model.get_piece_size())]
    # In another order, and with a character that the model does not know.
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(x for x in pieces[::-1] if hash_of(x) % 5), "ש"]
    ids = {token: id for id, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    named = {"tokenizer_class": "M2M100Tokenizer"}
    names = transformers.models.m2m_100.tokenization_m2m_100.FAIRSEQ_LANGUAGE_CODES["m2m100"]
    named["additional_special_tokens"] = [f"__{name}__" for name in names]
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    fields = {"vocab_size": len(tokens) + 108, "pad_token_id": 1, "eos_token_id": 2}
    return from_checkpoint(folder, fields), theirs


def hash_of(text):
    return zlib.crc32(text.encode())


@pytest.mark.parametrize("length", [None, 12])
def test_tokens_of_m2m_100_equal_transformers(m2m, length, tmp_path):
    ours, theirs = m2m
    texts = [*RAW, "Hund__de__ <s>x", "__de__", " __fr__Ball", "<unk> שש Ball ש", "ein Hund " * 400]
    given = {"truncation": bool(length), "max_length": length}
    expected = {}
    for language in ("en", "de"):
        theirs.src_lang = language
        expected[language] = theirs(texts, **given).input_ids
    unknown = sum(row.count(3) for row in expected["en"])
    print(f"{unknown} of {sum(map(len, expected['en']))} tokens are unknown")
    assert unknown
    own = [text for text in texts if not text.lstrip().startswith("__")]
    assert rows_of(ours(own, length)) == [
        row for text, row in zip(texts, expected["en"], strict=True) if text in own
    ]
    german = languages.marked(texts, "de", ours)
    assert german[0].startswith("__de__")
    assert rows_of(ours(german, length)) == expected["de"]
    prefixed = M2M100Tokenizer(ours._model, ours._dictionary, "__de__")
    prefixed.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert rows_of(again(texts, length)) == expected["de"]
    assert again.fingerprint() == prefixed.fingerprint() != ours.fingerprint()
    assert languages.marked(["Aso"], "fil", ours) == ["__tl__Aso"]


def test_exported_tokenizers_of_m2m_100_give_the_same_tokens(m2m, tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    from xlir.export.pytorch.inputs import load_tokenizer as exported

    ours = m2m[0]
    ours.save_vocabulary(tmp_path)
    given = {"prefix": "__de__ Ein ", "languages": sorted(ours.languages.values())}
    prefixed = M2M100Tokenizer(ours._model, ours._dictionary, "__de__ Ein ")
    marked = [text for raw in RAW for text in (raw, f"__fr__{raw}")]
    for length in (40, 12):
        plain = exported(tmp_path, "m2m_100", length)
        assert plain(marked) == rows_of(ours(marked, length))
        assert exported(tmp_path, "m2m_100", length, **given)(RAW) == rows_of(prefixed(RAW, length))


def test_what_is_refused_of_m2m_100(m2m, tmp_path):
    ours = m2m[0]
    with pytest.raises(ValueError, match="M2M-100's vocabulary can't be trimmed"):
        ours.used_ids(CORPUS)
    with pytest.raises(ValueError, match="must be at least 3"):
        ours(["a"], 2)
    ours.save(tmp_path / "saved")
    for name, content in (("dictionary.json", "{}"), ("sentencepiece.model", "not one")):
        (tmp_path / "saved" / name).write_text(content)
        with pytest.raises(ValueError, match="saved: the tokenizer is damaged: "):
            load_tokenizer(tmp_path / "saved")

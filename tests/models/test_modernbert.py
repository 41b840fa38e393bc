"""ModernBERT and mmBERT: outputs, gradients and tokens equal those of transformers."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from input_pipeline.tokenizers import from_checkpoint
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

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
TINY = IDS | {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "local_attention": 8,
    "cls_token_id": 2,
    "sep_token_id": 1,
}
KINDS = ["sliding_attention", "full_attention"]
# Fields of the config, pooling, class of transformers.
CASES = {
    "mean": (TINY, "mean", "ModernBertModel"),
    "cls": (TINY | {"global_attn_every_n_layers": 2}, "cls", "ModernBertModel"),
    "masked language model": (TINY | {"layer_types": KINDS * 2}, "mean", "ModernBertForMaskedLM"),
    "biases": (
        TINY | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "norm_eps": 0.1},
        "cls",
        "ModernBertModel",
    ),
    "odd window and other bases": (
        TINY | {"local_attention": 5, "global_rope_theta": 100.0, "local_rope_theta": 7.0},
        "mean",
        "ModernBertModel",
    ),
    "a window of one token": (TINY | {"local_attention": 1}, "mean", "ModernBertModel"),
    "local layers only": (
        TINY | {"num_hidden_layers": 2, "layer_types": KINDS[:1] * 2},
        "mean",
        "ModernBertModel",
    ),
    "deep and narrow, with ReLU": (
        TINY
        | {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 7}
        | {"hidden_activation": "relu"},
        "cls",
        "ModernBertModel",
    ),
}
LONGEST = TINY["max_position_embeddings"]


def reference(case: str):
    """The model of transformers; its random parameters all affect the outputs."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    module = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    fields, _, name = CASES[case]
    return randomized(getattr(module, name)(module.ModernBertConfig(**fields)))


def assert_equal_outputs(name: str, theirs, ours, pooling: str) -> None:
    """Compares texts that are all padded, and texts of which one fills the length."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    apply = nnx.jit(lambda model, ids, mask: model(ids, mask))
    for lengths in ((7, 7, 7, 7), (LONGEST, 12, 3, 1)):
        ids, mask = texts(lengths, max(lengths), 0)
        with torch.inference_mode():
            expected = pooled(getattr(theirs, "model", theirs), ids, mask, pooling).numpy()
        assert np.abs(expected).max() > 0.3
        wider = (0, 0), (0, LONGEST - ids.shape[1])
        ids, mask = np.pad(ids, wider), np.pad(mask, wider)
        arbitrary = np.where(mask, ids, np.random.default_rng(1).integers(0, 40, ids.shape))
        difference = np.abs(apply(ours, arbitrary.astype(np.int32), mask) - expected).max()
        print(f"{name} {lengths} difference {difference:.1e}")
        assert difference <= 2e-5


def gradients(theirs, pooling: str, folder) -> tuple[dict, dict]:
    """Our gradients, and torch's, which are saved and renamed like weights."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    ids, mask = texts((LONGEST, 11, 4, 1), LONGEST, 0)
    seed = np.random.default_rng(2).normal(size=(4, 32)).astype(np.float32)
    (pooled(theirs, ids, mask, pooling) * torch.from_numpy(seed)).sum().backward()
    config, weights = written(theirs, folder / "weights")
    ours = loaded(config, weights, pooling=pooling)
    loss = nnx.grad(lambda model: jnp.sum(model(jnp.asarray(ids), jnp.asarray(mask)) * seed))
    computed = flat(nnx.jit(loss)(ours))
    become_gradients(theirs)
    config, expected = written(theirs, folder / "gradients")
    return computed, rename(expected, config, pooling)


def assert_restored(theirs, folder, pooling: str) -> None:
    """The config.json and tensors of an export load in transformers, and nothing is left over."""
    transformers = pytest.importorskip("transformers")
    config, weights = written(theirs, folder / "theirs")
    ours = loaded(config, weights, pooling=pooling)
    family = registry.family_of("text", config)
    exported = family.hub_config(TowerSpec(family, config, pooling), pad_id=0)
    by_name = {name: np.asarray(x) for name, x in pretrained.flatten(ours).items()}
    restored = family.restore(by_name, exported)
    again = family.rename(restored, exported, pooling)
    assert set(again) == set(by_name)
    for weight, value in by_name.items():
        np.testing.assert_array_equal(again[weight], value)
    (folder / "ours").mkdir()
    (folder / "ours" / "config.json").write_text(json.dumps(exported))
    pretrained.save(restored, folder / "ours" / "model.safetensors")
    model, info = transformers.AutoModel.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert_equal_outputs("restored", model.eval(), ours, pooling)


def assert_half_precision(theirs, dtype: str, folder) -> None:
    """Weights in half precision are computed with in float32, as in transformers."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    config, weights = written(theirs.to(getattr(torch, dtype)), folder)
    assert {value.dtype.name for value in weights.values()} == {dtype}
    ours = loaded(config, pretrained.in_float32(weights))
    again = type(theirs).from_pretrained(folder, dtype=torch.float32)
    assert_equal_outputs(dtype, again, ours, "mean")


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    theirs, pooling = reference(case), CASES[case][1]
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights, pooling=pooling)
    assert ours.max_length == LONGEST
    assert_equal_outputs(case, theirs, ours, pooling)


@pytest.mark.parametrize("case", ["mean", "biases"])
def test_gradients_equal_torch(case, tmp_path):
    computed, expected = gradients(reference(case), CASES[case][1], tmp_path)
    for name in expected:  # the norm that the first layer does not use
        if ".attention_norm." in name:
            expected[name][0] = 0
            assert not computed[name][0].any()
    assert_equal_gradients(case, computed, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype, tmp_path):
    assert_half_precision(reference("mean"), dtype, tmp_path)


@pytest.mark.parametrize("case", ["cls", "biases"])
def test_restored_towers_load_in_transformers(case, tmp_path):
    assert_restored(reference(case), tmp_path, CASES[case][1])


@pytest.mark.parametrize("case", ["mean", "cls", "odd window and other bases", "biases"])
def test_older_files_describe_the_same_tower(case):
    """Version 5 of transformers writes rope_parameters and layer_types instead of four fields."""
    transformers = pytest.importorskip("transformers")
    older = CASES[case][0] | {"model_type": "modernbert"}
    newer = transformers.ModernBertConfig(**CASES[case][0]).to_dict()
    assert {"rope_parameters", "layer_types"} <= set(newer)
    family = registry.families("text")["modernbert"]
    assert family.described(older) == family.described(newer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5; .* divides 32"),
        ({"num_attention_heads": 32}, "heads of width 1 are not supported; rotary positions need"),
        ({"hidden_activation": "swish"}, "hidden_activation is 'swish'; known: "),
        ({"norm_bias": 1}, "norm_bias is 1; it must be"),
        (
            {"layer_types": KINDS},
            "layer_types is .* must be a list of 4 times full_attention or",
        ),
        ({"layer_types": ["chunked_attention"] * 4}, "it must be a list of 4 times full_attention"),
        ({"global_rope_theta": 0}, "global_rope_theta is 0; it must be"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling {'factor': 2} is not supported, only null"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta; known: full_"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4}}},
            "rope_parameters.full_attention .*yarn.* is not supported, only rope_type 'default'",
        ),
        ({"is_decoder": True}, "decoders are not supported"),
    ],
)
def test_what_is_not_known_is_refused(fields, message):
    family = registry.families("text")["modernbert"]
    with pytest.raises(ValueError, match=message):
        family.check(TINY | fields)
    with pytest.raises(ValueError, match=r"'pooler'; modernbert supports mean, cls$"):
        family.check_pooling(TINY, "pooler")


# Number of parameters of transformers' model. Ours has one norm more, which is not used.
PARAMETERS = {
    "answerdotai/ModernBERT-base": 149_014_272,
    "answerdotai/ModernBERT-large": 394_781_696,
    "jhu-clsp/mmBERT-small": 140_493_696,
    "jhu-clsp/mmBERT-base": 306_939_648,
}


@pytest.mark.parametrize("hub_id", PARAMETERS)
def test_parameters_of_published_architectures(hub_id):
    model = create(registry.architectures("text")[hub_id])
    assert model.max_length == 8192
    count = sum(math.prod(value.shape) for value in pretrained.flatten(model).values())
    assert count - model.dim == PARAMETERS[hub_id]


def test_published_totals_are_the_ones_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    for hub_id, total in PARAMETERS.items():
        fields = registry.architectures("text")[hub_id] | IDS
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**fields))
        assert sum(parameter.numel() for parameter in theirs.parameters()) == total, hub_id


# Tokens.

RAW = [
    *CORPUS,
    *OTHER,
    "😀👍🏽 ok",
    "שלום עולם مرحبا",
    "二匹の犬が走る。",
    "a  b\tc\n\n",
    " \u00a0 ",
    "[CLS] a [SEP] <eos> <bos>b<pad>",
    "x" * 300,
    "Zwei " * 90,
]


def byte_level_tokenizer():
    """A small BPE vocabulary in the layout of ModernBERT."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CORPUS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 1)]
    )
    names = {name: f"[{name.upper()}]" for name in ("pad", "sep", "cls", "unk", "mask")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, **{f"{name}_token": token for name, token in names.items()}
    )


def gemma_tokenizer(**options):
    """A small BPE vocabulary in the layout of Gemma, with bytes for unknown characters."""
    transformers = pytest.importorskip("transformers")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "a"), ("e", "r"), ("Z", "w"), ("e", "i"), ("Zw", "ei"), ("▁", "▁")]
    tokens += ["".join(merge) for merge in merges]
    return transformers.GemmaTokenizer(
        vocab={token: id for id, token in enumerate(tokens)},
        merges=merges,
        add_bos_token=True,
        add_eos_token=True,
        **options,
    )


@pytest.mark.parametrize("make", [byte_level_tokenizer, gemma_tokenizer])
def test_tokens_equal_transformers(make, tmp_path):
    """ModernBERT has a vocabulary of its own, and mmBERT that of Gemma 2."""
    theirs = make()
    theirs.save_pretrained(tmp_path)
    # The tower uses no ids of special tokens, so those in config.json may differ.
    family = registry.families("text")["modernbert"]
    config = TINY | {"vocab_size": len(theirs), "cls_token_id": 7}
    fields = family.tokenizer_fields(config)
    ours = from_checkpoint(tmp_path, fields)
    assert rows_of(ours(RAW)) == theirs(RAW).input_ids
    for length in (12, 3):
        cut = theirs(RAW, truncation=True, max_length=length).input_ids
        assert rows_of(ours(RAW, max_length=length)) == cut

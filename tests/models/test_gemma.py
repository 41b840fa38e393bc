"""EmbeddingGemma: outputs, gradients and tokens equal those of transformers."""

import math

import numpy as np
import pytest

import xlir
from configs import base
from input_pipeline.tokenizers import from_checkpoint
from tests.models.parity import assert_equal_gradients
from tests.models.test_modernbert import (
    IDS,
    KINDS,
    RAW,
    assert_equal_outputs,
    assert_half_precision,
    assert_restored,
    gemma_tokenizer,
    gradients,
)
from tests.models.test_transformer import create, loaded, randomized, written
from tests.tokenizers.test_huggingface import rows_of
from xlir.models import pretrained, registry, towers

TINY = IDS | {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "use_bidirectional_attention": True,
}
# Fields of the config, class of transformers.
CASES = {
    "grouped queries": (TINY, "Gemma3TextModel"),
    "one head of keys, as published": (
        TINY | {"num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 16},
        "Gemma3TextModel",
    ),
    "every head has its keys": (TINY | {"num_key_value_heads": 4}, "Gemma3TextModel"),
    "another scale of queries": (TINY | {"query_pre_attn_scalar": 30}, "Gemma3TextModel"),
    "biases": (TINY | {"attention_bias": True, "rms_norm_eps": 0.1}, "Gemma3TextModel"),
    "odd window and other bases": (
        TINY | {"sliding_window": 5, "rope_theta": 100.0, "rope_local_base_freq": 7.0},
        "Gemma3TextModel",
    ),
    "given kinds of layers": (
        TINY | {"layer_types": [*KINDS, KINDS[0]], "hidden_activation": "silu"},
        "Gemma3TextModel",
    ),
    "language model": (TINY | {"num_hidden_layers": 7}, "Gemma3ForCausalLM"),
}


def reference(case: str):
    """The model of transformers; its random parameters all affect the outputs."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    module = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    fields, name = CASES[case]
    model = randomized(getattr(module, name)(module.Gemma3TextConfig(**fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and (parameter > 0.5).all():  # the scales of norms, minus 1
                parameter -= 1
    return model


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_torch(case, tmp_path):
    theirs = reference(case)
    config, weights = written(theirs, tmp_path)
    ours = loaded(config, weights)
    assert ours.max_length == 24
    assert_equal_outputs(case, theirs, ours, "mean")


@pytest.mark.parametrize("case", ["grouped queries", "biases"])
def test_gradients_equal_torch(case, tmp_path):
    computed, expected = gradients(reference(case), "mean", tmp_path)
    # Loading adds 1 to the scales of norms.
    scales = {name: value - 1 for name, value in expected.items() if name.endswith("scale")}
    assert_equal_gradients(case, computed, expected | scales)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_checkpoints(dtype, tmp_path):
    assert_half_precision(reference("grouped queries"), dtype, tmp_path)


@pytest.mark.parametrize("case", ["grouped queries", "biases"])
def test_restored_towers_load_in_transformers(case, tmp_path):
    assert_restored(reference(case), tmp_path, "mean")


@pytest.mark.parametrize("case", ["grouped queries", "odd window and other bases"])
def test_older_files_describe_the_same_tower(case):
    """Version 5 of transformers writes rope_parameters and layer_types instead of three fields."""
    transformers = pytest.importorskip("transformers")
    older = CASES[case][0] | {"rope_scaling": None, "attn_logit_softcapping": None}
    newer = transformers.Gemma3TextConfig(**CASES[case][0]).to_dict()
    assert {"rope_parameters", "layer_types"} <= set(newer)
    family = registry.families("text")["gemma3_text"]
    assert family.described(older) == family.described(newer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_bidirectional_attention": False}, "causal Gemma models are not supported, only"),
        ({"use_bidirectional_attention": None}, "causal Gemma models are not supported, only"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; .* divides 4"),
        ({"head_dim": 7}, "head_dim is 7: heads of width 7 are not supported; rotary positions"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported, only null"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; it must be a list"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling .* is not supported, only null"),
    ],
)
def test_what_is_not_known_is_refused(fields, message):
    family = registry.families("text")["gemma3_text"]
    with pytest.raises(ValueError, match=message):
        family.check(TINY | fields)
    with pytest.raises(ValueError, match=r"'cls'; gemma3_text supports mean$"):
        family.check_pooling(TINY, "cls")
    with pytest.raises(ValueError, match="model_type 'embedding_gemma2' is not supported; known"):
        registry.family_of("text", {"model_type": "embedding_gemma2"})


def test_parameters_of_the_published_architecture():
    """The transformer's parameters, which are the same as those of transformers' model."""
    fields = registry.architectures("text")["google/embeddinggemma-300m"]
    model = create(fields)
    assert model.max_length == 2048
    count = sum(math.prod(value.shape) for value in pretrained.flatten(model).values())
    assert count == 302_863_104
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**fields))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count


def test_the_published_model_has_dense_layers():
    """Its shapes are known without the checkpoint: 308 million parameters."""
    config = base.get_config()
    config.text.tower, config.image.tower = "google/embeddinggemma-300m", "toy-vit"
    described = towers.describe_published(config)["text"]
    assert (described.pooling, len(described.dense)) == ("mean", 2)


def test_tokens_equal_transformers(tmp_path):
    theirs = gemma_tokenizer(padding_side="left")
    theirs.save_pretrained(tmp_path)
    ours = from_checkpoint(tmp_path, {"vocab_size": len(theirs)})
    assert rows_of(ours(RAW)) == theirs(RAW).input_ids
    cut = theirs(RAW, truncation=True, max_length=12).input_ids
    assert rows_of(ours(RAW, max_length=12)) == cut
    assert rows_of(ours([""])) == [[2, 1]]


def test_the_token_for_images_is_text(tmp_path):
    """The published tokenizer has one more token than the embedding has rows."""
    theirs = gemma_tokenizer()
    size, text = len(theirs), "a <image_soft_token> b"
    split = theirs([text]).input_ids
    theirs.add_tokens(["<image_soft_token>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    assert size in theirs([text]).input_ids[0]
    ours = from_checkpoint(tmp_path, {"vocab_size": size})
    assert (ours.vocab_size, rows_of(ours([text]))) == (size, split)
    whole = from_checkpoint(tmp_path, {"vocab_size": size + 1})
    assert rows_of(whole([text])) == theirs([text]).input_ids


def test_a_checkpoint_with_dense_layers_equals_sentence_transformers(tmp_path):
    """From raw texts to embeddings, in the layout of google/embeddinggemma-300m."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    tokenizer = gemma_tokenizer(padding_side="left")
    fields = CASES["one head of keys, as published"][0] | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.Gemma3TextConfig(**fields))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "tower")
    parts = [modules.Transformer(str(tmp_path / "tower"), max_seq_length=24)]
    parts.append(modules.Pooling(32, pooling_mode="mean"))
    for features, dim in ((32, 48), (48, 20)):
        parts.append(modules.Dense(features, dim, False, torch.nn.Identity()))
    theirs = library.SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu")
    theirs.save(str(tmp_path / "model"))
    config = base.get_config()
    config.text.tower, config.image.tower = str(tmp_path / "model"), "toy-vit"
    config.text.head, config.image.head, config.embedding_dim = "none", "linear", 20
    config.text.dtype, config.text.max_length = "float32", 24
    encoder = xlir.Encoder.create(config)
    expected = theirs.encode(RAW)
    np.testing.assert_allclose(encoder.encode_text(RAW), expected, atol=2e-5, rtol=0)

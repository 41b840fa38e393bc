"""Compares models of sentence-transformers with that library: pooling, dense layers, norms."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import xlir
from configs import base
from tests.tokenizers.test_huggingface import CORPUS, OTHER, wordpiece
from xlir.models import pretrained, sentence_modules, towers

torch = pytest.importorskip("torch", reason="needs torch: pip install 'xlir[export]'")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.models")

FIELDS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TEXTS = [*CORPUS, *OTHER]
# Name -> pooling mode, dense layers (width, bias, activation), whether the model normalises.
CASES = {
    "LaBSE": ("cls", [(32, True, torch.nn.Tanh())], True),
    "distiluse": ("mean", [(24, True, torch.nn.Tanh())], False),
    "CLIP multilingual": ("mean", [(20, False, torch.nn.Identity())], False),
    "two layers": ("cls", [(40, True, torch.nn.GELU()), (16, True, torch.nn.ReLU())], True),
    "cls alone": ("cls", [], False),
    "E5": ("mean", [], True),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    tokenizer = wordpiece()
    size = tokenizer.get_vocab_size()
    config = transformers.BertConfig(vocab_size=size, pad_token_id=0, **FIELDS)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    special = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in special.items()}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(bert, tmp_path_factory):
    """A function that saves a model of sentence-transformers; it returns folder and model."""

    def write(pooling, dense=(), normalizes=False, **options):
        folder = tmp_path_factory.mktemp("model")
        parts = [modules.Transformer(str(bert))]
        parts.append(modules.Pooling(32, pooling_mode=pooling, **options))
        width = 32
        for dim, bias, activation in dense:
            layer = modules.Dense(width, dim, bias, activation)
            parts.append(layer)
            width = dim
        parts += [modules.Normalize()] if normalizes else []
        model = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
        model.save(str(folder))
        return folder, model

    return write


@pytest.fixture(scope="module")
def labse(write):
    return write(*CASES["LaBSE"])


def configured(folder, dim: int, **fields):
    config = base.get_config()
    config.text.tower, config.image.tower = str(folder), "toy-vit"
    config.text.head, config.image.head, config.embedding_dim = "none", "linear", dim
    config.text.dtype, config.text.max_length = "float32", 64
    config.text.update(fields)
    return config


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_the_librarys(case, write, tmp_path):
    """Embeddings are equal, and so are their lengths if the model does not normalise them."""
    pooling, dense, normalizes = CASES[case]
    folder, model = write(pooling, dense, normalizes)
    dim = dense[-1][0] if dense else 32
    expected = model.encode(TEXTS)
    encoder = xlir.Encoder.create(configured(folder, dim))
    np.testing.assert_allclose(encoder.encode_text(TEXTS), unit(expected), atol=2e-5, rtol=0)
    features = encoder.embedder.features(encoder.parameters, "text", TEXTS)
    if not normalizes:
        np.testing.assert_allclose(features, expected, atol=2e-5, rtol=0)
    encoder.save(tmp_path)
    assert ("dense" in json.loads((tmp_path / "text_tower" / "tower.json").read_text())) == bool(
        dense
    )
    opened = xlir.Encoder.open(tmp_path)
    np.testing.assert_array_equal(opened.encode_text(TEXTS), encoder.encode_text(TEXTS))


def test_a_pooling_of_ones_own_goes_without_dense_layers(labse, bert):
    folder, _ = labse
    alone = xlir.Encoder.create(configured(bert, 32)).encode_text(TEXTS)
    chosen = xlir.Encoder.create(configured(folder, 32, pooling="mean"))
    np.testing.assert_array_equal(chosen.encode_text(TEXTS), alone)
    assert (
        np.abs(xlir.Encoder.create(configured(folder, 32)).encode_text(TEXTS) - alone).max() > 0.1
    )


def test_a_run_of_before_has_no_dense_layers(labse, tmp_path):
    """The tower.json of earlier versions lists no dense layers."""
    encoder = xlir.Encoder.create(configured(labse[0], 32, pooling="cls"))
    encoder.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text"]["pooling"] = ""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "SHA256SUMS").unlink()
    opened = xlir.Encoder.open(tmp_path)
    np.testing.assert_array_equal(opened.encode_text(TEXTS), encoder.encode_text(TEXTS))


def test_dense_layers_are_trained_with_the_tower(labse):
    encoder = xlir.Encoder.create(configured(labse[0], 32, frozen=False))
    assert {"dense", "layers"} <= set(encoder.parameters.trained["text_tower"])
    frozen = xlir.Encoder.create(configured(labse[0], 32))
    assert "text_tower" not in frozen.parameters.trained


def test_the_published_labse_has_its_dense_layer():
    """Its shapes are known without the checkpoint."""
    config = configured("sentence-transformers/LaBSE", 768)
    described = towers.describe_published(config)["text"]
    assert (described.pooling, len(described.dense)) == ("cls", 1)
    config.text.pooling = "mean"
    described = towers.describe_published(config)["text"]
    assert (described.pooling, len(described.dense)) == ("mean", 0)


def test_older_fields_of_the_pooling(labse, tmp_path):
    """Older models have a field for each pooling mode, and their weights in a pickle."""
    folder, model = labse
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode == "cls_token" for mode in ("cls_token", "mean_tokens")}
    write_json(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **modes})
    file = tmp_path / "2_Dense" / "model.safetensors"
    tensors = {name: torch.from_numpy(x) for name, x in load_file(file).items()}
    torch.save(tensors, tmp_path / "2_Dense" / "pytorch_model.bin")
    file.unlink()
    ours = xlir.Encoder.create(configured(tmp_path, 32)).encode_text(TEXTS)
    np.testing.assert_allclose(ours, model.encode(TEXTS), atol=2e-5, rtol=0)


def write_json(file, content):
    file.write_text(json.dumps(content))


def changed(name: str, **fields):
    """Changes fields of a JSON file."""

    def change(folder):
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        write_json(folder / name, content | fields)

    return change


def without(name: str):
    return lambda folder: (folder / name).unlink()


def another_module(folder):
    listed = json.loads((folder / "modules.json").read_text())
    listed[2]["type"] = "sentence_transformers.models.LSTM"
    write_json(folder / "modules.json", listed)


def outside(folder):
    listed = json.loads((folder / "modules.json").read_text())
    listed[2]["path"] = "../2_Dense"
    write_json(folder / "modules.json", listed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_module, "lists Transformer, Pooling, LSTM, Normalize; known: Transformer"),
        (outside, r"path '\.\./2_Dense' is not the name of a folder"),
        (lambda folder: write_json(folder / "modules.json", {"a": 1}), "modules.json is damaged"),
        (lambda folder: write_json(folder / "modules.json", []), "modules.json is damaged"),
        (without("1_Pooling/config.json"), "1_Pooling/config.json is missing, but modules.json"),
        (changed("1_Pooling/config.json", pooling_mode="max"), "pools by max; known: mean or cls"),
        (changed("1_Pooling/config.json", pooling_mode="lasttoken"), "pools by lasttoken; known"),
        (
            changed("1_Pooling/config.json", pooling_mode=["cls", "mean"]),
            "pools by cls and mean; known: mean or cls; set config.text.pooling to use only its",
        ),
        (changed("1_Pooling/config.json", include_prompt=False), "leaves out the prompt"),
        (changed("2_Dense/config.json", in_features=31), "from 31 to 32 features, but .* has 32"),
        (
            changed("2_Dense/config.json", activation_function="torch.nn.ELU"),
            "activation_function 'torch.nn.ELU' is not supported; set config.text.pooling",
        ),
        (changed("2_Dense/config.json", use_residual=True), "use_residual True is not supported"),
        (without("2_Dense/model.safetensors"), "2_Dense has no weights"),
        (changed("2_Dense/config.json", bias=False), "unused dense.0.bias"),
    ],
)
def test_what_is_not_known_is_one_line(change, message, labse, tmp_path):
    shutil.copytree(labse[0], tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{message}[^\n]*$") as raised:
        xlir.Encoder.create(configured(tmp_path, 32))
    assert "\n" not in str(raised.value)


def test_a_folder_without_modules(bert):
    assert sentence_modules.read(bert, 32) is None
    assert pretrained.checkpoint_folder(str(bert)) == bert
    assert not towers.describe_text(configured(bert, 32).text).dense

"""SigLIP's tokenizer, converted, gives the ids of transformers' own."""

import json

import pytest
import sentencepiece

from input_pipeline.tokenizers import Padding, from_checkpoint, load_tokenizer, siglip
from tests.tokenizers.test_huggingface import CORPUS, OTHER, rows_of

TEXTS = [
    *CORPUS,
    *OTHER,
    *siglip.PROBES,
    "\u2581 a\u2581b",
    "A.B",
    "don't",
    "İstanbul",
    "ΣΑΣ",
    "a\u3000b",
    "e\u0301",
    "\u200bfoo",
    "\n a dog \n",
    "a\x00b",
]


def write_tokenizer(folder) -> None:
    """A SentencePiece model in a checkpoint's folder, as SigLIP has it: `</s>` is 1 and pads."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in CORPUS] * 5),
        model_prefix=str(folder / "spiece"),
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"}
    tokenizer["model_input_names"] = ["input_ids"]  # no mask: tokens attend to the padding
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder without weights."""
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    return tmp_path


def test_ids_are_those_of_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    fields = {"model_type": "siglip_text_model", "vocab_size": theirs.vocab_size}
    ours = from_checkpoint(folder, fields, full_length=24)
    assert ours.padding == Padding(24, 1)
    given = {"padding": "max_length", "max_length": 24, "truncation": True}
    expected = theirs(TEXTS, **given)["input_ids"]
    assert rows_of(ours(TEXTS, 24)) == expected
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.padding == ours.padding
    assert again.fingerprint() == ours.fingerprint()
    assert rows_of(again(TEXTS, 24)) == expected
    kept = ours.used_ids(TEXTS)
    trimmed = ours.trimmed(kept)
    assert [[kept[i] for i in row] for row in trimmed(TEXTS, 24)] == expected


def test_a_model_that_is_split_differently_is_refused(folder, monkeypatch):
    monkeypatch.setattr(siglip, "PROBES", ("</s>",))  # transformers adds no second EOS
    with pytest.raises(ValueError, match="can't be converted: '</s>' would become"):
        from_checkpoint(folder, {"vocab_size": 150})


@pytest.mark.parametrize("padding", [3, [1, 2, 3]])
def test_a_damaged_padding_is_named(folder, tmp_path, padding):
    tokenizer = from_checkpoint(folder, {"vocab_size": len(_pieces(folder))}, full_length=24)
    tokenizer.save(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenization.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding": padding}))
    with pytest.raises(ValueError, match=r"tokenization\.json: padding is "):
        load_tokenizer(tmp_path / "saved")


def _pieces(folder) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    return [processor.id_to_piece(id) for id in range(processor.get_piece_size())]

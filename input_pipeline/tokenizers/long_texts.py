"""The first tokens of very long texts, without tokenizing all of the text.

If no token spans a space, then what follows a space does not change the tokens before it. For such
tokenizers it is enough to tokenize the beginning of a text, cut at a space.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Length of the beginning that is tokenized first, in characters per wanted token.
CHARACTERS_PER_TOKEN = 64
# Where a text may be cut: before a space that follows a letter or digit. Characters that Unicode
# may join with what follows them are excluded: U+0D4E, and some beyond the 16-bit plane.
CUT = re.compile("(?<=[^\\W\u0d4e\U00010000-\U0010ffff]) ")
# Steps of a tokenizer.json that treat a text's beginning the same with or without the rest.
NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled")
NORMALIZERS += ("Prepend", "Strip", "StripAccents")
PRE_TOKENIZERS = ("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit")
# Replacements that open_clip makes before it tokenizes texts: regular expression, replacement.
CLEANING = (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"'), (r"\s+", " "))
# More replacements that it makes, in lower case, for the models of SigLIP: no punctuation.
CANONICAL = (("_", " "), (f"[{re.escape(string.punctuation)}]", ""), (r"\s+", " "))
REPLACED = (*(pattern for pattern, _ in CLEANING + CANONICAL), " {2,}")


def first_tokens(
    split: Callable[[Sequence[str]], list[list[int]]],
    texts: Sequence[str],
    keep: int | None,
    splits_at_spaces: Callable[[], bool],
) -> list[list[int]]:
    """At least the first `keep` tokens of each text, or all tokens of shorter texts.

    Only the beginning of a long text, up to a space, is tokenized. If that gives too few tokens, a
    longer beginning is tokenized. A text without a space to cut at is tokenized as a whole.

    Args:
      split: tokenizes whole texts.
      texts: any strings.
      keep: number of wanted tokens; None for all.
      splits_at_spaces: whether no token spans a space (the function `splits_at_spaces`); called for
        long texts only.
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
    """Whether tokens and normalization before a space are independent of what follows (see `CUT`).

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
    """A text up to the first space after some characters, or all of it if there is no space."""
    space = CUT.search(text, characters)
    return text[: space.start()] if space else text


def _steps(step: Mapping[str, Any] | None, parts: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: itself, or the parts of a sequence."""
    return [] if step is None else step.get(parts, [step])


def _divides_at_spaces(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer splits at each space, no matter what follows it."""
    options = {"Metaspace": "split", "ByteLevel": "use_regex"}
    return step["type"] in PRE_TOKENIZERS and step.get(options.get(step["type"]), True)


def _is_local(step: Mapping[str, Any]) -> bool:
    """Whether a normalizer changes the beginning of a text in the same way without the rest."""
    if step["type"] == "Replace":
        return step["pattern"].get("Regex") in REPLACED
    return step["type"] in NORMALIZERS

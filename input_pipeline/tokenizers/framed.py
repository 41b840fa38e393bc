"""`FramedTokenizer`: the base of tokenizers that put special tokens around a text."""

import abc
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from input_pipeline.tokenizers.long_texts import first_tokens

# Texts that are split at a time, because the libraries take much memory for each token.
CHUNK = 10_000


class Padding(NamedTuple):
    """Padding that is part of every text, for models whose tokens attend to it.

    Attributes:
      length: the number of tokens that shorter texts are padded to, on the right.
      id: the padding token's id.
    """

    length: int
    id: int


class FramedTokenizer(abc.ABC):
    """Splits texts into tokens, and puts special tokens before and after them.

    Translation models put the token of a text's language before the text, by default that of
    English. A text that begins with the token of another language, such as "deu_Latn Zwei Hunde",
    gets this token instead.

    Attributes:
      prefix: put before every text.
      padding: padding that counts as a part of the text; None for all models that ignore it.
      languages: token of a language -> id; empty unless texts begin with such a token.
    """

    prefix: str
    padding: Padding | None
    languages: Mapping[str, int]
    _before: Sequence[int]
    _after: Sequence[int]

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[Int32[np.ndarray, " _"]]:
        """The token ids of each text, with special tokens before and after, then `padding`.

        Args:
          texts: any strings; a lone surrogate counts as "?".
          max_length: longer texts lose tokens at their end, but no special tokens. None: no limit.

        Raises:
          ValueError: `max_length` leaves no room for the special tokens and a token of the text.
        """
        special = len(self._before) + len(self._after)
        if max_length is not None and max_length <= special:
            raise ValueError(
                f"max_length is {max_length}; it must be at least {special + 1}: the special "
                "tokens and one token of the text"
            )
        keep = None if max_length is None else max_length - special
        wanted = None if keep is None else keep + bool(self.languages)
        rows = []
        for start in range(0, len(texts), CHUNK):
            chunk = texts[start : start + CHUNK]
            for tokens in first_tokens(self._split, chunk, wanted, lambda: self._splits_at_spaces):
                ids = self._framed(tokens, keep)
                if self.padding is not None:
                    ids += [self.padding.id] * (self.padding.length - len(ids))
                rows.append(np.array(ids, np.int32))
        return rows

    def _framed(self, tokens: list[int], keep: int | None) -> list[int]:
        """The first `keep` tokens of a text between the special tokens."""
        if tokens and tokens[0] in self.languages.values():
            return [tokens[0], *tokens[1:][:keep], *self._after]
        return [*self._before, *tokens[:keep], *self._after]

    def _prefixed(self, texts: Sequence[str]) -> list[str]:
        """The texts after the prefix, with "?" for lone surrogates."""
        return [self.prefix + text.encode("utf8", "replace").decode() for text in texts]

    @abc.abstractmethod
    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text with the prefix, without the tokens around it."""

    @property
    @abc.abstractmethod
    def _splits_at_spaces(self) -> bool:
        """See `long_texts.first_tokens`."""

"""M2M-100's tokenizer, which `transformers` has only in Python."""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sentencepiece

from input_pipeline.tokenizers.framed import FramedTokenizer
from input_pipeline.tokenizers.saved import DESCRIPTION_FILE, DICTIONARY_FILE, MODEL_FILE

END, UNKNOWN, ENGLISH = "</s>", "<unk>", "__en__"


class M2M100Tokenizer(FramedTokenizer):
    """Splits texts into tokens of a SentencePiece model, whose ids are in a dictionary.

    A token that the dictionary lacks becomes UNK: the model published by Fan et al. 2020
    (https://arxiv.org/abs/2010.11125) has such tokens. The ids equal those of `transformers`; a
    literal special token in a text, such as "</s>" or "__de__", becomes that token.

    A text is framed by the token of its language, "__en__" by default, and "</s>".
    """

    kind = "m2m_100"
    padding = None

    def __init__(self, model: bytes, dictionary: Mapping[str, Any], prefix: str = ""):
        """Takes the content of the two files of a saved tokenizer.

        Args:
          model: a SentencePiece model.
          dictionary: "ids" holds the ids of tokens, "special" those of special tokens, and
            "languages" the tokens of languages, which are special tokens, too.
          prefix: put before every text, such as "__de__" for texts in German.

        Raises:
          ValueError: the model or the dictionary is damaged.
        """
        self._model, self._dictionary, self.prefix = model, dictionary, prefix
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model") from error
        try:
            self._ids, self._special = dictionary["ids"], dictionary["special"]
            self.languages = {token: self._special[token] for token in dictionary["languages"]}
            self._before, self._after = (self.languages[ENGLISH],), (self._special[END],)
            self._unknown = self._special[UNKNOWN]
        except (KeyError, TypeError) as error:
            raise ValueError(f"its dictionary lacks {error}") from error
        longest_first = sorted(self._special, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @classmethod
    def converted(cls, original: Any, prefix: str = "") -> "M2M100Tokenizer":
        """The tokenizer that gives the same ids as the `M2M100Tokenizer` of transformers."""
        languages = original.lang_token_to_id
        special = {**original.added_tokens_encoder, **languages}
        dictionary = {"ids": original.encoder, "special": special, "languages": [*languages]}
        return cls(pathlib.Path(original.spm_file).read_bytes(), dictionary, prefix)

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids; all ids are below it."""
        return max(*self._ids.values(), *self._special.values()) + 1

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """See `FramedTokenizer._split`."""
        rows = [[x for x in self._specials.split(text) if x] for text in self._prefixed(texts)]
        plain = [part for row in rows for part in row if part not in self._special]
        tokens = iter(self._processor.encode(plain, out_type=str))
        return [[id for part in row for id in self._ids_of(part, tokens)] for row in rows]

    def _ids_of(self, part: str, tokens: Iterator[list[str]]) -> list[int]:
        """The id of a special token, or those of the next tokens."""
        if part in self._special:
            return [self._special[part]]
        return [self._ids.get(token, self._unknown) for token in next(tokens)]

    @functools.cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether a space, written "\u2581", is known and only the first character of a token."""
        pieces = [self._processor.id_to_piece(id) for id in range(self._processor.get_piece_size())]
        return "\u2581" in pieces and not any("\u2581" in piece[1:] for piece in pieces)

    def used_ids(self, texts: Iterable[str]) -> None:
        """Raises ValueError: without a token, a text would not be split into others, but be UNK."""
        raise ValueError("M2M-100's vocabulary can't be trimmed: set --config.text.trim_vocab=")

    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        described = json.dumps([self.prefix, self._dictionary]).encode()
        return hashlib.sha256(self._model + described).hexdigest()

    def special_tokens(self) -> dict[str, int]:
        """Content -> id of the special tokens."""
        return dict(self._special)

    def save_vocabulary(self, folder: pathlib.Path) -> None:
        """Writes the SentencePiece model and the dictionary, without the prefix."""
        (folder / MODEL_FILE).write_bytes(self._model)
        content = json.dumps(self._dictionary, ensure_ascii=False)
        (folder / DICTIONARY_FILE).write_text(content, encoding="utf8")

    def save(self, folder: pathlib.Path) -> None:
        """Creates a folder and writes into it what `load_tokenizer` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vocabulary(folder)
        description = {"kind": self.kind, "prefix": self.prefix}
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "M2M100Tokenizer":
        """Reads what `save` wrote."""
        prefix = json.loads((folder / DESCRIPTION_FILE).read_text()).get("prefix", "")
        try:
            dictionary = json.loads((folder / DICTIONARY_FILE).read_text(encoding="utf8"))
            return cls((folder / MODEL_FILE).read_bytes(), dictionary, prefix)
        except ValueError as error:
            raise ValueError(f"{folder}: the tokenizer is damaged: {error}") from error

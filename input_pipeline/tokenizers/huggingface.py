"""Tokenizers of Hugging Face checkpoints, with their whole vocabulary or a part of it."""

import functools
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from input_pipeline.tokenizers.framed import CHUNK, FramedTokenizer, Padding
from input_pipeline.tokenizers.long_texts import CANONICAL, CLEANING, splits_at_spaces
from input_pipeline.tokenizers.saved import DESCRIPTION_FILE, TOKENIZER_FILE

# Tokens that say which language a text is in: NLLB's "eng_Latn" and M2M-100's "__en__".
LANGUAGE = re.compile("[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")


class HuggingFaceTokenizer(FramedTokenizer):
    """Splits texts into tokens by a tokenizer of the `tokenizers` library.

    The ids equal those of `transformers`. For example, a literal "</s>" in a text becomes that
    special token, and an empty text has special tokens only.
    """

    kind = "huggingface"

    def __init__(self, serialized: str, prefix: str = "", padding: Padding | None = None):
        """Takes the content of a tokenizer.json.

        Args:
          serialized: JSON; padding and truncation in it are ignored.
          prefix: put before every text, such as "query: " for the E5 models, or "deu_Latn" for
            texts in German and NLLB.
          padding: padding that counts as a part of the text; None for all models that ignore it.

        Raises:
          ValueError: this is not a tokenizer, or it puts no special tokens around a text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._serialized = serialized
        self.prefix, self.padding = prefix, padding
        probe = self._tokenizer.encode("a")
        own = [i for i, special in enumerate(probe.special_tokens_mask) if not special]
        if len(own) in (0, len(probe.ids)):
            raise ValueError("the tokenizer puts no special tokens (CLS, SEP) around a text")
        self._before, self._after = probe.ids[: own[0]], probe.ids[own[-1] + 1 :]
        added = self._tokenizer.get_added_tokens_decoder().items()
        languages = {token.content: id for id, token in added if LANGUAGE.fullmatch(token.content)}
        self.languages = languages if {*self._before} & {*languages.values()} else {}

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """See `FramedTokenizer._split`."""
        encoded = self._tokenizer.encode_batch_fast(self._prefixed(texts), add_special_tokens=False)
        return [tokens.ids for tokens in encoded]

    @functools.cached_property
    def _splits_at_spaces(self) -> bool:
        return splits_at_spaces(json.loads(self._serialized))

    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        padding = [] if self.padding is None else [self.padding]
        described = json.dumps([self.prefix, self._serialized, *padding])
        return hashlib.sha256(described.encode()).hexdigest()

    def special_tokens(self) -> dict[str, int]:
        """Content -> id of the added tokens, such as the padding token."""
        added = json.loads(self._serialized)["added_tokens"]
        return {token["content"]: token["id"] for token in added}

    def save_vocabulary(self, folder: pathlib.Path) -> None:
        """Writes a tokenizer.json, without the prefix, the padding and a maximum length."""
        (folder / TOKENIZER_FILE).write_text(self._serialized, encoding="utf8")

    def save(self, folder: pathlib.Path) -> None:
        """Creates a folder and writes into it what `load_tokenizer` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vocabulary(folder)
        description: dict[str, Any] = {"kind": self.kind, "prefix": self.prefix}
        if self.padding is not None:
            description["padding"] = self.padding
        (folder / DESCRIPTION_FILE).write_text(json.dumps(description))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "HuggingFaceTokenizer":
        """Reads what `save` wrote."""
        description = json.loads((folder / DESCRIPTION_FILE).read_text())
        prefix, padding = description.get("prefix", ""), description.get("padding")
        try:
            padding = None if padding is None else Padding(*padding)
        except TypeError as error:
            raise ValueError(f"{folder / DESCRIPTION_FILE}: padding is {padding!r}") from error
        try:
            return cls((folder / TOKENIZER_FILE).read_text(encoding="utf8"), prefix, padding)
        except ValueError as error:
            raise ValueError(f"{folder / TOKENIZER_FILE}: {error}") from error

    def used_ids(self, texts: Iterable[str]) -> Int32[np.ndarray, " kept"]:
        """The ids, ascending, that `trimmed` has to keep in order to split these texts as before.

        These are the tokens of the texts, the added tokens, and all tokens of a single character or
        byte, so that new words in other texts are split into shorter tokens instead of UNK.

        Args:
          texts: a corpus, with texts in every language of the evaluation.
        """
        content = json.loads(self._serialized)
        model = content["model"]
        used = {token["id"] for token in content["added_tokens"]}
        used |= set() if self.padding is None else {self.padding.id}
        prefix = model.get("continuing_subword_prefix") or ""
        for token, id in self._tokenizer.get_vocab().items():
            if len(token.removeprefix(prefix)) == 1 or re.fullmatch("<0x[0-9A-F]{2}>", token):
                used.add(id)
        if model["type"] == "Unigram":
            # The library derives the score of unknown characters from the lowest score.
            used.add(min(range(len(model["vocab"])), key=lambda id: model["vocab"][id][1]))
            used.add(model["unk_id"])
        elif model.get("unk_token"):
            used.add(self._tokenizer.token_to_id(model["unk_token"]))
        remaining = iter(texts)
        while chunk := list(itertools.islice(remaining, CHUNK)):
            used.update(np.unique(np.concatenate(self(chunk))).tolist())
        return np.array(sorted(used - {None}), np.int32)

    def trimmed(self, kept: Integer[np.ndarray, " kept"]) -> "HuggingFaceTokenizer":
        """A tokenizer with a part of the vocabulary, whose ids are 0 to len(kept) - 1.

        New token i is old token `kept[i]`, so row `kept[i]` of the embedding table becomes row i. A
        text whose tokens are all kept is split as before; other texts are split into kept tokens.

        Args:
          kept: ascending ids that include all added tokens (see `used_ids`).

        Raises:
          ValueError: `kept` is invalid, or the vocabulary is neither Unigram (SentencePiece) nor
            WordPiece. BPE can't be trimmed, as a token needs the tokens that it is merged from.
        """
        content = json.loads(self._serialized)
        model, added = content["model"], content["added_tokens"]
        if model["type"] not in ("Unigram", "WordPiece"):
            raise ValueError(
                f"a {model['type']} vocabulary can't be trimmed; known: Unigram, WordPiece"
            )
        ids = kept.tolist()
        if not ids or ids[0] < 0 or ids[-1] >= self.vocab_size or (np.diff(kept) <= 0).any():
            raise ValueError(
                f"kept ids must be ascending, at least 0 and at most {self.vocab_size - 1}"
            )
        new_ids = {old: new for new, old in enumerate(ids)}
        if missing := [token["content"] for token in added if token["id"] not in new_ids]:
            raise ValueError(f"kept ids lack the special tokens {', '.join(missing)}")
        if model["type"] == "Unigram":
            model["vocab"] = [model["vocab"][id] for id in ids if id < len(model["vocab"])]
            model["unk_id"] = new_ids.get(model["unk_id"])
        else:
            tokens = model["vocab"].items()
            model["vocab"] = {token: new_ids[id] for token, id in tokens if id in new_ids}
        for token in added:
            token["id"] = new_ids[token["id"]]
        _renumber(content["post_processor"], new_ids)
        padding = self.padding and Padding(self.padding.length, new_ids[self.padding.id])
        return type(self)(json.dumps(content, ensure_ascii=False), self.prefix, padding)

    def cleaned(self, canonical: bool = False) -> "HuggingFaceTokenizer":
        """This tokenizer after open_clip's cleaning of texts: straight quotes, single spaces.

        If `canonical`, texts also lose their case and ASCII punctuation.

        open_clip also runs `ftfy`, whose other effects that matter for captions are part of
        XLM-R's normalisation: the ids of 15,495 captions in 12 languages equal open_clip's. Unlike
        `ftfy`, this method does not repair wrongly decoded texts and HTML entities.
        """
        content = json.loads(self._serialized)
        steps: list[dict] = [{"type": "Lowercase"}] if canonical else []
        steps += [
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": replacement}
            for pattern, replacement in CLEANING + (CANONICAL if canonical else ())
        ]
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}]
        steps += [content["normalizer"]] if content["normalizer"] else []
        content["normalizer"] = {"type": "Sequence", "normalizers": steps}
        return type(self)(json.dumps(content, ensure_ascii=False), self.prefix, self.padding)

    def loses_case(self) -> bool:
        """Whether it lowercases texts although its vocabulary, one of WordPiece, is cased.

        Others that lowercase do so on purpose: CLIP's vocabulary has a token for each byte.
        """
        normalizer = self._tokenizer.normalizer
        word_piece = isinstance(self._tokenizer.model, tokenizers.models.WordPiece)
        cased = word_piece and self._tokenizer.token_to_id("A") is not None
        return cased and normalizer is not None and normalizer.normalize_str("A") == "a"


def _renumber(post_processor: dict[str, Any], new_ids: Mapping[int, int]) -> None:
    """Replaces the ids in the post-processor of a tokenizer.json, in place."""
    for part in post_processor.get("processors", ()):
        _renumber(part, new_ids)
    for name in ("cls", "sep"):  # (token, id), in post-processors of BERT and RoBERTa
        if name in post_processor:
            token, id = post_processor[name]
            post_processor[name] = [token, new_ids[id]]
    templates = post_processor.get("special_tokens", {})
    for token in templates.values():
        token["ids"] = [new_ids[id] for id in token["ids"]]

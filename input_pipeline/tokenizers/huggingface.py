"""Tokenizers of Hugging Face checkpoints, with their whole vocabulary or a part of it."""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32, Integer

from input_pipeline.tokenizers import siglip
from input_pipeline.tokenizers.long_texts import CANONICAL, CLEANING, first_tokens, splits_at_spaces
from input_pipeline.tokenizers.saved import DESCRIPTION_FILE, TOKENIZER_FILE

# A checkpoint must have one of these files; without them, transformers makes an empty tokenizer.
VOCABULARY_FILES = (
    TOKENIZER_FILE,
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)
# Rows that an embedding table may have beyond the vocabulary; published models have up to 35.
SPARE_ROWS = 1024
# Model types whose position ids do not depend on the padding id.
ABSOLUTE_POSITIONS = ("bert", "distilbert")
# Tokens that say which language a text is in: NLLB's "eng_Latn" and M2M-100's "__en__".
LANGUAGE = re.compile("[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")
# Gemma 3's token for an image; the embedding of EmbeddingGemma has no row for it.
IMAGE_TOKEN = "<image_soft_token>"
# Texts given to the tokenizer at a time, because the library takes much memory for each token.
CHUNK = 10_000


class Padding(NamedTuple):
    """Padding that is part of every text, for models whose tokens attend to it.

    Attributes:
      length: the number of tokens that shorter texts are padded to, on the right.
      id: the padding token's id.
    """

    length: int
    id: int


class HuggingFaceTokenizer:
    """Splits texts into tokens by a tokenizer of the `tokenizers` library.

    The ids equal those of `transformers`. For example, a literal "</s>" in a text becomes that
    special token, and an empty text has special tokens only.

    Translation models put the token of a text's language before the text, by default that of
    English. A text that begins with the token of another language, such as "deu_Latn Zwei Hunde",
    gets this token instead.

    Attributes:
      prefix, padding: see `__init__`.
      languages: token of a language -> id; empty unless texts begin with such a token.
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

    @classmethod
    def from_checkpoint(
        cls,
        folder: pathlib.Path,
        model_config: Mapping[str, Any],
        prefix: str = "",
        full_length: int | None = None,
    ) -> "HuggingFaceTokenizer":
        """The tokenizer of a checkpoint; an older format is converted.

        This uses neither the network nor the checkpoint's code.

        Args:
          folder: the checkpoint's folder.
          model_config: the fields of config.json that the tokenizer must agree with.
          prefix: see `__init__`.
          full_length: the number of tokens to pad every text to with the checkpoint's padding token
            (see `Padding`); None to leave texts as they are.

        Raises:
          FileNotFoundError: the folder holds no tokenizer.
          ValueError: the tokenizer is damaged or needs the checkpoint's code, or its vocabulary,
            its special ids or its lowercasing do not fit the model, or it has no padding token.
        """
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            raise FileNotFoundError(
                f"{folder} has no tokenizer: none of {', '.join(VOCABULARY_FILES)}"
            )
        # Hide the advice of transformers to install torch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers  # not at the top: it takes seconds, and finished runs do not need it

        try:
            loaded = transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            is_siglip = type(loaded).__name__ == "SiglipTokenizer"
            if not is_siglip and not hasattr(loaded, "backend_tokenizer"):
                raise ValueError(f"transformers has {type(loaded).__name__} only in Python")
            backend = siglip.converted(loaded) if is_siglip else loaded.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            tokenizer = cls(_text_only(backend, model_config), prefix)
        except Exception as error:  # the library raises many types
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: its tokenizer can't be loaded: {reason}") from error
        special_ids = {
            f"{name}_token_id": getattr(loaded, f"{name}_token_id")
            for name in ("pad", "bos", "eos", "cls", "sep")
        }
        try:
            if full_length is not None and loaded.pad_token_id is None:
                raise ValueError("the tokenizer has no padding token, but the model attends to it")
            if full_length is not None and loaded.padding_side != "right":
                raise ValueError("the tokenizer pads on the left; only the right is supported")
            tokenizer.check_against_model(special_ids, model_config)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        if full_length is not None:
            tokenizer.padding = Padding(full_length, loaded.pad_token_id)
        return tokenizer

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return max(self._tokenizer.get_vocab().values()) + 1

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

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text with the prefix, without special tokens."""
        clean = [self.prefix + text.encode("utf8", "replace").decode() for text in texts]
        encoded = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
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

    def check_against_model(
        self, special_ids: Mapping[str, int | None], model_config: Mapping[str, Any]
    ) -> None:
        """Refuses a tokenizer that does not fit a model.

        Args:
          special_ids: pad_token_id and so on; None where the tokenizer has no such token.
          model_config: the fields of config.json that the tokenizer must agree with.

        Raises:
          ValueError: the vocabulary, a special id or the case of letters differ.
        """
        rows = model_config.get("vocab_size")
        if not isinstance(rows, int):
            raise ValueError("config.json has no vocab_size")
        if not rows - SPARE_ROWS <= self.vocab_size <= rows:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} tokens and the model an embedding of {rows} "
                "rows: they do not belong to the same checkpoint"
            )
        for name, ours in special_ids.items():
            theirs = model_config.get(name)
            # BERT's config.json has pad_token_id 0 whatever the tokenizer has (1 in
            # multilingual-e5-small), and the model does not use it.
            bert = model_config.get("model_type") in ABSOLUTE_POSITIONS
            if None in (ours, theirs) or (bert and (name, theirs) == ("pad_token_id", 0)):
                continue
            if ours != theirs:
                raise ValueError(f"{name} is {ours} in the tokenizer and {theirs} in config.json")
        normalizer = self._tokenizer.normalizer
        # Others that lowercase do so on purpose: CLIP's vocabulary has a token for each byte.
        word_piece = isinstance(self._tokenizer.model, tokenizers.models.WordPiece)
        cased = word_piece and self._tokenizer.token_to_id("A") is not None
        if cased and normalizer is not None and normalizer.normalize_str("A") == "a":
            raise ValueError(
                "the tokenizer lowercases texts, but its vocabulary is cased: put "
                '"do_lower_case": false into tokenizer_config.json'
            )


def _text_only(tokenizer: tokenizers.Tokenizer, model_config: Mapping[str, Any]) -> str:
    """A tokenizer.json. If the model has no embedding of IMAGE_TOKEN, it is split like any word."""
    id, serialized = tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.to_str()
    if id is None or id != model_config.get("vocab_size"):
        return serialized
    content = json.loads(serialized)
    content["added_tokens"] = [x for x in content["added_tokens"] if x["id"] != id]
    return json.dumps(content, ensure_ascii=False)


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

"""Reads the tokenizers of Hugging Face checkpoints."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers

from input_pipeline.tokenizers import siglip
from input_pipeline.tokenizers.framed import FramedTokenizer, Padding
from input_pipeline.tokenizers.huggingface import HuggingFaceTokenizer
from input_pipeline.tokenizers.m2m_100 import M2M100Tokenizer
from input_pipeline.tokenizers.saved import TOKENIZER_FILE

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
# Gemma 3's token for an image; the embedding of EmbeddingGemma has no row for it.
IMAGE_TOKEN = "<image_soft_token>"


def from_checkpoint(
    folder: pathlib.Path,
    model_config: Mapping[str, Any],
    prefix: str = "",
    full_length: int | None = None,
) -> FramedTokenizer:
    """The tokenizer of a checkpoint; an older format is converted.

    This uses neither the network nor the checkpoint's code.

    Args:
      folder: the checkpoint's folder.
      model_config: the fields of config.json that the tokenizer must agree with.
      prefix: put before every text; see `HuggingFaceTokenizer`.
      full_length: the number of tokens to pad every text to with the checkpoint's padding token
        (see `Padding`); None to leave texts as they are.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: the tokenizer is damaged or needs the checkpoint's code, or its vocabulary,
        its special ids or its lowercasing do not fit the model, or it has no padding token.
    """
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARY_FILES)}")
    # Hide the advice of transformers to install torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # not at the top: it takes seconds, and finished runs do not need it

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        tokenizer = _converted(loaded, model_config, prefix)
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
        check_against_model(tokenizer, special_ids, model_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if full_length is not None:
        tokenizer.padding = Padding(full_length, loaded.pad_token_id)
    return tokenizer


def check_against_model(
    tokenizer: FramedTokenizer,
    special_ids: Mapping[str, int | None],
    model_config: Mapping[str, Any],
) -> None:
    """Refuses a tokenizer that does not fit a model.

    Args:
      tokenizer: the tokenizer.
      special_ids: its pad_token_id and so on; None where it has no such token.
      model_config: the fields of config.json that the tokenizer must agree with.

    Raises:
      ValueError: the vocabulary, a special id or the case of letters differ.
    """
    rows = model_config.get("vocab_size")
    if not isinstance(rows, int):
        raise ValueError("config.json has no vocab_size")
    if not rows - SPARE_ROWS <= tokenizer.vocab_size <= rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model an embedding of {rows} "
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
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.loses_case():
        raise ValueError(
            "the tokenizer lowercases texts, but its vocabulary is cased: put "
            '"do_lower_case": false into tokenizer_config.json'
        )


def _converted(loaded: Any, model_config: Mapping[str, Any], prefix: str) -> FramedTokenizer:
    """A tokenizer of transformers as one of ours."""
    kind = type(loaded).__name__
    if kind == "M2M100Tokenizer":
        return M2M100Tokenizer.converted(loaded, prefix)
    if kind != "SiglipTokenizer" and not hasattr(loaded, "backend_tokenizer"):
        raise ValueError(f"transformers has {kind} only in Python")
    is_siglip = kind == "SiglipTokenizer"
    backend = siglip.converted(loaded) if is_siglip else loaded.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return HuggingFaceTokenizer(_text_only(backend, model_config), prefix)


def _text_only(tokenizer: tokenizers.Tokenizer, model_config: Mapping[str, Any]) -> str:
    """A tokenizer.json. If the model has no embedding of IMAGE_TOKEN, it is split like any word."""
    id, serialized = tokenizer.token_to_id(IMAGE_TOKEN), tokenizer.to_str()
    if id is None or id != model_config.get("vocab_size"):
        return serialized
    content = json.loads(serialized)
    content["added_tokens"] = [x for x in content["added_tokens"] if x["id"] != id]
    return json.dumps(content, ensure_ascii=False)

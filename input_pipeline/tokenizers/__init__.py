"""Tokenizers (SentencePiece models and Hugging Face's tokenizers), and padded batches of tokens."""

import json
import pathlib

from input_pipeline.tokenizers.batches import length_batches, pad, padded_length
from input_pipeline.tokenizers.checkpoints import from_checkpoint
from input_pipeline.tokenizers.framed import Padding
from input_pipeline.tokenizers.huggingface import HuggingFaceTokenizer
from input_pipeline.tokenizers.m2m_100 import M2M100Tokenizer
from input_pipeline.tokenizers.saved import DESCRIPTION_FILE
from input_pipeline.tokenizers.sentencepiece import SentencePieceTokenizer, from_package
from input_pipeline.tokenizers.utf8 import byte_tokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "M2M100Tokenizer",
    "Padding",
    "SentencePieceTokenizer",
    "Tokenizer",
    "byte_tokenizer",
    "from_checkpoint",
    "from_package",
    "length_batches",
    "load_tokenizer",
    "pad",
    "padded_length",
]

Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer | M2M100Tokenizer
TOKENIZERS = {tokenizer.kind: tokenizer for tokenizer in Tokenizer.__args__}


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer that was saved in a folder.

    Raises:
      FileNotFoundError: a file of the tokenizer is missing.
      ValueError: a file is damaged, or the tokenizer's kind is unknown.
    """
    file = folder / DESCRIPTION_FILE
    try:
        kind = json.loads(file.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a tokenizer") from error
    if kind not in TOKENIZERS:
        raise ValueError(f"{file}: kind is {kind!r}; known: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].load(folder)

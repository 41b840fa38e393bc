"""Turns texts into token ids and images into pixels."""

import io
import json
import math
import os
import re

import numpy as np
from PIL import Image, ImageOps


def load_tokenizer(folder, kind, max_length, prefix="", padding=None, languages=()):
    """Loads a folder's tokenizer; only that tokenizer's library has to be installed."""
    if kind == "sentencepiece":
        return SentencePiece(folder / "sentencepiece.model", max_length)
    if kind == "m2m_100":
        return M2M100(folder, max_length, prefix)
    return FastTokenizer(folder / "tokenizer.json", max_length, prefix, padding, languages)


class FastTokenizer:
    """A tokenizer.json. It puts `prefix` before texts and truncates to `max_length` tokens.

    If the model attends to padding, `padding` holds its token's `id` and the `length` of all texts.
    If texts begin with the token of their language, `languages` holds the ids of these tokens; one
    that is written at the beginning of a text replaces the default.
    """

    def __init__(self, file, max_length, prefix, padding=None, languages=()):
        import tokenizers

        self.tokenizer, self.prefix = tokenizers.Tokenizer.from_file(str(file)), prefix
        self.tokenizer.no_padding()
        if padding:
            self.tokenizer.enable_padding(length=padding["length"], pad_id=padding["id"])
        self.max_length, self.languages = max_length, frozenset(languages)
        self.tokenizer.enable_truncation(max_length + bool(languages))

    def __call__(self, texts):
        """A list of ids for each text."""
        texts = [self.prefix + readable(text) for text in texts]
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        return [self.in_language(ids) for ids in rows] if self.languages else rows

    def in_language(self, ids):
        """Drops the default language's token before another one, or a token too many."""
        if ids[1] in self.languages:
            return ids[1:]
        return ids if len(ids) <= self.max_length else [*ids[:-2], ids[-1]]


class SentencePiece:
    """mUSE's tokenizer. Each unknown character becomes one UNK, as does a text without tokens."""

    def __init__(self, file, max_length):
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.keep = max_length - 2

    def __call__(self, texts):
        """A list of ids for each text."""
        model, unknown = self.model, self.model.unk_id()
        texts = [readable(text) for text in texts]
        rows = []
        for ids, pieces in zip(model.encode(texts), model.encode(texts, out_type=str), strict=True):
            spread = []
            for id, piece in zip(ids, pieces, strict=True):
                spread += [id] * (len(piece) if id == unknown else 1)
            rows.append([model.bos_id(), *(spread or [unknown])[: self.keep], model.eos_id()])
        return rows


class M2M100:
    """M2M-100's tokenizer: tokens of a SentencePiece model, whose ids are in a dictionary.

    A text begins with the token of its language, by default "__en__".
    """

    def __init__(self, folder, max_length, prefix):
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(
            model_file=str(folder / "sentencepiece.model")
        )
        dictionary = json.loads((folder / "dictionary.json").read_text(encoding="utf8"))
        self.ids, self.special = dictionary["ids"], dictionary["special"]
        self.languages = {self.special[token] for token in dictionary["languages"]}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.prefix, self.keep = prefix, max_length - 2

    def __call__(self, texts):
        """A list of ids for each text."""
        return [self.framed(self.split(self.prefix + readable(text))) for text in texts]

    def split(self, text):
        """The ids of a text, in which special tokens may be written."""
        ids = []
        for part in filter(None, self.specials.split(text)):
            if part in self.special:
                ids.append(self.special[part])
            else:
                unknown = self.special["<unk>"]
                ids += [self.ids.get(x, unknown) for x in self.model.encode(part, out_type=str)]
        return ids

    def framed(self, ids):
        """The first ids, after that of the language and before that of "</s>"."""
        if not ids or ids[0] not in self.languages:
            ids = [self.special["__en__"], *ids]
        return [*ids[: 1 + self.keep], self.special["</s>"]]


def readable(text):
    """The text with "?" for lone surrogates, which UTF-8 can't encode."""
    return text.encode("utf8", "replace").decode()


def pad(rows):
    """Ids, int64 [batch, length], and a bool mask of the same shape, False for padding."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask


class ImageReader:
    """Decodes an image and turns it into a square, with the preprocessing of the model's training.

    It applies the EXIF orientation and blends transparent images over white. It resizes the shorter
    side, or both sides if `crop` is "squash", to `resize`, then crops the centre. Half of an odd
    margin is rounded down, or to the nearest even number if `crop` is "center_rounded".

    Values are from 0 to 255. They are rounded to whole numbers if `dtype` is "uint8"; if it is
    "float32", they are not.

    If `patch` is not 0, an image keeps its proportions and is cut into patches of this many pixels
    per side, at most as many as in a square of `size` (SigLIP 2 NaFlex).
    """

    def __init__(self, size, resize, resample, crop, patch=0, dtype="uint8"):
        self.size, self.resize, self.crop, self.patch = size, resize, crop, patch
        self.dtype = dtype
        self.resample = Image.Resampling[resample.upper()]

    def __call__(self, image):
        """Pixels, [size, size, 3] or `packed`, of a path, encoded bytes or a PIL image.

        An array is taken as pixels and returned unchanged.
        """
        if isinstance(image, np.ndarray):
            return image
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        image = rgb(ImageOps.exif_transpose(image))
        if self.patch:
            return self.packed(image)
        if self.crop != "squash":
            image = middle(image)
        width = height = self.resize
        if self.crop != "squash" and image.width <= image.height:
            height = int(self.resize * image.height / image.width)
        elif self.crop != "squash":
            width = int(self.resize * image.width / image.height)
        half = round if self.crop == "center_rounded" else math.floor
        left, top = (half((side - self.size) / 2) for side in (width, height))
        pixels = self.resized(image, (width, height))
        return pixels[top : top + self.size, left : left + self.size].copy()

    def resized(self, image, size):
        """The pixels of an RGB image, resized to a width and height."""
        if self.dtype == "uint8":
            return np.array(image.resize(size, self.resample))
        # In Pillow, images of float32 have only one channel.
        channels = [channel.convert("F") for channel in image.split()]
        return np.stack([np.array(x.resize(size, self.resample)) for x in channels], axis=-1)

    def packed(self, image):
        """A row of uint8 values for each patch, then rows of zeros.

        The last row begins with the number of rows of patches and that of columns, two bytes each,
        the higher one first.
        """
        patch, most = self.patch, (self.size // self.patch) ** 2
        smallest, largest = 1e-6, 100.0

        def grid(scale):
            return [max(math.ceil(side * scale / patch), 1) for side in image.size]

        while largest - smallest >= 1e-5:  # the precision of transformers' Siglip2ImageProcessor
            scale = (smallest + largest) / 2
            if math.prod(grid(scale)) <= most:
                smallest = scale
            else:
                largest = scale
        columns, rows = grid(smallest)
        pixels = self.resized(image, (columns * patch, rows * patch))
        pixels = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
        result = np.zeros((most + 1, 3 * patch**2), np.uint8)
        result[: rows * columns] = pixels.reshape(rows * columns, -1)
        result[-1, :4] = *divmod(rows, 256), *divmod(columns, 256)
        return result


def middle(image, longest=32):
    """The image, cropped to its middle if it is over `longest` times as long as wide.

    Resizing the whole of such a strip would exhaust the memory.
    """
    side = longest * min(image.size)
    if max(image.size) <= side:
        return image
    width, height = min(image.width, side), min(image.height, side)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def rgb(image):
    """The image in 8-bit RGB, blended over white if it has transparency."""
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.clip(image, 0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

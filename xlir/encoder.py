"""The Python API: texts and images in, embeddings out.

encoder = xlir.Encoder.load("runs/quickstart")
scores = encoder.encode_text(["ein roter Apfel"]) @ encoder.encode_image(["apple.jpg"]).T
"""

import collections
import concurrent.futures
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from configs import base
from input_pipeline import files, photo_limits
from input_pipeline import images as image_io
from input_pipeline import tokenizers as text_io
from xlir import partition
from xlir.checkpoint import Checkpoints
from xlir.config import check_config, upgrade
from xlir.models import dual_encoder, pretrained, towers

log = logging.getLogger(__name__)

# Inputs that go through a tower, or rows that go through a head, at once on each device.
IMAGE_BATCH = 32
TEXT_BATCH = 128
TEXT_TOKENS = 2048  # padding included; mUSE's activations then stay in a CPU's cache
FEATURE_BATCH = 1024

# Which inputs, and this process's share of them under a training batch's keys.
Batches = Iterable[tuple[np.ndarray, dict[str, np.ndarray]]]


class Encoder:
    """A dual encoder with its tokenizer and its image preprocessing.

    Its parameters lie on a mesh, and what is embedded is split over the mesh's devices. Where these
    are of several processes, all have to make the same calls.

    Attributes:
      config: the configuration that it was built from.
      params: the trained parameters, an NNX state; training replaces it.
      frozen: everything else of the model.
      step: the training step of the parameters; 0 before training.
      mesh: the devices.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: dual_encoder.DualEncoder,
        tokenizer: text_io.Tokenizer,
        descriptions: dict[str, towers.Description],
        mesh: Mesh | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.descriptions = descriptions
        self.step = 0
        self.preprocessing = image_io.Preprocessing(**descriptions["image"]["preprocessing"])
        self._described: dict[str, dict[str, object]] = {}
        self.feature_dims = {"text": model.text_tower.dim, "image": model.image_tower.dim}
        self.mesh = mesh or partition.single_device_mesh()
        self.graph, *states = nnx.split(model, dual_encoder.trainable(config), ...)
        self.params, self.frozen = (partition.place(state, self.mesh) for state in states)
        # Every process, and the host, gets all rows of what is embedded.
        compiled = functools.partial(jax.jit, out_shardings=partition.replicated(self.mesh))
        self._embed = {side: compiled(functools.partial(self._embed_batch, side)) for side in SIDES}
        self._tower = {side: compiled(functools.partial(self._tower_batch, side)) for side in SIDES}

    @classmethod
    def create(
        cls, config: ConfigDict, texts: Iterable[str] = (), mesh: Mesh | None = None
    ) -> "Encoder":
        """An encoder with published weights in its towers and untrained heads.

        Args:
          config: see configs/base.py.
          texts: what a trimmed vocabulary (`text.trim_vocab`) must be able to split.
          mesh: the devices to lay it on; default: the first one.

        Raises:
          ValueError: the configuration can't be, or names something unknown.
          FileNotFoundError: weights or tokenizer are not installed.
        """
        check_config(config)
        descriptions = {
            "text": towers.describe_text(config.text),
            "image": towers.describe_image(config.image),
        }
        tokenizer, kept = towers.load_tokenizer(config.text, descriptions["text"]), None
        if config.text.trim_vocab:
            kept = tokenizer.used_ids(itertools.chain(texts, _lines(config)))
            log.info("vocabulary: %d of %d tokens kept", len(kept), tokenizer.vocab_size)
            tokenizer = tokenizer.trimmed(kept)
            descriptions["text"] = towers.trimmed(descriptions["text"], kept)
        with partition.on_host():
            text_tower = towers.load(config.text, descriptions["text"], kept=kept)
            image_tower = towers.load(config.image, descriptions["image"])
            rngs = nnx.Rngs(config.seed)
            model = dual_encoder.DualEncoder(config, text_tower, image_tower, rngs=rngs)
        return cls(config, model, tokenizer, descriptions, mesh)

    @classmethod
    def load(
        cls,
        workdir: str | os.PathLike,
        *,
        checkpoint: str = "best",
        weights: str = "",
        dtype: str = "",
        mesh: Mesh | None = None,
    ) -> "Encoder":
        """A trained encoder.

        Args:
          workdir: the folder of a training run; nothing else is needed, no network either.
          checkpoint: "best" (by validation) or "latest". Where it is damaged, the next best or the
            one before is loaded, which the log says; `step` tells which one it is.
          weights: "ema", the moving average over training, or "raw"; default: "ema" where the run
            keeps one.
          dtype: what to compute in; default: as the configuration says.
          mesh: the devices to lay it on; default: the first one. It need not be the one that the
            checkpoint was saved from.

        Raises:
          FileNotFoundError: the folder is not a run's, or holds no checkpoint yet.
          ValueError: an argument is none of these, the run keeps no moving average, or a file of
            the run is damaged or of another model.
        """
        if checkpoint not in ("best", "latest"):
            raise ValueError(f"checkpoint is {checkpoint!r}; known: best, latest")
        if weights not in ("", "ema", "raw"):
            raise ValueError(f"weights is {weights!r}; known: ema, raw")
        workdir = pathlib.Path(workdir)
        encoder = cls.open(workdir, mesh, dtype)
        with Checkpoints(workdir, read_only=True) as checkpoints:
            if not checkpoints.steps():
                raise FileNotFoundError(f"{workdir} holds no checkpoint yet: train it first")
            averaged = encoder.config.optimizer.ema > 0
            if weights == "ema" and not averaged:
                raise ValueError(f"{workdir} keeps no moving average (config.optimizer.ema is 0)")
            item = "ema" if averaged and weights != "raw" else "params"
            targets = {item: nnx.to_pure_dict(encoder.params)}
            step, items = checkpoints.restore(targets, best=checkpoint == "best")
        params = items[item]
        encoder.replace_params(params)
        encoder.step = step
        return encoder

    @classmethod
    def open(cls, workdir: pathlib.Path, mesh: Mesh | None = None, dtype: str = "") -> "Encoder":
        """The encoder of a run with its towers as saved and untrained heads.

        Args:
          workdir: the folder of a training run.
          mesh, dtype: as of `load`.

        Raises:
          FileNotFoundError: the folder is not a run's, or lacks a file.
          ValueError: a file is damaged.
        """
        config = read_config(workdir)
        with files.checking(workdir):
            return cls._open(config, workdir, mesh, dtype)

    @classmethod
    def _open(
        cls, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh | None, dtype: str
    ) -> "Encoder":
        if dtype:
            config.head_dtype = config.text.dtype = config.image.dtype = dtype
        descriptions, loaded = {}, {}
        with partition.on_host():
            for side in SIDES:
                folder = workdir / f"{side}_tower"
                descriptions[side] = towers.read_description(side, folder / DESCRIPTION_FILE)
                create = functools.partial(towers.create, descriptions[side], config[side])
                # Shapes only: what is about to be overwritten need not be drawn.
                loaded[side] = nnx.eval_shape(lambda create=create: create(rngs=nnx.Rngs(0)))
                pretrained.load(loaded[side], folder / WEIGHTS_FILE)
            rngs = nnx.Rngs(config.seed)
            model = dual_encoder.DualEncoder(config, loaded["text"], loaded["image"], rngs=rngs)
        tokenizer = text_io.load_tokenizer(workdir / "text_tower")
        rows = descriptions["text"].get("config", {}).get("vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"{workdir / 'text_tower'}: the tokenizer has {tokenizer.vocab_size} tokens, and "
                f"the tower an embedding of {rows}; it is the tokenizer of another model"
            )
        return cls(config, model, tokenizer, descriptions, mesh)

    def save(self, workdir: pathlib.Path) -> None:
        """Writes configuration, towers and tokenizer, the parts that training does not change.

        config.json comes last: a folder that has it is whole. Of several processes the first one
        writes.
        """
        weights = {side: self.weights(f"{side}_tower") for side in SIDES}
        if jax.process_index():
            return
        for side in SIDES:
            folder = workdir / f"{side}_tower"
            folder.mkdir(parents=True, exist_ok=True)
            pretrained.save(weights[side], folder / WEIGHTS_FILE)
            (folder / DESCRIPTION_FILE).write_text(json.dumps(self.descriptions[side], indent=1))
        self.tokenizer.save(workdir / "text_tower")
        config = json.dumps(self.config.to_dict(), indent=1)
        files.write_sums(workdir, _tower_files(workdir), {CONFIG_FILE: config})
        files.write_whole(workdir / CONFIG_FILE, config)

    def replace_params(self, params: Mapping) -> None:
        """Takes trained parameters, as a pure tree of arrays."""
        nnx.replace_by_pure_dict(self.params, params)

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit-length embeddings of texts in any language; dot products are cosines.

        Raises:
          ValueError: an embedding is not finite, as the weights are damaged.
        """
        if isinstance(texts, str):
            raise TypeError("encode_text takes a list of texts, not one string")
        return self.embed("text", self.text_batches(texts), len(texts))

    def encode_image(
        self, images: Sequence[str | os.PathLike | bytes | Image.Image | np.ndarray]
    ) -> Float[np.ndarray, "images dim"]:
        """Unit-length embeddings of images: paths, encoded bytes, PIL images, or `decode`'s.

        Raises:
          ValueError: an image can't be decoded, is no regular file or too large (the message names
            it); or its embedding is not finite.
          FileNotFoundError: a path does not exist.
        """
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            raise TypeError("encode_image takes a list of images, not one")
        return self.embed("image", self.image_batches(images), len(images))

    def text_batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs: texts of similar length together, in few distinct shapes."""
        longest = self.config.text.max_length
        ids = self.tokenizer(texts, max_length=longest)
        size, tokens = TEXT_BATCH * self.mesh.size, TEXT_TOKENS * self.mesh.size
        lengths = [len(i) for i in ids]
        for rows, length in text_io.length_batches(
            lengths, size, max_tokens=tokens, longest=longest
        ):
            text_ids, text_mask = text_io.pad([ids[row] for row in self._share(rows)], length)
            yield rows, {"text_ids": text_ids, "text_mask": text_mask}

    def image_batches(self, images: Sequence) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs; photos are decoded by threads, a batch ahead of the tower."""
        size, ahead = IMAGE_BATCH * self.mesh.size, collections.deque()

        def result() -> tuple[np.ndarray, dict]:
            rows, places, decoded = ahead.popleft()
            return rows, {"image": np.stack([image.result() for image in decoded])[places]}

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), size):
                rows = np.arange(start, min(start + size, len(images)))
                # Rows that fill a batch up repeat the last one, which is decoded once.
                mine, places = np.unique(self._share(rows), return_inverse=True)
                decoded = [pool.submit(self.decode, images[row], row) for row in mine.tolist()]
                ahead.append((rows, places, decoded))
                if len(ahead) > 2:
                    yield result()
            while ahead:
                yield result()

    def decode(
        self,
        image: str | os.PathLike | bytes | Image.Image | np.ndarray,
        row: int = 0,
        generator: np.random.Generator | None = None,
    ) -> np.ndarray:
        """One image as the image tower takes it, uint8 [size, size, 3].

        Args:
          image: a path, encoded bytes, or a PIL image; what was decoded before is taken as it is.
          row: for error messages.
          generator: augments it as config.image says; None does not.
        """
        if isinstance(image, np.ndarray):
            return image
        name = f"image {row}"
        if isinstance(image, (str, os.PathLike)):
            name, image = os.fspath(image), photo_limits.read(image)
        try:
            if isinstance(image, Image.Image):
                image = _png(image)
            if generator is not None:
                options = self.config.image
                return image_io.decode_augmented(
                    image, self.preprocessing, generator, options.min_area, options.mirror
                )
            return image_io.decode(image, self.preprocessing)
        except (image_io.ImageError, OSError) as error:
            raise ValueError(f"{name}: {error}") from error

    def feature_batches(self, side: str, features: np.ndarray) -> Iterator[tuple[np.ndarray, dict]]:
        """(rows, batch) pairs of a tower's outputs, computed before."""
        size = FEATURE_BATCH * self.mesh.size
        for start in range(0, len(features), size):
            rows = np.arange(start, min(start + size, len(features)))
            yield rows, {f"{side}_features": np.asarray(features[self._share(rows)])}

    def embed(self, side: str, batches: Batches, count: int) -> Float[np.ndarray, "count dim"]:
        """Unit-length embeddings of what the batches hold, in the order of their rows.

        Raises:
          ValueError: one is not finite.
        """
        return self._gather(side, self._embed, batches, (count, self.config.embedding_dim))

    def features(self, side: str, batches: Batches, count: int) -> Float[np.ndarray, "count dim"]:
        """The tower's outputs for what the batches hold, in the order of their rows.

        Raises:
          ValueError: one is not finite.
        """
        return self._gather(side, self._tower, batches, (count, self.feature_dims[side]))

    def describe_tower(self, side: str) -> dict[str, object]:
        """Everything that the features of one side depend on, but the input itself."""
        if side not in self._described or not self.config[side].frozen:
            self._described[side] = self._describe(side)
        return self._described[side]

    def _describe(self, side: str) -> dict[str, object]:
        digest = hashlib.sha256()
        for name, array in sorted(self.weights(f"{side}_tower").items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(array))
        options = self.config[side]
        description: dict[str, object] = {
            "tower": self.descriptions[side],
            "weights": digest.hexdigest(),
            "dtype": jnp.dtype(dual_encoder.compute_dtype(options.dtype)).name,
        }
        if side == "text":
            return description | {
                "max_length": options.max_length,
                "tokenizer": self.tokenizer.fingerprint(),
            }
        return description

    def weights(self, part: str) -> dict[str, np.ndarray]:
        """The weights, whole and by dotted path, of "text_tower", "text_head", "image_tower" ..."""
        module = getattr(nnx.merge(self.graph, self.params, self.frozen), part)
        return {name: partition.fetch(x) for name, x in pretrained.flatten(module).items()}

    @property
    def scale(self) -> float:
        """The inverse temperature, clamped."""
        return float(nnx.merge(self.graph, self.params, self.frozen).scale)

    def _share(self, rows: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " share"]:
        """Which of a batch's rows this process reads.

        The batch is filled up with its last row, to a power of two on each device: the shapes that
        are compiled for are few.
        """
        of_device = -(-len(rows) // self.mesh.size)
        size = self.mesh.size << (of_device - 1).bit_length()
        filled = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])
        return filled[partition.local_rows(size, self.mesh)]

    def _gather(
        self, side: str, compiled: dict[str, Callable], batches: Batches, shape: tuple[int, int]
    ) -> Float[np.ndarray, "count dim"]:
        """What a side's compiled function gives for all batches; every process gets all of it."""
        out = np.empty(shape, np.float32)
        with jax.set_mesh(self.mesh):
            for rows, batch in batches:
                batch = partition.global_batch(batch, self.mesh)
                outputs = compiled[side](self.params, self.frozen, batch)
                out[rows] = np.asarray(outputs)[: len(rows)]
                bad = rows[~np.isfinite(out[rows]).all(axis=1)]
                if len(bad):
                    raise ValueError(
                        f"the embedding of {side} {bad[0]} (counted from 0) is not finite: the "
                        "weights are damaged, or the computation overflowed"
                    )
        return out

    def _embed_batch(self, side: str, params: nnx.State, frozen: nnx.State, batch: dict):
        model = nnx.merge(self.graph, params, frozen)
        encode = model.encode_text if side == "text" else model.encode_image
        embeddings = encode(batch)
        # Also where training is on raw embeddings: retrieval is by cosine.
        return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)

    def _tower_batch(self, side: str, params: nnx.State, frozen: nnx.State, batch: dict):
        model = nnx.merge(self.graph, params, frozen)
        if side == "text":
            return model.text_tower(batch["text_ids"], batch["text_mask"])
        return model.image_tower(batch["image"])


SIDES = ("text", "image")
# In the folder of a tower in a workdir.
WEIGHTS_FILE = "weights.safetensors"
DESCRIPTION_FILE = "tower.json"
CONFIG_FILE = "config.json"


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration that a run was started with; fields that are newer have their defaults.

    Raises:
      FileNotFoundError: the folder is not a run's.
      ValueError: the file is damaged, or a field is not what it may be.
    """
    file, config = workdir / CONFIG_FILE, base.get_config()
    if not file.is_file():
        raise FileNotFoundError(
            f"{workdir} is not the folder of a training run (it has no config.json)"
        )
    files.check_sums(workdir, [CONFIG_FILE])
    try:
        config.update(upgrade(json.loads(file.read_text())))
        check_config(config)
        return config
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"{file} is damaged, or of another version: {error}") from error


def _tower_files(workdir: pathlib.Path) -> list[str]:
    """The files of both towers and of the tokenizer, by their paths in the workdir."""
    folders = (workdir / f"{side}_tower" for side in SIDES)
    found = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return [str(file.relative_to(workdir)) for file in found]


def _png(image: Image.Image) -> bytes:
    """An image as PNG, which knows neither EXIF's orientation (as saved here) nor CMYK."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _lines(config: ConfigDict) -> Iterator[str]:
    """The lines of the files that `text.trim_vocab` names."""
    for name in config.text.trim_vocab.split(","):
        path = pathlib.Path(config.data.dir) / name
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not name or not files:
            raise FileNotFoundError(f"config.text.trim_vocab: {path} holds no .txt files")
        for file in files:
            yield from file.read_text(encoding="utf-8-sig").splitlines()

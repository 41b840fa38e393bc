"""The Python API: texts and images in, embeddings out.

encoder = xlir.Encoder.load("runs/quickstart")
scores = encoder.encode_text(["ein roter Apfel"]) @ encoder.encode_image(["apple.jpg"]).T
"""

import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from input_pipeline import cache, files, tokenizers
from input_pipeline.images import Pixels
from xlir import embed, initial, partition, programs
from xlir import workdir as run_folder
from xlir.checkpoint import Checkpoints
from xlir.config import check_config
from xlir.decoding import Photo, decode_each
from xlir.embed import SIDES, Embedder, Inputs, Parameters
from xlir.models import dual_encoder, pretrained, towers
from xlir.models.family import TowerSpec
from xlir.onnx_graphs import OnnxGraphs

log = logging.getLogger(__name__)

Item, Extra = TypeVar("Item"), TypeVar("Extra")
ENGINES = ("jax", "onnxruntime")


class Encoder:
    """A dual encoder: an `Embedder` together with the parameters that it embeds with.

    Args, Attributes:
      embedder: computes the embeddings on the devices of its mesh. If the devices belong to
        several processes, all processes must make the same calls.
      parameters: the parameters, sharded over that mesh.
      step: number of training steps after which the parameters were saved.
      graphs: compute the embeddings instead of the embedder; None unless `load` was asked for them.
      config, tokenizer, preprocessing, specs, feature_dims, mesh: those of the embedder.
    """

    def __init__(self, embedder: Embedder, parameters: Parameters, step: int = 0):
        self.embedder, self.parameters, self.step = embedder, parameters, step
        self.graphs: OnnxGraphs | None = None
        self.config, self.mesh = embedder.config, embedder.mesh
        self.tokenizer, self.preprocessing = embedder.tokenizer, embedder.preprocessing
        self.specs, self.feature_dims = embedder.specs, embedder.feature_dims
        self._describe_tower = functools.cache(
            functools.partial(embedder.describe_tower, parameters)
        )

    @classmethod
    def from_model(
        cls,
        config: ConfigDict,
        model: dual_encoder.DualEncoder,
        tokenizer: tokenizers.Tokenizer,
        specs: dict[str, TowerSpec],
        mesh: Mesh | None = None,
    ) -> "Encoder":
        """An encoder from a model with loaded weights, which are sharded over the mesh.

        Args:
          config: the configuration that the model was built from.
          model: the model, usually in the host's memory.
          tokenizer: the tokenizer of the text tower.
          specs: the descriptions of both towers.
          mesh: the devices; default: the first one.
        """
        mesh = mesh or partition.single_device_mesh()
        graph, parameters = embed.split(config, model)
        dims = {"text": model.text_tower.dim, "image": model.image_tower.dim}
        embedder = Embedder(config, graph, tokenizer, specs, dims, mesh)
        return cls(embedder, Parameters(*(partition.shard(tree, mesh) for tree in parameters)))

    @classmethod
    def create(
        cls, config: ConfigDict, texts: Iterable[str] = (), mesh: Mesh | None = None
    ) -> "Encoder":
        """An encoder before training: published towers and untrained heads.

        Sides that continue those of the run in `config.init` have its towers and heads.

        Args:
          config: see configs/base.py.
          texts: texts whose tokens a trimmed vocabulary (`text.trim_vocab`) must keep.
          mesh: the devices; default: the first one.

        Raises:
          ValueError: the configuration is invalid, or names something unknown.
          FileNotFoundError: weights or tokenizer are not installed.
        """
        config = initial.resolve(config)
        check_config(config)
        source = cls.load(config.init, mesh=mesh) if config.init else None
        specs = {
            side: describe(config[side]) if config[side].tower else source.specs[side]
            for side, describe in towers.DESCRIBE.items()
        }
        if config.text.tower:
            tokenizer = towers.load_tokenizer(config.text, specs["text"])
        else:
            tokenizer = source.tokenizer
        kept = None
        if config.text.trim_vocab:
            kept = tokenizer.used_ids(itertools.chain(texts, _lines(config)))
            log.info("vocabulary: %d of %d tokens kept", len(kept), tokenizer.vocab_size)
            tokenizer = tokenizer.trimmed(kept)
            specs["text"] = specs["text"].family.trimmed(specs["text"], kept)
        with partition.on_host():
            loaded = {}
            for side, spec in specs.items():
                if config[side].tower:
                    rows = kept if side == "text" else None
                    loaded[side] = towers.load(config[side], spec, kept=rows)
                else:
                    weights = source.weights(f"{side}_tower")
                    loaded[side] = initial.tower(config[side], spec, weights)
            rngs = nnx.Rngs(config.seed)
            model = dual_encoder.DualEncoder(config, loaded["text"], loaded["image"], rngs=rngs)
            if source is not None:
                initial.merge_heads(model, config, source.embedder, source.parameters)
        return cls.from_model(config, model, tokenizer, specs, mesh)

    @classmethod
    def load(
        cls,
        workdir: str | os.PathLike,
        *,
        checkpoint: str = "best",
        weights: str = "",
        dtype: str = "",
        engine: str = "jax",
        mesh: Mesh | None = None,
    ) -> "Encoder":
        """A trained encoder. Programs compiled after this call are kept on disk (`programs`).

        Args:
          workdir: the folder of a training run. Nothing else is needed, not even a network.
          checkpoint: "best" (by validation) or "latest". If that checkpoint is damaged, the next
            best or the previous one is loaded, and the log says so. `step` is the step of the
            checkpoint that was loaded.
          weights: "raw", the weights after the last step, or "ema", their moving average over
            training; default: the weights that were validated, which are "ema" if the run keeps a
            moving average, averaged with the start as `config.average` says.
          dtype: the dtype of the computation; default: as the configuration says.
          engine: "jax", or "onnxruntime": in float32 on the CPU, with the graphs that `export` has
            written to the folder `onnx` of the run (`OnnxGraphs`).
          mesh: the devices of JAX; default: the first one. It may differ from that of training.

        Raises:
          FileNotFoundError: the folder is not the folder of a run, or has no checkpoint yet; or
            the engine's graphs or its package are missing.
          ValueError: an argument has an unknown value, the run keeps no moving average, or
            a file of the run is damaged or belongs to another model.
        """
        if checkpoint not in ("best", "latest"):
            raise ValueError(f"checkpoint is {checkpoint!r}; known: best, latest")
        if weights not in ("", "ema", "raw"):
            raise ValueError(f"weights is {weights!r}; known: ema, raw")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; known: {', '.join(ENGINES)}")
        workdir = pathlib.Path(workdir)
        config = run_folder.read_config(workdir)
        if dtype:
            config.head_dtype = config.text.dtype = config.image.dtype = dtype
        programs.keep_on_disk()
        with files.checking(workdir):
            described = cls._open(workdir, mesh, config, initialize=False)
        with Checkpoints(workdir, read_only=True) as checkpoints:
            if not checkpoints.steps():
                raise FileNotFoundError(f"{workdir} holds no checkpoint yet: train first")
            averaged = config.optimizer.ema > 0
            if weights == "ema" and not averaged:
                raise ValueError(f"{workdir} keeps no moving average (config.optimizer.ema is 0)")
            item = "ema" if averaged and weights != "raw" else "params"
            targets = {item: described.parameters.trained}
            step, items = checkpoints.restore(targets, best=checkpoint == "best")
        start, trained = described.parameters.trained, items[item]
        trained = trained if weights else embed.averaged(trained, start, config.average)
        encoder = cls(described.embedder, Parameters(trained, described.parameters.frozen), step)
        if engine == "onnxruntime":
            encoder.graphs = OnnxGraphs(workdir, encoder.digests(), encoder.embedder)
        return encoder

    @classmethod
    def open(
        cls, workdir: pathlib.Path, mesh: Mesh | None = None, config: ConfigDict | None = None
    ) -> "Encoder":
        """The encoder of a run, with its saved towers and untrained heads.

        Args:
          workdir: the folder of a training run.
          mesh: as in `load`.
          config: the configuration; default: the run's own. It may differ from the run's in fields
            that do not change the model's structure, such as dtypes.

        Raises:
          FileNotFoundError: the folder is not the folder of a run, or a file is missing.
          ValueError: a file is damaged.
        """
        config = run_folder.read_config(workdir) if config is None else config
        with files.checking(workdir):
            return cls._open(workdir, mesh, config, initialize=True)

    @classmethod
    def _open(
        cls, workdir: pathlib.Path, mesh: Mesh | None, config: ConfigDict, *, initialize: bool
    ) -> "Encoder":
        """As `open`; without `initialize`, parameters outside of the towers are only shapes."""
        folders = {side: run_folder.tower_folder(workdir, side) for side in SIDES}
        specs = {
            side: towers.read_spec(side, folder / run_folder.SPEC_FILE)
            for side, folder in folders.items()
        }
        # Only shapes, because the saved weights replace random initial ones anyway.
        model = towers.abstract_model(config, specs)
        with partition.on_host():
            for side, folder in folders.items():
                tower = getattr(model, f"{side}_tower")
                pretrained.load(tower, folder / run_folder.WEIGHTS_FILE)
            if initialize:
                rngs = nnx.Rngs(config.seed)
                model = dual_encoder.DualEncoder(
                    config, model.text_tower, model.image_tower, rngs=rngs
                )
        folder = folders["text"]
        tokenizer = tokenizers.load_tokenizer(folder)
        fields = specs["text"].family.tokenizer_fields(specs["text"].config)
        rows = fields.get("vocab_size", tokenizer.vocab_size)
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, but the tower's "
                f"embedding has {rows} rows; the tokenizer belongs to another model"
            )
        return cls.from_model(config, model, tokenizer, specs, mesh)

    def save(self, workdir: pathlib.Path) -> None:
        """Writes what training does not change: both towers, the tokenizer and the configuration.

        config.json is written last, so a folder that has it is complete. With several processes,
        the first one writes.
        """
        weights = {side: self.weights(f"{side}_tower") for side in SIDES}
        if jax.process_index():
            return
        for side in SIDES:
            folder = run_folder.tower_folder(workdir, side)
            folder.mkdir(parents=True, exist_ok=True)
            pretrained.save(weights[side], folder / run_folder.WEIGHTS_FILE)
            spec = json.dumps(self.specs[side].to_json(), indent=1)
            (folder / run_folder.SPEC_FILE).write_text(spec)
        self.tokenizer.save(run_folder.tower_folder(workdir, "text"))
        run_folder.write_config(workdir, self.config)

    def save_run(self, workdir: pathlib.Path) -> None:
        """Writes a run's folder for `load`, with this encoder's parameters as the checkpoint.

        The folder is written under another name, then renamed, so `workdir` is never incomplete.
        """
        workdir = workdir.resolve()
        workdir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=workdir.parent, prefix=f".{workdir.name}-") as scratch:
            unfinished = pathlib.Path(scratch) / "run"
            self.save(unfinished)
            if self.graphs is not None:
                shutil.copytree(self.graphs.folder, unfinished / self.graphs.folder.name)
            with Checkpoints(unfinished) as checkpoints:
                item = "ema" if self.config.optimizer.ema > 0 else "params"
                checkpoints.save(self.step, {item: self.parameters.trained})
            unfinished.rename(workdir)

    def fingerprint(self) -> str:
        """Identifies the model: encoders with the same fingerprint compute the same embeddings."""
        towers = {side: self._describe_tower(side) for side in SIDES}
        heads = {f"{side} head": embed.digest(self.weights(f"{side}_head")) for side in SIDES}
        return cache.fingerprint({**towers, **heads})

    def digests(self) -> dict[str, str]:
        """Identifies the weights of each tower and head, whatever dtype they are computed in."""
        parts = [f"{side}_{part}" for side in SIDES for part in ("tower", "head")]
        return {part: embed.digest(self.weights(part)) for part in parts}

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """Unit-length embeddings of texts in any language; dot products are cosines.

        Raises:
          ValueError: an embedding is not finite, because the weights are damaged.
        """
        if isinstance(texts, str):
            raise TypeError("encode_text takes a list of texts, not one string")
        return self._embed("text", texts)

    def encode_image(self, images: Sequence[Photo]) -> Float[np.ndarray, "images dim"]:
        """Unit-length embeddings of images: paths, encoded bytes or PIL images.

        Raises:
          ValueError: an image can't be decoded, is not a regular file or is too large (the message
            names the image), or its embedding is not finite.
          FileNotFoundError: a path does not exist.
        """
        if isinstance(images, Photo) and not isinstance(images, np.ndarray):
            raise TypeError("encode_image takes a list of images, not one")
        return self._embed("image", images)

    def _embed(self, side: str, inputs: Sequence) -> Float[np.ndarray, "inputs dim"]:
        if self.graphs is not None:
            return self.graphs.embed(side, inputs)
        return self.embedder.embed(self.parameters, side, inputs)

    def frozen_features(
        self, inputs: Inputs, folder: pathlib.Path, sides: Sequence[str] = SIDES
    ) -> dict[str, Float[np.ndarray, "rows features"]]:
        """The outputs of frozen towers by side, read from the cache or computed and cached.

        Args:
          inputs: the texts and images.
          folder: the folder of the cache.
          sides: the sides to compute; sides that the configuration does not freeze are skipped.
        """
        frozen = [side for side in sides if self.config[side].frozen]
        descriptions = {side: self._describe_tower(side) for side in frozen}
        return embed.frozen_features(self.embedder, self.parameters, descriptions, inputs, folder)

    def weights(self, part: str) -> dict[str, np.ndarray]:
        """The unsharded weights of a part such as "text_tower" or "image_head", by dotted path."""
        return self.embedder.weights(self.parameters, part)

    @property
    def scale(self) -> float:
        """The inverse temperature, at most `dual_encoder.max_scale`."""
        return float(nnx.merge(self.embedder.graph, *self.parameters).scale)


def encode_each(
    encoder: Encoder,
    items: Iterable[Item],
    read: Callable[[Item], tuple[Pixels, Extra]],
    skip: Callable[[str], None],
) -> Iterator[tuple[list[Item], list[Extra], Float[np.ndarray, "images dim"]]]:
    """Embeds any number of images, a batch at a time, while threads decode the next images.

    Args:
      encoder: computes the embeddings.
      items: one for each image, for example its path; see `decoding.decode_each`.
      read: item -> (pixels, anything else to yield with the image). It runs in threads.
      skip: called with a one-line reason for each item for which `read` raises ValueError or
        OSError; the item is left out.

    Yields:
      The items of a batch, the second value that `read` returned for each, and the embeddings, of
      unit length.
    """
    size, ready = embed.IMAGE_BATCH * encoder.mesh.size, []
    whole = False
    for item, result in decode_each(read, items, 2 * size):
        if isinstance(result, Exception):
            skip(str(result))
            continue
        ready.append((item, *result))
        if len(ready) == size:
            yield _encoded(encoder, ready, size)
            ready, whole = [], True
    if ready:
        # The last batch is padded if others were full, so that no other shape is compiled.
        yield _encoded(encoder, ready, size if whole else len(ready))


def _encoded(
    encoder: Encoder, ready: Sequence[tuple[Item, Pixels, Extra]], size: int
) -> tuple[list[Item], list[Extra], Float[np.ndarray, "images dim"]]:
    items, pixels, extras = (list(part) for part in zip(*ready, strict=True))
    filled = pixels + [pixels[-1]] * (size - len(pixels))
    return items, extras, encoder.encode_image(filled)[: len(items)]


def _lines(config: ConfigDict) -> Iterator[str]:
    """The lines of the files that `text.trim_vocab` names."""
    for name in config.text.trim_vocab.split(","):
        path = pathlib.Path(config.data.dir) / name
        found = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not name or not found:
            raise FileNotFoundError(f"config.text.trim_vocab: {path} holds no .txt files")
        for file in found:
            yield from file.read_text(encoding="utf-8-sig").splitlines()

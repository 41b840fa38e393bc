"""The teacher of a run: a dual encoder whose text embeddings another text tower learns to give."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from input_pipeline import features as feature_cache
from input_pipeline.cache import fingerprint
from xlir import embed, partition
from xlir import workdir as run_folder
from xlir.encoder import Encoder


def check_teacher(config: ConfigDict) -> None:
    """Checks that the run that `config.teacher` names, if any, can teach a run of `config`.

    Raises:
      FileNotFoundError: it is not the folder of a run.
      ValueError: its embeddings have another width, or its config.json is damaged.
    """
    if not config.teacher:
        return
    folder = pathlib.Path(config.teacher)
    if not run_folder.is_run(folder):
        raise FileNotFoundError(
            f"config.teacher: {folder} is not the folder of a run (it has no config.json)"
        )
    dim = run_folder.read_config(folder).embedding_dim
    if dim != config.embedding_dim:
        raise ValueError(
            f"config.embedding_dim is {config.embedding_dim}, but the embeddings of the teacher "
            f"{folder} have {dim} dimensions: set --config.embedding_dim={dim}"
        )


class Teacher:
    """The text side of a finished or imported run, and the cache of its embeddings.

    Args:
      folder: the run's folder (`config.teacher`).
      mesh: the devices; with several processes, all must make the same calls.
      cache: the folder of the feature cache.

    Attributes:
      fingerprint: identifies the teacher's model, wherever its folder is.
    """

    def __init__(self, folder: str, mesh: Mesh, cache: pathlib.Path):
        self._encoder, self._cache = Encoder.load(folder, mesh=mesh), cache
        self.fingerprint = self._encoder.fingerprint()

    def embed(self, texts: Sequence[str]) -> "Lessons":
        """The embeddings of texts: computed once, then read from the cache."""
        row_of: dict[str, int] = {}
        rows = np.array([row_of.setdefault(text, len(row_of)) for text in texts], np.int64)
        unique, encoder = list(row_of), self._encoder

        def compute(start: int, stop: int) -> np.ndarray:
            return encoder.encode_text(unique[start:stop])

        embeddings = feature_cache.cached(
            self._cache,
            {"teacher": self.fingerprint, "source": fingerprint({"texts": unique})},
            (len(unique), encoder.config.embedding_dim),
            compute,
            label="the teacher's embeddings",
            block=embed.FEATURE_BATCH * encoder.mesh.size,
            agree=partition.agree_minimum if jax.process_count() > 1 else None,
        )
        return Lessons(embeddings, rows)


class Lessons:
    """A teacher's embeddings of texts, each distinct text stored once; `lessons[rows]` reads them.

    Args:
      embeddings: unit-length embeddings of the distinct texts.
      rows: for each text, its row in `embeddings`.
    """

    def __init__(
        self, embeddings: Float[np.ndarray, "distinct dim"], rows: Int[np.ndarray, " texts"]
    ):
        self._embeddings, self._rows = embeddings, rows

    def __getitem__(self, rows: Int[np.ndarray, " batch"]) -> Float[np.ndarray, "batch dim"]:
        """The embeddings of some texts, float32."""
        return np.asarray(self._embeddings[self._rows[rows]])

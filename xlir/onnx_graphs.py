"""Embeds with ONNX Runtime, from the graphs that `export --format=onnx` has written.

On a CPU, this can be faster than JAX (docs/results.md), and any shape of a batch is fast from the
first call on, because nothing is compiled.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from xlir.embed import SIDES, Embedder, collect

# The folder of the graphs in a run's folder.
FOLDER = "onnx"
CONFIG_FILE = "config.json"


class OnnxGraphs:
    """Both sides of a dual encoder in ONNX Runtime, in float32, on the CPU.

    Args:
      workdir: the run's folder, which holds the graphs in `FOLDER`.
      digests: `Encoder.digests` of the run.
      embedder: makes batches of texts and images.

    Raises:
      FileNotFoundError: there are no graphs, or ONNX Runtime is not installed.
      ValueError: the graphs are damaged, or have other weights than the run.
    """

    def __init__(self, workdir: pathlib.Path, digests: Mapping[str, str], embedder: Embedder):
        self.folder, self._embedder = workdir / FOLDER, embedder
        command = f"python -m xlir.main export --workdir={workdir} --to={self.folder} --format=onnx"
        if not (self.folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{workdir} holds no ONNX graphs: write them with {command}")
        if _digests(self.folder) != digests:
            raise ValueError(
                f"{self.folder} does not hold the weights of this checkpoint: remove it, and "
                f"write it again with {command}"
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise FileNotFoundError(
                "onnxruntime is not installed: pip install 'xlir[onnxruntime]'"
            ) from error
        try:
            self._sessions = {
                side: onnxruntime.InferenceSession(
                    self.folder / f"{side}.onnx", providers=["CPUExecutionProvider"]
                )
                for side in SIDES
            }
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{self.folder} is damaged ({reason}): remove it, and write it again with {command}"
            ) from error

    def embed(self, side: str, inputs: Sequence) -> Float[np.ndarray, "inputs dim"]:
        """As `Embedder.embed`."""
        shape = (len(inputs), self._embedder.config.embedding_dim)
        batches = (
            (rows, graph_inputs(side, batch, len(rows)))
            for rows, batch in self._embedder.batches(side, inputs)
        )
        run = self._sessions[side].run
        return collect(lambda feed: run(["embeddings"], feed)[0], side, batches, shape)


def graph_inputs(side: str, batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The first rows of a batch of `Embedder`, under the names of a graph's inputs.

    `Embedder` pads batches to few shapes, because each is compiled. Graphs take any shape, so the
    padding is removed, which is at the end of rows and of texts.
    """
    if side == "image":
        return {"pixels": batch["image"][:rows]}
    ids, mask = (batch[f"text_{part}"][:rows] for part in ("ids", "mask"))
    longest = max(int(mask.sum(axis=1).max()), 1)
    return {
        "input_ids": ids[:, :longest].astype(np.int64),
        "attention_mask": mask[:, :longest].astype(np.int64),
    }


def _digests(folder: pathlib.Path) -> Mapping[str, str] | None:
    """The digests of the exported weights; None if the folder names none."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf8")).get("weights")
    except (ValueError, AttributeError):
        return None

"""Export to PyTorch and ONNX.

Every format is a folder that can be loaded without this package or JAX. The folder gets its final
name only after a check: a new process loads it and must reproduce the run's embeddings of real
captions and photos.

Embeddings of very large JPEGs differ slightly from the run's: training and evaluation decode such
files at a reduced size, which other libraries don't do.
"""

import contextlib
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

from xlir import data
from xlir import results as result_files
from xlir.encoder import Encoder
from xlir.export import card, huggingface, plain, verification

log = logging.getLogger(__name__)


class Format(NamedTuple):
    """An export format.

    Attributes:
      write: writes an encoder into an empty folder.
      unfit: returns why the format can't represent an encoder; an empty string if it can.
      needs: packages of the extra `export` that are needed to load the folder.
    """

    write: Callable[[Encoder, pathlib.Path], None]
    unfit: Callable[[Encoder], str]
    needs: tuple[str, ...]


# In order of preference: without --format, the first that can represent the encoder is used.
FORMATS = {
    "sentence-transformers": Format(
        huggingface.write_sentence_transformers,
        huggingface.unfit_for_sentence_transformers,
        ("torch", "sentence_transformers"),
    ),
    "torch": Format(plain.write_torch, lambda encoder: "", ("torch",)),
    "transformers": Format(
        huggingface.write_transformers,
        huggingface.unfit_for_transformers,
        ("torch", "transformers"),
    ),
    "onnx": Format(
        plain.write_onnx, lambda encoder: "", ("torch", "onnx", "onnxscript", "onnxruntime")
    ),
}


@contextlib.contextmanager
def _beside(to: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder next to the target, because a rename can't cross file systems."""
    if os.path.lexists(to):
        raise FileExistsError(f"--to={to} already exists: choose another folder or remove it")
    folder = to.absolute().parent / f".{to.name}.partial-{secrets.token_hex(4)}"
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"--to={to}: can't write to {folder.parent}: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: it holds the exported folder
                parent.rmdir()


def _default_format(encoder: Encoder) -> str:
    """The default format for an encoder."""
    return next(name for name, format in FORMATS.items() if not format.unfit(encoder))


def export(
    workdir: pathlib.Path,
    to: pathlib.Path,
    format: str = "",
    *,
    weights: str = "",
    test_set: str = "",
    images: str = "",
) -> verification.Report:
    """Exports the best checkpoint of a run.

    Args:
      workdir: the run's folder.
      to: the folder to write; it must not exist.
      format: a key of `FORMATS`; default: sentence-transformers if it can represent the model,
        else torch.
      weights: "ema" or "raw"; default: the validated weights (see `Encoder.load`).
      test_set: the test set that the export is checked on, as `data.test_sets` takes it; default:
        the first of the run's own.
      images: the folder of the test set's photos, as `data.test_sets` takes it.

    Raises:
      FileExistsError: `to` exists already.
      ValueError: the format can't represent the model, or the exported model's outputs differ
        from the run's.
      FileNotFoundError: the run, its test set or a package is missing.
    """
    if format and format not in FORMATS:
        raise ValueError(f"--format={format} is not known; known: {', '.join(FORMATS)}")
    with _beside(to) as folder:
        encoder = Encoder.load(workdir, weights=weights, dtype="float32")
        format = format or _default_format(encoder)
        if reason := FORMATS[format].unfit(encoder):
            others = [name for name, other in FORMATS.items() if not other.unfit(encoder)]
            raise ValueError(
                f"--format={format} can't hold this model: {reason}. "
                f"Use one of: {', '.join(others)}"
            )
        verification.check_packages(FORMATS[format].needs)
        examples = verification.examples(data.test_sets(encoder.config, test_set, images)[0])
        # results/ was measured with the default weights.
        ema, average = encoder.config.optimizer.ema, encoder.config.average
        measured = not weights or (not average and weights == ("ema" if ema else "raw"))
        results = result_files.read(workdir, encoder.step) if measured else []
        log.info("writing %s (%s)", to, format)
        FORMATS[format].write(encoder, folder)
        log.info("checking the folder in a separate process")
        report = verification.verify(encoder, folder, format, examples)
        card.write(encoder, results, folder, format, report)
        folder.rename(to)
    return report

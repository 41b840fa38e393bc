"""Export to PyTorch and ONNX.

Each format is a folder that needs neither this package nor JAX. It appears under its name once it
has been loaded afresh and has given the run's own embeddings for real captions and photos.

Of a very large JPEG they are not quite the run's: for training and evaluation it is decoded at a
fraction of its size, which other libraries don't do.
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
    """A format.

    Attributes:
      write: writes an encoder into an empty folder.
      unfit: what of an encoder the format can't hold; empty where it can.
      needs: packages of the extra `export` that loading it takes.
    """

    write: Callable[[Encoder, pathlib.Path], None]
    unfit: Callable[[Encoder], str]
    needs: tuple[str, ...]


# In the order in which they are preferred where none is asked for.
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
    """A new folder beside the target, as a rename can't cross file systems; gone afterwards."""
    if os.path.lexists(to):
        raise FileExistsError(f"--to={to} is there already: name another folder, or remove it")
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
            with contextlib.suppress(OSError):  # it holds what was exported
                parent.rmdir()


def _fitting(encoder: Encoder) -> str:
    """The format to take where none is asked for."""
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
      to: the folder to write, which must not be there.
      format: a key of `FORMATS`; default: sentence-transformers where it can hold the model, else
        torch.
      weights: "ema" or "raw"; default: the moving average where the run keeps one.
      test_set, images: what it is checked on, as of `data.test_sets`, of which the first counts;
        default: the run's own.

    Raises:
      FileExistsError: `to` is there already.
      ValueError: the format can't hold the model, or what was written gives something else.
      FileNotFoundError: the run, its test set or a package is missing.
    """
    if format and format not in FORMATS:
        raise ValueError(f"--format={format} is not known; known: {', '.join(FORMATS)}")
    with _beside(to) as folder:
        encoder = Encoder.load(workdir, weights=weights, dtype="float32")
        format = format or _fitting(encoder)
        if reason := FORMATS[format].unfit(encoder):
            others = [name for name, other in FORMATS.items() if not other.unfit(encoder)]
            raise ValueError(
                f"--format={format} can't hold this model: {reason}. What can: {', '.join(others)}"
            )
        verification.check_packages(FORMATS[format].needs)
        examples = verification.examples(data.test_sets(encoder.config, test_set, images)[0])
        raw = weights == "raw" and encoder.config.optimizer.ema > 0
        # Of a run's average; those of the weights themselves are not known.
        results = [] if raw else result_files.read(workdir, encoder.step)
        log.info("writing %s (%s)", to, format)
        FORMATS[format].write(encoder, folder)
        log.info("checking it in a process of its own")
        report = verification.verify(encoder, folder, format, examples)
        card.write(encoder, results, folder, format, report)
        folder.rename(to)
    return report

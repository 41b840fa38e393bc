"""Write the best checkpoint of a run to a folder that is used without JAX.

The folder is loaded afresh and compared with the run before it appears.

Examples:
  python -m xlir.main export --workdir=runs/flickr8k --to=exported
  python -m xlir.main export --workdir=runs/flickr8k --to=exported --format=onnx
"""

import pathlib
import signal
import sys

from absl.flags import FlagValues

from xlir.commands import processes
from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.string("to", "Folder to write; it must not be there yet.", needed=True)
    flags.string(
        "format",
        "sentence-transformers, transformers, torch or onnx; default: sentence-transformers where "
        "it can hold the model, else torch.",
        default="",
    )
    flags.choice(
        "weights",
        "The moving average over training, or the weights themselves; default: ema where the run "
        "keeps one.",
        ("ema", "raw"),
    )
    flags.test_set()


def run(values: FlagValues) -> None:
    """Exports."""
    # SIGTERM ends it as Ctrl-C does, so that what is half-written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    processes.start_jax(values)
    from xlir import export

    report = export.export(
        pathlib.Path(values.workdir),
        pathlib.Path(values.to),
        values.format,
        weights=values.weights or "",
        test_set=values.test_set,
        images=values.images,
    )
    print(f"{report}\nwritten: {values.to}")

"""Export the best checkpoint of a run to a folder that works without JAX.

The folder appears only after another process has loaded the exported model and compared it with the
run.

Examples:
  python -m xlir.main export --workdir=runs/flickr8k --to=exported
  python -m xlir.main export --workdir=runs/flickr8k --to=exported --format=onnx
"""

import pathlib
import signal
import sys

from absl.flags import FlagValues

from xlir.commands import processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.workdir()
    flags.string("to", "Folder to write; it must not exist yet.", needed=True)
    flags.string(
        "format",
        "sentence-transformers, transformers, torch or onnx; default: sentence-transformers if "
        "it can hold the model, otherwise torch.",
        default="",
    )
    flags.choice(
        "weights",
        "ema: the moving average of the weights over training; raw: the weights themselves; "
        "default: the weights that were validated.",
        ("ema", "raw"),
    )
    flags.test_set(several=False)


def run(values: FlagValues) -> None:
    """Exports."""
    from xlir import data

    if len(data.listed(values.test_set)) > 1:
        raise UsageError(
            f"--test_set={values.test_set} names several test sets; an export is checked on one"
        )
    # SIGTERM raises an exception, as Ctrl-C does, so that a half-written folder is removed.
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

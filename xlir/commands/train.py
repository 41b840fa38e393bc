"""Train and evaluate a configuration, or resume an interrupted run.

The same command, run again, resumes from the last checkpoint in the run's folder. Prepared data
sets, features of frozen towers and compiled programs are cached in $XLIR_CACHE (default:
~/.cache/xlir).

Examples:
  python -m xlir.main --config=configs/quickstart.py
  python -m xlir.main --config=configs/flickr8k.py --config.data.dir=PATH --workdir=runs/flickr8k
  python -m xlir.main --config=configs/xlmr.py:lit --config.data.dir=PATH --config.steps=1000
"""

import pathlib

from absl.flags import FlagValues

from xlir.commands import processes
from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.config()
    flags.string(
        "workdir", "Folder of the run; default: runs/NAME or runs/NAME-VARIANT, as in --config."
    )
    flags.switch(
        "accept_changed_data",
        "Resume a run even if its training or validation data have changed.",
    )
    processes.define(flags)


def run(values: FlagValues) -> None:
    """Trains."""
    processes.start_jax(values)
    from xlir import train

    workdir = pathlib.Path(values.workdir or _default_workdir(values))
    train.train(values.config, workdir, accept_changed_data=values.accept_changed_data)


def _default_workdir(values: FlagValues) -> str:
    file, _, variant = values["config"].config_filename.partition(":")
    return f"runs/{pathlib.Path(file).stem}" + (f"-{variant}" if variant else "")

"""Compile the training step for a TPU, without a TPU, and say whether it fits in memory.

The report estimates the memory of each chip and the time of a step. The exit code is 1 if the step
does not fit. `pip install 'jax[tpu]'` installs the TPU's compiler.

Example:
  python -m xlir.main compile --config=configs/xlmr.py --topology=v5e:8x8 \\
      --config.data.batch_size=16384
"""

import os

from absl.flags import FlagValues

from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.string(
        "topology",
        "Generation and shape of the TPU, for example v5e:8x8 or v5p:2x2x4.",
        needed=True,
    )
    flags.config()


def run(values: FlagValues) -> int:
    """Compiles, and prints the report."""
    # This machine's devices are not used, and its TPU may belong to another process.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from xlir import compile

    report = compile.compile_for(values.config, values.topology)
    print(report)
    return 0 if report.fits else 1

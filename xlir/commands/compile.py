"""Compile the training step for TPUs that need not be there, and say whether it fits them.

The report has the memory of a chip and the time of a step. The exit code is 1 where the step does
not fit. The TPU's compiler comes with `pip install 'jax[tpu]'`.

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
        "topology", "Generation and shape of the TPU, as v5e:8x8 or v5p:2x2x4.", needed=True
    )
    flags.config()


def run(values: FlagValues) -> int:
    """Compiles, and prints the report."""
    # The devices of this machine are not used, and a TPU among them may be another process's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from xlir import compile

    report = compile.compile_for(values.config, values.topology)
    print(report)
    return 0 if report.fits else 1

"""Compile the training step for a TPU, without a TPU, and say whether it fits in memory.

The report estimates the memory of each chip and the time of a step, and lists the instructions that
move most bytes. With --fit, several steps are compiled, with more or fewer microbatches, and with
and without rematerialisation, to find the fastest that fits. The exit code is 1 if no compiled step
fits. `pip install 'jax[tpu]'` installs the TPU's compiler.

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
    flags.switch(
        "fit",
        "Find the microbatches and the rematerialisation of the fastest step that fits. Each trial "
        "takes as long as one call without this flag.",
    )
    flags.config()


def run(values: FlagValues) -> int:
    """Compiles, and prints the report."""
    # This machine's devices are not used, and its TPU may belong to another process.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from xlir import compile, fit

    if values.fit:
        trials = fit.fit(values.config, values.topology)
        print(fit.table(trials))
        chosen = fit.best(trials)
        if chosen:
            print(f"\n{chosen.report}")
        return 0 if chosen else 1
    report = compile.compile_for(values.config, values.topology)
    print(report)
    return 0 if report.fits else 1

"""Print how the parameters that --config describes lie on a number of devices.

Neither the devices nor the weights have to be there.

Example:
  python -m xlir.main shardings --config=configs/xlmr.py --devices=8
"""

from absl.flags import FlagValues

from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.config()
    flags.integer(
        "devices", "How many devices; default: those of this machine.", least=1, most=2**20
    )


def run(values: FlagValues) -> None:
    """Prints the table."""
    import jax

    from xlir import compile, partition

    partition.check_platforms()
    print(compile.sharding_table(values.config, values.devices or jax.device_count()))

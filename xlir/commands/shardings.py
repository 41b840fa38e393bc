"""Print how the parameters of a configuration are sharded over a number of devices.

Neither the devices nor the weights are needed.

Example:
  python -m xlir.main shardings --config=configs/xlmr.py --devices=8
"""

from absl.flags import FlagValues

from xlir.commands.flags import Flags


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.config()
    flags.integer(
        "devices", "Number of devices; default: the number on this machine.", least=1, most=2**20
    )


def run(values: FlagValues) -> None:
    """Prints the table."""
    import jax

    from xlir import compile, partition

    partition.check_platforms()
    print(compile.sharding_table(values.config, values.devices or jax.device_count()))

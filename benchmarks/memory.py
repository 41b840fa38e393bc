"""Memory of a training step with microbatches and rematerialisation, according to the compiler.

    python benchmarks/memory.py [--batch_size=N]

The step of configs/xlmr.py (XLM-R base and ViT-B/16, both trained, float32) is compiled from shapes
for one device of this machine; it does not run. For TPUs and larger meshes, see
`python -m xlir.main compile`.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from configs import xlmr
from xlir import compile, partition


def temporaries(config) -> int:
    """Bytes that a step needs besides parameters, optimizer state and batch."""
    traced = compile.trace(config, partition.single_device_mesh())
    return traced.lower().compile().memory_analysis().temp_size_in_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    arguments = parser.parse_args()
    print(f"batch {arguments.batch_size}, temporaries of a step in GiB")
    print(f"{'microbatches':<14}{'remat off':>12}{'remat on':>12}")
    for microbatches in (1, 8):
        row = f"{microbatches:<14}"
        for remat in (False, True):
            config = xlmr.get_config()
            config.data.batch_size = arguments.batch_size
            config.data.microbatches = microbatches
            config.text.remat = config.image.remat = remat
            row += f"{temporaries(config) / 2**30:12.2f}"
        print(row)


if __name__ == "__main__":
    main()

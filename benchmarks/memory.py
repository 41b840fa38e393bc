"""Memory of a training step, from the compiler: microbatches and rematerialisation.

    python benchmarks/memory.py [--batch_size=N]

The step of configs/xlmr.py (XLM-R base and ViT-B/16, both trained, float32) is compiled for one
device of this machine, from shapes alone, and not run.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from configs import xlmr
from input_pipeline.images import Preprocessing
from xlir import optimizer, train
from xlir.models import dual_encoder, towers, transformer, vit


class Shapes:
    """What `train.make_train_step` takes of an encoder, without weights."""

    def __init__(self, config):
        self.config = config
        descriptions = {
            "text": {
                "kind": "transformer",
                "config": transformer.ARCHITECTURES[config.text.tower],
                "pooling": "mean",
            },
            "image": {
                "kind": "vit",
                "config": vit.ARCHITECTURES[config.image.tower],
                "pooling": "",
                "preprocessing": dataclasses.asdict(Preprocessing(size=224)),
            },
        }

        def create():
            rngs = nnx.Rngs(0)
            text, image = (
                towers.create(descriptions[side], config[side], rngs=rngs)
                for side in ("text", "image")
            )
            return dual_encoder.DualEncoder(config, text, image, rngs=rngs)

        model = nnx.eval_shape(create)
        self.graph, self.params, self.frozen = nnx.split(model, dual_encoder.trainable(config), ...)


def temporaries(config) -> int:
    """Bytes that a step needs beside parameters, optimizer state and batch."""
    encoder, transformation = Shapes(config), optimizer.build(config)
    state = jax.eval_shape(lambda: train.init_state(encoder, transformation))
    size, length = config.data.batch_size, config.text.max_length
    batch = {
        "text_ids": jax.ShapeDtypeStruct((size, length), jnp.int32),
        "text_mask": jax.ShapeDtypeStruct((size, length), jnp.bool_),
        "image": jax.ShapeDtypeStruct((size, 224, 224, 3), jnp.uint8),
        "image_id": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    step = jax.jit(train.make_train_step(encoder, transformation), donate_argnums=0)
    compiled = step.lower(state, encoder.frozen, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


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

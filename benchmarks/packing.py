"""A training step of a text tower with short captions, packed and in rows of their own.

    python benchmarks/packing.py --data=FLICKR8K --tower=E5_SMALL [--batch_size=N] [--rounds=N]

Trains as configs/flickr8k.py:e5_tuned does, on Flickr8k's captions and random image features, whose
values do not change how long a step takes. Both kinds of batches take turns; medians are printed.
Seconds of the processor say more than seconds of the clock where other programs run too.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from configs import flickr8k
from input_pipeline import loader, packing, tokenizers
from xlir import partition, train_step
from xlir.encoder import Encoder


def read_captions(folder):
    """The captions of the training split, photo by photo."""
    content = json.loads((pathlib.Path(folder) / "dataset_flickr8k.json").read_text())
    photos = [image for image in content["images"] if image["split"] == "train"]
    return [[sentence["raw"] for sentence in photo["sentences"]] for photo in photos]


def texts_of(config, tokenizer, captions):
    """The first batch's texts in rows of their own and packed, and the number of their tokens."""
    size, length = config.data.batch_size, config.text.max_length
    flat = [caption for of_photo in captions for caption in of_photo]
    sampler = loader.Sampler(0, list(map(len, captions)), size)
    tokenize = functools.partial(tokenizer, max_length=length)
    ids = tokenize([flat[row] for row in sampler(0)[1]])
    alone = dict(zip(("text_ids", "text_mask"), tokenizers.pad(ids, length), strict=True))
    pack = packing.Packing(tokenize, flat, length, sampler, size, 1)
    return {"alone": alone, "packed": pack(0, np.arange(size))}, sum(map(len, ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of dataset_flickr8k.json")
    parser.add_argument("--tower", required=True, help="folder of multilingual-e5-small")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = flickr8k.get_config("e5_tuned")
    config.text.tower, config.data.dir = arguments.tower, arguments.data
    config.data.batch_size = size = arguments.batch_size
    captions, mesh = read_captions(arguments.data), partition.single_device_mesh()
    encoder = Encoder.create(config, [x for of_photo in captions for x in of_photo], mesh)
    texts, real = texts_of(config, encoder.embedder.tokenizer, captions)
    params, frozen = encoder.parameters
    layout, step = train_step.compile_step(config, encoder.embedder.graph, params, mesh)
    features = np.random.default_rng(0).normal(size=(size, encoder.embedder.feature_dims["image"]))
    common = {"image_features": features.astype(np.float32), "image_id": np.arange(size)}
    times = {name: [] for name in texts}
    with jax.set_mesh(mesh):
        state = train_step.first_state(config, params, layout)
        for turn in range(arguments.rounds + 1):
            for name, batch in texts.items():
                clock, processor = time.perf_counter(), time.process_time()
                state, metrics = step(state, frozen, batch | common)
                float(metrics["loss"])
                if turn:  # the first round compiles
                    times[name].append(
                        (time.perf_counter() - clock, time.process_time() - processor)
                    )
    print(f"batch {size}, {os.cpu_count()} cores, {arguments.rounds} rounds, {real} tokens")
    for name, batch in texts.items():
        clock, processor = map(statistics.median, zip(*times[name], strict=True))
        computed = batch["text_ids"].size
        print(
            f"{name:<8}{computed:8,} tokens computed, {computed / real:.2f} for each token"
            f"{clock:8.2f} s a step, {processor:.2f} of the processor{size / clock:8.1f} examples/s"
        )


if __name__ == "__main__":
    main()

"""Training throughput on cached features, compared with the same model in PyTorch.

    pip install -e '.[quickstart]' torch==2.13.0
    python benchmarks/train_step.py [--batch_size=N] [--rounds=N]

Both sides train the heads of configs/flickr8k.py (same layers, InfoNCE, AdamW, clipping, dropout,
batch) on features of Flickr8k's shape, and read batches from memory: xlir through the loader of
a real run, PyTorch by indexing tensors. Rounds alternate between the two; medians are printed.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from configs import flickr8k
from input_pipeline import loader
from xlir import partition
from xlir import train_step as steps
from xlir.encoder import Encoder

PHOTOS, CAPTIONS = 5827, 5
STEPS = 8  # in a round


def features(config):
    """Random features: their values do not change how long a step takes."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(PHOTOS * CAPTIONS, 512)).astype(np.float32)
    return text, rng.normal(size=(PHOTOS, 1280)).astype(np.float32)


def ours(config, text, image):
    """Trains in xlir; yields the loss of each step."""
    mesh = partition.create_mesh()
    encoder = Encoder.create(config, mesh=mesh)
    params, frozen = encoder.parameters
    layout, step = steps.compile_step(config, encoder.embedder.graph, params, mesh)
    state = steps.first_state(config, params, layout)

    def read(images, captions, step, places):
        return {
            "text_features": text[captions],
            "image_features": image[images],
            "image_id": images.astype(np.int32),
        }

    order = loader.Sampler(0, [CAPTIONS] * PHOTOS, config.data.batch_size)
    rows = partition.local_rows(config.data.batch_size, mesh)
    batches = loader.Batches(order, read, 10**6, rows)
    for batch in loader.iterate(batches, first_step=0, prefetch=config.data.prefetch):
        state, metrics = step(state, frozen, partition.global_batch(batch, mesh))
        yield metrics["loss"]


def head(features, config, options):
    """The MLP head in PyTorch."""
    layers, widths = [nn.LayerNorm(features)], (features, *options.hidden)
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.GELU(), nn.Dropout(options.dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], config.embedding_dim))


def theirs(config, text, image, *, autocast=False, fused=True):
    """Trains in PyTorch; yields the loss of each step."""
    text, image = torch.from_numpy(text), torch.from_numpy(image)
    heads = nn.ModuleList([head(512, config, config.text), head(1280, config, config.image)])
    log_scale = nn.Parameter(-torch.tensor(config.loss.temperature).log())
    parameters = [*heads.parameters(), log_scale]
    rate, options = config.optimizer.learning_rate, config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(options.b1, options.b2), fused=fused)
    size = config.data.batch_size
    own = torch.arange(size)
    while True:
        for rows in torch.randperm(PHOTOS)[: PHOTOS // size * size].split(size):
            captions = rows * CAPTIONS + torch.randint(CAPTIONS, (size,))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                t, v = heads[0](text[captions]), heads[1](image[rows])
            t, v = functional.normalize(t.float()), functional.normalize(v.float())
            logits = log_scale.exp().clamp(max=100) * t @ v.T
            false_negative = (rows[:, None] == rows[None, :]) & (own[:, None] != own[None, :])
            logits = logits.masked_fill(false_negative, -torch.inf)
            loss = functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)
            adamw.zero_grad()
            (loss / 2).backward()
            nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            adamw.step()
            yield loss


def seconds_per_step(run):
    """Mean seconds per step of a round; only the end of the round waits for the device."""
    start = time.perf_counter()
    for _ in range(STEPS):
        loss = next(run)
    float(loss)
    return (time.perf_counter() - start) / STEPS


def main():
    config = flickr8k.get_config()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=config.data.batch_size)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default=config.head_dtype, help="dtype of xlir's matmuls")
    arguments = parser.parse_args()
    config.data.batch_size = arguments.batch_size
    config.head_dtype = arguments.dtype
    torch.set_num_threads(os.cpu_count())
    arrays = features(config)
    runs = {
        "xlir": ours(config, *arrays),
        "PyTorch": theirs(config, *arrays),
        "PyTorch, AdamW unfused": theirs(config, *arrays, fused=False),
        "PyTorch, bfloat16 autocast": theirs(config, *arrays, autocast=True),
    }
    for run in runs.values():
        seconds_per_step(run)
    times = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(seconds_per_step(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"batch {config.data.batch_size}, {os.cpu_count()} cores, {arguments.rounds} rounds")
    print(f"xlir in {config.head_dtype}, PyTorch in float32 unless its name says otherwise")
    for name, value in medians.items():
        speed = config.data.batch_size / value
        print(
            f"{name:<28}{1000 * value:8.1f} ms a step{speed:10,.0f} pairs/s"
            f"   xlir is {value / medians['xlir']:.2f}x"
        )


if __name__ == "__main__":
    main()

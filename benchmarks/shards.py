"""Measures reading from shards: start, memory and records per second, by the number of pairs.

    python -m benchmarks.shards --folder=SCRATCH [--pairs=10000000] [--processes=2]

It writes synthetic pairs to SCRATCH (small photos that repeat, captions that do not) and removes
them at the end. Each shard lies in the folder under up to ten names, which saves time and disk.
Each process reads its share of global batches, without decoding.
"""

import argparse
import io
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from input_pipeline import loader, shards
from input_pipeline.datasets.shards import ShardedPhotos

BATCH, STEPS, WARM_UP = 1024, 60, 20
SMALL, NAMES = 100_000, 10


def write(folder: pathlib.Path, count: int) -> None:
    """Shards with this number of pairs."""
    photos = []
    for number in range(16):
        noise = np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((8, 8)).save(buffer, "WEBP", quality=1)
        photos.append(buffer.getvalue())
    folder.mkdir(parents=True)
    entries = []
    distinct = max(SMALL, count // NAMES) // shards.SHARD + 1
    for shard in range(-(-count // shards.SHARD)):
        file = folder / f"{shard:07d}.array_record"
        if shard >= distinct:
            entry = entries[shard % distinct]
            file.hardlink_to(folder / entry["file"])
            entries.append({**entry, "file": file.name})
            continue
        start = shard * shards.SHARD
        records = [
            shards.Record(f"{n:x}.jpg", [f"caption number {n} of this set"], ["en"], photos[n % 16])
            for n in range(start, start + shards.SHARD)
        ]
        entries.append(shards.write(file, records))
    shards.write_index(folder, entries)


def resident() -> float:
    """Resident memory of this process in MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def measure(folder: pathlib.Path, process: int, processes: int) -> dict[str, float]:
    """Reads one process's share of the batches."""
    start, start_cpu = time.monotonic(), time.process_time()
    photos = ShardedPhotos([folder])
    sampler = loader.Mixture(0, photos.sizes, (), BATCH)
    places = np.arange(BATCH).reshape(processes, -1)[process]
    records = 0

    def read(rows: np.ndarray, turns: np.ndarray, step: int, places: np.ndarray) -> loader.Batch:
        nonlocal records
        texts = [photos[row].texts for row in rows.tolist()]
        records += len(texts)
        return {"length": np.array([len(text[0]) for text in texts])}

    batches = loader.Batches(sampler, read, WARM_UP + STEPS, places)
    first = {}
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            cpu, wall, before = time.process_time(), time.monotonic(), records
        batches[step]
        first = first or {
            "first batch, s": time.monotonic() - start,
            "first batch, CPU s": time.process_time() - start_cpu,
        }
    read_since = records - before
    return {
        **first,
        "resident, MB": resident(),
        "records per CPU second": read_since / (time.process_time() - cpu),
        "records per second": read_since / (time.monotonic() - wall),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--measure", type=int, help="used by the benchmark itself")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.folder, options.measure, options.processes)))
        return
    for count in (SMALL, options.pairs):
        folder = options.folder / f"pairs-{count}"
        start = time.monotonic()
        write(folder, count)
        written = time.monotonic() - start
        print(f"{count:,} pairs in {len(list(folder.iterdir())):,} files ({written:.0f} s)")
        command = [sys.executable, "-m", "benchmarks.shards", f"--folder={folder}"]
        command += [f"--processes={options.processes}"]
        running = [
            subprocess.Popen([*command, f"--measure={number}"], stdout=subprocess.PIPE)
            for number in range(options.processes)
        ]
        for number, process in enumerate(running):
            found = json.loads(process.communicate()[0])
            values = ", ".join(f"{name} {value:,.2f}" for name, value in found.items())
            print(f"  process {number}: {values}")
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

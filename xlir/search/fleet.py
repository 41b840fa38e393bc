"""Embeds photos on the machines of a Ray cluster.

This process finds the photos and stores their rows; the machines embed the photos, a shard at a
time. If a machine fails, others embed its shards. Each shard is stored once, in one step, so an
interrupted run leaves whole shards, and the next run embeds only what is missing.

All machines need xlir, and must see the photos and the index under the same paths.
"""

import functools
import itertools
import os
import pathlib
import platform
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
import ray

from input_pipeline import photo_limits
from xlir.encoder import Encoder
from xlir.search import photo_rows, photos

# The number of photos in a shard, and how often a shard is tried again after its machine failed.
SHARD, RETRIES = 512, 5


def embedded(
    encoder: pathlib.Path, found: Iterable[photos.Photo], skip: Callable[[str], None]
) -> Iterator[pa.Table]:
    """As `photo_rows.embedded`, on the cluster at $RAY_ADDRESS or, by default, on this machine.

    Args:
      encoder: the folder of the run whose encoder computes the embeddings.
      found: the photos.
      skip: called with one line for each photo that can't be read or decoded.

    Yields:
      The rows of each shard, in the order in which the shards finish.

    Raises:
      ValueError: the cluster can't be reached, or a machine can't embed.
    """
    try:
        variables = {photo_limits.VARIABLE: str(photo_limits.limit() // 1_000_000)}
        if not ray.is_initialized():
            _check_address()
            ray.init(log_to_driver=False, logging_level="ERROR", configure_logging=False)
        least, slots = _machines()
        embed = ray.remote(_embed_shard).options(
            max_retries=RETRIES, runtime_env={"env_vars": variables}, **least
        )
        # Twice as many shards are sent as fit at a time, so no machine waits for the next one.
        shards = (embed.remote(encoder.absolute(), *shard) for shard in _shards(found))
        running = list(itertools.islice(shards, 2 * slots))
        while running:
            (done,), running = ray.wait(running, num_returns=1)
            rows, reasons = ray.get(done)
            running += itertools.islice(shards, 1)
            for reason in reasons:
                skip(reason)
            if rows is not None:
                yield rows
    except (ray.exceptions.RayError, ConnectionError) as error:
        cause = getattr(error, "cause", None) or error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ValueError(f"the Ray cluster failed: {reason[0]}") from error


def _check_address() -> None:
    """Raises ValueError if no machine answers at $RAY_ADDRESS, for which Ray would wait minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    if found := re.fullmatch(r"([\w.-]+):(\d+)", address):
        try:
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error


def _machines() -> tuple[dict[str, int], int]:
    """The resources that a shard needs, and how many shards can be embedded at a time.

    If the cluster has GPUs, a shard needs one. Otherwise, it needs as many cores as the smallest
    machine has, because XLA uses all of a machine's cores for one shard.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(resources.get("GPU", 0)) for resources in machines)
    if gpus:
        return {"num_gpus": 1}, gpus
    cores = [int(resources.get("CPU", 0)) for resources in machines]
    least = min((number for number in cores if number), default=1)
    return {"num_cpus": least}, max(1, sum(number // least for number in cores))


def _shards(found: Iterable[photos.Photo]) -> Iterator[tuple[list[str], frozenset[str]]]:
    """For each shard, the files and archives of its photos, and the ids of the photos."""
    found = iter(found)
    while shard := list(itertools.islice(found, SHARD)):
        files = list(dict.fromkeys(photo.file for photo in shard))
        yield files, frozenset(photo.id for photo in shard)


def _embed_shard(
    folder: pathlib.Path, files: Sequence[str], ids: frozenset[str]
) -> tuple[pa.Table | None, list[str]]:
    """Embeds a shard on one of the machines: its rows, and a line for each photo without a row."""
    here = [file for file in files if os.path.exists(file)]
    reasons = [
        f"{file} does not exist on {platform.node()}" for file in files if file not in set(here)
    ]
    todo = (photo for photo in photos.find(here, skip=reasons.append) if photo.id in ids)
    rows = list(photo_rows.embedded(_encoder(folder), todo, reasons.append))
    return pa.concat_tables(rows) if rows else None, reasons


@functools.cache
def _encoder(folder: pathlib.Path) -> Encoder:
    """The encoder, which each of a machine's processes keeps for further shards."""
    return Encoder.load(folder)

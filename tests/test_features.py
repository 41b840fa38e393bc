"""The feature cache: it is never stale, and an interrupted computation resumes."""

import concurrent.futures
import fcntl
import logging
import os
import resource
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from input_pipeline import features

BLOCK = features.BLOCK
COUNT, DIM = BLOCK * 3 + 5, 4
EXPECTED = np.arange(COUNT * DIM, dtype=np.float32).reshape(COUNT, DIM)


def build(folder, calls, description=None, upto=None, **options):
    def compute(start, stop):
        if upto is not None and start >= upto:
            raise KeyboardInterrupt
        calls.append((start, stop))
        return EXPECTED[start:stop]

    source = description or {"w": 1}
    return features.cached(folder, source, (COUNT, DIM), compute, label="test", **options)


def damage(folder, block):
    """Flips a bit in the rows of a block."""
    (file,) = folder.glob("*.npy")
    data = bytearray(file.read_bytes())
    data[len(data) - (COUNT - block * BLOCK) * DIM * 4 + 5] ^= 1
    file.write_bytes(data)


def test_computed_once(tmp_path):
    first, second = [], []
    np.testing.assert_array_equal(build(tmp_path, first), EXPECTED)
    np.testing.assert_array_equal(build(tmp_path, second), EXPECTED)
    assert len(first) == 4
    assert not second


def test_another_description_is_computed_anew(tmp_path):
    build(tmp_path, [])
    calls = []
    build(tmp_path, calls, {"w": 2})
    assert len(calls) == 4


def test_an_interrupt_costs_one_block(tmp_path):
    before, after = [], []
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, before, upto=2 * features.BLOCK)
    np.testing.assert_array_equal(build(tmp_path, after), EXPECTED)
    assert before + after == [
        (start, min(start + features.BLOCK, COUNT)) for start in range(0, COUNT, features.BLOCK)
    ]


def build_together(folders, block=features.BLOCK):
    """Computes features together, with threads as processes; returns the computed blocks."""
    rows, barrier = [0] * len(folders), threading.Barrier(len(folders), timeout=30)
    calls = [[] for _ in folders]

    def run(place):
        def agree(row):
            rows[place] = row
            barrier.wait()
            lowest = min(rows)
            barrier.wait()
            return lowest

        return build(folders[place], calls[place], agree=agree, block=block)

    with concurrent.futures.ThreadPoolExecutor(len(folders)) as pool:
        found = list(pool.map(run, range(len(folders))))
    for ours in found:
        np.testing.assert_array_equal(ours, EXPECTED)
    assert len({tuple(blocks) for blocks in calls}) == 1, "not all computed the same blocks"
    return calls[0]


def test_processes_compute_together_from_where_all_are(tmp_path):
    """One process has all rows (another run may be reading them), one has half, one none."""
    whole, half, none = (tmp_path / name for name in ("whole", "half", "none"))
    reading = build(whole, [])
    with pytest.raises(KeyboardInterrupt):
        build(half, [], upto=2 * features.BLOCK)
    assert len(build_together([whole, half, none])) == 4
    np.testing.assert_array_equal(reading, EXPECTED)
    assert build_together([whole, half, none]) == []


def test_processes_compute_together_what_one_has_damaged(tmp_path):
    """Two processes have a damaged block each; the others take part, and keep their rows."""
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in folders:
        build(folder, [])
    damage(folders[0], 1)
    damage(folders[1], 3)
    calls = build_together(folders)
    assert calls == [(BLOCK, 2 * BLOCK), (3 * BLOCK, COUNT)]
    assert build_together(folders) == []


def test_processes_that_compute_together_wait_for_no_other_run(tmp_path):
    """If another run holds the lock, they keep their rows in memory."""
    build(tmp_path, [])
    (done,) = tmp_path.glob("*.npy")
    done.unlink()
    with open(done.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        calls = []
        ours = build(tmp_path, calls, agree=lambda rows: rows)
    np.testing.assert_array_equal(ours, EXPECTED)
    assert len(calls) == 4
    assert not list(tmp_path.glob("*.partial"))


def test_a_torn_row_is_written_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, [], upto=2 * BLOCK)
    cut(array_of(tmp_path), 3)
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert calls == [(start, min(start + BLOCK, COUNT)) for start in (BLOCK, 2 * BLOCK, 3 * BLOCK)]


KILLED = f"""
import os, pathlib, signal, sys
sys.path[:0] = {sys.path!r}
from tests import test_features as t
folder, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
def compute(start, stop):
    if start >= last * t.BLOCK:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.EXPECTED[start:stop]
t.features.cached(folder, {{"w": 1}}, (t.COUNT, t.DIM), compute, label="killed")
"""


def test_kill_in_mid_build_leaves_no_readable_half(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path), "2"]
    killed = subprocess.run(words, env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ValueError, match="mmap length"):
        np.load(array_of(tmp_path), mmap_mode="r")
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert calls[0][0] == 2 * BLOCK


def array_of(folder):
    (file,) = folder.glob("*.npy")
    return file


def cut(file, size):
    """Removes `size` bytes from the end of a file."""
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size - size)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_numpy_reads_a_whole_cache(tmp_path):
    build(tmp_path, [])
    np.testing.assert_array_equal(np.load(array_of(tmp_path), mmap_mode="r"), EXPECTED)


def test_only_damaged_blocks_are_computed_anew(tmp_path, caplog):
    build(tmp_path, [])
    damage(tmp_path, 1)
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert calls == [(BLOCK, 2 * BLOCK)]
    (line,) = warnings(caplog)
    file = array_of(tmp_path)
    assert line.startswith(f"{file}: {BLOCK} of {COUNT} rows are damaged (from row {BLOCK} on)")
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert len(calls) == len(warnings(caplog)) == 1, "the cache was not repaired"


def test_another_size_of_blocks_keeps_what_is_intact(tmp_path):
    build(tmp_path, [], block=1000)
    damage(tmp_path, 1)  # a row in the second block of 1,000 rows
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls, block=600), EXPECTED)
    assert calls == [(1000, 1600), (1600, 2200)]
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("spoil", "blocks"),
    [
        (lambda array, sums: cut(array, array.stat().st_size), 4),
        (lambda array, sums: cut(array, 1), 1),
        (lambda array, sums: cut(array, (5 + BLOCK // 2) * DIM * 4), 2),
        (lambda array, sums: array.write_bytes(bytes(array.stat().st_size)), 4),
        (lambda array, sums: cut(sums, sums.stat().st_size), 4),
        (lambda array, sums: cut(sums, 10), 1),
        (lambda array, sums: sums.unlink(), 4),
        (lambda array, sums: sums.write_bytes(b"\xff\xfe" * 100), 4),
        (lambda array, sums: sums.write_bytes(b"0" * 64 + b" 0 999999999999999999"), 4),
        # A file of version 49a03f1: complete, but the run was killed before it renamed the file.
        (lambda array, sums: (sums.unlink(), array.rename(array.with_suffix(".partial"))), 4),
    ],
    ids=[
        "empty",
        "cut by a byte",
        "cut in the third block",
        "zeros",
        "empty sums",
        "cut sums",
        "no sums",
        "bytes for sums",
        "sums of other rows",
        "not renamed",
    ],
)
def test_what_is_lost_is_computed_anew(tmp_path, caplog, spoil, blocks):
    build(tmp_path, [])
    array = array_of(tmp_path)
    spoil(array, array.with_suffix(".sha256"))
    calls = []
    caplog.set_level(logging.INFO)
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert len(calls) == blocks
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert str(array.with_suffix("")) in lines[0]
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert len(calls) == blocks
    np.testing.assert_array_equal(np.load(array), EXPECTED)
    assert not list(tmp_path.glob("*partial"))


def test_a_damaged_header_is_mended(tmp_path):
    build(tmp_path, [])
    file = array_of(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(b"x" + whole[1:])
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert not calls
    assert file.read_bytes() == whole


def test_a_whole_cache_is_read_where_it_cannot_be_written(read_only, caplog):
    folder, forbid = read_only
    build(folder, [])
    (lock,) = folder.glob("*.lock")
    lock.unlink()
    forbid()
    with pytest.raises(PermissionError):
        lock.touch()
    calls = []
    np.testing.assert_array_equal(build(folder, calls), EXPECTED)
    assert not calls
    assert not warnings(caplog)


def test_a_damaged_cache_that_cannot_be_written_is_computed_in_memory(read_only, caplog):
    folder, forbid = read_only
    build(folder, [])
    damage(folder, 2)
    file = array_of(folder)
    before = file.read_bytes()
    forbid()
    calls = []
    ours = build(folder, calls)
    np.testing.assert_array_equal(ours, EXPECTED)
    assert not ours.flags.writeable
    assert calls == [(2 * BLOCK, 3 * BLOCK)]
    assert file.read_bytes() == before
    found, kept = warnings(caplog)
    assert "rows are damaged" in found
    assert str(file) in kept
    assert "not kept" in kept


def test_a_file_in_the_place_of_the_cache_is_no_reason_to_fail(tmp_path, caplog):
    (tmp_path / "cache").touch()
    np.testing.assert_array_equal(build(tmp_path / "cache", []), EXPECTED)
    (line,) = warnings(caplog)
    assert "not kept" in line


def test_a_full_disk_keeps_what_is_there(tmp_path, caplog):
    """Files may not grow beyond two and a half blocks, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK * DIM * 4 * 5 // 2, limits[1]))
    try:
        calls = []
        np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 4
    (line,) = warnings(caplog)
    assert "File too large" in line
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert calls[4:] == [(2 * BLOCK, 3 * BLOCK), (3 * BLOCK, COUNT)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(lambda n: np.full((n, DIM), np.nan), "not finite"), (lambda n: np.zeros((n, 3)), "expected")],
)
def test_broken_features_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        features.cached(
            tmp_path, {}, (COUNT, DIM), lambda start, stop: rows(stop - start), label="test"
        )

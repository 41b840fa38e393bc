"""The feature cache: never stale, resumable, and never half-read."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from input_pipeline import features

COUNT, DIM = features.BLOCK * 3 + 5, 4
EXPECTED = np.arange(COUNT * DIM, dtype=np.float32).reshape(COUNT, DIM)


def build(folder, calls, description=None, upto=None, **options):
    def compute(start, stop):
        if upto is not None and start >= upto:
            raise KeyboardInterrupt
        calls.append((start, stop))
        return EXPECTED[start:stop]

    source = description or {"w": 1}
    return features.cached(folder, source, COUNT, DIM, compute, label="test", **options)


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


def test_processes_compute_together_from_where_all_are(tmp_path):
    """One has all rows, as another run may be reading, one half of them, and one none."""
    whole, half, none = (tmp_path / name for name in ("whole", "half", "none"))
    reading = build(whole, [])
    with pytest.raises(KeyboardInterrupt):
        build(half, [], upto=2 * features.BLOCK)
    starts, calls = [], {}

    def agree(rows):
        starts.append(rows)
        return 0

    for folder in (whole, half, none):
        calls[folder] = []
        ours = build(folder, calls[folder], agree=agree)
        np.testing.assert_array_equal(ours, EXPECTED)
    assert starts == [COUNT, 2 * features.BLOCK, 0]
    assert len({tuple(blocks) for blocks in calls.values()}) == 1, "all take part in every block"
    np.testing.assert_array_equal(reading, EXPECTED)


def test_processes_that_compute_together_wait_for_no_other_run(tmp_path):
    """They build a file of their own beside the one that another run holds."""
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
        build(tmp_path, [], upto=2 * features.BLOCK)
    (partial,) = tmp_path.glob("*.partial")
    with open(partial, "r+b") as file:
        file.truncate(partial.stat().st_size - 3)
    np.testing.assert_array_equal(build(tmp_path, []), EXPECTED)


def test_kill_in_mid_build_leaves_no_readable_half(tmp_path):
    script = textwrap.dedent(f"""
        import os, signal, sys, pathlib
        sys.path[:0] = {sys.path!r}
        from tests import test_features as t
        def compute(start, stop):
            if start >= 2 * t.features.BLOCK:
                os.kill(os.getpid(), signal.SIGKILL)
            return t.EXPECTED[start:stop]
        t.features.cached(pathlib.Path({str(tmp_path)!r}), {{"w": 1}}, t.COUNT, t.DIM, compute,
                          label="killed")
    """)
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list(tmp_path.glob("*.npy"))
    calls = []
    np.testing.assert_array_equal(build(tmp_path, calls), EXPECTED)
    assert calls[0][0] == 2 * features.BLOCK


@pytest.mark.parametrize(
    ("rows", "message"),
    [(lambda n: np.full((n, DIM), np.nan), "not finite"), (lambda n: np.zeros((n, 3)), "expected")],
)
def test_broken_features_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        features.cached(
            tmp_path, {}, COUNT, DIM, lambda start, stop: rows(stop - start), label="test"
        )

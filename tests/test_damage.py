"""Random damage to the files of a run is detected, or changes no number."""

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.runs import checkpoint_of, metrics_of
from xlir import results, train_step, workdir
from xlir.checkpoint import Checkpoints
from xlir.encoder import Encoder
from xlir.metric_log import MetricLog

TEXTS = ["A red circle, left.", "Kreis, rot", "빨간 원", ""]
# Written for people only, and never read again.
NOT_READ = ("tensorboard", "profile", ".lock")


def choose(run, rng: random.Random):
    """A random file that is read again, from a random folder or item of the last checkpoint."""
    groups = collections.defaultdict(list)
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        first, *others = path.relative_to(run).parts
        if first == "checkpoints":
            first = f"checkpoint, {others[1]}" if others[0] == "6" else "other checkpoint"
        if first not in NOT_READ and path.suffix != ".png":
            groups[first].append(path)
    return rng.choice(groups[rng.choice(sorted(groups))])


def read_all(run, learned_from: dict) -> dict:
    """Everything that loading, resuming and exporting read from a run's folder."""
    workdir.check_data(run, learned_from, accept_changes=False)
    encoder = Encoder.load(run)
    layout, _ = train_step.compile_step(
        encoder.config, encoder.embedder.graph, encoder.parameters.trained, encoder.mesh
    )
    with Checkpoints(run) as checkpoints:
        step, items = checkpoints.restore(layout.items())
    MetricLog(run, resume_at=step).close()
    return {
        "config": encoder.config.to_json(),
        "preprocessing": encoder.preprocessing,
        "tokens": encoder.tokenizer(TEXTS, max_length=16),
        "frozen": encoder.parameters.frozen,
        "loaded": (encoder.step, encoder.parameters.trained),
        "resumed": (step, items),
        "results": results.read(run, 6),
        "metrics": [record["step"] for record in metrics_of(run)],
    }


def damage(file, rng: random.Random) -> str:
    """Flips bits of one byte, or truncates the file; returns a description."""
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        file.write_bytes(content[:place])
        return f"{file} cut at {place}"
    content[place] ^= rng.randrange(1, 256)
    file.write_bytes(content)
    return f"{file} flipped at {place}"


def same(one, other) -> bool:
    """Whether two trees are equal, bit for bit."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))


@pytest.mark.slow
def test_damage_is_noticed_or_without_effect(toy_run, tmp_path, caplog):
    """200 times, one file is truncated or has one byte changed in an otherwise intact run."""
    rng, noticed, silent, unnoticed = random.Random(0), 0, [], []
    learned_from = json.loads((toy_run / "data.json").read_text())
    whole = read_all(shutil.copytree(toy_run, tmp_path / "whole"), learned_from)
    steps = {}  # step -> the content of its checkpoint
    for step in (2, 4, 6):
        one = shutil.copytree(toy_run, tmp_path / f"only-{step}")
        for other in {2, 4, 6} - {step}:
            shutil.rmtree(one / "checkpoints" / str(other), ignore_errors=True)
        if (one / "checkpoints" / str(step)).is_dir():
            steps[step] = read_all(one, learned_from)
    for trial in range(200):
        run = shutil.copytree(toy_run, tmp_path / "damaged")
        what = damage(choose(run, rng), rng)
        caplog.clear()
        try:
            found = read_all(run, learned_from)
        except (ValueError, OSError) as error:
            noticed += 1
            if "\n" in str(error):
                unnoticed.append(f"{what}: not one line: {error}")
        else:
            used = {
                "loaded": steps[found["loaded"][0]]["loaded"],
                "resumed": steps[found["resumed"][0]]["resumed"],
            }
            differing = [k for k, v in (whole | used).items() if not same(found[k], v)]
            warned = any(record.name.startswith("xlir") for record in caplog.records)
            if differing and not warned:
                unnoticed.append(f"trial {trial}: {what}: {differing}")
            noticed += warned
            silent += [what] * (not warned)
        kept = {path.name for path in (run / "checkpoints").iterdir()}
        assert len(kept) == len(list((toy_run / "checkpoints").iterdir())), what
        shutil.rmtree(run)
    print(f"{noticed} of 200 noticed, the others without effect:", *silent, sep="\n")
    assert not unnoticed, "\n".join(unnoticed)
    assert noticed > 100


@pytest.mark.slow
def test_kill_at_random_moments(photos, tmp_path):
    """30 runs end by kill -9, between preparing the data and evaluation; no result may change.

    Each trial has its own cache, so that the killed run prepares its data and features itself.
    """
    rng = random.Random(0)

    def start(name: str) -> subprocess.Popen:
        flags = ["--config=configs/xlmr.py:tiny", f"--config.data.dir={photos}"]
        flags += ["--config.image.frozen=True", "--config.image.min_area=0.0"]
        flags += ["--config.optimizer.ema=0.9"]
        flags += ["--config.eval_every=2", "--config.log_every=1"]
        return subprocess.Popen(
            [sys.executable, "-m", "xlir.main", *flags, f"--workdir={tmp_path / name / 'run'}"],
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": "", "XLIR_CACHE": str(tmp_path / name)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def digits(name: str):
        run = tmp_path / name / "run"
        (results,) = (run / "results").glob("*.json")
        return metrics_of(run), json.loads(results.read_text()), checkpoint_of(run, 20)

    for name in ("first", "straight"):  # later runs reuse what the first one compiled
        (tmp_path / name).mkdir()
        began = time.monotonic()
        whole = start(name)
        _, errors = whole.communicate()
        assert whole.returncode == 0, errors
    took = time.monotonic() - began
    straight, differing, said = digits("straight"), [], collections.Counter()
    for trial in range(30):
        name = f"trial-{trial}"
        (tmp_path / name).mkdir()
        killed, moment = start(name), rng.uniform(0.25, 1) * took
        try:
            killed.wait(moment)
        except subprocess.TimeoutExpired:
            killed.kill()
            killed.communicate()
        resumed = start(name)
        _, errors = resumed.communicate()
        said[next((line for line in errors.splitlines() if "resuming" in line), "from 0")] += 1
        if resumed.returncode or not same(digits(name), straight):
            differing.append(f"{trial}, killed after {moment:.1f} s of {took:.1f}: {errors[-500:]}")
        shutil.rmtree(tmp_path / name)
    print(f"killed over {took:.1f} s; resumed:", *said.items(), sep="\n")
    assert not differing, "\n".join(differing)

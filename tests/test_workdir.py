"""A run's folder: its lock, its record of the data, and folders that can't be written."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.runs import metrics_of
from xlir import data as prepared
from xlir import evaluate, train, workdir
from xlir.encoder import Encoder
from xlir.metric_log import MetricLog

HOLD = """
import pathlib, sys, time
from xlir.workdir import Lock
with Lock(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_training_run_is_refused_until_the_first_has_ended(tmp_path):
    """kill -9 also releases the lock, although the lock file remains."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "locked\n"
        refused = rf"run is in use: process {first.pid} on .* is training in it"
        with pytest.raises(ValueError, match=refused), workdir.Lock(run):
            pass
    finally:
        first.kill()
        first.wait()
    assert (run / ".lock").exists()
    with workdir.Lock(run):
        (run / "config.json").write_text("{}")
    assert run.is_dir()


def test_a_folder_in_which_no_run_was_started_is_removed(tmp_path):
    with workdir.Lock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").write_text("not ours")
    with workdir.Lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_training_takes_the_lock_first(toy_config, tmp_path):
    """The lock is taken before data and weights are searched for, which takes minutes."""
    config = toy_config.copy_and_resolve_references()
    config.data.dir = str(tmp_path / "nothing")
    with workdir.Lock(tmp_path / "run"), pytest.raises(ValueError, match="is in use"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/run", "can't write to .*file/run: Not a directory"),
        ("a\\b", "backslash"),
    ],
)
def test_places_that_cannot_be_used_are_refused(name, message, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message) as info, workdir.Lock(tmp_path / name):
        pass
    assert len(str(info.value).splitlines()) == 1


def test_changed_data_are_refused_or_accepted(toy_config, toy_run, tmp_path, caplog):
    """Without the check, a run would resume without photos that have been removed."""
    run = shutil.copytree(toy_run, tmp_path / "run")
    data = shutil.copytree(toy_config.data.dir, tmp_path / "data")
    config = toy_config.copy_and_resolve_references()
    config.data.dir = str(data)
    # The same data in another folder are accepted.
    saved = json.loads((run / "config.json").read_text())
    saved["data"]["dir"] = str(data)
    (run / "config.json").write_text(json.dumps(saved))
    (run / "SHA256SUMS").unlink()
    train.train(config, run)
    for number in range(5):
        (data / "images" / f"{number:02d}.jpg").unlink()
    prepared.open_data_set.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match=r"photos 33, .*before: photos 38, ") as info:
        train.train(config, run)
    assert len(str(info.value).splitlines()) == 1
    assert "--accept_changed_data" in str(info.value)
    with caplog.at_level(logging.INFO):
        train.train(config, run, accept_changed_data=True)
        train.train(config, run)  # the new data are recorded now
    assert "resuming from step 6" in caplog.text


def test_a_damaged_description_of_the_data_is_named(tmp_path):
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(ValueError, match=r"data\.json is damaged: .* Delete it to resume"):
        workdir.check_data(tmp_path, {"photos": 1}, accept_changes=False)


RECORDS = [{"step": step, "loss": 1 / step} for step in range(1, 9)]


def write_records(folder) -> str:
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "metrics.jsonl").write_text(text)
    return text


def test_a_full_disk_leaves_the_metrics_that_are_there(tmp_path, monkeypatch):
    text = write_records(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        MetricLog(tmp_path, resume_at=4)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_damaged_metrics_are_counted_and_kept_beside(tmp_path, caplog):
    text = write_records(tmp_path)
    damaged = text.replace('"loss": 0.5', '"loss: 0.5').encode().replace(b"0.25", b"\xff")
    (tmp_path / "metrics.jsonl").write_bytes(damaged + b'{"step": 9, "lo')
    MetricLog(tmp_path, resume_at=6).close()
    assert metrics_of(tmp_path) == [r for r in RECORDS if r["step"] in (1, 3, 5, 6)]
    assert "metrics.jsonl: 2 damaged records dropped, the first in line 2" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(damaged)


@pytest.mark.parametrize(
    ("half", "damaged"),
    [('{"step": 9, "lo', False), ('{"step": 8, "lo', True), ('{"st', False), ("", False)],
)
def test_a_half_written_record_of_a_step_that_was_saved(half, damaged, tmp_path, caplog):
    text = write_records(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(text + half)
    MetricLog(tmp_path, resume_at=8).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert ("1 damaged records dropped, the first in line 9" in caplog.text) == damaged


def test_results_are_shown_where_they_cannot_be_kept(toy_run, tmp_path, capsys, caplog):
    """A file blocks the folder, because tests run as root, who may write anywhere."""
    encoder = Encoder.load(toy_run)
    (chosen,) = prepared.test_sets(encoder.config)
    (tmp_path / "results").write_text("")
    evaluate.report(encoder, chosen, tmp_path, tmp_path / "cache")
    assert "text to image" in capsys.readouterr().out
    assert "results are shown but not saved: can't write to" in caplog.text

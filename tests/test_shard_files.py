"""Shards: their records, damage, and stores that fail."""

import json
import shutil

import numpy as np
import pytest

from input_pipeline import shards
from input_pipeline.shards import BrokenRecord, Record, Shards


def record(number: int) -> Record:
    texts = [f"caption {number}", "ein Äpfel\u2028"][: 1 + number % 2]
    return Record(f"{number}.jpg", texts, ["en", "de"][: len(texts)], bytes([number]) * 300)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 10, 1 and 20 records."""
    entries, start = [], 0
    for size in (10, 1, 20):
        file = tmp_path / f"{start}.array_record"
        entries.append(shards.write(file, [record(n) for n in range(start, start + size)]))
        start += size
    shards.write_index(tmp_path, entries, kept_out=["a"])
    return tmp_path


@pytest.fixture
def waited():
    return []


@pytest.fixture
def opened(folder, waited):
    return Shards(folder, waited.append)


def test_records_come_back(opened, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 1)
    assert (len(opened), opened.captions) == (31, 46)
    assert opened.facts == {"kept_out": ["a"]}
    for row in np.random.default_rng(0).permutation(31).tolist():
        assert opened[row] == record(row)
        assert len(opened._readers) <= 1
    with pytest.raises(IndexError):
        opened[31]


@pytest.mark.parametrize("data", [b"", b"\xff\xff", b"\x02\x00\x00\x00{}", b"\x00" * 40])
def test_bytes_that_are_no_record(data):
    with pytest.raises(ValueError, match="not a photo with captions"):
        shards.decode(data)


def test_a_record_without_captions_is_refused():
    with pytest.raises(ValueError, match="it has no captions"):
        shards.decode(shards.encode(Record("a", [], [], b"x")))


def test_a_damaged_record_spares_the_others(folder, opened, waited):
    file = folder / "11.array_record"
    data = bytearray(file.read_bytes())
    place = data.index(bytes([15]) * 300)
    data[place + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(BrokenRecord, match=r"11\.array_record, record 4: "):
        opened[15]
    assert opened[14] == record(14)
    assert opened[16] == record(16)
    assert not waited


def test_a_store_that_fails_for_a_time_is_waited_for(folder, opened, waited, caplog):
    file, away = folder / "0.array_record", folder / "away"
    file.rename(away)

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            away.rename(file)

    opened._wait = wait
    assert opened[3] == record(3)
    assert waited == [0.5, 1, 2]
    assert "can't be read: No such file or directory; trying again in 0.5 s" in caplog.text


@pytest.mark.parametrize("fault", ["missing", "cut off", "a folder"])
def test_a_store_that_stays_broken_ends_in_one_line(folder, opened, waited, fault):
    file = folder / "0.array_record"
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-5])
    else:
        file.unlink()
    if fault == "a folder":
        file.mkdir()
    with pytest.raises(OSError, match=r"7 attempts in 32 s\)\. When .* resume$") as raised:
        opened[3]
    assert "\n" not in str(raised.value)
    assert waited == list(shards.PAUSES)
    assert opened[12] == record(12)


def test_an_incomplete_or_damaged_folder(folder, tmp_path):
    index = folder / shards.INDEX
    content = index.read_text()
    index.write_text(content.replace('"records": 10', '"records": 11'))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        Shards(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match="not a complete folder of shards"):
        Shards(folder)
    shards.write_index(folder, [])
    with pytest.raises(ValueError, match="holds no photos"):
        Shards(folder)


def test_the_fingerprint_follows_the_content(folder, opened, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("copy"))
    assert Shards(copy).fingerprint == opened.fingerprint
    entries = json.loads((copy / shards.INDEX).read_text().split("\n")[1])["shards"]
    entries[1] = shards.write(copy / "10.array_record", [record(99)])
    shards.write_index(copy, entries)
    assert Shards(copy).fingerprint != opened.fingerprint

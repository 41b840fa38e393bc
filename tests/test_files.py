"""Atomic writes, and digests of files."""

import os
import subprocess

import pytest

from input_pipeline import files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "weights").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "with two  spaces").write_text("ä")
    names = ["tower/weights", "with two  spaces"]
    files.write_sums(tmp_path, names, {"config.json": "{}"})
    files.write_whole(tmp_path / "config.json", "{}")
    return tmp_path


def test_coreutils_agree(folder):
    """The reference is `sha256sum --check --strict`."""
    check = ["sha256sum", "--check", "--strict", files.SUMS]
    process = subprocess.run(check, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("OK") == 3
    files.check_sums(folder)


def test_every_flipped_byte_is_named(folder):
    for name in ("tower/weights", "with two  spaces", "config.json"):
        content = (folder / name).read_bytes()
        for place in range(0, len(content), max(len(content) // 20, 1)):
            damaged = bytearray(content)
            damaged[place] ^= 1
            (folder / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged"):
                files.check_sums(folder)
        (folder / name).write_bytes(content)
    files.check_sums(folder)


def test_damaged_digests_are_named(folder):
    sums = folder / files.SUMS
    content = sums.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        sums.write_bytes(damaged)
        # The error names the file, a missing file (if its name was changed), or the list itself.
        with pytest.raises((ValueError, FileNotFoundError)) as info:
            files.check_sums(folder)
        assert len(str(info.value).splitlines()) == 1


def test_a_missing_file_is_named(folder):
    (folder / "tower" / "weights").unlink()
    with pytest.raises(FileNotFoundError, match=r"tower/weights is missing"):
        files.check_sums(folder)


def test_the_damage_and_not_what_it_led_to_is_raised(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"), files.checking(folder):
        raise KeyError("as a parser of damaged files may raise")
    (folder / "config.json").write_text("{}")
    with pytest.raises(KeyError), files.checking(folder):
        raise KeyError("where nothing is damaged")


def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "file"
    files.write_whole(file, "before")

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(file, "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]

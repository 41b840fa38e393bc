"""The cache of compiled programs: where it is, and when it is not used."""

import jax
import pytest

from xlir import programs


@pytest.fixture
def no_choice(monkeypatch):
    """The user has chosen no folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def kept_in() -> str:
    programs.keep_on_disk()
    return jax.config.jax_compilation_cache_dir


def test_other_cpus_have_folders_of_their_own(no_choice, monkeypatch, tmp_path):
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path))
    folders = []
    for cpu in (["flags: avx2"], ["flags: avx2 avx512f"]):
        monkeypatch.setattr(programs, "_cpu", lambda cpu=cpu: cpu)
        jax.config.update("jax_compilation_cache_dir", None)
        folders.append(kept_in())
    assert len({*folders}) == 2
    assert all(folder.startswith(f"{tmp_path}/compiled/") for folder in folders)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == programs.WORTH_KEEPING


def test_a_chosen_folder_stays(no_choice, monkeypatch, tmp_path):
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "chosen")
    assert kept_in() == "chosen"
    assert not list(tmp_path.iterdir())


def test_accelerators_share_a_folder(no_choice, monkeypatch, tmp_path):
    """The keys of their programs name the device."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kept_in() == f"{tmp_path}/compiled"


def test_read_only_folders_are_read(no_choice, monkeypatch, read_only):
    folder, forbid = read_only
    monkeypatch.setenv("XLIR_CACHE", str(folder / "cache"))
    there = kept_in()
    jax.config.update("jax_compilation_cache_dir", None)
    forbid()
    assert kept_in() == there
    assert jax.config.jax_persistent_cache_min_compile_time_secs == float("inf")


def test_a_folder_that_cannot_be_made_is_not_used(no_choice, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path / "file" / "cache"))
    assert not kept_in()

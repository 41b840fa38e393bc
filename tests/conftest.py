"""Eight CPU devices for every test, and the place of the shared data."""

import os
import pathlib

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real photos and captions; the test skips where it is absent."""
    folder = pathlib.Path(os.environ.get("XLIR_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real photos and captions in {folder} (set XLIR_SHARED)")
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keeps tests out of the user's cache of prepared data sets and features."""
    monkeypatch.setenv("XLIR_CACHE", str(tmp_path_factory.getbasetemp() / "xlir-cache"))

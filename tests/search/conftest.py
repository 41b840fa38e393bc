"""A small index of real files, and a service that answers over HTTP."""

import asyncio
import contextlib
import dataclasses
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from tests import runs


@dataclasses.dataclass
class Served:
    """A running service.

    Attributes:
      index: its index.
      photos: the folder of the photos, to which tests may add files.
      url: its address.
      port: its port.
    """

    index: object
    photos: pathlib.Path
    url: str
    port: int


def write_index(folder: pathlib.Path, images: pathlib.Path, run: pathlib.Path) -> None:
    """`photos.index`, and the photos in it: in two folders and in an archive."""
    from xlir.search.index import Index

    files = sorted(images.glob("*.jpg"))
    for name, part in (("greece", files[:20]), ("Ελλάδα & co", files[20:30])):
        (folder / "photos" / name).mkdir(parents=True)
        for file in part:
            shutil.copy(file, folder / "photos" / name)
    with zipfile.ZipFile(folder / "photos" / "old.zip", "w") as archive:
        for file in files[30:34]:
            archive.write(file, f"inside/{file.name}")
    Index.create(folder / "photos.index", run).add([folder / "photos"])


@pytest.fixture(scope="session")
def small_index(photos, toy_run, session_folder) -> pathlib.Path:
    """A folder with an index, `photos.index`, of `photos`; tests must not change it."""
    pytest.importorskip("lancedb")
    return runs.once(
        session_folder / "small-index", lambda to: write_index(to, photos / "images", toy_run)
    )


@contextlib.contextmanager
def serving(app):
    """Serves an app over HTTP in a thread; yields the port."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory):
    """The address of a Milvus server; each test has its own collections."""
    pytest.importorskip("pymilvus", reason="needs pip install 'xlir[milvus]'")
    pytest.importorskip("milvus_lite", reason="needs pip install milvus-lite, a server for tests")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "milvus_lite", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--data-dir", str(tmp_path_factory.mktemp("milvus"))]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.1)
    yield f"milvus://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def served(small_index, tmp_path_factory):
    """A service with an index of its own, whose photos tests may add and remove."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("prometheus_client")
    pytest.importorskip("python_multipart")
    from xlir.search.index import Index
    from xlir.search.service import application

    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(small_index / "photos", folder / "photos")
    changed = Index.create(folder / "photos.index", small_index / "photos.index" / "encoder")
    changed.add([folder / "photos"])
    with serving(application(Index.open(folder / "photos.index"))) as port:
        yield Served(changed, folder / "photos", f"http://127.0.0.1:{port}", port)


@pytest.fixture(scope="session")
def client(served):
    """Asks the running service."""
    httpx = pytest.importorskip("httpx")
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def index(small_index):
    """An index for apps that are called in this process; tests must not change it."""
    from xlir.search.index import Index

    return Index.open(small_index / "photos.index")


def asked(app, method: str = "GET", path: str = "/healthz", **options):
    """The answer of an app that is called in this process."""

    import httpx

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())

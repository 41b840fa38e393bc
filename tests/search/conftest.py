"""A small index of real files, and a service that answers over HTTP."""

import contextlib
import dataclasses
import pathlib
import shutil
import socket
import threading
import zipfile

import pytest

from tests import runs


@dataclasses.dataclass
class Served:
    """A running service.

    Attributes:
      index: its index.
      photos: the folder of the photos, to which tests may add.
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
def served(small_index, tmp_path_factory):
    """A service with an index of its own, of which tests may add and remove files."""
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

"""Hostile requests and requests of strangers do no harm, and the service ends cleanly."""

import asyncio
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import pytest

from tests import runs
from tests.search.conftest import asked, serving

for package in ("fastapi", "lancedb", "prometheus_client", "python_multipart", "uvicorn", "httpx"):
    pytest.importorskip(package)

import httpx  # noqa: E402

from xlir.search.guard import COOKIE, Access, Limits  # noqa: E402
from xlir.search.service import application  # noqa: E402

TOKEN = "a-token-of-many-letters"


def png_of_size(width: int, height: int) -> bytes:
    """A small file whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "path",
    [
        "/api/photos/../../etc/passwd",
        "/api/photos/..%2f..%2f..%2fetc%2fpasswd/file",
        "/api/photos/%2fetc%2fpasswd/file",
        "/api/photos/" + "0" * 20,
        "/api/photos/" + "0" * 20 + "/file",
        "/api/photos/" + "0" * 20 + "/thumbnail",
        "/api/photos/" + "0" * 20 + "/tags",
        "/api/photos/" + "0" * 20 + "/tags?language=../../etc",
        "/api/photos/' OR '1'='1",
        "/api/photos/" + "0" * 19 + "'/thumbnail",
        "/api/photos/" + "A" * 20,
        "/api/photos/" + "0" * 20 + "%0a",
        "/page.js/../service.py",
        "/..%2fservice.py",
        "/docs",
        "/api/search",
        "/api/search?q=%20%0a",
        "/api/search?q=" + "x" * 1001,
        "/api/search?q=" + "x" * 30_000,
        "/api/search?q=rot&count=0",
        "/api/search?q=rot&count=201",
        "/api/search?q=rot&count=1e9",
        "/api/search?q=rot&cutoff=nan",
        "/api/search?q=rot&cutoff=1.1",
        "/api/search?q=rot&" + "&".join(["not=blau"] * 9),
        "/api/search?q=rot&not=rot&not=rot",
        "/api/search?like=" + "0" * 20,
        "/api/search?like='%20OR%20true",
        "/api/search?q=rot&where=folder",
        "/api/search?q=rot&where=path+x",
        "/api/search?q=rot&where=taken+2023-13",
        "/api/search?q=rot&where=name+%22x",
        "/api/search?q=rot&where=" + "name+x+and+" * 100,
    ],
)
def test_hostile_addresses_are_refused(client, path):
    answer = client.get(path)
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.text) < 2000
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST"])
@pytest.mark.parametrize("path", ["/api/search", "/", "/healthz", "/api/photos/" + "0" * 20])
def test_other_methods_are_refused(client, method, path):
    assert 400 <= client.request(method, path).status_code < 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a photo",
        png_of_size(60_000, 60_000),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8\xff\xe0" + bytes(1000),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=["empty", "text", "bomb", "svg", "damaged", "eps"],
)
def test_hostile_photos_are_refused(client, data):
    answer = client.post("/api/search", files={"photo": ("x.png", data)})
    assert answer.status_code == 422, answer.text
    assert client.get("/healthz").status_code == 200


def test_a_huge_upload_is_refused_before_it_is_read(served, client):
    head = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert client.get("/healthz").status_code == 200


def test_bodies_and_heads_of_unknown_size_are_bounded(index):
    limits = Limits(body=10_000)

    async def pieces():
        yield b'--b\r\nContent-Disposition: form-data; name="photo"; filename="x"\r\n\r\n'
        for _ in range(100):
            yield bytes(1000)

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    app = application(index, limits=limits)
    answer = asked(app, "POST", "/api/search", content=pieces(), headers=form)
    assert answer.status_code == 413
    assert asked(app, "POST", "/api/search", files={"photo": bytes(20_000)}).status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "[::2]:80", ""])
def test_other_hosts_are_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 421
    assert client.get("/healthz", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:99", "127.0.0.1", "[::1]:1", "LOCALHOST"])
def test_own_hosts_are_answered(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 200


def test_other_sites_may_not_search(client):
    headers = {"Sec-Fetch-Site": "cross-site"}
    assert client.get("/api/search?q=rot", headers=headers).status_code == 403


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/search?q=rot", "/nothing", "/metrics"])
def test_headers_that_keep_pages_safe(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers or headers["server"] == "uvicorn"


def test_a_token_is_needed(index):
    app = application(index, Access(TOKEN, names=None))
    query = "/api/search?q=rot"
    for path in ("/", query, "/metrics", "/openapi.json", "/page.js", "/?token=wrong", "/?token="):
        assert asked(app, path=path).status_code == 401
    wrong = [
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer é".encode("latin1")},
        {"Cookie": f"{COOKIE}={TOKEN}"},
        {"Cookie": f"{COOKIE}="},
    ]
    for headers in wrong:
        assert asked(app, path=query, headers=headers).status_code == 401
    assert asked(app).status_code == 200
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert asked(app, path=query, headers=right).status_code == 200


def test_the_page_keeps_the_token_in_a_cookie(index):
    app = application(index, Access(TOKEN, names=None))
    opened = asked(app, path=f"/?token={TOKEN}")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    cookie = opened.headers["set-cookie"]
    assert TOKEN not in cookie
    assert "HttpOnly" in cookie
    headers = {"Cookie": cookie.split(";")[0]}
    assert asked(app, path="/", headers=headers).status_code == 200


def test_a_public_service_does_not_tell_paths(index):
    app = application(index, Access(names=None, paths=False))
    answer = asked(app, path="/api/search?q=rot", headers={"Host": "photos.example"})
    assert all(hit["path"] is None for hit in answer.json()["hits"])
    assert str(index.folder.parent) not in answer.text


@pytest.fixture
def slow(index, monkeypatch):
    """An index whose search takes half a second longer."""
    find = index.find

    def later(*arguments, **options):
        time.sleep(0.5)
        return find(*arguments, **options)

    monkeypatch.setattr(index, "find", later)
    return index


async def several(app, number: int) -> list[int]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        asked = [client.get("/api/search?q=rot") for _ in range(number)]
        return [answer.status_code for answer in await asyncio.gather(*asked)]


def test_requests_at_a_time_are_bounded(slow):
    total = application(slow, limits=Limits(in_flight=2))
    assert sorted(asyncio.run(several(total, 5))) == [200, 200, 503, 503, 503]
    each = application(slow, limits=Limits(of_client=3))
    assert sorted(asyncio.run(several(each, 5))) == [200, 200, 200, 429, 429]
    assert asked(each, path="/api/search?q=rot").status_code == 200


def test_uploads_at_a_time_are_bounded(slow, small_index):
    photo = next((small_index / "photos").rglob("05.jpg")).read_bytes()
    app = application(slow, limits=Limits(uploads=1))

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            photos = [client.post("/api/search", files={"photo": photo}) for _ in range(3)]
            answers = await asyncio.gather(*photos, client.get("/api/search?q=rot"))
            return [answer.status_code for answer in answers]

    found = asyncio.run(statuses())
    assert (sorted(found[:3]), found[3]) == ([200, 503, 503], 200)
    assert asked(app, "POST", "/api/search", files={"photo": photo}).status_code == 200


def test_a_slow_upload_is_given_up(served):
    app = application(served.index, limits=Limits(seconds=0.5))
    head = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
    form = b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    with (
        serving(app) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(head + form)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_time_is_bounded(slow):
    app = application(slow, limits=Limits(seconds=0.2))
    assert asked(app, path="/api/search?q=rot").status_code == 503
    assert asked(app).status_code == 200


@pytest.mark.parametrize(
    "flags",
    [
        ["--host=0.0.0.0"],
        ["--host=photos.example"],
        ["--host=::"],
        ["--token=short"],
        ["--token="],
        [f"--token={TOKEN}", "--public"],
        ["--port=65536"],
    ],
)
def test_unsafe_command_lines_are_refused(flags, small_index):
    process = runs.run_main("serve", f"--index={small_index / 'photos.index'}", *flags, check=False)
    assert process.returncode == 2
    assert "Traceback" not in process.stderr


def test_a_port_that_is_taken_is_reported(served, small_index):
    process = runs.run_main(
        "serve",
        f"--index={small_index / 'photos.index'}",
        f"--port={served.port}",
        check=False,
    )
    assert process.returncode == 1
    assert f"port {served.port}" in process.stderr


def test_sigterm_finishes_what_is_running(small_index):
    """An upload is under way when the service is told to end."""
    folder = small_index / "photos.index"
    process = subprocess.Popen(
        [sys.executable, "-m", "xlir.main", "serve", f"--index={folder}", "--port=0"],
        cwd=runs.REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        line = process.stdout.readline()
        while not (found := re.match(r"34 photos at http://127\.0\.0\.1:(\d+)/$", line)):
            assert line, "the service has ended"
            line = process.stdout.readline()
        photo = next((small_index / "photos").rglob("05.jpg")).read_bytes()
        request = httpx.Request(
            "POST", f"http://127.0.0.1:{found[1]}/api/search", files={"photo": photo}
        )
        body = request.read()
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as connection:
            connection.sendall(f"POST /api/search HTTP/1.1\r\n{head}\r\n".encode() + body[:500])
            time.sleep(1.0)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            connection.sendall(body[500:])
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stdout.close()

"""The service answers as the index does."""

import asyncio
import concurrent.futures
import functools
import io
import os
import pathlib
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from tests.search.conftest import asked

for package in ("fastapi", "lancedb", "prometheus_client", "python_multipart", "uvicorn", "httpx"):
    pytest.importorskip(package)

import httpx  # noqa: E402

from xlir.search.batching import (  # noqa: E402
    Batcher,
    Full,
    Search,
    embed_together,
    find_together,
)
from xlir.search.query import combined  # noqa: E402
from xlir.search.service import application  # noqa: E402


def file_of(served, name: str) -> str:
    return str(next(served.photos.rglob(name)))


def id_of(client, **query) -> str:
    return client.get("/api/search", params={"q": "rot", "count": 1, **query}).json()["hits"][0][
        "id"
    ]


def same(answer, hits) -> None:
    assert answer.status_code == 200, answer.text
    found = answer.json()["hits"]
    assert [hit["path"] for hit in found] == [hit.path for hit in hits]
    np.testing.assert_allclose(
        [hit["cosine"] for hit in found], [hit.cosine for hit in hits], atol=1e-4
    )


@pytest.mark.parametrize("query", ["roter Kreis", "دائرة حمراء", "赤い丸", "x" * 1000, "a\0b"])
def test_answers_equal_those_of_the_index(client, served, query):
    same(
        client.get("/api/search", params={"q": query, "count": 7}),
        served.index.search(query, count=7),
    )


def test_parts_and_filters_are_passed_on(client, served):
    where = "folder greece and width 10..100 and not name 0*"
    answer = client.get(
        "/api/search",
        params={"q": "rot", "not": ["blau", "grün"], "where": where, "count": 200},
    )
    same(answer, served.index.search("rot", without=["blau", "grün"], where=where, count=200))
    assert answer.json()["hits"]


def test_percentiles_and_the_cutoff(client, served):
    answer = client.get("/api/search", params={"q": "rot", "cutoff": 0.5, "count": 40})
    hits = served.index.search("rot", count=40, cutoff=0.5)
    same(answer, hits)
    found = [hit["percentile"] for hit in answer.json()["hits"]]
    np.testing.assert_allclose(found, [hit.percentile for hit in hits], atol=1e-3)
    everything = client.get("/api/search", params={"q": "rot", "count": 40}).json()["hits"]
    assert len(everything) == 34
    assert all(hit["percentile"] is not None for hit in everything)


def test_like_is_the_stored_embedding(client, served):
    identifier = id_of(client)
    hits = client.get("/api/search", params={"like": identifier, "count": 5}).json()["hits"]
    # These photos are simple, so the toy model may find several of them alike.
    assert identifier in [hit["id"] for hit in hits if hit["cosine"] > 0.999]
    query = np.stack([served.index.vector(identifier), *served.index.encoder.encode_text(["blau"])])
    answer = client.get("/api/search", params={"like": identifier, "q": "blau", "count": 5})
    same(answer, served.index.find(combined(query)[None], 5)[0])


def test_an_uploaded_photo_finds_itself(client, served):
    file = file_of(served, "05.jpg")
    data = pathlib.Path(file).read_bytes()
    answer = client.post("/api/search", files={"photo": data}, data={"count": 3})
    same(answer, served.index.search(data, count=3))
    assert answer.json()["hits"][0]["cosine"] > 0.999
    both = client.post("/api/search", files={"photo": data}, data={"q": "rot", "not": "blau"})
    same(both, served.index.search("rot", data, without=["blau"], count=40))


def test_photos_are_described_and_served(client, served):
    file = file_of(served, "05.jpg")
    hits = client.get("/api/search", params={"q": "rot", "where": "name 05.jpg"}).json()["hits"]
    (hit,) = hits
    assert hit["path"] == file
    assert hit["size"] == os.path.getsize(file)
    photo = client.get(f"/api/photos/{hit['id']}").json()
    del hit["cosine"], hit["percentile"]
    assert photo == hit
    answer = client.get(photo["file"])
    assert answer.content == pathlib.Path(file).read_bytes()
    assert answer.headers["content-type"] == "image/jpeg"
    assert "sandbox" in answer.headers["content-security-policy"]
    thumbnail = client.get(photo["thumbnail"])
    assert Image.open(io.BytesIO(thumbnail.content)).format == "JPEG"


def test_photos_in_archives_have_only_a_thumbnail(client):
    params = {"q": "rot", "where": "folder old.zip"}
    hit = client.get("/api/search", params=params).json()["hits"][0]
    assert hit["file"] is None
    assert client.get(hit["thumbnail"]).status_code == 200
    assert client.get(f"/api/photos/{hit['id']}/file").status_code == 404


def test_files_that_have_become_something_else_are_not_served(client, served, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    for place in ("links", "links/folder"):
        (served.photos / place).mkdir(exist_ok=True)
    names = ["links/file.jpg", "links/fifo.jpg", "links/gone.jpg", "links/folder/05.jpg"]
    for name in names:
        shutil.copy(file_of(served, "05.jpg"), served.photos / name)
    shutil.copy(served.photos / names[0], secret / "05.jpg")
    served.index.add([served.photos])
    for name in names[:3]:
        (served.photos / name).unlink()
    (served.photos / names[0]).symlink_to(secret / "05.jpg")
    os.mkfifo(served.photos / names[1])
    shutil.rmtree(served.photos / "links/folder")
    (served.photos / "links/folder").symlink_to(secret)
    time.sleep(1.1)
    hits = client.get("/api/search", params={"q": "rot", "where": "folder links"}).json()["hits"]
    assert len(hits) == len(names)
    try:
        for hit in hits:
            assert client.get(hit["file"]).status_code == 404
    finally:
        shutil.rmtree(served.photos / "links")
        served.index.add([served.photos], prune=True)
        time.sleep(1.1)


def test_new_photos_are_found_without_restarting(client, served):
    before = client.get("/api/search", params={"q": "rot", "count": 200}).json()["hits"]
    added = served.photos / "greece" / "added.jpg"
    Image.new("RGB", (40, 30), "red").save(added)
    served.index.add([served.photos])
    time.sleep(1.1)
    after = client.get("/api/search", params={"q": "rot", "count": 200}).json()["hits"]
    assert {hit["path"] for hit in after} - {hit["path"] for hit in before} == {str(added)}
    added.unlink()
    served.index.add([served.photos], prune=True)
    time.sleep(1.1)
    assert len(client.get("/api/search", params={"q": "rot", "count": 200}).json()["hits"]) == len(
        before
    )


@pytest.mark.parametrize(
    "where",
    [
        'name "x\'y"',
        "name '%_\\'",
        "name '*'",
        "folder 'a\" OR 1=1 --'",
        "taken 9999",
        "width 1..9999999999999999999",
    ],
)
def test_odd_filters_are_answered(client, where):
    assert client.get("/api/search", params={"q": "rot", "where": where}).status_code == 200


def test_a_broken_index_is_reported_without_its_path(index, monkeypatch, caplog):
    def find(*arguments, **options):
        raise ValueError(f"{index.folder}: lost")

    monkeypatch.setattr(index, "find", find)
    answer = asked(application(index), path="/api/search?q=rot")
    assert answer.status_code == 503
    assert str(index.folder) not in answer.text
    assert "lost" in caplog.text


def test_counts_and_description(client):
    client.get("/api/search?q=rot")
    text = client.get("/metrics").text
    assert re.search(r'xlir_requests_total\{route="/api/search",status="200"\} [1-9]', text)
    assert re.search(r"xlir_photos 3\d\.0", text)
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {
        "/api/search",
        "/api/photos/{id}",
        "/api/photos/{id}/thumbnail",
        "/api/photos/{id}/file",
        "/api/photos/{id}/tags",
        "/api/languages",
        "/healthz",
        "/metrics",
    }
    assert described["components"]["schemas"]["Photo"]["examples"]


def test_requests_that_wait_are_embedded_together():
    calls = []

    def texts(parts):
        calls.append(list(parts))
        time.sleep(0.2)
        if "bad" in parts:
            raise ValueError("bad")
        return np.array([[len(part)] for part in parts], np.float32)

    def photos(parts):
        return np.array([[-part.sum()] for part in parts], np.float32)

    batcher = Batcher(functools.partial(embed_together, texts, photos), waiting=4)

    async def ask():
        first = asyncio.create_task(batcher(["1"]))
        await asyncio.sleep(0.05)
        parts = (["22", np.ones(3)], ["333"], ["bad"], ["cancelled"])
        tasks = [asyncio.create_task(batcher(one)) for one in parts]
        await asyncio.sleep(0.05)
        with pytest.raises(Full):
            await batcher(["one too many"])
        tasks[3].cancel()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    first, both, text, bad, cancelled = asyncio.run(ask())
    assert (first.tolist(), both.tolist(), text.tolist()) == ([[1]], [[2], [-3]], [[3]])
    assert isinstance(bad, ValueError)
    assert isinstance(cancelled, asyncio.CancelledError)
    # Three texts are padded to a batch of four.
    assert calls[:2] == [["1"], ["22", "333", "bad", "bad"]]
    batcher.close()


def test_searches_that_wait_share_calls_and_find_what_each_finds(index, monkeypatch):
    vectors = index.encoder.encode_text(["rot", "blau", "grün", "gelb", "schwarz"])
    wanted = [(3, "", True), (3, "", True), (2, "", True), (3, "folder greece", True)]
    wanted += [(3, "", False)]
    searches = [Search(vector, *one) for vector, one in zip(vectors, wanted, strict=True)]
    expected = [
        index.find(vector[None], count, where, calibrated=calibrated)[0]
        for vector, (count, where, calibrated) in zip(vectors, wanted, strict=True)
    ]
    calls, find = [], type(index).find
    monkeypatch.setattr(
        type(index), "find", lambda *given, **more: calls.append(1) or find(*given, **more)
    )
    found = find_together(index, searches)
    assert len(calls) == 4
    for one, other in zip(found, expected, strict=True):
        assert [hit.path for hit in one] == [hit.path for hit in other]
        assert [hit.percentile for hit in one] == [hit.percentile for hit in other]
    assert found[4][0].percentile is None


def test_many_clients_at_once(served):
    def ask(number):
        query = f"rot {number % 7}"
        with httpx.Client(base_url=served.url, timeout=60) as client:
            return query, client.get("/api/search", params={"q": query, "count": 3})

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(64)))
    for query, answer in answers[:7]:
        same(answer, served.index.search(query, count=3))
    assert {answer.status_code for _, answer in answers} == {200}

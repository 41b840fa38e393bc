"""The tags of a photo are the names that fit it best, and searches for them agree."""

import asyncio
import shutil

import numpy as np
import pytest

from input_pipeline import vocabularies
from tests.search.conftest import asked

for package in ("fastapi", "lancedb", "prometheus_client", "python_multipart", "uvicorn", "httpx"):
    pytest.importorskip(package)
pytest.importorskip("emoji", reason="needs the names of emoji: pip install 'xlir[quickstart]'")

from fastapi import HTTPException  # noqa: E402
from sklearn.metrics.pairwise import cosine_similarity  # noqa: E402

from xlir.search import tags  # noqa: E402
from xlir.search.calibration import FILE  # noqa: E402
from xlir.search.index import Index  # noqa: E402
from xlir.search.service import application  # noqa: E402
from xlir.search.tags import Tags  # noqa: E402

LANGUAGES = ["en", "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh"]


def photo_id(client, number: int = 0) -> str:
    return client.get("/api/search?q=rot").json()["hits"][number]["id"]


def tags_of(client, identifier: str, **query) -> list[dict]:
    answer = client.get(f"/api/photos/{identifier}/tags", params=query)
    assert answer.status_code == 200, answer.text
    assert answer.json()["language"] == query.get("language", "en")
    return answer.json()["tags"]


def emoji_names(language: str) -> list[str]:
    names = [name for (name,) in vocabularies.load("emoji").names[language]]
    return list(dict.fromkeys(names))


def test_languages(client):
    assert client.get("/api/languages").json() == {"languages": LANGUAGES}


@pytest.mark.parametrize("language", ["en", "de", "ar"])
@pytest.mark.parametrize("photo", [0, 12])
def test_tags_equal_those_of_another_computation(client, served, language, photo):
    identifier = photo_id(client, photo)
    found = tags_of(client, identifier, language=language, count=25)
    names = emoji_names(language)
    vectors = served.index.encoder.encode_text(names)
    with np.load(served.index.folder / FILE) as arrays:
        training, best = arrays["training"], arrays["best"]
    cosines = cosine_similarity(vectors, served.index.vector(identifier)[None])[:, 0]
    neighbours = cosine_similarity(vectors, training)
    scores = cosines - neighbours.mean(axis=1) + neighbours.std(axis=1)
    rows = [names.index(one["tag"]) for one in found]
    assert len(set(rows)) == 25
    # Names with nearly the same score may be in another order.
    np.testing.assert_allclose(scores[rows], np.sort(scores)[::-1][:25], atol=1e-4)
    np.testing.assert_allclose([one["cosine"] for one in found], cosines[rows], atol=1e-4)
    shares = [np.mean(best < score) for score in scores[rows]]
    np.testing.assert_allclose([one["percentile"] for one in found], shares, atol=2 / len(best))


def test_a_tag_fits_as_a_search_for_it_says(client, served):
    identifier = photo_id(client)
    for tag in tags_of(client, identifier, language="de", count=3):
        hits = client.get("/api/search", params={"q": tag["tag"], "count": 200}).json()["hits"]
        (hit,) = [hit for hit in hits if hit["id"] == identifier]
        assert hit["cosine"] == pytest.approx(tag["cosine"], abs=1e-4)
        assert hit["percentile"] == pytest.approx(tag["percentile"], abs=0.05)


def test_the_cutoff_and_the_count(client):
    identifier = photo_id(client)
    everything = tags_of(client, identifier, count=200)
    shares = [one["percentile"] for one in everything]
    assert len(everything) == 200
    assert shares == sorted(shares, reverse=True)
    assert tags_of(client, identifier) == everything[:10]
    middle = shares[100]
    kept = tags_of(client, identifier, count=200, cutoff=middle)
    assert kept == [one for one in everything if one["percentile"] >= middle]


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("language=xx", 422),
        ("language=", 422),
        ("language=DE", 422),
        ("language=de%0a", 422),
        ("language=de'--", 422),
        ("language=" + "d" * 5000, 422),
        ("language=jp", 422),
        ("count=0", 422),
        ("count=201", 422),
        ("count=1e9", 422),
        ("cutoff=nan", 422),
        ("cutoff=-1", 422),
    ],
)
def test_hostile_values_are_refused(client, query, code):
    answer = client.get(f"/api/photos/{photo_id(client)}/tags?{query}")
    assert answer.status_code == code, answer.text
    assert len(answer.text) < 500


@pytest.mark.parametrize("name", ["0" * 20, "x", "0" * 19 + "'", "..%2f.."])
def test_unknown_photos_have_no_tags(client, name):
    assert client.get(f"/api/photos/{name}/tags").status_code in (404, 422)


def test_without_names_there_are_no_tags(index, client, monkeypatch):
    def load(name):
        raise FileNotFoundError("emoji is not installed")

    path = f"/api/photos/{index.find(index.encoder.encode_text(['rot']))[0][0].id}/tags"
    monkeypatch.setattr(vocabularies, "load", load)
    app = application(index)
    assert asked(app, path="/api/languages").json() == {"languages": []}
    answer = asked(app, path=path)
    assert answer.status_code == 404
    assert "quickstart" in answer.json()["detail"]


def test_without_calibration_tags_are_ordered_by_cosine(small_index, tmp_path):
    folder = shutil.copytree(small_index / "photos.index", tmp_path / "photos.index")
    (folder / FILE).unlink()
    index = Index.open(folder)
    identifier = index.find(index.encoder.encode_text(["rot"]))[0][0].id
    answer = asked(application(index), path=f"/api/photos/{identifier}/tags?cutoff=0.9&count=5")
    found = answer.json()["tags"]
    cosines = index.encoder.encode_text(emoji_names("en")) @ index.vector(identifier)
    expected = np.sort(cosines)[::-1][:5]
    np.testing.assert_allclose([one["cosine"] for one in found], expected, atol=1e-4)
    assert {one["percentile"] for one in found} == {None}


class Embedding:
    """Embeds each text as its length, and records the calls."""

    def __init__(self):
        self.parts = []
        self.at_once = self.most_at_once = 0

    async def __call__(self, texts) -> np.ndarray:
        self.parts.append(list(texts))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        return np.array([[len(text), 1] for text in texts], np.float32)


QUERY = np.array([1, 0], np.float32)


def test_names_are_embedded_in_parts_and_kept_for_a_few_languages():
    embedding = Embedding()
    found = Tags(embedding, None)

    async def ask(*languages):
        await asyncio.gather(*(found.of_photo(QUERY, one, 3, 0.0) for one in languages))
        parts, embedding.parts = embedding.parts, []
        return [text for part in parts for text in part], max(map(len, parts), default=0)

    async def check():
        texts, largest = await ask("de", "de", "fr")
        assert texts == [*emoji_names("de"), *emoji_names("fr")]
        assert largest == tags.NAMES_AT_ONCE
        assert embedding.most_at_once == 1
        assert await ask("de", "fr") == ([], 0)
        others = [one for one in LANGUAGES if one not in ("de", "fr")]
        for language in others[: tags.MOST_LANGUAGES - 2]:
            await ask(language)
        # German is used again, so French is the first to go.
        assert await ask("de") == ([], 0)
        await ask(others[-1])
        assert await ask("de", *others[: tags.MOST_LANGUAGES - 2], others[-1]) == ([], 0)
        assert (await ask("fr"))[0] == emoji_names("fr")

    asyncio.run(check())


def test_a_client_that_leaves_does_not_stop_the_embedding():
    embedding = Embedding()
    found = Tags(embedding, None)

    async def check():
        first = asyncio.create_task(found.of_photo(QUERY, "de", 3, 0.0))
        while not embedding.parts:
            await asyncio.sleep(0)
        first.cancel()
        longest = await found.of_photo(QUERY, "de", 1, 0.0)
        assert len(longest[0].tag) == max(map(len, emoji_names("de")))
        texts = [text for part in embedding.parts for text in part]
        assert texts == emoji_names("de")
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(check())


def test_closing_stops_the_embedding():
    embedding = Embedding()
    found = Tags(embedding, None)

    async def check():
        asked = asyncio.create_task(found.of_photo(QUERY, "de", 3, 0.0))
        while not embedding.parts:
            await asyncio.sleep(0)
        found.close()
        with pytest.raises(asyncio.CancelledError):
            await asked
        texts = [text for part in embedding.parts for text in part]
        assert len(texts) < len(emoji_names("de"))

    asyncio.run(check())


def test_a_failure_is_not_kept():
    embedding = Embedding()

    async def fail(texts):
        if len(embedding.parts) == 2:
            embedding.parts.append("failed")
            raise ValueError("not finite")
        return await embedding(texts)

    found = Tags(fail, None)

    async def check():
        with pytest.raises(ValueError, match="not finite"):
            await found.of_photo(QUERY, "de", 3, 0.0)
        assert len(await found.of_photo(QUERY, "de", 3, 0.0)) == 3
        with pytest.raises(HTTPException):
            await found.of_photo(QUERY, "xx", 3, 0.0)

    asyncio.run(check())

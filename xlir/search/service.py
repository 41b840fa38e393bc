"""The service: a JSON API over an index, and the page that uses it.

`application` makes the FastAPI app. `xlir.search.guard` checks and limits requests before the app.
Requests name photos only by id. Everything that takes time runs in threads: one embeds, another
one searches (`xlir.search.batching`), and a few do the rest.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal

import anyio.to_thread
import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from input_pipeline import archives
from xlir.search import api, filters
from xlir.search.batching import (
    Batcher,
    Full,
    Part,
    Search,
    embed_together,
    find_together,
)
from xlir.search.guard import Access, Guard, Limits, Metrics
from xlir.search.index import Hit, Index
from xlir.search.query import combined
from xlir.search.tags import Tags

log = logging.getLogger(__name__)

PAGE = pathlib.Path(__file__).parent / "page"
# The index is refreshed at most this often, in seconds.
REFRESH_SECONDS = 1.0
# The largest numbers of uploaded photos decoded, and of files read, at a time.
DECODED_AT_ONCE, READ_AT_ONCE = 2, 4

MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".avif": "image/avif",
}
# A browser never runs a photo's file as a page, whatever the file holds.
FILE_HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox"}
CACHED = {"Cache-Control": "private, max-age=300"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a search is for.

    Attributes:
      text: what photos should show.
      unwanted: what they should not show.
      like: the id of a photo of the index that they should resemble.
      photo: the bytes of another photo that they should resemble.
    """

    text: str = ""
    unwanted: Sequence[str] = ()
    like: str | None = None
    photo: bytes | None = None


class Service:
    """Answers the requests of the API.

    Args:
      index: the photos; its encoder is loaded.
      metrics: counts batches and photos.
      paths: whether answers contain the paths of photos.
    """

    def __init__(self, index: Index, metrics: Metrics, *, paths: bool):
        self._index, self._metrics, self._paths = index, metrics, paths
        encoder = index.encoder
        embed = functools.partial(embed_together, encoder.encode_text, encoder.encode_image)
        self.embed = Batcher(embed, metrics.batch.observe)
        self.find = Batcher(functools.partial(find_together, index))
        self.tags = Tags(self.embed, index.calibration)
        self._refreshed, self._refreshing = -math.inf, threading.Lock()
        self._decoding = anyio.CapacityLimiter(DECODED_AT_ONCE)
        self._reading = anyio.CapacityLimiter(READ_AT_ONCE)
        self.refresh()

    async def search(self, query: Asked, count: int, where: str, cutoff: float) -> api.Answer:
        """The photos that fit all parts of a query together."""
        check_filter(where)
        if not query.text.strip() and query.like is None and query.photo is None:
            raise HTTPException(422, "a search needs a text, a photo or an id")
        await anyio.to_thread.run_sync(self.refresh)
        embedded = await self._embedded(query)
        texts = query.like is None and query.photo is None
        hits = [
            api.Found(
                cosine=round(hit.cosine, 5),
                percentile=None if hit.percentile is None else round(hit.percentile, 5),
                **self._told(hit),
            )
            for hit in await self.find(Search(embedded, count, where, calibrated=texts))
            if hit.percentile is None or hit.percentile >= cutoff
        ]
        return api.Answer(hits=hits)

    async def _embedded(self, query: Asked) -> np.ndarray:
        """One vector for a query."""
        wanted: list[Part] = [query.text] if query.text.strip() else []
        if query.photo is not None:
            wanted.append(await self._decoded(query.photo))
        unwanted = [one for one in query.unwanted if one.strip()]
        vectors = [] if query.like is None else [await self._vector(query.like)]
        parts = [*wanted, *unwanted]
        embedded = await self.embed(parts) if parts else np.zeros((0, 0), np.float32)
        vectors += list(embedded[: len(wanted)])
        others = embedded[len(wanted) :] if unwanted else None
        try:
            return combined(np.stack(vectors), others)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    async def photo(self, identifier: str) -> api.Photo:
        """What the index knows about a photo."""
        return api.Photo(**self._told(await self._hit(identifier)))

    async def photo_tags(
        self, identifier: str, language: str, count: int, cutoff: float
    ) -> api.PhotoTags:
        """The tags that fit a photo in a language."""
        await anyio.to_thread.run_sync(self.refresh)
        vector = await self._vector(identifier)
        tags = await self.tags.of_photo(vector, language, count, cutoff)
        return api.PhotoTags(language=language, tags=tags)

    async def thumbnail(self, identifier: str) -> Response:
        """The thumbnail of a photo."""
        found = await anyio.to_thread.run_sync(self._index.thumbnails, [identifier])
        if not found or not found[0]:
            raise HTTPException(404, "there is no such thumbnail")
        return Response(found[0], media_type="image/jpeg", headers=FILE_HEADERS | CACHED)

    async def file(self, identifier: str) -> Response:
        """The file of a photo."""
        hit = await self._hit(identifier)
        data = await anyio.to_thread.run_sync(read_file, hit.path, limiter=self._reading)
        if data is None:
            raise HTTPException(404, "this photo's file is missing or inside an archive")
        suffix = os.path.splitext(hit.path)[1].lower()
        media_type = MEDIA_TYPES.get(suffix, "application/octet-stream")
        return Response(data, media_type=media_type, headers=FILE_HEADERS | CACHED)

    def refresh(self) -> None:
        """Makes newly added photos visible. Does so at most once a second."""
        with self._refreshing:
            if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
                self._index.refresh()
                self._metrics.photos.set(self._index.count())
                self._refreshed = time.monotonic()

    async def _decoded(self, photo: bytes) -> np.ndarray:
        decode = self._index.encoder.embedder.decode
        try:
            return await anyio.to_thread.run_sync(
                decode, photo, "the photo", limiter=self._decoding
            )
        except ValueError as error:
            raise HTTPException(422, " ".join(str(error).split())) from error

    async def _vector(self, identifier: str) -> np.ndarray:
        vector = await anyio.to_thread.run_sync(self._index.vector, identifier)
        if vector is None:
            raise HTTPException(404, "there is no photo with this id")
        return vector

    async def _hit(self, identifier: str) -> Hit:
        await anyio.to_thread.run_sync(self.refresh)
        hit = await anyio.to_thread.run_sync(self._index.photo, identifier)
        if hit is None:
            raise HTTPException(404, "there is no photo with this id")
        return hit

    def _told(self, hit: Hit) -> dict:
        """The fields of a photo in an answer."""
        place = f"/api/photos/{hit.id}"
        return {
            "id": hit.id,
            "name": os.path.basename(hit.path),
            "path": hit.path if self._paths else None,
            "taken": _moment(hit.taken) if hit.size else None,
            "width": hit.width,
            "height": hit.height,
            "size": hit.size,
            "thumbnail": f"{place}/thumbnail",
            "file": None if _in_archive(hit.path) else f"{place}/file",
        }


def application(
    index: Index, access: Access | None = None, limits: Limits | None = None
) -> FastAPI:
    """The app that serves an index.

    Args:
      index: the photos.
      access: who may send requests; default: local browsers.
      limits: see `Limits`.
    """
    access, metrics = access or Access(), Metrics()
    service = Service(index, metrics, paths=access.paths)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.tags.close()
        for batcher in (service.embed, service.find):
            await anyio.to_thread.run_sync(batcher.close)

    app = FastAPI(
        title="xlir",
        version="1",
        summary="Searches photos with texts in any language, and with photos.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, access=access, limits=limits or Limits(), metrics=metrics)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Full, _full)
    app.add_exception_handler(ValueError, _failed)
    app.add_exception_handler(OSError, _failed)
    _add_searches(app, service)
    _add_photos(app, service)
    _add_tags(app, service)
    _add_pages(app, metrics)
    return app


def _add_searches(app: FastAPI, service: Service) -> None:
    """The routes that search."""

    @app.get("/api/search", responses=api.PROBLEMS)
    async def search(
        q: Annotated[api.Text, Query(**api.QUERY)] = "",
        unwanted: Annotated[api.Texts, Query(**api.NOT)] = [],  # noqa: B006 - FastAPI copies it
        like: Annotated[
            str | None,
            Query(pattern=api.ID, description="The id of a photo.", examples=[api.EXAMPLE["id"]]),
        ] = None,
        count: Annotated[int, Query(**api.COUNT)] = 40,
        where: Annotated[api.Text, Query(**api.WHERE)] = "",
        cutoff: Annotated[float, Query(**api.CUTOFF)] = 0.0,
    ) -> api.Answer:
        """The photos that best fit a text, a photo of the index, or both."""
        return await service.search(Asked(q, unwanted, like), count, where, cutoff)

    @app.post("/api/search", responses=api.PROBLEMS)
    async def search_with_photo(
        photo: Annotated[UploadFile, File(description="A photo to search for.")],
        q: Annotated[api.Text, Form(**api.QUERY)] = "",
        unwanted: Annotated[api.Texts, Form(**api.NOT)] = [],  # noqa: B006 - FastAPI copies it
        count: Annotated[int, Form(**api.COUNT)] = 40,
        where: Annotated[api.Text, Form(**api.WHERE)] = "",
    ) -> api.Answer:
        """The photos that are most like an uploaded photo, and fit a text if there is one."""
        query = Asked(q, unwanted, photo=await photo.read())
        return await service.search(query, count, where, cutoff=0.0)


def _add_photos(app: FastAPI, service: Service) -> None:
    """The routes of single photos."""
    image = {200: {"content": {"image/*": {}}, "description": "The picture."}}

    @app.get("/api/photos/{id}", responses=api.PROBLEMS)
    async def photo(id: api.Id) -> api.Photo:
        """What the index knows about a photo."""
        return await service.photo(id)

    @app.get("/api/photos/{id}/thumbnail", response_class=Response, responses=api.PROBLEMS | image)
    async def thumbnail(id: api.Id) -> Response:
        """A small JPEG of a photo."""
        return await service.thumbnail(id)

    @app.get("/api/photos/{id}/file", response_class=Response, responses=api.PROBLEMS | image)
    async def file(id: api.Id) -> Response:
        """The file of a photo, unless it lies in an archive."""
        return await service.file(id)


def _add_tags(app: FastAPI, service: Service) -> None:
    """The routes of the photos' tags."""

    @app.get("/api/languages")
    async def languages() -> api.Languages:
        """The languages that have tags."""
        return api.Languages(languages=await service.tags.languages())

    @app.get("/api/photos/{id}/tags", responses=api.PROBLEMS)
    async def tags(
        id: api.Id,
        language: Annotated[str, Query(**api.LANGUAGE)] = "en",
        count: Annotated[int, Query(**api.TAG_COUNT)] = 10,
        cutoff: Annotated[float, Query(**api.TAG_CUTOFF)] = 0.0,
    ) -> api.PhotoTags:
        """The tags that best fit a photo: names of emoji, in one of several languages."""
        return await service.photo_tags(id, language, count, cutoff)


def _add_pages(app: FastAPI, metrics: Metrics) -> None:
    """The routes of the page, and those for monitoring."""

    @app.get("/healthz")
    async def health() -> dict[str, Literal["ok"]]:
        """Whether the service answers."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def counts() -> Response:
        """Counts in Prometheus' format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    def add(path: str, content: bytes, media_type: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page(request: Request) -> Response:
            return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    add("/", (PAGE / "index.html").read_bytes(), "text/html")
    add("/page.css", (PAGE / "page.css").read_bytes(), "text/css")
    add("/page.js", (PAGE / "page.js").read_bytes(), "text/javascript")
    add("/icon.svg", (PAGE / "icon.svg").read_bytes(), "image/svg+xml")


def check_filter(where: str) -> None:
    """Raises an HTTP error 422 if a text is not a filter."""
    try:
        filters.parse(where)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


def read_file(path: str) -> bytes | None:
    """The content of a photo's file; None if it can't be read, or its path now has a link.

    A path in an index has no links. If one of its folders has become a link, the file may lie
    anywhere, and is not read.
    """
    from input_pipeline import photo_limits

    try:
        return photo_limits.read(path) if os.path.realpath(path) == path else None
    except (OSError, ValueError):
        return None


def _in_archive(path: str) -> bool:
    """Whether a photo lies in an archive, judging by the names in its path."""
    return any(map(archives.is_archive, os.path.dirname(path).split("/")))


def _moment(seconds: int) -> str | None:
    """A time as ISO 8601 without a zone; None if it is over 4,000 years from 1970."""
    try:
        return str(np.datetime64(seconds, "s")) if abs(seconds) < 2**37 else None
    except (ValueError, OverflowError):
        return None


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """Says which parameters are not valid, without repeating their values."""
    reasons = [
        f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()
    ]
    return JSONResponse({"detail": "; ".join(dict.fromkeys(reasons))[:1000]}, 422)


async def _full(request: Request, error: Full) -> Response:
    return JSONResponse({"detail": f"{error}; try again soon"}, 503, {"Retry-After": "1"})


async def _failed(request: Request, error: Exception) -> Response:
    """Answers if the index or the model can't be read. Only the log tells the reason."""
    log.warning("%s: %s", request.url.path, re.sub(r"\s+", " ", str(error)))
    return JSONResponse({"detail": "the index can't be read at the moment"}, 503)

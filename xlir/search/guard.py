"""Checks every request before it is answered, and limits its size and time."""

import asyncio
import collections
import dataclasses
import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

import prometheus_client
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Scripts, styles and photos come from the service itself; nothing else is loaded or run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
COOKIE = "xlir-token"
# The names by which a browser on this machine reaches a service that only listens to this machine.
LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
# Paths that answer without a token.
OPEN_PATHS = frozenset({"/healthz"})


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much load a service accepts.

    Attributes:
      body: bytes of a request's body.
      seconds: time limit of a request.
      in_flight: requests at a time, in total.
      of_client: requests at a time, per client address.
      uploads: requests with a body at a time, in total. This limits the memory for bodies.
    """

    body: int = 32_000_000
    seconds: float = 30.0
    in_flight: int = 128
    of_client: int = 32
    uploads: int = 32


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may use a service, and whether they see paths.

    Attributes:
      token: what requests must show, in the header "Authorization: Bearer TOKEN" or in the cookie
        that the page sets. None if no token is needed.
      names: the host names (header Host) under which the service answers; None for all. This
        refuses foreign sites whose names point to this machine (DNS rebinding).
      paths: whether answers contain the paths of photos.
    """

    token: str | None = None
    names: frozenset[str] | None = LOOPBACK_NAMES
    paths: bool = True


class Metrics:
    """The counts of one service, for Prometheus."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "xlir_requests", "Requests.", ["route", "status"], registry=self.registry
        )
        self.seconds = prometheus_client.Histogram(
            "xlir_request_seconds", "Time of requests.", ["route"], registry=self.registry
        )
        self.in_flight = prometheus_client.Gauge(
            "xlir_requests_in_flight", "Requests being answered.", registry=self.registry
        )
        self.batch = prometheus_client.Histogram(
            "xlir_embedding_batch",
            "Requests that are embedded in one call.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.photos = prometheus_client.Gauge(
            "xlir_photos", "Photos in the index.", registry=self.registry
        )

    def text(self) -> bytes:
        """All counts in Prometheus' format."""
        return prometheus_client.generate_latest(self.registry)


class Guard:
    """Middleware: checks, bounds and counts every request, and adds headers to every answer.

    Args:
      app: answers requests that are let through.
      access: who may send requests.
      limits: how much load is accepted.
      metrics: counts the requests.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics):
        self._app, self._access, self._limits, self._metrics = app, access, limits, metrics
        self._clients: collections.Counter[str] = collections.Counter()
        self._uploads = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        start, answer = time.monotonic(), _Answer(send)
        refusal = self._refusal(Request(scope))
        if refusal:
            await refusal(scope, receive, answer.send)
        else:
            await self._bounded(scope, receive, answer)
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, answer.status or 499).inc()
        self._metrics.seconds.labels(route).observe(time.monotonic() - start)

    def _refusal(self, request: Request) -> Response | None:
        """The answer to a request that is not let through, else None."""
        headers, path = request.headers, request.url.path
        if self._access.names is not None and _name(headers) not in self._access.names:
            return _refused(421, "this service does not answer under that host name")
        if path.startswith("/api/") and headers.get("sec-fetch-site") == "cross-site":
            return _refused(403, "other sites may not use this service")
        refusal = self._without_token(request, path) if self._access.token else None
        if refusal:
            return refusal
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._limits.body:
            return _refused(413, _too_large(self._limits.body))
        if path in OPEN_PATHS:
            return None
        full = self._clients.total() >= self._limits.in_flight
        if full or (_has_body(request.scope) and self._uploads >= self._limits.uploads):
            return _refused(503, "too many requests at a time; try again soon", retry=True)
        if self._clients[_client(request.scope)] >= self._limits.of_client:
            return _refused(429, "too many requests at a time from you", retry=True)
        return None

    def _without_token(self, request: Request, path: str) -> Response | None:
        if path in OPEN_PATHS or _shown(request.headers, self._access.token):
            return None
        # A browser sends the token in the address once. From then on, it sends a cookie.
        given = parse_qs(request.url.query).get("token", [""])[0]
        if path == "/" and request.method == "GET" and _equal(given, self._access.token):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(
                COOKIE, _cookie(self._access.token), httponly=True, samesite="lax", path="/"
            )
            return answer
        refusal = _refused(401, "this service needs its token: open /?token=TOKEN")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal

    async def _bounded(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        """Answers within the limits of time and size."""
        client, uploads = _client(scope), _has_body(scope)
        self._clients[client] += 1
        self._uploads += uploads
        self._metrics.in_flight.inc()
        body = _Body(receive, self._limits.body, whole=not uploads)
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, body.receive, answer.send)
        except TimeoutError:
            if answer.status is None:
                code, reason = (
                    (503, "this took too long")
                    if body.whole
                    else (408, "the request arrived too slowly")
                )
                await _refused(code, reason)(scope, receive, answer.send)
        finally:
            self._metrics.in_flight.dec()
            self._uploads -= uploads
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]


class _Answer:
    """Sends an answer, adds `HEADERS` to it, and remembers its status."""

    def __init__(self, send: Send):
        self._send, self.status = send, None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name for name, _ in message.get("headers", ())}
            added = [header for header in HEADERS if header[0] not in present]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await self._send(message)


class _Body:
    """Receives a request's body, up to a limit. `whole` tells whether all of it has arrived."""

    def __init__(self, receive: Receive, limit: int, *, whole: bool):
        self._receive, self._left, self._limit, self.whole = receive, limit, limit, whole

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self._left < 0:
                raise HTTPException(413, _too_large(self._limit))
        return message


def _refused(code: int, reason: str, *, retry: bool = False) -> Response:
    return JSONResponse({"detail": reason}, code, {"Retry-After": "1"} if retry else None)


def _too_large(limit: int) -> str:
    return f"the request is larger than {limit / 1e6:,.0f} MB"


def _name(headers: Headers) -> str:
    """The name in the header Host, without the port."""
    host = headers.get("host", "").lower()
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _client(scope: Scope) -> str:
    return (scope.get("client") or ("",))[0]


def _shown(headers: Headers, token: str) -> bool:
    """Whether a request shows the token."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and _equal(given.strip(), token):
        return True
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return morsel is not None and _equal(morsel.value, _cookie(token))


def _cookie(token: str) -> str:
    """The page's cookie, which does not reveal the token."""
    return hashlib.sha256(f"{COOKIE}:{token}".encode()).hexdigest()


def _equal(given: str, wanted: str) -> bool:
    """Compares in a time that does not depend on where the texts differ."""
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())

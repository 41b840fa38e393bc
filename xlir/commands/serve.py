"""Serve an index: a page to search its photos in any language, and a JSON API.

The page is at http://HOST:PORT/. It searches by texts and by photos, has a slider for the cutoff,
and shows tags of photos in 14 languages (tags need `pip install 'xlir[quickstart]'`). The
description of the API is at /openapi.json, and counts for Prometheus are at /metrics. Photos that
`index` adds while the service runs are found at once. After SIGTERM or Ctrl-C, the service finishes
the requests that are running, and ends.

By default, the service answers only this machine. To serve others, choose an address with --host,
and either --token (to answer those who know it) or --public (to answer all who reach the address).
--public hides the folders of photos. The service speaks HTTP: on networks that others can
read, put a proxy in front of it that speaks HTTPS.

Needs `pip install 'xlir[search,serve]'`; --engine=onnxruntime also `xlir[onnxruntime]`.

Examples:
  python -m xlir.main serve --index=photos.index
  XLIR_TOKEN=SECRET python -m xlir.main serve --index=photos.index --host=0.0.0.0 --port=8080
"""

import importlib.util
import os
import re
import signal
import socket

from absl.flags import FlagValues

from input_pipeline import photo_limits
from xlir.commands import processes
from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
# A shorter token could be guessed.
SHORTEST_TOKEN = 8
# Limits: seconds that requests may still run after SIGTERM, connections at a time, and bytes of a
# request's headers.
FINISHING, CONNECTIONS, HEAD = 30, 200, 32_768


def define(flags: Flags) -> None:
    """Declares the flags."""
    flags.string("index", "Folder of the index.", needed=True)
    flags.integer("port", "Port; 0 for any free one; default: 8000.", least=0, most=65535)
    flags.string("host", "Address to listen on.", default="127.0.0.1")
    flags.string(
        "token",
        "Token that clients must show: browsers open /?token=TOKEN once, programs send the "
        f"header 'Authorization: Bearer TOKEN'. At least {SHORTEST_TOKEN} letters, digits or "
        "'-._~'. Default: $XLIR_TOKEN, which other users of this machine can't see.",
    )
    flags.switch("public", "Answer everyone who reaches the address.")
    flags.engine()


def run(values: FlagValues) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    token = values.token if values.token is not None else os.environ.get("XLIR_TOKEN") or None
    _check(values, token)
    photo_limits.limit()
    from xlir import search

    search.check_installed()
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise FileNotFoundError(f"serving needs {package}: pip install 'xlir[search,serve]'")
    with _listening(values.host, 8000 if values.port is None else values.port) as listener:
        processes.start_jax(values)
        _serve(values, token, listener)


def _check(values: FlagValues, token: str | None) -> None:
    """Refuses contradictory and unsafe flags."""
    if token is not None and not re.fullmatch(rf"[\w.~-]{{{SHORTEST_TOKEN},}}", token, re.ASCII):
        raise UsageError(
            f"the token should have at least {SHORTEST_TOKEN} letters, digits or '-._~'"
        )
    if values.public and token is not None:
        raise UsageError("--public answers everyone, so it takes no token")
    if not (_is_loopback(values.host) or values.public or token):
        raise UsageError(
            f"--host={values.host} can be reached from other machines: add --token=TOKEN, or "
            "--public to answer everyone"
        )


def _is_loopback(host: str) -> bool:
    """Whether an address can be reached only from this machine."""
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that accepts connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise OSError(f"can't listen on {host}, port {port}: {error.strerror}") from error


def _serve(values: FlagValues, token: str | None, listener: socket.socket) -> None:
    import uvicorn

    from xlir.search.guard import LOOPBACK_NAMES, Access, Limits
    from xlir.search.index import Index
    from xlir.search.service import application
    from xlir.search.warming import warming

    index = Index.open(values.index, engine=values.engine)
    index.encoder.encode_text(["compiles the model"])
    local, limits = _is_loopback(values.host), Limits()
    own = LOOPBACK_NAMES | {values.host} if local else None
    access = Access(token, names=None if values.public else own, paths=not values.public)
    if local:
        # All clients have the same address, even those that come through a proxy on this machine.
        limits = Limits(of_client=limits.in_flight)
    config = uvicorn.Config(
        application(index, access, limits),
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=FINISHING,
        h11_max_incomplete_event_size=HEAD,
    )
    host = f"[{values.host}]" if ":" in values.host else values.host
    print(
        f"{index.count():,} photos at http://{host}:{listener.getsockname()[1]}/"
        + ("?token=TOKEN" if token else ""),
        flush=True,
    )
    # Once uvicorn has finished, it raises again the signal that stopped it. Ignore that signal.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    with warming(index.encoder):
        uvicorn.Server(config).run([listener])

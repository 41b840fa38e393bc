"""The folder of everything that can be computed again, and names for what is in it."""

import hashlib
import json
import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Where prepared sets and features live: $XLIR_CACHE, or xlir in the user's cache folder."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "xlir"
    folder = pathlib.Path(os.environ.get("XLIR_CACHE") or default).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def fingerprint(description: object) -> str:
    """A short hash of a JSON-able description."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

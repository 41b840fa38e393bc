"""The folder of everything that can be computed again, and names for what is in it."""

import hashlib
import json
import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Where prepared sets and features live: $XLIR_CACHE, or xlir in the user's cache folder.

    It may be one that can only be read, as long as what is asked for is in it.

    Raises:
      OSError: it is not there, and can't be made.
    """
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "xlir"
    folder = pathlib.Path(os.environ.get("XLIR_CACHE") or default).expanduser()
    make_folder(folder)
    return folder


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder of the cache, and those above it, where it is not there.

    Raises:
      OSError: it can't be made; in one line that says what can be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise not_writable(folder, error) from error


def not_writable(place: pathlib.Path, error: OSError) -> OSError:
    """The error of a place in the cache that can't be written."""
    return type(error)(
        f"the cache can't be written at {place} ({error.strerror or error}); name a folder for it "
        "that can: XLIR_CACHE=DIR"
    )


def fingerprint(description: object) -> str:
    """A short hash of a JSON-able description."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

"""The cache folder, which holds only reproducible files, and fingerprints for their names."""

import hashlib
import json
import os
import pathlib


def cache_folder() -> pathlib.Path:
    """The folder of prepared sets and features: $XLIR_CACHE, or xlir in the user's cache folder.

    A read-only folder works as long as it holds everything that a run needs.

    Raises:
      OSError: the folder does not exist and can't be made.
    """
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "xlir"
    folder = pathlib.Path(os.environ.get("XLIR_CACHE") or default).expanduser()
    make_folder(folder)
    return folder


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder of the cache and its parents, if they do not exist.

    Raises:
      OSError: the folder can't be made. The message, one line, says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise not_writable(folder, error) from error


def not_writable(place: pathlib.Path, error: OSError) -> OSError:
    """The error for a path in the cache that can't be written."""
    return type(error)(
        f"the cache can't be written at {place} ({error.strerror or error}); name a writable "
        "folder for the cache: XLIR_CACHE=DIR"
    )


def fingerprint(description: object) -> str:
    """A short hash of a JSON-able description."""
    text = json.dumps(description, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

"""Search in a collection of photos: what is in it, where it is stored, and how it answers."""

import importlib.util


def check_installed() -> None:
    """Raises FileNotFoundError if the packages that searching needs are not installed."""
    if importlib.util.find_spec("lancedb") is None:
        raise FileNotFoundError("searching needs LanceDB: pip install 'xlir[search]'")

"""Search in collections of photos: finds photos, stores their embeddings, answers queries."""

import importlib.util


def check_installed(package: str = "lancedb", extra: str = "search") -> None:
    """Raises FileNotFoundError if a package from one of xlir's extras is not installed."""
    if importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f"{package} is not installed: pip install 'xlir[{extra}]'")

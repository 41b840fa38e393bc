"""Search in a collection of photos: what is in it, where it is stored, and how it answers."""

import importlib.util


def check_installed(package: str = "lancedb", extra: str = "search") -> None:
    """Raises FileNotFoundError if a package that an extra of xlir brings is not installed."""
    if importlib.util.find_spec(package) is None:
        raise FileNotFoundError(f"{package} is not installed: pip install 'xlir[{extra}]'")

"""Cross-lingual image retrieval: train on English captions, search in other languages."""

__all__ = ["Encoder"]


def __getattr__(name: str):
    """Loads the encoder, and JAX with it, when it is first used."""
    if name == "Encoder":
        from xlir.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

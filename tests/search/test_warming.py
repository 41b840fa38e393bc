"""A service compiles in advance what requests need."""

import threading

import pytest

pytest.importorskip("lancedb")

from xlir.encoder import Encoder  # noqa: E402
from xlir.search.warming import shapes, warming  # noqa: E402


def test_later_batches_compile_nothing(toy_run):
    encoder = Encoder.load(toy_run)
    for embed in shapes(encoder):
        embed()
    compiled = encoder.embedder._embed["text"]
    before = compiled._cache_size()
    assert before > 10
    for size, words in ((1, 1), (3, 20), (17, 9), (64, 31), (64, 200), (33, 2)):
        encoder.encode_text(["rot " * words] * size)
    assert compiled._cache_size() == before


def test_warming_ends_with_the_service(toy_run):
    with warming(Encoder.load(toy_run)) as thread:
        assert thread.is_alive()
    assert thread not in threading.enumerate()


def test_a_broken_model_does_not_stop_the_service(toy_run, monkeypatch, caplog):
    encoder = Encoder.load(toy_run)

    def broken(texts):
        raise ValueError("the weights are damaged")

    monkeypatch.setattr(encoder, "encode_text", broken)
    with warming(encoder) as thread:
        thread.join(20)
    assert "not compiled in advance: the weights are damaged" in caplog.text

"""A service compiles in advance what requests need."""

import threading

import numpy as np
import pytest

pytest.importorskip("lancedb")

from xlir.encoder import Encoder
from xlir.search.batching import embed_together
from xlir.search.warming import shapes, warming


def test_usual_shapes_of_batches_are_compiled(toy_run, monkeypatch):
    encoder, met = Encoder.load(toy_run), set()

    def record(texts):
        for _, batch in encoder.embedder.text_batches(texts):
            met.add(batch["text_ids"].shape)

    monkeypatch.setattr(encoder, "encode_text", record)
    monkeypatch.setattr(encoder, "encode_image", lambda images: None)
    for embed in shapes(encoder):
        embed()
    compiled = set(met)
    assert len(compiled) >= 12

    def zeros(parts):
        return np.zeros((len(parts), 1), np.float32)

    for size in (1, 2, 3, 17, 33, 64):
        for letters in range(1, 30):
            queries = [["x" * letters]] * size
            embed_together(lambda texts: record(texts) or zeros(texts), zeros, queries)
    assert met == compiled


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

"""Embedding on a Ray cluster. Its machines are processes here, and one of them is killed."""

import shutil

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="needs pip install 'xlir[search]'")
pytest.importorskip("ray", reason="needs pip install 'xlir[ray]'")

from xlir.search import fleet, photos
from xlir.search.index import Index


@pytest.fixture
def cluster():
    """A cluster of a head without cores, and two machines with one core each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, machines
    ray.shutdown()
    cluster.shutdown()


def rows(index) -> dict:
    """Path -> the embedding of every row; fails if a photo is in the index twice."""
    found = [
        (row["path"], np.asarray(row["vector"], np.float32))
        for batch in index._store.scan(["path", "vector"])
        for row in batch.to_pylist()
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_shards_name_files_and_archives(small_index):
    found = list(photos.find([small_index / "photos"]))
    shards = list(fleet._shards(iter(found)))
    assert len(shards) == 1
    files, ids = shards[0]
    assert str(small_index / "photos/old.zip") in files
    assert ids == {photo.id for photo in found}


@pytest.mark.slow
def test_a_killed_machine_loses_and_repeats_nothing(small_index, tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(fleet, "SHARD", 3)
    folder = tmp_path / "photos"
    shutil.copytree(small_index / "photos", folder)
    (folder / "broken.jpg").write_bytes(b"no photo")
    index = Index.create(tmp_path / "photos.index", small_index / "photos.index" / "encoder")
    _, machines = cluster
    real, stored, skipped = fleet.embedded, [], []

    def killing(*arguments):
        for number, table in enumerate(real(*arguments)):
            stored.append(len(table))
            if number == 1:
                cluster[0].remove_node(machines[0], allow_graceful=False)
            yield table

    monkeypatch.setattr(fleet, "embedded", killing)
    added = index.add([folder], engine="ray", skip=skipped.append)
    assert (added.new, added.skipped) == (34, 1)
    assert "broken.jpg" in skipped[0]
    assert sum(stored) == 34
    assert len(stored) > 6
    # The same rows as in one process.
    expected, found = rows(Index.open(small_index / "photos.index")), rows(index)
    for path, vector in expected.items():
        moved = path.replace(str(small_index / "photos"), str(folder))
        np.testing.assert_allclose(found.pop(moved), vector, atol=2e-3)
    assert not found
    # Nothing is embedded again.
    stored.clear()
    assert index.add([folder], engine="ray").unchanged == 34
    assert not stored


def test_an_address_without_a_cluster_is_one_line(small_index, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    index = Index.create(tmp_path / "photos.index", small_index / "photos.index" / "encoder")
    with pytest.raises(ValueError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9"):
        index.add([small_index / "photos"], engine="ray")


@pytest.mark.slow
def test_a_machine_that_cannot_embed_is_one_line(small_index, tmp_path, cluster):
    index = Index.create(tmp_path / "photos.index", small_index / "photos.index" / "encoder")
    (tmp_path / "photos.index/encoder/config.json").unlink()
    with pytest.raises(ValueError, match=r"Ray cluster failed: .*config\.json") as error:
        index.add([small_index / "photos"], engine="ray")
    assert "\n" not in str(error.value)
    assert index.count() == 0

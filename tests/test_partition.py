"""How parameters, optimizer state and batches are sharded over meshes."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

import xlir
from configs import flickr8k, muse, quickstart, xlmr
from tests.conftest import REPOSITORY
from xlir import compile, embed, partition, train_step

GOLDEN = pathlib.Path(__file__).parent / "shardings"
CONFIGS = {
    "quickstart": quickstart.get_config,
    "flickr8k": flickr8k.get_config,
    "muse-m3l": lambda: muse.get_config("m3l"),
    **{f"xlmr-{name}": lambda name=name: xlmr.get_config(name) for name in xlmr.VARIANTS},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_how_every_config_lies_on_eight_devices(name):
    """To accept a change, run XLIR_WRITE_GOLDEN=1 pytest tests/test_partition.py and review."""
    table = compile.sharding_table(CONFIGS[name](), 8) + "\n"
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("XLIR_WRITE_GOLDEN"):
        file.write_text(table)
    assert file.read_text() == table


def bytes_of(tree, of=lambda x: x.shape):
    return sum(
        np.prod(of(x), dtype=np.int64) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("name", ["xlmr-base", "xlmr-large", "flickr8k", "muse-m3l"])
def test_eight_devices_hold_an_eighth_each(name):
    """Each device holds an eighth of parameters and optimizer state, plus at most two percent."""
    config = CONFIGS[name]()
    config.mesh.data, config.mesh.fsdp = 1, 8
    graph, parameters, _ = compile.abstract(config)
    mesh = partition.create_mesh(config.mesh)
    layout, _ = train_step.compile_step(config, graph, parameters.trained, mesh)
    held = bytes_of(layout, lambda x: x.sharding.shard_shape(x.shape))
    assert bytes_of(layout) / 8 <= held <= 1.02 * bytes_of(layout) / 8


def test_a_real_run_holds_what_the_table_says():
    """Measures the devices' memory after a step, and compares every array's sharding."""
    config = xlmr.get_config("tiny")
    config.mesh.data, config.mesh.fsdp = 2, 4
    mesh = partition.create_mesh(config.mesh)
    encoder = xlir.Encoder.create(config, mesh=mesh)
    params, frozen = encoder.parameters
    layout, step = train_step.compile_step(config, encoder.embedder.graph, params, mesh)
    batch = {
        "text_ids": np.ones((16, 8), np.int32),
        "text_mask": np.ones((16, 8), bool),
        "image": np.zeros((16, 32, 32, 3), np.uint8),
        "image_id": np.arange(16, dtype=np.int32),
    }
    with jax.set_mesh(mesh):
        state = train_step.first_state(config, params, layout)
        state, _ = step(state, frozen, partition.global_batch(batch, mesh))
    planned = jax.tree.leaves(layout)
    for array, plan in zip(jax.tree.leaves(state), planned, strict=True):
        assert array.sharding.is_equivalent_to(plan.sharding, array.ndim)
        assert {shard.data.shape for shard in array.addressable_shards} == {
            plan.sharding.shard_shape(plan.shape)
        }
    leaves = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1]
    assert any("fsdp" in leaf.sharding.spec for leaf in leaves)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("text_tower.layers.stacked.mlp.fc1.kernel", (12, 768, 3072), (None, None, "fsdp")),
        # 1001 is no multiple of 8, and 768 is; the first axis of a stack is never sharded.
        ("text_tower.layers.stacked.mlp.fc1.kernel", (8, 768, 1001), (None, "fsdp")),
        ("text_tower.layers.stacked.mlp.fc1.kernel", (8, 767, 1001), ()),
        ("text_tower.embedding", (250002, 768), (None, "fsdp")),
        ("text_tower.layers.stacked.mlp.fc1.bias", (12, 3072), ()),
        ("optimizer.0.mu.image_tower.patches.kernel", (768, 768), (None, "fsdp")),
        ("text_head.kernel", (16, 16), ()),  # too small
    ],
)
def test_rules(path, shape, expected):
    mesh = partition.abstract_mesh({"data": 1, "fsdp": 8}, 8)
    assert partition.layout(path, shape, mesh) == PartitionSpec(*expected)


def test_what_can_not_be_split_is_said(caplog):
    mesh = partition.abstract_mesh({"data": 1, "fsdp": 8}, 8)
    tree = {
        "table": jax.ShapeDtypeStruct((1001, 1003), jnp.float32),
        "kernel": jax.ShapeDtypeStruct((1000, 1000), jnp.float32),
    }
    with caplog.at_level("INFO"):
        partition.shardings(tree, mesh)
    assert caplog.messages == [
        "1 arrays (4.0 MB) are not sharded, because no axis is a multiple of 8: table"
    ]


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (2, -1, (2, 4)), (4, 2, (4, 2)), (1, -1, (1, 8))]
)
def test_mesh_shapes(data, fsdp, shape):
    mesh = partition.create_mesh({"data": data, "fsdp": fsdp})
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp")


@pytest.mark.parametrize(("data", "fsdp"), [(3, -1), (2, 2), (-1, -1), (0, 8), (-2, 4), (16, 1)])
def test_meshes_that_do_not_fit(data, fsdp):
    with pytest.raises(ValueError, match=f"config.mesh.data={data}, config.mesh.fsdp={fsdp}"):
        partition.create_mesh({"data": data, "fsdp": fsdp})


class Device:
    """A fake device of a multi-slice TPU, with the attributes that creating a mesh needs."""

    device_kind = "TPU v5 lite"

    def __init__(self, index: int, a_slice: int, platform: str = "tpu"):
        self.platform = platform
        self.id, self.slice_index = index, index // a_slice
        self.process_index = index // 4
        within = index % a_slice
        self.coords, self.core_on_chip = (within % 4, within // 4, 0), 0

    def __repr__(self):
        return f"{self.id} of slice {self.slice_index}"


def test_data_goes_across_the_slices_of_a_tpu():
    devices = [Device(i, 16) for i in range(32)]
    mesh = partition.create_mesh({"data": -1, "fsdp": 8}, devices)
    assert mesh.devices.shape == (4, 8)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == slices[:, :1]).all(), "a gather would cross slices"
    assert {tuple(column) for column in slices.T} == {(0, 0, 1, 1)}
    with pytest.raises(ValueError, match="is not a multiple of the 2 TPU slices"):
        partition.create_mesh({"data": 1, "fsdp": 32}, devices)


def test_hosts_of_gpus_are_no_slices():
    devices = [Device(i, 16, "gpu") for i in range(32)]
    assert partition.create_mesh({"data": 1, "fsdp": 32}, devices).devices.shape == (1, 32)


@pytest.mark.parametrize(("fsdp", "shape"), [(1, (8, 1)), (-1, (1, 8)), (4, (2, 4)), (12, (2, 4))])
def test_a_run_is_evaluated_on_whatever_is_there(fsdp, shape):
    assert partition.fitting_mesh({"data": 3, "fsdp": fsdp}).devices.shape == shape


@pytest.fixture(scope="module")
def one() -> xlir.Encoder:
    """Toy towers on one device."""
    return xlir.Encoder.create(xlmr.get_config("tiny"))


@pytest.mark.parametrize(("rows", "filled"), [(1, 6), (6, 6), (7, 12), (13, 24), (192, 192)])
def test_batches_are_padded_to_a_power_of_two_on_each_device(rows, filled):
    mesh = partition.create_mesh(devices=jax.devices()[:6])
    share = embed.padded_share(np.arange(rows), mesh)
    np.testing.assert_array_equal(share, np.minimum(np.arange(filled), rows - 1))


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_global_batch_keeps_its_rows_in_order_and_none_twice(fsdp):
    mesh = partition.create_mesh({"data": -1, "fsdp": fsdp})
    rows = np.arange(48).reshape(24, 2)
    batch = partition.global_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(batch, rows)
    assert all(shard.data.shape == (3, 2) for shard in batch.addressable_shards)
    np.testing.assert_array_equal(partition.local_rows(24, mesh), np.arange(24))
    with pytest.raises(ValueError, match="25 does not divide over 8 devices"):
        partition.local_rows(25, mesh)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_embeddings_do_not_depend_on_the_mesh(fsdp, one):
    """Inputs are split over all devices, even if their number does not divide."""
    config = xlmr.get_config("tiny")
    texts = [f"caption {'and ' * (i % 5)}{i}" for i in range(37)]
    images = [np.full((32, 32, 3), 6 * i, np.uint8) for i in range(21)]
    images = [Image.fromarray(image) for image in images]
    config.mesh.fsdp = fsdp
    many = xlir.Encoder.create(config, mesh=partition.create_mesh(config.mesh))
    np.testing.assert_allclose(many.encode_text(texts), one.encode_text(texts), atol=1e-6)
    np.testing.assert_allclose(many.encode_image(images), one.encode_image(images), atol=1e-6)
    described = [e.embedder.describe_tower(e.parameters, "text") for e in (many, one)]
    assert described[0] == described[1]


def test_weights_go_to_the_devices_in_parts():
    """Each device receives only its shard of a sharded array."""
    config = xlmr.get_config("tiny")
    mesh = partition.create_mesh({"data": 1, "fsdp": 8})
    encoder = xlir.Encoder.create(config, mesh=mesh)
    embedding = encoder.parameters.trained["text_tower"]["embedding"]
    assert embedding.sharding.spec == PartitionSpec(None, "fsdp")
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(260, 4)}


WITHOUT_TPU = {
    "JAX first": "import jax; import xlir; xlir.Encoder; jax.devices()",
    "xlir first": "import xlir; xlir.Encoder; import jax; jax.devices()",
    "a mesh": "from xlir import partition; partition.create_mesh()",
}


@pytest.mark.parametrize("script", WITHOUT_TPU.values(), ids=WITHOUT_TPU)
def test_libtpu_says_nothing_where_there_is_no_tpu(script):
    """`jax[tpu]` is installed to compile for TPUs, and JAX_PLATFORMS is not set."""
    pytest.importorskip("libtpu")
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize(
    ("platforms", "device_files", "passed_over"),
    [
        (None, {}, True),
        ("tpu,cpu", {}, False),  # chosen by the user, or by JAX because it found a TPU
        (None, {"/dev/accel*": ["/dev/accel0"]}, False),
        (None, {"/dev/vfio/[0-9]*": ["/dev/vfio/0"]}, False),
    ],
)
def test_a_tpu_is_passed_over_only_where_there_is_none(
    platforms, device_files, passed_over, monkeypatch
):
    registered = []
    monkeypatch.setattr(
        "jax.extend.backend.register_backend_factory",
        lambda name, *args, **options: registered.append(name),
    )
    monkeypatch.setattr(partition.glob, "glob", lambda pattern: device_files.get(pattern, []))
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms)
        partition._pass_over_absent_tpu()
    finally:
        jax.config.update("jax_platforms", before)
    assert registered == (["tpu"] if passed_over else [])

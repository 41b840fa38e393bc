"""Compares objectives on meshes of eight devices with one device; memory of chunked losses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs import base
from tests.conftest import REPOSITORY  # noqa: F401  (eight devices are forced there)
from xlir import losses

ROWS, DIM = 32, 24
SHAPES = ((8, 1), (4, 2), (2, 4), (1, 8))
PAIRWISE = ("infonce", "sigmoid")
DENSE = [
    (name, push_apart, 0)
    for name in (*PAIRWISE, "triplet", "patr", "m3l")
    for push_apart in (0.0, 0.3)
]
# On eight devices with four rows each, a chunk has one image of each device, three images of each
# (one is left over for the next chunk), or all of them.
CHUNKED = [(name, 0.0, chunk) for name in PAIRWISE for chunk in (8, 20, 100)]


def mesh_of(shape: tuple[int, int]) -> Mesh:
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch(rows: int = ROWS, scale: float = 12.0):
    """Arguments of an objective; a photo has one row, two (near or far apart), or eight."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(rows, DIM))
    text = image + 1.5 * rng.normal(size=(rows, DIM))
    image_id = np.arange(rows)
    image_id[1] = image_id[0]
    image_id[-1] = image_id[2]
    # All rows of two of eight devices.
    image_id[8:16] = 8
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image)]
    return (
        *(x.astype(np.float32) for x in unit),
        image_id.astype(np.int32),
        np.float32(scale),
        np.float32(-3.0),
    )


@functools.cache
def value_and_gradients(name: str, push_apart: float, chunk: int):
    """The compiled value and gradients with respect to text, image, scale and bias."""
    options = base.get_config().loss
    options.name, options.push_apart, options.chunk = name, push_apart, chunk
    options.margin, options.rho = 0.7, 3.0
    return jax.jit(jax.value_and_grad(losses.build(options), argnums=(0, 1, 3, 4)))


@functools.cache
def on_one_device(name: str, push_apart: float):
    return jax.device_get(value_and_gradients(name, push_apart, 0)(*batch()))


def on_mesh(mesh: Mesh, args):
    """Shards the batch's rows over all devices, and copies scale and bias to each."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    copies = NamedSharding(mesh, PartitionSpec())
    return [jax.device_put(x, rows if np.ndim(x) else copies) for x in args]


def assert_equal(ours, expected):
    (value, gradients), (expected_value, expected_gradients) = ours, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        largest = np.max(np.abs(wanted))
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5 * largest)


# Dense losses do not depend on the mesh, because XLA splits their sums: one mesh with one axis and
# one with two axes are enough. Chunked losses loop over both axes.
CASES = [
    pytest.param(
        *(*case, shape),
        id="-".join(map(str, case)) + "-{}x{}".format(*shape),
        marks=[pytest.mark.slow] if case in DENSE and shape in ((4, 2), (1, 8)) else [],
    )
    for case in DENSE + CHUNKED
    for shape in SHAPES
]


@pytest.mark.parametrize(("name", "push_apart", "chunk", "shape"), CASES)
def test_mesh_equals_one_device(name, push_apart, chunk, shape):
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        args = on_mesh(mesh, batch())
        assert {s.data.shape[0] for s in args[0].addressable_shards} == {ROWS // 8}
        ours = value_and_gradients(name, push_apart, chunk)(*args)
    assert_equal(ours, on_one_device(name, push_apart))


@pytest.mark.parametrize("chunk", [1, 4, 5, 24, ROWS, 100])
@pytest.mark.parametrize("name", PAIRWISE)
def test_chunks_equal_the_whole(name, chunk):
    assert_equal(value_and_gradients(name, 0.0, chunk)(*batch()), on_one_device(name, 0.0))


@pytest.mark.parametrize("chunk", [0, 4])
def test_each_device_counts_the_negatives_of_all(chunk):
    """The tests above would pass if both sides ignored the rows of other devices."""
    whole = on_one_device("infonce", 0.0)[0]
    args = batch()
    part = value_and_gradients("infonce", 0.0, chunk)(*(x[:4] for x in args[:3]), *args[3:])[0]
    assert abs(part - whole) > 0.1 * whole


@pytest.mark.parametrize("scale", [1e-3, 100.0])
@pytest.mark.parametrize("name", PAIRWISE)
def test_chunks_where_the_logits_are_small_or_large(name, scale):
    """At scale 100, the largest in training, exponentials overflow float32."""
    args = batch(scale=scale)
    mesh = mesh_of((4, 2))
    expected = value_and_gradients(name, 0.0, 0)(*args)
    assert_equal(value_and_gradients(name, 0.0, 4)(*args), expected)
    with jax.set_mesh(mesh):
        assert_equal(value_and_gradients(name, 0.0, 4)(*on_mesh(mesh, args)), expected)


@pytest.mark.parametrize("photos", [1, 2])
@pytest.mark.parametrize("name", PAIRWISE)
def test_a_batch_of_few_photos(name, photos):
    """In most chunks, whole rows are masked, or all rows of a device."""
    text, image, image_id, *rest = batch()
    args = (text, image, (image_id * photos // ROWS).astype(np.int32), *rest)
    expected = value_and_gradients(name, 0.0, 0)(*args)
    mesh = mesh_of((2, 4))
    with jax.set_mesh(mesh):
        sharded = value_and_gradients(name, 0.0, 4)(*on_mesh(mesh, args))
    for ours in (value_and_gradients(name, 0.0, 4)(*args), sharded):
        # With only one photo, infonce is zero except for rounding.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, expected
        )


@pytest.mark.parametrize("chunk", [0, 8])
def test_infonce_of_a_solved_batch_is_not_negative(chunk):
    mesh, values = mesh_of((4, 2)), []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        image = generator.normal(size=(ROWS, 512))
        text = image + 0.02 * generator.normal(size=image.shape)
        unit = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
        pairs = [x.astype(np.float32) for x in unit]
        args = (*pairs, np.arange(ROWS, dtype=np.int32), np.float32(100), np.float32(0))
        with jax.set_mesh(mesh):
            values.append(value_and_gradients("infonce", 0.0, chunk)(*on_mesh(mesh, args))[0])
    assert 0 <= min(values) <= max(values) <= 2e-6


def temporary(name: str, chunk: int, rows: int):
    """Bytes of temporary memory for value and gradients, and the compiled program."""
    args = [jnp.zeros(x.shape, x.dtype) for x in batch(rows)]
    compiled = value_and_gradients(name, 0.0, chunk).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


@pytest.mark.parametrize("name", PAIRWISE)
def test_chunks_hold_no_square_matrix(name):
    rows = 2048
    dense, text = temporary(name, 0, rows)
    assert dense >= 4 * rows**2
    assert f"[{rows},{rows}]" in text
    chunked, text = temporary(name, 64, rows)
    assert chunked < 4 * rows**2 / 4
    assert f"[{rows},{rows}]" not in text


@pytest.mark.parametrize("name", PAIRWISE)
def test_only_images_travel(name):
    """Only a chunk of images and all ids are gathered; no texts, and never all images."""
    mesh = mesh_of((4, 2))
    with jax.set_mesh(mesh):
        args = on_mesh(mesh, batch())
        program = value_and_gradients(name, 0.0, 8).lower(*args).compile().as_text()
    found = re.findall(r"= (.*) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program)
    shapes = {kind: set() for _, kind in found}
    for result, kind in found:
        shapes[kind] |= set(re.findall(r"\w+\[[\d,]*\]", result))
    # A chunk is one image per device, gathered along one mesh axis and then along the other.
    floats = {shape for shape in shapes["all-gather"] if shape.startswith("f32")}
    assert floats == {f"f32[2,{DIM}]", f"f32[8,{DIM}]"}
    assert shapes["reduce-scatter"] == {f"f32[2,{DIM}]", f"f32[1,{DIM}]"}
    assert shapes["all-reduce"] <= {"f32[]", f"f32[8,{ROWS // 8}]"}
    assert set(shapes) == {"all-gather", "reduce-scatter", "all-reduce"}

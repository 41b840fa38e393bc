"""`losses.infonce` and `losses.sigmoid` with few logits in memory at a time.

They are partitioned explicitly, with `jax.shard_map`: no device holds the batch x batch matrix.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Embeddings = Float[Array, "batch dim"]
ImageIds = Int[Array, " batch"]
Scalar = Float[Array, ""]
Chunk = Float[Array, "rows columns"]
Chosen = Bool[Array, "rows columns"]


def dot_products(
    x: Float[Array, "rows dim"], y: Float[Array, "columns dim"]
) -> Float[Array, "rows columns"]:
    """The dot product of each row of `x` with each row of `y`, in full float32 precision.

    By default TPUs and GPUs round the operands. At a temperature of 0.01, rounding to bfloat16
    would move a logit by some tenths.
    """
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def with_positives(
    logits: Chunk, positive: Float[Array, " rows"], own: Chosen, counted: Chosen
) -> Chunk:
    """Replaces the logits of positive pairs with `positive`, and masks pairs not `counted`.

    The loss is a log-sum-exp minus `positive`. A log-sum-exp is never below any of its terms, so
    the loss is never negative if `positive` is one of the terms. The logit from the matrix product
    differs from `positive` by a rounding error, because it is summed in another order. When
    training has nearly solved a batch, this error is larger than the loss.
    """
    return jnp.where(own, positive[:, None], jnp.where(counted, logits, -jnp.inf))


def by_device(of_rows: Callable[..., Scalar], *args: Array, chunk: int) -> Scalar:
    """Runs `of_rows` on each device with its rows of the batch, or on all rows without a mesh.

    Args:
      of_rows: (rows of text, image and image_id, scale [, bias], axes=, chunk=) -> the loss over
        the global batch. It communicates with other devices over the mesh axes `axes`; there
        are none without a mesh.
      *args: the arguments of `of_rows`, for the global batch.
      chunk: passed on to `of_rows`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    of_rows = functools.partial(of_rows, axes=mesh.axis_names, chunk=chunk)
    if mesh.empty:
        return of_rows(*args)
    rows, copies = PartitionSpec(mesh.axis_names), PartitionSpec()
    in_specs = tuple(rows if arg.ndim else copies for arg in args)
    return jax.shard_map(of_rows, in_specs=in_specs, out_specs=copies)(*args)


def infonce_by_chunks(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    scale: Scalar,
    *,
    axes: tuple[str, ...],
    chunk: int,
) -> Scalar:
    """`losses.infonce` over the global batch, from this device's rows; see `by_device`."""
    positive = scale * jnp.sum(text * image, axis=-1)

    def log_sums(similarity: Chunk, own: Chosen, counted: Chosen) -> tuple[Array, Array]:
        logits = with_positives(scale * similarity, positive, own, counted)
        return jax.nn.logsumexp(logits, axis=1), jax.nn.logsumexp(logits, axis=0)

    by_row, by_column = _map_chunks(log_sums, text, image, image_id, axes, chunk)
    to_image = jax.nn.logsumexp(by_row, axis=0)
    # [chunks, devices x columns] -> [devices, rows], without the padding.
    rows, devices = len(text), jax.lax.axis_size(axes)
    by_column = by_column.reshape(len(by_column), devices, -1).swapaxes(0, 1)
    by_column = by_column.reshape(devices, -1)[:, :rows]
    # The log-sum-exp over the rows of all devices; subtracting the maximum prevents overflow.
    largest = jax.lax.pmax(jax.lax.stop_gradient(by_column), axes)
    to_text = largest + jnp.log(jax.lax.psum(jnp.exp(by_column - largest), axes))
    # Subtracted row by row, so that no difference is negative.
    of_rows = (to_image - positive) + (to_text[jax.lax.axis_index(axes)] - positive)
    return jax.lax.psum(jnp.sum(of_rows), axes) / (2 * rows * devices)


def sigmoid_by_chunks(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    scale: Scalar,
    bias: Scalar,
    *,
    axes: tuple[str, ...],
    chunk: int,
) -> Scalar:
    """`losses.sigmoid` over the global batch, from this device's rows; see `by_device`."""

    def log_likelihood(similarity: Chunk, own: Chosen, counted: Chosen) -> Scalar:
        logits = scale * similarity + bias
        of_pairs = jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
        return jnp.sum(jnp.where(counted, of_pairs, 0))

    total = jnp.sum(_map_chunks(log_likelihood, text, image, image_id, axes, chunk))
    return -jax.lax.psum(total, axes) / (len(text) * jax.lax.axis_size(axes))


def _map_chunks(
    reduce: Callable[[Chunk, Chosen, Chosen], PyTree],
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    axes: tuple[str, ...],
    chunk: int,
) -> PyTree:
    """Applies `reduce` to this device's rows of `text @ image.T`, one chunk of columns at a time.

    Each device contributes an equal share of a chunk's images, and only images are communicated.
    The backward pass gathers and computes each chunk again, so no device holds the images of the
    whole batch. The gradients of the images are summed over the devices by a reduce-scatter, the
    transpose of the all-gather.

    Args:
      reduce: (similarity, own, counted) -> arrays, for a chunk of columns; `own` is true on the
        diagonal of the global batch, `counted` is true there and for pairs of different photos.
      text, image, image_id: this device's rows of the batch.
      axes: the mesh axes that the rows of the batch are sharded over; empty without a mesh.
      chunk: number of columns at a time, rounded up to a multiple of the number of devices.

    Returns:
      The arrays of all chunks, stacked. Columns are ordered by device. In the last chunk, the last
      columns of each device may be padding, which is not `counted`.
    """
    share = min(-(-chunk // jax.lax.axis_size(axes)), len(image))

    def split(columns: Array, padding: int = 0) -> Array:
        widths = [(0, -len(columns) % share)] + [(0, 0)] * (columns.ndim - 1)
        padded = jnp.pad(columns, widths, constant_values=padding)
        return padded.reshape(-1, share, *columns.shape[1:])

    def of_chunk(chunk: tuple[Array, Array, Array]) -> PyTree:
        images, ids, column = chunk
        own = row[:, None] == column
        counted = own | ((image_id[:, None] != ids) & (column >= 0))
        return reduce(dot_products(text, _gather(images, axes)), own, counted)

    row = jax.lax.axis_index(axes) * len(text) + jnp.arange(len(text))
    ids, column = _gather(split(image_id), axes, 1), _gather(split(row, padding=-1), axes, 1)
    return jax.lax.map(jax.checkpoint(of_chunk), (split(image), ids, column))


def _gather(x: Array, axes: tuple[str, ...], axis: int = 0) -> Array:
    """Concatenates the devices' shards in the order of the batch.

    The mesh axes are gathered one at a time. For a gather over two axes at once, XLA's backward
    pass on TPUs is an all-reduce and a slice, with twice the traffic of a reduce-scatter.
    """
    for name in reversed(axes):
        x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
    return x

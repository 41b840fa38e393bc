"""Training objectives of the dual encoder, as pure functions of a global batch.

Row i of `text` and row i of `image` are a positive pair. `image_id` identifies the photo of a row:
two rows of the same photo are never each other's negatives. The objectives are written as for one
device. Under `jax.jit` with a sharded batch, XLA partitions them, and they are exact over the
*global* batch. Only `infonce` and `sigmoid` with a `chunk` are partitioned explicitly, with
`jax.shard_map`, so that no device holds the batch x batch matrix.

`build` turns `config.loss` into one function; `push_apart` can be added to any objective.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

# Keeps the gradients of distances and quotients finite at distance zero.
EPSILON = 1e-6

PyTree = Any
Embeddings = Float[Array, "batch dim"]
ImageIds = Int[Array, " batch"]
Scalar = Float[Array, ""]
Chunk = Float[Array, "rows columns"]
Chosen = Bool[Array, "rows columns"]


def same_image(image_id: ImageIds) -> Bool[Array, "batch batch"]:
    """True where rows i and j show the same photo, so true on the diagonal."""
    return image_id[:, None] == image_id[None, :]


def dot_products(
    x: Float[Array, "rows dim"], y: Float[Array, "columns dim"]
) -> Float[Array, "rows columns"]:
    """The dot product of each row of `x` with each row of `y`, in full float32 precision.

    By default TPUs and GPUs round the operands. At a temperature of 0.01, rounding to bfloat16
    would move a logit by some tenths.
    """
    return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)


def infonce(
    text: Embeddings, image: Embeddings, image_id: ImageIds, scale: Scalar, *, chunk: int = 0
) -> Scalar:
    """Symmetric cross-entropy over `scale * <text, image>` (CLIP, Radford et al. 2021, fig. 3).

    Args:
      text: unit-length text embeddings.
      image: unit-length image embeddings.
      image_id: the photo of each row; other rows of the same photo are not used as negatives.
      scale: the inverse temperature.
      chunk: number of images that the texts are compared with at a time; 0 for all at once. The
        logits then take the memory of batch x chunk instead of batch x batch elements; the loss
        and its gradient stay the same.

    Returns:
      The mean of the text-to-image and the image-to-text cross-entropy, in nats.
    """
    if chunk:
        return _by_device(_infonce_by_chunks, text, image, image_id, scale, chunk=chunk)
    own = jnp.eye(len(image_id), dtype=bool)
    positive = scale * jnp.sum(text * image, axis=-1)
    logits = scale * dot_products(text, image)
    logits = _with_positives(logits, positive, own, own | ~same_image(image_id))
    to_image = jax.nn.logsumexp(logits, axis=1) - positive
    to_text = jax.nn.logsumexp(logits, axis=0) - positive
    return (jnp.mean(to_image) + jnp.mean(to_text)) / 2


def _with_positives(
    logits: Chunk, positive: Float[Array, " rows"], own: Chosen, counted: Chosen
) -> Chunk:
    """Replaces the logits of positive pairs with `positive`, and masks pairs not `counted`.

    The loss is a log-sum-exp minus `positive`. A log-sum-exp is never below any of its terms, so
    the loss is never negative if `positive` is one of the terms. The logit from the matrix product
    differs from `positive` by a rounding error, because it is summed in another order. When
    training has nearly solved a batch, this error is larger than the loss.
    """
    return jnp.where(own, positive[:, None], jnp.where(counted, logits, -jnp.inf))


def sigmoid(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    scale: Scalar,
    bias: Scalar,
    *,
    chunk: int = 0,
) -> Scalar:
    """Pairwise log-sigmoid of `scale * <text, image> + bias` (SigLIP, Zhai et al. 2023, eq. 1).

    The sum over the pairs is divided by the batch size, as in the paper. Other rows of the same
    photo are not used as negatives. `chunk` is as for `infonce`.
    """
    if chunk:
        return _by_device(_sigmoid_by_chunks, text, image, image_id, scale, bias, chunk=chunk)
    own = jnp.eye(len(image_id), dtype=bool)
    logits = scale * dot_products(text, image) + bias
    log_likelihood = jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
    counted = own | ~same_image(image_id)
    return -jnp.sum(jnp.where(counted, log_likelihood, 0)) / len(image_id)


def _by_device(of_rows: Callable[..., Scalar], *args: Array, chunk: int) -> Scalar:
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


def _infonce_by_chunks(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    scale: Scalar,
    *,
    axes: tuple[str, ...],
    chunk: int,
) -> Scalar:
    positive = scale * jnp.sum(text * image, axis=-1)

    def log_sums(similarity: Chunk, own: Chosen, counted: Chosen) -> tuple[Array, Array]:
        logits = _with_positives(scale * similarity, positive, own, counted)
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


def _sigmoid_by_chunks(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    scale: Scalar,
    bias: Scalar,
    *,
    axes: tuple[str, ...],
    chunk: int,
) -> Scalar:
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


def distance(x: Embeddings, y: Embeddings, metric: str) -> Float[Array, " batch"]:
    """Distance of each row of `x` to the same row of `y`.

    Args:
      x: embeddings, one per row.
      y: the same number of embeddings.
      metric: "euclidean", "squared_euclidean", or "cosine" (one minus the cosine similarity).
    """
    if metric == "cosine":
        return 1 - jnp.sum(_unit(x) * _unit(y), axis=-1)
    squared = jnp.sum(jnp.square(x - y), axis=-1)
    return squared if metric == "squared_euclidean" else jnp.sqrt(squared + EPSILON**2)


def hardest_negative(
    anchors: Embeddings, candidates: Embeddings, image_id: ImageIds, metric: str
) -> Int[Array, " batch"]:
    """For each anchor, the row of the nearest candidate that shows another photo.

    The search is not differentiated: callers compute the distance to the chosen row again, which
    gives the exact gradient of the minimum without a batch x batch backward pass. If the whole
    batch shows one photo, the result is row 0, and `has_negative` is false.
    """
    anchors, candidates = jax.lax.stop_gradient((anchors, candidates))
    if metric == "cosine":
        anchors, candidates = _unit(anchors), _unit(candidates)
    # |a - c|^2 - |a|^2; leaving out |a|^2 does not change the order within a row.
    lengths = jnp.sum(jnp.square(candidates), axis=-1)
    order = lengths[None, :] - 2 * dot_products(anchors, candidates)
    return jnp.argmin(jnp.where(same_image(image_id), jnp.inf, order), axis=1)


def has_negative(image_id: ImageIds) -> Bool[Array, " batch"]:
    """True for each row if the batch has a row of another photo."""
    return ~jnp.all(same_image(image_id), axis=1)


def triplet(
    text: Embeddings, image: Embeddings, image_id: ImageIds, *, margin: float, metric: str
) -> Scalar:
    """`max(0, margin + d(positive) - d(hardest negative))`, the mean of both directions.

    VSE++ (Faghri et al. 2018), eq. 6, with a distance in place of a similarity.
    """
    positive = distance(text, image, metric)
    image_negative = image[hardest_negative(text, image, image_id, metric)]
    text_negative = text[hardest_negative(image, text, image_id, metric)]
    to_image = jax.nn.relu(margin + positive - distance(text, image_negative, metric))
    to_text = jax.nn.relu(margin + positive - distance(image, text_negative, metric))
    return jnp.mean(jnp.where(has_negative(image_id), (to_image + to_text) / 2, 0))


def patr(
    text: Embeddings, image: Embeddings, image_id: ImageIds, *, margin: float, metric: str
) -> Scalar:
    """`d(t, v) + max(0, margin - d(t, v_n))`: the positive-aware triplet ranking loss.

    The baseline of Aggarwal et al. 2021 (their eta is `margin`); text-to-image only.
    """
    negative = image[hardest_negative(text, image, image_id, metric)]
    push = jax.nn.relu(margin - distance(text, negative, metric))
    return jnp.mean(distance(text, image, metric) + jnp.where(has_negative(image_id), push, 0))


def m3l(
    text: Embeddings,
    image: Embeddings,
    image_id: ImageIds,
    *,
    image_weight: float,
    text_weight: float,
    rho: float,
    metric: str,
) -> Scalar:
    """`a1 d(t,v)^rho / d(t,v_n) + a2 d(t,v)^rho / d(t,t_n)` (Aggarwal et al. 2021, M3L).

    `v_n` is the wrong image nearest to the text, and `t_n` is that image's caption: dissimilar
    texts are pushed apart. `image_weight` and `text_weight` are the paper's alpha 1 and 2. Use it
    with a fixed image side; with a trainable image head, all embeddings collapse.
    """
    chosen = hardest_negative(text, image, image_id, metric)
    attract = distance(text, image, metric) ** rho
    apart = image_weight / _at_least_epsilon(distance(text, image[chosen], metric))
    apart += text_weight / _at_least_epsilon(distance(text, text[chosen], metric))
    return jnp.mean(jnp.where(has_negative(image_id), attract * apart, 0))


def push_apart(
    text: Embeddings, image: Embeddings, image_id: ImageIds, *, rho: float, metric: str
) -> Scalar:
    """M3L's text-text term alone, `d(t,v)^rho / d(t,t_n)`, to be added to another objective."""
    return m3l(text, image, image_id, image_weight=0.0, text_weight=1.0, rho=rho, metric=metric)


def build(config: ConfigDict) -> Callable[..., Scalar]:
    """The objective that `config.loss` describes; `xlir.config` checks its fields.

    Returns:
      `objective(text, image, image_id, scale, bias) -> loss`.
    """
    metric, name, chunk = config.metric, config.name, config.chunk
    objectives = {
        "infonce": lambda t, v, ids, scale, bias: infonce(t, v, ids, scale, chunk=chunk),
        "sigmoid": functools.partial(sigmoid, chunk=chunk),
        "triplet": lambda t, v, ids, *_: triplet(t, v, ids, margin=config.margin, metric=metric),
        "patr": lambda t, v, ids, *_: patr(t, v, ids, margin=config.margin, metric=metric),
        "m3l": lambda t, v, ids, *_: m3l(
            t,
            v,
            ids,
            image_weight=config.image_weight,
            text_weight=config.text_weight,
            rho=config.rho,
            metric=metric,
        ),
    }
    if not config.push_apart:
        return objectives[name]

    def objective(text, image, image_id, scale, bias):
        apart = push_apart(text, image, image_id, rho=config.rho, metric=metric)
        return objectives[name](text, image, image_id, scale, bias) + config.push_apart * apart

    return objective


def _unit(x: Embeddings) -> Embeddings:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + EPSILON**2)


def _at_least_epsilon(x: Float[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.maximum(x, EPSILON)

"""The gradient of a loss over the global batch, at once or from microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from xlir.partition import split_rows

PyTree = Any
Batch = dict[str, Array]
Embeddings = tuple[Float[Array, "batch dim"], Float[Array, "batch dim"]]


def value_and_gradient(
    embed: Callable[[PyTree, Batch, Key[Array, ""]], Embeddings],
    loss: Callable[[PyTree, Embeddings], Float[Array, ""]],
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    microbatches: int,
) -> tuple[Float[Array, ""], PyTree]:
    """A loss of the embeddings of a whole batch, and its gradient.

    With microbatches it is the same gradient for a fraction of the activations in memory: the
    batch is embedded part by part, the loss is differentiated with respect to the embeddings, and
    each part is embedded again to carry its share of that gradient to the parameters (GradCache,
    Gao et al. 2021, https://arxiv.org/abs/2101.06983).

    Args:
      embed: (params, rows, key) -> text and image embeddings of these rows.
      loss: (params, embeddings of the whole batch) -> loss; the parameters are for what it has of
        its own, such as the temperature.
      params: what to differentiate by.
      batch: arrays of `batch` rows.
      key: for dropout; each part draws from a key of its own, and twice the same.
      microbatches: parts; they divide the batch. 1 takes it at once.
    """
    if microbatches == 1:
        return jax.value_and_grad(lambda params: loss(params, embed(params, batch, key)))(params)
    parts = jax.tree.map(lambda rows: _split(rows, microbatches), batch)
    keys = jax.random.split(key, microbatches)
    embeddings = jax.lax.map(lambda part: embed(params, *part), (parts, keys))
    value, (gradient, by_embedding) = jax.value_and_grad(loss, argnums=(0, 1))(
        params, jax.tree.map(_join, embeddings)
    )

    def add(total: PyTree, part: tuple) -> tuple[PyTree, None]:
        rows, key, by_embedding = part
        _, pull = jax.vjp(lambda params: embed(params, rows, key), params)
        return jax.tree.map(jnp.add, total, pull(by_embedding)[0]), None

    cotangents = jax.tree.map(lambda rows: _split(rows, microbatches), by_embedding)
    gradient, _ = jax.lax.scan(add, gradient, (parts, keys, cotangents))
    return value, gradient


def _split(rows: Array, parts: int) -> Array:
    """[batch, ...] -> [parts, batch / parts, ...].

    Part i takes rows i, i + parts, ..., so that it lies on all devices that the batch lies on.
    """
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def _join(parts: Array) -> Array:
    """Undoes `_split`."""
    return split_rows(parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]))

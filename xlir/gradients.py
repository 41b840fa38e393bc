"""The gradient of a loss over the global batch, at once or from microbatches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from xlir.partition import split_rows

PyTree = Any
Batch = dict[str, Array]
# Of texts and images; None for images that the loss does not take.
Embeddings = tuple[Float[Array, "batch dim"], Float[Array, "batch dim"] | None]


def value_and_gradient(
    embed: Callable[[PyTree, Batch, Key[Array, ""]], Embeddings],
    loss: Callable[[PyTree, Embeddings], Float[Array, ""]],
    params: PyTree,
    batch: Batch,
    key: Key[Array, ""],
    microbatches: int,
) -> tuple[Float[Array, ""], PyTree]:
    """A loss of the embeddings of a whole batch, and its gradient.

    Microbatches give the same gradient, and their activations take a fraction of the memory. First
    each microbatch is embedded. Then the loss is differentiated with respect to all embeddings.
    Then each microbatch is embedded again, to backpropagate its share of that gradient to the
    parameters (GradCache, Gao et al. 2021, https://arxiv.org/abs/2101.06983).

    Args:
      embed: (params, rows, key) -> text and image embeddings of these rows.
      loss: (params, embeddings of the whole batch) -> loss. It takes the parameters because it
        has some of its own, such as the temperature.
      params: the parameters to differentiate with respect to.
      batch: arrays with one row per example.
      key: for dropout. Each microbatch has its own key, the same both times it is embedded.
      microbatches: number of microbatches, which divides the batch size.
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

    Part i takes rows i, i + parts, ..., so that every part is spread over the batch's devices.
    """
    return rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1)


def _join(parts: Array) -> Array:
    """Undoes `_split`."""
    return split_rows(parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:]))

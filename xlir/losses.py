"""Training objectives of the dual encoder, as pure functions of a global batch.

Row i of `text` and row i of `image` belong together. `image_id` says which photo a row shows:
two rows of one photo are never each other's negatives. Under `jax.jit` with a sharded batch every
objective is exact over the *global* batch, because nothing here knows about devices.

`build` turns `config.loss` into one function; `push_apart` can be added to any objective.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

# Keeps the gradient of a distance and of a quotient finite where the distance is zero.
EPSILON = 1e-6

Embeddings = Float[Array, "batch dim"]
ImageIds = Int[Array, " batch"]
Scalar = Float[Array, ""]


def same_image(image_id: ImageIds) -> Bool[Array, "batch batch"]:
    """True where rows i and j show one photo; true on the diagonal."""
    return image_id[:, None] == image_id[None, :]


def infonce(text: Embeddings, image: Embeddings, image_id: ImageIds, scale: Scalar) -> Scalar:
    """Symmetric cross-entropy over `scale * <text, image>` (CLIP, Radford et al. 2021, fig. 3).

    Args:
      text: unit-length text embeddings.
      image: unit-length image embeddings.
      image_id: the photo of each row; other rows of the same photo are left out of the sums.
      scale: the inverse temperature.

    Returns:
      The mean of the text-to-image and the image-to-text cross-entropy, in nats.
    """
    positive = scale * jnp.sum(text * image, axis=-1)
    false_negative = same_image(image_id) & ~jnp.eye(len(image_id), dtype=bool)
    logits = jnp.where(false_negative, -jnp.inf, scale * (text @ image.T))
    to_image = jax.nn.logsumexp(logits, axis=1) - positive
    to_text = jax.nn.logsumexp(logits, axis=0) - positive
    return (jnp.mean(to_image) + jnp.mean(to_text)) / 2


def sigmoid(
    text: Embeddings, image: Embeddings, image_id: ImageIds, scale: Scalar, bias: Scalar
) -> Scalar:
    """Pairwise log-sigmoid of `scale * <text, image> + bias` (SigLIP, Zhai et al. 2023, eq. 1).

    Summed over the pairs and divided by the batch size, as in the paper; pairs of the same photo
    other than the row's own are left out.
    """
    own = jnp.eye(len(image_id), dtype=bool)
    logits = scale * (text @ image.T) + bias
    log_likelihood = jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
    counted = own | ~same_image(image_id)
    return -jnp.sum(jnp.where(counted, log_likelihood, 0)) / len(image_id)


def distance(x: Embeddings, y: Embeddings, metric: str) -> Float[Array, " batch"]:
    """Distance of each row of `x` to the same row of `y`.

    Args:
      x: one embedding a row.
      y: as many embeddings.
      metric: "euclidean", "squared_euclidean", or "cosine" (one minus the cosine similarity).
    """
    if metric == "cosine":
        return 1 - jnp.sum(_unit(x) * _unit(y), axis=-1)
    squared = jnp.sum(jnp.square(x - y), axis=-1)
    return squared if metric == "squared_euclidean" else jnp.sqrt(squared + EPSILON**2)


def hardest_negative(
    anchors: Embeddings, candidates: Embeddings, image_id: ImageIds, metric: str
) -> Int[Array, " batch"]:
    """For each anchor the row of the nearest candidate that shows another photo.

    Nothing is differentiated here: callers compute the distance to the chosen row anew, which
    gives the exact gradient of the minimum without a batch x batch backward pass. Where the whole
    batch shows one photo the answer is row 0, and `has_negative` is false.
    """
    anchors, candidates = jax.lax.stop_gradient((anchors, candidates))
    if metric == "cosine":
        anchors, candidates = _unit(anchors), _unit(candidates)
    # |a - c|^2 less |a|^2, which does not change the order within a row.
    order = jnp.sum(jnp.square(candidates), axis=-1)[None, :] - 2 * (anchors @ candidates.T)
    return jnp.argmin(jnp.where(same_image(image_id), jnp.inf, order), axis=1)


def has_negative(image_id: ImageIds) -> Bool[Array, " batch"]:
    """True for rows whose batch shows at least one other photo."""
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

    `n` is the wrong image nearest to the text, and `t_n` is that image's caption: dissimilar
    texts are pushed apart. `image_weight` and `text_weight` are the paper's alpha 1 and 2.
    Meant for a fixed image side; with a trainable image head it collapses.
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
    """The objective that `config.loss` describes.

    Returns:
      `objective(text, image, image_id, scale, bias) -> loss`.

    Raises:
      ValueError: the objective or the metric is unknown.
    """
    metric, name = config.metric, config.name
    if metric not in ("euclidean", "squared_euclidean", "cosine"):
        raise ValueError(
            f"config.loss.metric is {metric!r}; known: euclidean, squared_euclidean, cosine"
        )
    objectives = {
        "infonce": lambda t, v, ids, scale, bias: infonce(t, v, ids, scale),
        "sigmoid": sigmoid,
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
    if name not in objectives:
        raise ValueError(f"config.loss.name is {name!r}; known: {', '.join(objectives)}")
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

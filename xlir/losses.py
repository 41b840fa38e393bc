"""Training objectives of the dual encoder, as pure functions of a global batch.

Row i of `text` and row i of `image` are a positive pair. `image_id` identifies the photo of a row:
two rows of the same photo are never each other's negatives. The objectives are written as for one
device. Under `jax.jit` with a sharded batch, XLA partitions them, and they are exact over the
*global* batch. Only `infonce` and `sigmoid` with a `chunk` are partitioned explicitly: see
`loss_chunks.py`.

`build` turns `config.loss` into one function; `push_apart` and `distill` can be added to any
objective.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from xlir.loss_chunks import (
    Embeddings,
    ImageIds,
    Scalar,
    by_device,
    dot_products,
    infonce_by_chunks,
    sigmoid_by_chunks,
    with_positives,
)

# Keeps the gradients of distances and quotients finite at distance zero.
EPSILON = 1e-6


def same_image(image_id: ImageIds) -> Bool[Array, "batch batch"]:
    """True where rows i and j show the same photo, so true on the diagonal."""
    return image_id[:, None] == image_id[None, :]


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
        return by_device(infonce_by_chunks, text, image, image_id, scale, chunk=chunk)
    own = jnp.eye(len(image_id), dtype=bool)
    positive = scale * jnp.sum(text * image, axis=-1)
    logits = scale * dot_products(text, image)
    logits = with_positives(logits, positive, own, own | ~same_image(image_id))
    to_image = jax.nn.logsumexp(logits, axis=1) - positive
    to_text = jax.nn.logsumexp(logits, axis=0) - positive
    return (jnp.mean(to_image) + jnp.mean(to_text)) / 2


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
        return by_device(sigmoid_by_chunks, text, image, image_id, scale, bias, chunk=chunk)
    own = jnp.eye(len(image_id), dtype=bool)
    logits = scale * dot_products(text, image) + bias
    log_likelihood = jax.nn.log_sigmoid(jnp.where(own, logits, -logits))
    counted = own | ~same_image(image_id)
    return -jnp.sum(jnp.where(counted, log_likelihood, 0)) / len(image_id)


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


def distill(
    text: Embeddings,
    teacher: Embeddings,
    image_id: ImageIds,
    *,
    metric: str,
    temperature: float,
    chunk: int = 0,
) -> Scalar:
    """How far text embeddings are from those of a teacher, another model's text side.

    Training on the texts that the teacher reads, and on their translations, moves its embeddings
    to a text tower that knows more languages (Reimers and Gurevych 2020,
    https://arxiv.org/abs/2004.09813; M-CLIP, Carlsson et al. 2022,
    https://aclanthology.org/2022.lrec-1.739).

    Args:
      text: text embeddings.
      teacher: the teacher's embeddings of the same rows, of unit length.
      image_id: the photo (or the line) of each row, as for `infonce`.
      metric: "mse" (squared difference, the mean over rows and dimensions), "cosine" (one minus the
        cosine similarity, the mean over rows) or "contrastive" (`infonce` between `text`, scaled to
        unit length, and `teacher`).
      temperature: the fixed temperature of "contrastive".
      chunk: as for `infonce`; only for "contrastive".
    """
    if metric == "mse":
        return jnp.mean(jnp.square(text - teacher))
    if metric == "cosine":
        return jnp.mean(distance(text, teacher, "cosine"))
    return infonce(_unit(text), teacher, image_id, jnp.float32(1 / temperature), chunk=chunk)


def has_teacher(config: ConfigDict) -> bool:
    """Whether the objective that `config.loss` describes takes a teacher's embeddings."""
    return config.name == "distill" or config.distill > 0


def sides(config: ConfigDict) -> tuple[str, ...]:
    """The sides whose embeddings the objective that `config.loss` describes takes."""
    texts_only = config.name == "distill" and not config.push_apart
    return ("text",) if texts_only else ("text", "image")


def build(config: ConfigDict) -> Callable[..., Scalar]:
    """The objective that `config.loss` describes; `xlir.config` checks its fields.

    Returns:
      `objective(text, image, image_id, scale, bias, teacher=None) -> loss`. `image` may be None if
      `sides` leaves it out; `teacher` has the teacher's embeddings if `has_teacher`.
    """
    metric, chunk = config.metric, config.chunk
    options = {"margin": config.margin, "metric": metric}
    weights = {"image_weight": config.image_weight, "text_weight": config.text_weight}
    objectives = {
        "infonce": lambda t, v, ids, scale, bias: infonce(t, v, ids, scale, chunk=chunk),
        "sigmoid": functools.partial(sigmoid, chunk=chunk),
        "triplet": lambda t, v, ids, *_: triplet(t, v, ids, **options),
        "patr": lambda t, v, ids, *_: patr(t, v, ids, **options),
        "m3l": lambda t, v, ids, *_: m3l(t, v, ids, rho=config.rho, metric=metric, **weights),
    }
    # The weight of the teacher's term, which "distill" alone has.
    taught = 1.0 if config.name == "distill" else config.distill

    def objective(text, image, image_id, scale, bias, teacher=None):
        terms = []
        if config.name in objectives:
            terms.append(objectives[config.name](text, image, image_id, scale, bias))
        if config.push_apart:
            apart = push_apart(text, image, image_id, rho=config.rho, metric=metric)
            terms.append(config.push_apart * apart)
        if taught:
            by_teacher = distill(
                text,
                teacher,
                image_id,
                metric=config.distill_metric,
                temperature=config.distill_temperature,
                chunk=chunk,
            )
            terms.append(taught * by_teacher)
        return sum(terms[1:], terms[0])

    return objective


def _unit(x: Embeddings) -> Embeddings:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + EPSILON**2)


def _at_least_epsilon(x: Float[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.maximum(x, EPSILON)

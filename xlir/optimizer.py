"""The Optax optimizer: AdamW with clipping, a schedule, and a learning rate for each tower."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from xlir import losses
from xlir.models import registry


def schedule(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to `optimizer.learning_rate`, then a cosine to zero at `steps`."""
    options = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup_steps,
        decay_steps=max(config.steps, options.warmup_steps + 1),
    )


def build(config: ConfigDict) -> optax.GradientTransformation:
    """The transformation that turns gradients of the trainable parameters into updates.

    Frozen towers are not trainable, so they have no optimizer state; nor has the image head if the
    loss takes no images: it stays as it is. Weight decay applies to matrices, but not to biases,
    norms or the temperature.
    """
    options, rate = config.optimizer, schedule(config)

    def adamw(factor: float, layer_decay: float = 1.0) -> optax.GradientTransformation:
        transformation = optax.adamw(
            lambda step: factor * rate(step),
            b1=options.b1,
            b2=options.b2,
            weight_decay=options.weight_decay,
            mask=decays,
        )
        if layer_decay == 1.0:
            return transformation
        return optax.chain(
            transformation,
            optax.stateless(
                lambda updates, _: jax.tree.map(
                    lambda update, scale: update * scale,
                    updates,
                    layer_scales(updates, layer_decay),
                )
            ),
        )

    factors = {
        f"{side}_tower": (config[side].learning_rate_factor, config[side].layer_decay)
        for side in ("text", "image")
        if not config[side].frozen
    }
    groups = {name: adamw(*factor) for name, factor in (factors | {"heads": (1.0,)}).items()}
    if "image" not in losses.sides(config.loss):
        groups["image_head"] = optax.set_to_zero()
    per_tower = optax.partition(
        groups,
        lambda params: {
            name: jax.tree.map(lambda _, name=name: name if name in groups else "heads", tree)
            for name, tree in params.items()
        },
    )
    if not options.clip_norm:
        return per_tower
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), per_tower)


def decays(params: Any) -> Any:
    """Which parameters weight decay applies to: matrices, but not biases, norms or temperature.

    Parameters of stacked layers have an additional first axis (see `transformer.Layers`).
    """
    return jax.tree.map_with_path(
        lambda path, x: x.ndim > (2 if "stacked" in _names(path) else 1), params
    )


def layer_scales(params: Any, decay: float) -> Any:
    """Layer-wise learning rate decay: a factor on the tower's rate for each parameter.

    As in BEiT (Bao et al. 2021, https://arxiv.org/abs/2106.08254): the factor is 1 above the last
    layer, `decay` in the last layer, `decay`^2 in the layer below it, and so on down to the
    embeddings. In a tower without repeated layers, it is 1 everywhere.

    Args:
      params: a tower's parameters. Those of layers are under `stacked` (the first axis is over
        the layers) or under `blocks` and the layer's number.
      decay: the factor between a layer and the layer below it.
    """
    depths = [
        x.shape[0] if "stacked" in names else int(names[names.index("blocks") + 1]) + 1
        for names, x in ((_names(path), x) for path, x in jax.tree.leaves_with_path(params))
        if "stacked" in names or "blocks" in names
    ]
    depth, below_layers = max(depths, default=0), registry.below_layers()

    def scale(path: tuple, x: Any) -> Any:
        names = _names(path)
        if "stacked" in names:
            powers = decay ** (depth - jnp.arange(depth, dtype=jnp.float32))
            return powers.reshape(depth, *(1,) * (x.ndim - 1))
        if "blocks" in names:
            return decay ** (depth - int(names[names.index("blocks") + 1]))
        return decay ** (depth + 1) if depth and below_layers.intersection(names) else 1.0

    return jax.tree.map_with_path(scale, params)


def _names(path: tuple) -> list[str]:
    """The keys of a path in a tree."""
    return [str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path]

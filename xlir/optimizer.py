"""Configuration -> Optax: AdamW with clipping, a schedule, and a rate for each tower."""

import jax
import optax
from ml_collections import ConfigDict


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

    Frozen towers are not among its parameters, so they hold no optimizer state. Matrices decay;
    biases, norms and the temperature do not.
    """
    options, rate = config.optimizer, schedule(config)

    def adamw(factor: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: factor * rate(step),
            b1=options.b1,
            b2=options.b2,
            weight_decay=options.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )

    factors = {
        f"{side}_tower": config[side].learning_rate_factor
        for side in ("text", "image")
        if not config[side].frozen
    }
    per_tower = optax.partition(
        {name: adamw(factor) for name, factor in (factors | {"heads": 1.0}).items()},
        lambda params: {
            name: jax.tree.map(lambda _, name=name: name if name in factors else "heads", tree)
            for name, tree in params.items()
        },
    )
    if not options.clip_norm:
        return per_tower
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), per_tower)

"""The training loop."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from input_pipeline import datasets, loader, text
from xlir import data, evaluate, gradients, losses, optimizer, partition
from xlir.checkpoint import Checkpoints
from xlir.encoder import Encoder, read_config
from xlir.metric_log import MetricLog, Progress
from xlir.models import towers

log = logging.getLogger(__name__)

PyTree = Any
Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a training step changes: a checkpoint holds it whole.

    Attributes:
      step: steps taken.
      params: trainable parameters, a pure tree of arrays.
      optimizer: Optax's state for them.
      ema: their exponential moving average, or None.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    ema: PyTree | None

    def items(self) -> dict[str, PyTree]:
        """The items of a checkpoint; the step is the checkpoint's name."""
        items = {"params": self.params, "optimizer": self.optimizer, "ema": self.ema}
        return {name: tree for name, tree in items.items() if tree is not None}

    @property
    def best_params(self) -> PyTree:
        """What is evaluated: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains, resuming where a checkpoint is found, and evaluates the best checkpoint at the end.

    Raises:
      FileNotFoundError: data or weights are not at hand; the message says how to get them.
      ValueError: the configuration is not usable, is not the one that `workdir` was started with,
        or the loss or its gradient is not finite.
    """
    _check_start(config, workdir)
    mesh = partition.create_mesh()
    partition.check_batch_size(config.data.batch_size, mesh, config.data.microbatches)
    training = data.training_photos(config)
    captions = _flat(training.captions)
    encoder = _open(config, workdir, captions)
    validation = evaluate.Evaluator(encoder, data.validation_set(config), data.feature_cache())
    cached = evaluate.frozen_features(
        encoder, "training", captions, training, training.fingerprint, data.feature_cache()
    )
    _center(encoder, cached)
    batches = loader.Batches(
        loader.Order(
            config.seed, [len(captions) for captions in training.captions], config.data.batch_size
        ),
        _reader(training, captions, encoder, cached),
        config.steps,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    transformation = optimizer.build(config)
    state = jax.device_put(init_state(encoder, transformation), partition.replicated(mesh))
    encoder.frozen = jax.device_put(encoder.frozen, partition.replicated(mesh))
    train_step = jax.jit(make_train_step(encoder, transformation), donate_argnums=0)
    trained = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    log.info("trained parameters:\n%s", trained)

    # Only now: a start that failed leaves no folder that insists on its configuration.
    if not (workdir / "config.json").exists() and jax.process_index() == 0:
        encoder.save(workdir)
    with Checkpoints(workdir) as checkpoints:
        state = _resume(state, checkpoints)
        with contextlib.closing(MetricLog(workdir, int(state.step))) as metric_log:
            _loop(state, train_step, batches, encoder, validation, checkpoints, metric_log, mesh)
    finish(workdir)


def finish(workdir: pathlib.Path) -> None:
    """Evaluates the best checkpoint of a run on its test set; writes results and pictures."""
    encoder = Encoder.load(workdir)
    for test_set in data.test_sets(encoder.config):
        evaluate.report(encoder, test_set, workdir, data.feature_cache())


def _reader(
    photos: datasets.CaptionedImages,
    captions: list[str],
    encoder: Encoder,
    cached: dict[str, np.ndarray],
) -> loader.Read:
    """What reads the rows of a batch: features of frozen towers, raw input of others."""
    length, seed = encoder.config.text.max_length, encoder.config.seed

    decoders = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def decode(row: int, key: list[int]) -> np.ndarray:
        return encoder.decode(photos[row], row, np.random.default_rng(key))

    def read(
        image_rows: np.ndarray, caption_rows: np.ndarray, step: int, places: np.ndarray
    ) -> loader.Batch:
        rows = {"text": caption_rows, "image": image_rows}
        batch = {f"{side}_features": array[rows[side]] for side, array in cached.items()}
        if "text" not in cached:
            ids = encoder.tokenizer([captions[row] for row in caption_rows], max_length=length)
            batch["text_ids"], batch["text_mask"] = text.pad(ids, length)
        if "image" not in cached:
            keys = [[seed, step, place] for place in places.tolist()]
            batch["image"] = np.stack(list(decoders.map(decode, image_rows.tolist(), keys)))
        return batch | {"image_id": photos.image_ids[image_rows].astype(np.int32)}

    return read


def _center(encoder: Encoder, cached: dict[str, np.ndarray]) -> None:
    """Gives heads that take off the training set's mean that mean."""
    for side, array in cached.items():
        if encoder.config[side].head == "center":
            mean = np.mean(array, axis=0, dtype=np.float64).astype(np.float32)
            encoder.params[f"{side}_head"]["mean"].set_value(jnp.asarray(mean))


def _flat(captions: list[list[str]]) -> list[str]:
    return [caption for of_one_image in captions for caption in of_one_image]


def init_state(encoder: Encoder, transformation: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params = nnx.to_pure_dict(encoder.params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=transformation.init(params),
        ema=jax.tree.map(jnp.copy, params) if encoder.config.optimizer.ema else None,
    )


def make_train_step(
    encoder: Encoder, transformation: optax.GradientTransformation
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """A pure function `(state, frozen, batch) -> state, metrics`, to be compiled once.

    Everything random in it is drawn from a key folded from the step, and every row of the batch
    counts in the loss wherever it lies: the numbers do not depend on the mesh.
    """
    config, graph = encoder.config, encoder.graph
    objective = losses.build(config.loss)
    rate = optimizer.schedule(config)

    def train_step(state: TrainState, frozen: nnx.State, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def embed(params: PyTree, rows: Batch, key: Key[Array, ""]) -> gradients.Embeddings:
            model = nnx.merge(graph, params, frozen)
            text_key, image_key = jax.random.split(key)
            text = model.encode_text(rows, rngs=nnx.Rngs(dropout=text_key))
            return text, model.encode_image(rows, rngs=nnx.Rngs(dropout=image_key))

        def loss_of(params: PyTree, embeddings: gradients.Embeddings) -> Float[Array, ""]:
            model = nnx.merge(graph, params, frozen)
            return objective(*embeddings, batch["image_id"], model.scale, model.bias[...])

        loss, gradient = gradients.value_and_gradient(
            embed, loss_of, state.params, batch, key, config.data.microbatches
        )
        updates, opt_state = transformation.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "temperature": 1 / nnx.merge(graph, state.params, frozen).scale,
            "learning_rate": rate(state.step),
        }
        ema = _average(config.optimizer.ema, state.ema, params, state.step)
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def _average(decay: float, ema: PyTree | None, params: PyTree, step: Int[Array, ""]):
    """The next moving average; early on it forgets faster, or it would keep the initial values."""
    if ema is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def _check_start(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses what would fail later, or would continue another run."""
    starts = not (workdir / "config.json").exists()
    if lacking := data.missing(config) + (towers.missing(config) if starts else []):
        raise FileNotFoundError("\n".join(lacking))
    if starts:
        return
    started_with = read_config(workdir)
    given = ConfigDict(json.loads(json.dumps(config.to_dict())))
    differing = sorted(_differences(started_with.to_dict(), given.to_dict()))
    if differing:
        raise ValueError(
            f"{workdir} was started with another configuration; it differs in "
            f"{', '.join(differing)}. Use another --workdir, or the old values to resume"
        )


def _open(config: ConfigDict, workdir: pathlib.Path, captions: list[str]) -> Encoder:
    """The run's encoder: as it was saved, or a new one where the run starts."""
    if (workdir / "config.json").exists():
        return Encoder.open(workdir)
    return Encoder.create(config, captions)


def _differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """`config.a.b (old -> new)` for each field that differs."""
    found = []
    for name in old.keys() | new.keys():
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}.{name}")
        elif before != after:
            found.append(f"{prefix}.{name} ({before!r} -> {after!r})")
    return found


def _resume(state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state of the latest checkpoint, or the given one where there is none."""
    step = checkpoints.latest_step()
    if step is None:
        return state
    log.info("resuming from step %d", step)
    return TrainState(
        step=jax.device_put(jnp.int32(step), state.step.sharding),
        **{"ema": None, **checkpoints.restore(step, state.items())},
    )


def _loop(
    state: TrainState,
    train_step: Callable,
    batches: loader.Batches,
    encoder: Encoder,
    validation: evaluate.Evaluator,
    checkpoints: Checkpoints,
    metric_log: MetricLog,
    mesh: jax.sharding.Mesh,
) -> None:
    """Trains from the state's step to the last; validates and saves on the way."""
    config = encoder.config
    first = int(state.step)
    progress = Progress(first, config.steps, config.data.batch_size)
    stream = loader.iterate(batches, first_step=first, prefetch=config.data.prefetch)
    for step, batch in enumerate(stream, start=first + 1):
        state, metrics = train_step(state, encoder.frozen, partition.global_batch(batch, mesh))
        last = step == config.steps
        evaluates = step % config.eval_every == 0 or last
        if evaluates or step % config.log_every == 0:
            values = {name: float(value) for name, value in metrics.items()}
            _check_finite(step, values)
            speed = progress.lap(step)
            log.info(
                "step %*d/%d  loss %.4f  %s examples/s  %s left",
                *(len(str(config.steps)), step, config.steps, values["loss"]),
                *(f"{speed:,.0f}", progress.remaining(step, speed)),
            )
            metric_log.write(step, values | {"examples_per_second": speed})
        if evaluates:
            encoder.replace_params(jax.tree.map(jnp.copy, state.best_params))
            encoder.step = step
            results = validation()
            score = evaluate.score(results)
            log.info("step %d  validation: %s", step, evaluate.headline(results))
            metric_log.write(step, evaluate.scalars(results))
            checkpoints.save(step, state.items(), score)
            progress.skip()


def _check_finite(step: int, values: dict[str, float]) -> None:
    """Raises ValueError where training has diverged, before anything is saved."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise ValueError(
                f"the {name} at step {step} is {values[name]}: training diverged, and the "
                "checkpoints saved before are untouched. Lower config.optimizer.learning_rate or "
                "set config.optimizer.clip_norm, and start in a new --workdir"
            )

"""The training loop."""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import math
import os
import pathlib
import re
import signal
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from input_pipeline import datasets, loader, text
from xlir import data, evaluate, gradients, losses, optimizer, partition
from xlir.checkpoint import Checkpoints
from xlir.encoder import Encoder, read_config
from xlir.metric_log import MetricLog, Progress
from xlir.models import dual_encoder, towers

log = logging.getLogger(__name__)

PyTree = Any
Batch = dict[str, Array]


@runtime_checkable
class Model(Protocol):
    """What a training step takes of an `Encoder`; for compiling, shapes are enough."""

    config: ConfigDict
    graph: nnx.GraphDef
    params: nnx.State
    frozen: nnx.State


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a training step changes: a checkpoint holds it whole.

    A tree of the same form may hold shapes or shardings in the arrays' places.

    Attributes:
      step: steps taken, an int32.
      params: trainable parameters, a pure tree of arrays.
      optimizer: Optax's state for them.
      ema: their exponential moving average, or None.
    """

    step: PyTree
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


class Stopped(Exception):
    """The run was asked to end before its last step, and has saved where it is."""


def train(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains, resuming where a checkpoint is found, and evaluates the best checkpoint at the end.

    Raises:
      FileNotFoundError: data or weights are not at hand; the message says how to get them.
      ValueError: the configuration is not usable, is not the one that `workdir` was started with,
        or the loss or its gradient is not finite.
      Stopped: SIGTERM, as it comes before a preemption, has ended the run early.
    """
    # The first process may be about to write it while another looks.
    starts = not partition.agree_minimum((workdir / "config.json").exists())
    _check_start(config, workdir, starts)
    mesh = partition.create_mesh(config.mesh)
    partition.check_batch_size(config.data.batch_size, mesh, config.data.microbatches)
    training = data.training_photos(config)
    captions = _flat(training.captions)
    encoder = Encoder.create(config, captions, mesh) if starts else Encoder.open(workdir, mesh)
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
        partition.local_rows(config.data.batch_size, mesh),
    )
    transformation = optimizer.build(config)
    layout, train_step = compile_step(encoder, transformation, mesh)
    trained = parameter_overview.get_parameter_overview(
        nnx.to_pure_dict(encoder.params), include_stats=False
    )
    log.info("trained parameters:\n%s", trained)

    # Only now: a start that failed leaves no folder that insists on its configuration.
    if starts:
        encoder.save(workdir)
        _check_seen(workdir)
    with (
        jax.set_mesh(mesh),
        _Termination() as termination,  # until what it has had saved is written
        Checkpoints(workdir) as checkpoints,
    ):
        state = _first_state(encoder, transformation, layout, checkpoints)
        written = workdir if jax.process_index() == 0 else None
        with (
            contextlib.closing(MetricLog(written, int(state.step))) as metric_log,
            _Profile(config.profile.steps, workdir) as profile,
        ):
            _loop(
                state,
                train_step,
                batches,
                encoder,
                validation,
                checkpoints,
                metric_log,
                termination,
                profile,
            )
    finish(workdir, mesh)


def finish(workdir: pathlib.Path, mesh: Mesh) -> None:
    """Evaluates the best checkpoint of a run on its test set; writes results and pictures."""
    encoder = Encoder.load(workdir, mesh=mesh)
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
    # Ids may be of 64 bits, and those of a batch have 32: photos are numbered anew.
    _, image_id = np.unique(photos.image_ids, return_inverse=True)
    image_id = image_id.astype(np.int32)
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
        return batch | {"image_id": image_id[image_rows]}

    return read


def _center(encoder: Encoder, cached: dict[str, np.ndarray]) -> None:
    """Gives heads that take off the training set's mean that mean."""
    for side, array in cached.items():
        if encoder.config[side].head == "center":
            mean = np.mean(array, axis=0, dtype=np.float64).astype(np.float32)
            encoder.params[f"{side}_head"]["mean"].set_value(jnp.asarray(mean))


def _flat(captions: list[list[str]]) -> list[str]:
    return [caption for of_one_image in captions for caption in of_one_image]


def init_state(
    params: PyTree, config: ConfigDict, transformation: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=transformation.init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else None,
    )


def initial_state(
    encoder: Encoder, transformation: optax.GradientTransformation, layout: TrainState
) -> TrainState:
    """The state before the first step, each device's part made by itself.

    It takes the memory of the encoder's parameters, and the encoder has its.
    """
    make = jax.jit(
        lambda params: init_state(params, encoder.config, transformation),
        out_shardings=jax.tree.map(lambda x: x.sharding, layout),
        donate_argnums=0,
    )
    state = make(nnx.to_pure_dict(encoder.params))
    encoder.replace_params(state.params)
    return state


def compile_step(
    encoder: Model, transformation: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Callable]:
    """How the state lies on the mesh, and the training step, compiled when it is first called.

    Returns:
      A tree of shapes with their shardings, and `(state, frozen, batch) -> state, metrics`, which
      takes the state's memory for the next one.
    """
    config = encoder.config
    shapes = jax.eval_shape(
        lambda params: init_state(params, config, transformation), nnx.to_pure_dict(encoder.params)
    )
    shardings = partition.shardings(shapes, mesh)
    step = jax.jit(
        make_train_step(encoder, transformation),
        donate_argnums=0,
        out_shardings=(shardings, partition.replicated(mesh)),
    )
    return partition.with_shardings(shapes, shardings), step


def make_train_step(
    encoder: Model, transformation: optax.GradientTransformation
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
        params = dual_encoder.clipped(optax.apply_updates(state.params, updates))
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


def _check_start(config: ConfigDict, workdir: pathlib.Path, starts: bool) -> None:
    """Refuses what would fail later, or would continue another run."""
    if lacking := data.missing(config) + (towers.missing(config) if starts else []):
        raise FileNotFoundError("\n".join(lacking))
    if starts:
        return
    # Through JSON, in which a tuple is a list.
    started_with, given = (json.loads(c.to_json()) for c in (read_config(workdir), config))
    differing = sorted(_differences(started_with, given))
    if differing:
        raise ValueError(
            f"{workdir} was started with another configuration; it differs in "
            f"{', '.join(differing)}. Use another --workdir, or the old values to resume"
        )


def _check_seen(workdir: pathlib.Path) -> None:
    """Raises ValueError where not all processes see the folder that the first one has written."""
    partition.wait_for_all()
    for _ in range(60):  # what a network's file system may take
        if (workdir / "config.json").exists():
            break
        time.sleep(1)
    if not partition.agree_minimum((workdir / "config.json").exists()):
        raise ValueError(f"--workdir={workdir} has to be a folder that all processes see")


# A run may go on elsewhere, in more or less memory: what it learns does not depend on these. (From
# other microbatches dropout draws other masks.)
FREE = re.compile(
    r"config\.(mesh\..*|profile\..*|log_every|data\.(prefetch|microbatches)|loss\.chunk|.*\.remat)"
)


def _differences(old: dict, new: dict, prefix: str = "config") -> list[str]:
    """`config.a.b (old -> new)` for each field that differs and has to be the same."""
    found = []
    for name in old.keys() | new.keys():
        before, after = old.get(name, "absent"), new.get(name, "absent")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}.{name}")
        elif before != after and not FREE.fullmatch(f"{prefix}.{name}"):
            found.append(f"{prefix}.{name} ({before!r} -> {after!r})")
    return found


def _first_state(
    encoder: Encoder,
    transformation: optax.GradientTransformation,
    layout: TrainState,
    checkpoints: Checkpoints,
) -> TrainState:
    """The state of the latest checkpoint, from whatever mesh, or that before the first step."""
    step = checkpoints.latest_step()
    if step is None:
        return initial_state(encoder, transformation, layout)
    log.info("resuming from step %d", step)
    number = partition.place({"step": np.int32(step)}, encoder.mesh)["step"]
    state = TrainState(step=number, **{"ema": None, **checkpoints.restore(step, layout.items())})
    encoder.replace_params(state.params)
    return state


def _loop(
    state: TrainState,
    train_step: Callable,
    batches: loader.Batches,
    encoder: Encoder,
    validation: evaluate.Evaluator,
    checkpoints: Checkpoints,
    metric_log: MetricLog,
    termination: "_Termination",
    profile: "_Profile",
) -> None:
    """Trains from the state's step to the last; validates and saves on the way."""
    config = encoder.config
    first, metrics = int(state.step), None
    progress = Progress(first, config.steps, config.data.batch_size)
    stream = loader.iterate(batches, first_step=first, prefetch=config.data.prefetch)
    for step in range(first + 1, config.steps + 1):
        with progress.timed("data"):
            batch = partition.global_batch(next(stream), encoder.mesh)
        profile.before(step)
        before = metrics
        state, metrics = train_step(state, encoder.frozen, batch)
        # No more than one step ahead: each holds its batch on the devices.
        jax.block_until_ready(before)
        profile.after(step, metrics)
        last = step == config.steps
        evaluates = step % config.eval_every == 0 or last
        if evaluates or step % config.log_every == 0:
            values = {name: float(value) for name, value in metrics.items()}
            _check_finite(step, values)
            speed = progress.lap(step)
            log.info(
                "step %*d/%d  loss %.4f  %s examples/s  %s left",
                *(len(str(config.steps)), step, config.steps, values["loss"]),
                *(f"{speed['examples_per_second']:,.0f}", progress.remaining(step)),
            )
            metric_log.write(step, values | speed)
        if evaluates:
            # The step after this one takes their memory, but not before it is needed no more.
            encoder.replace_params(state.best_params)
            encoder.step = step
            with progress.timed("evaluation"):
                results = validation()
            log.info("step %d  validation: %s", step, evaluate.headline(results))
            metric_log.write(step, evaluate.scalars(results))
            with progress.timed("save"):
                checkpoints.save(step, state.items(), evaluate.score(results))
            progress.skip()
        if termination.asked() and not last:
            _check_finite(step, {name: float(value) for name, value in metrics.items()})
            if not evaluates:
                checkpoints.save(step, state.items())
            raise Stopped(f"stopped by SIGTERM after step {step}, which is saved")


class _Termination(contextlib.AbstractContextManager):
    """Whether SIGTERM has come, to any of the processes: for all at the same step."""

    def __enter__(self) -> "_Termination":
        self._came, self._calls = False, 0
        # JAX listens from the start where it was told that there may be several processes.
        self._jax_listens = jax.distributed.is_initialized()
        if not self._jax_listens:
            signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        # What comes later has nothing to save.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, *_: object) -> None:
        self._came = True

    def asked(self) -> bool:
        """Whether to end after this step; every process has to ask after every step."""
        # JAX waits for a number that is one more than the largest it has seen, from 0.
        self._calls += 1
        if self._jax_listens:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._came


class _Profile(contextlib.AbstractContextManager):
    """A trace of the steps that `config.profile.steps` names, in `<workdir>/profile`."""

    def __init__(self, steps: tuple[int, int], workdir: pathlib.Path):
        self._first, self._last = steps
        self._folder, self._traces = workdir / "profile", False
        self._first *= jax.process_index() == 0  # the first process's devices are like the others

    def __exit__(self, *exc_info: object) -> None:
        if self._traces:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Is called before a step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._traces = True

    def after(self, step: int, outputs: PyTree) -> None:
        """Is called when a step was sent off."""
        if self._traces and step >= self._last:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._traces = False
            log.info("steps %d to %d are traced in %s", self._first, self._last, self._folder)


def _check_finite(step: int, values: dict[str, float]) -> None:
    """Raises ValueError where training has diverged, before anything is saved."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise ValueError(
                f"the {name} at step {step} is {values[name]}: training diverged, and the "
                "checkpoints saved before are untouched. Lower config.optimizer.learning_rate or "
                "set config.optimizer.clip_norm, and start in a new --workdir"
            )

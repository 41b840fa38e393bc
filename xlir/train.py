"""The training loop."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
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

from input_pipeline import loader, tokenizers
from input_pipeline.datasets.captioned_images import CaptionedImages
from xlir import data, evaluate, gradients, losses, optimizer, partition
from xlir import workdir as run_folder
from xlir.checkpoint import Checkpoints
from xlir.config import check_config
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


def train(config: ConfigDict, workdir: pathlib.Path, *, accept_changed_data: bool = False) -> None:
    """Trains, resuming where a checkpoint is found, and evaluates the best checkpoint at the end.

    Args:
      config: see configs/base.py.
      workdir: the run's folder.
      accept_changed_data: resume also where the data are not those that the run was started with.

    Raises:
      FileNotFoundError: data or weights are not at hand; the message says how to get them.
      ValueError: the configuration is not usable, or is not the one that `workdir` was started
        with, or the data are not; another process is training in `workdir`; or the loss or its
        gradient is not finite.
      Stopped: a signal, as it comes before a preemption, has ended the run early.
    """
    check_config(config)
    with run_folder.Lock(workdir):
        mesh = _train(config, workdir, accept_changed_data)
        finish(config, workdir, mesh)


def _train(config: ConfigDict, workdir: pathlib.Path, accept_changed_data: bool) -> Mesh:
    """Trains to the last step; returns the mesh."""
    # The first process may be about to write it while another looks.
    starts = not partition.agree_minimum(run_folder.is_run(workdir))
    _check_start(config, workdir, starts)
    mesh = partition.create_mesh(config.mesh)
    partition.check_batch_size(config.data.batch_size, mesh, config.data.microbatches)
    training, validation_set = data.training_photos(config), data.validation_set(config)
    captions = _flat(training.captions)
    data.check_batch_size(config, len(captions))
    learned_from = {
        "photos": len(training),
        "captions": len(captions),
        "fingerprint": training.fingerprint,
        "validation": validation_set.fingerprint,
    }
    if not starts:
        run_folder.check_data(workdir, learned_from, accept_changes=accept_changed_data)
    encoder = Encoder.create(config, captions, mesh) if starts else Encoder.open(workdir, mesh)
    validation = evaluate.Evaluator(encoder, validation_set, data.feature_cache())
    cached = evaluate.frozen_features(
        encoder, "training", captions, training.images, training.fingerprint, data.feature_cache()
    )
    _center(encoder, cached)
    batches = loader.Batches(
        loader.Sampler(
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
        run_folder.check_data(workdir, learned_from, accept_changes=True)
        encoder.save(workdir)
        run_folder.check_seen(workdir)
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
    return mesh


def finish(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> None:
    """Evaluates the best checkpoint on the test sets of `config`; writes results and pictures."""
    encoder = Encoder.load(workdir, mesh=mesh)
    for test_set in data.test_sets(config):
        evaluate.report(encoder, test_set, workdir, data.feature_cache())


def _reader(
    photos: CaptionedImages,
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
        return encoder.decode(photos.images[row], row, np.random.default_rng(key))

    def read(
        image_rows: np.ndarray, caption_rows: np.ndarray, step: int, places: np.ndarray
    ) -> loader.Batch:
        rows = {"text": caption_rows, "image": image_rows}
        batch = {f"{side}_features": array[rows[side]] for side, array in cached.items()}
        if "text" not in cached:
            ids = encoder.tokenizer([captions[row] for row in caption_rows], max_length=length)
            batch["text_ids"], batch["text_mask"] = tokenizers.pad(ids, length)
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
        towers.abstract_model(config)
        return
    run_folder.check_unchanged(read_config(workdir), config, workdir)


def _first_state(
    encoder: Encoder,
    transformation: optax.GradientTransformation,
    layout: TrainState,
    checkpoints: Checkpoints,
) -> TrainState:
    """The state of the latest checkpoint, from whatever mesh, or that before the first step."""
    if not checkpoints.steps():
        return initial_state(encoder, transformation, layout)
    step, items = checkpoints.restore(layout.items())
    log.info("resuming from step %d", step)
    number = partition.place({"step": np.array(step, np.int32)}, encoder.mesh)["step"]
    state = TrainState(step=number, **{"ema": None, **items})
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
            raise Stopped(f"stopped by {termination.signal} after step {step}, which is saved")


class _Termination(contextlib.AbstractContextManager):
    """Whether a signal has asked this run to end: all processes learn it at the same step.

    SIGTERM comes before a preemption, SIGHUP when a connection is lost, SIGUSR1 when a batch
    system's time is nearly up. A signal that is ignored, as `nohup` does with SIGHUP, stays so.

    Attributes:
      signal: the name of the one that came to this process; SIGTERM where it came to another.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def __enter__(self) -> "_Termination":
        self._came, self._calls, self.signal = False, 0, signal.SIGTERM.name
        # JAX listens to SIGTERM from the start where it was told that there may be several
        # processes; other signals are handed on to it as that one.
        self._jax_listens = jax.distributed.is_initialized()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # What comes later has nothing to save.
        for number in self.SIGNALS[self._jax_listens :]:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, _: object) -> None:
        self._came, self.signal = True, signal.Signals(number).name
        if self._jax_listens:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to end after this step; every process has to ask after every step."""
        # JAX waits for a number that is one more than the largest it has seen, from 0.
        self._calls += 1
        # Before the first step there is nothing to save, and reading its batch and compiling may
        # take minutes: until then a signal ends the process at once.
        if self._calls == 1:
            for number in self.SIGNALS[self._jax_listens :]:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._note)
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

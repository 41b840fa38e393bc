"""The training loop."""

import contextlib
import dataclasses
import logging
import math
import pathlib
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from input_pipeline import loader
from input_pipeline.test_sets.retrieval_set import CLASSIFICATION, RETRIEVAL, RetrievalSet
from xlir import (
    batches,
    data,
    evaluate,
    evaluate_classification,
    initial,
    machine,
    partition,
    results,
    train_step,
)
from xlir import workdir as run_folder
from xlir.checkpoint import Checkpoints
from xlir.config import check_config
from xlir.embed import Parameters, averaged, start_of
from xlir.encoder import Encoder
from xlir.metric_log import MetricLog, Progress
from xlir.models import towers
from xlir.profiling import Profile
from xlir.report import writer
from xlir.teacher import Teacher, check_teacher
from xlir.termination import Termination
from xlir.train_step import TrainState, TrainStep

log = logging.getLogger(__name__)

PyTree = Any


class Stopped(Exception):
    """A signal stopped the run before its last step; its checkpoint has been saved."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a training run that do not change from step to step.

    Attributes:
      config: see configs/base.py.
      mesh: the devices.
      frozen: the parameters that are not trained.
      start: the trained parameters before the first step, if `config.average` needs them.
      layout: a tree of the state's shapes and shardings.
      step: the compiled training step.
      batches: this process's share of every global batch.
      validation: evaluates parameters on the validation set.
    """

    config: ConfigDict
    mesh: Mesh
    frozen: PyTree
    start: PyTree
    layout: TrainState
    step: TrainStep
    batches: loader.Batches
    validation: evaluate.Evaluator


def train(config: ConfigDict, workdir: pathlib.Path, *, accept_changed_data: bool = False) -> None:
    """Trains, or resumes from the latest checkpoint; then evaluates the best checkpoint.

    Args:
      config: see configs/base.py.
      workdir: the run's folder.
      accept_changed_data: resume even if the data have changed since the run started.

    Raises:
      FileNotFoundError: data or weights are missing; the message says how to get them.
      ValueError: the configuration is invalid; it or the data differ from those that `workdir`
        was started with; another process is training in `workdir`; or the loss or its gradient is
        not finite.
      Stopped: a signal ended the run early, for example before a preemption.
    """
    config = initial.resolve(config, workdir)
    check_config(config)
    with run_folder.Lock(workdir):
        mesh = _train(config, workdir, accept_changed_data)
        finish(config, workdir, mesh)


def finish(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh) -> None:
    """Evaluates the best checkpoint on the test sets of `config`; writes results and a report."""
    encoder = Encoder.load(workdir, mesh=mesh)
    found = [
        evaluate.report(encoder, test_set, workdir, data.feature_cache())
        for test_set in data.own_test_sets(config, RETRIEVAL)
    ]
    for test_set in data.own_test_sets(config, CLASSIFICATION):
        evaluate_classification.report(encoder, test_set, workdir, data.feature_cache())
    if jax.process_index() == 0:
        writer.write_at_end(writer.Run(workdir, config, encoder.step, found))


def _train(config: ConfigDict, workdir: pathlib.Path, accept_changed_data: bool) -> Mesh:
    """Trains to the last step; returns the mesh."""
    # All processes must agree: the first may write config.json while another checks for it.
    starts = not partition.agree_minimum(run_folder.is_run(workdir))
    _check_start(config, workdir, starts)
    mesh = partition.create_mesh(config.mesh)
    partition.check_batch_size(config.data.batch_size, mesh, config.data.microbatches)
    photos, validation_set = data.training_photos(config), data.validation_set(config)
    captions = data.count_captions(photos)
    data.check_batch_size(config, captions)
    learned_from = {
        "photos": len(photos),
        "captions": captions,
        "fingerprint": photos.fingerprint,
        "validation": validation_set.fingerprint,
    }
    teacher = None
    if config.teacher:
        teacher = Teacher(config.teacher, mesh, data.feature_cache())
        learned_from["teacher"] = teacher.fingerprint
    if not starts:
        run_folder.check_data(workdir, learned_from, accept_changes=accept_changed_data)
        encoder = Encoder.open(workdir, mesh, config)
    else:
        encoder = Encoder.create(config, data.captions_of(photos), mesh)
    run, params = _prepare(encoder, photos, validation_set, teacher)
    # Saved only now, so that a failed start does not tie the folder to its configuration.
    if starts:
        run_folder.check_data(workdir, learned_from, accept_changes=True)
        encoder.save(workdir)
        run_folder.check_seen(workdir)
    with (
        jax.set_mesh(mesh),
        Termination() as termination,  # outermost: it must outlast the saving of checkpoints
        Checkpoints(workdir) as checkpoints,
    ):
        state = _first_state(run, params, checkpoints)
        del encoder, params, teacher  # the state has its own copies
        written = workdir if jax.process_index() == 0 else None
        with (
            contextlib.closing(MetricLog(written, int(state.step))) as metric_log,
            Profile(config.profile.steps, workdir) as profile,
        ):
            trains = int(state.step) < config.steps
            _loop(run, state, checkpoints, metric_log, termination, profile)
            if trains:
                machine.record(workdir)
    return mesh


def _check_start(config: ConfigDict, workdir: pathlib.Path, starts: bool) -> None:
    """Raises an error if files are missing or the folder belongs to another configuration."""
    check_teacher(config)
    if lacking := data.missing(config) + (towers.missing(config) if starts else []):
        raise FileNotFoundError("\n".join(lacking))
    if starts:
        specs = towers.describe_published(config, initial.specs(config))
        towers.abstract_model(config, specs)
        return
    run_folder.check_unchanged(run_folder.read_config(workdir), config, workdir)


def _prepare(
    encoder: Encoder,
    photos: data.TrainingData,
    validation_set: RetrievalSet,
    teacher: Teacher | None,
) -> tuple[Run, PyTree]:
    """The inputs of the training loop, and the initial parameters."""
    config, mesh, embedder = encoder.config, encoder.mesh, encoder.embedder
    cache = data.feature_cache()
    lessons = teacher.embed(data.for_teacher(photos)) if teacher else None
    images = None
    if teacher and not data.has_photos(config):
        english = validation_set.images
        images = teacher.embed(english)[np.arange(len(english))]
    validation = evaluate.Evaluator(encoder, validation_set, cache, images)
    sampler = batches.sampler(config, photos)
    read, features = batches.reader(encoder, photos, sampler, lessons)
    params = _centered(config, encoder.parameters.trained, features, mesh)
    places = partition.local_rows(config.data.batch_size, mesh)
    layout, step = train_step.compile_step(config, embedder.graph, params, mesh)
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    log.info("trained parameters:\n%s", overview)
    frozen = encoder.parameters.frozen
    # A resumed run reads them from its folder, which holds the towers as they were at the start.
    start = start_of(config, params)
    share = loader.Batches(sampler, read, config.steps, places)
    return Run(config, mesh, frozen, start, layout, step, share, validation), params


def _centered(
    config: ConfigDict, params: PyTree, features: dict[str, np.ndarray], mesh: Mesh
) -> PyTree:
    """Sets the training set's mean in heads that subtract it; returns all parameters."""
    for side, array in features.items():
        if config[side].head == "center" and side not in initial.continued(config):
            mean = np.mean(array, axis=0, dtype=np.float64).astype(np.float32)
            params = params | {f"{side}_head": partition.shard({"mean": mean}, mesh)}
    return params


def _first_state(run: Run, params: PyTree, checkpoints: Checkpoints) -> TrainState:
    """The state of the latest checkpoint, or the initial state, on the run's mesh."""
    if not checkpoints.steps():
        return train_step.first_state(run.config, params, run.layout)
    step, items = checkpoints.restore(run.layout.items())
    log.info("resuming from step %d", step)
    number = partition.shard({"step": np.array(step, np.int32)}, run.mesh)["step"]
    return TrainState(step=number, **{"ema": None, **items})


def _loop(
    run: Run,
    state: TrainState,
    checkpoints: Checkpoints,
    metric_log: MetricLog,
    termination: Termination,
    profile: Profile,
) -> None:
    """Trains from the state's step to the last step; validates and saves at intervals."""
    config = run.config
    first, metrics = int(state.step), None
    progress = Progress(first, config.steps, config.data.batch_size)
    stream = loader.iterate(run.batches, first_step=first, prefetch=config.data.prefetch)
    for step in range(first + 1, config.steps + 1):
        with progress.timed("data"):
            batch = partition.global_batch(batches.without_counts(next(stream), progress), run.mesh)
        profile.before(step)
        before = metrics
        state, metrics = run.step(state, run.frozen, batch)
        # Queue at most one step ahead, because each queued step holds its batch on the devices.
        jax.block_until_ready(before)
        profile.after(step, metrics)
        last = step == config.steps
        validates = last or step % config.eval_every == 0
        saves = validates or (config.save_every > 0 and step % config.save_every == 0)
        if validates or step % config.log_every == 0:
            values = _finite(step, metrics)
            speed = progress.lap(step) | batches.total_counts(progress)
            log.info(
                "step %*d/%d  loss %.4f  %s examples/s  %s left",
                *(len(str(config.steps)), step, config.steps, values["loss"]),
                *(f"{speed['examples_per_second']:,.0f}", progress.remaining(step)),
            )
            metric_log.write(step, values | speed)
        score = None
        if validates:
            with progress.timed("evaluation"):
                params = averaged(state.best_params, run.start, config.average)
                found = run.validation(Parameters(params, run.frozen), step)
                del params
            log.info("step %d  validation: %s", step, results.headline(found))
            metric_log.write(step, results.scalars(found))
            score = results.score(found)
        stops = termination.asked() and not last
        if saves or stops:
            _finite(step, metrics)
            with progress.timed("save"):
                checkpoints.save(step, state.items(), score)
        if stops:
            raise Stopped(f"stopped by {termination.signal} after step {step}, which is saved")


def _finite(step: int, metrics: dict[str, Array]) -> dict[str, float]:
    """The metrics of a step as numbers.

    Raises:
      ValueError: training has diverged, so the state must not be saved.
    """
    values = {name: float(value) for name, value in metrics.items()}
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(values[name]):
            raise ValueError(
                f"the {name} at step {step} is {values[name]}: training diverged, and the "
                "checkpoints saved before are untouched. Lower config.optimizer.learning_rate or "
                "set config.optimizer.clip_norm, and start in a new --workdir"
            )
    return values

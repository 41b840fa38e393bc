"""The training step and its state, from a configuration and a model's structure."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from xlir import gradients, losses, optimizer, partition
from xlir.models import dual_encoder

PyTree = Any
Batch = dict[str, Array]
# (state, frozen parameters, batch) -> the next state, and metrics.
TrainStep = Callable[
    ["TrainState", PyTree, Batch], tuple["TrainState", dict[str, Float[Array, ""]]]
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The training state that a step updates and a checkpoint saves.

    The fields may also hold shapes or shardings instead of arrays.

    Attributes:
      step: steps taken, an int32.
      params: trainable parameters, a pure tree of arrays.
      optimizer: Optax's state for `params`.
      ema: the exponential moving average of `params`, or None.
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
        """The parameters to evaluate: the moving average if the run keeps one."""
        return self.params if self.ema is None else self.ema


def init_state(config: ConfigDict, params: PyTree) -> TrainState:
    """The state before the first step; it shares no arrays with `params`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.copy, params),
        optimizer=optimizer.build(config).init(params),
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema else None,
    )


def first_state(config: ConfigDict, params: PyTree, layout: TrainState) -> TrainState:
    """The state before the first step; each device creates its own shard.

    Args:
      config: see configs/base.py.
      params: the initial parameters, on the mesh; they are copied, not donated.
      layout: the state's shapes and shardings, from `compile_step`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, layout)
    return jax.jit(lambda params: init_state(config, params), out_shardings=shardings)(params)


def compile_step(
    config: ConfigDict, graph: nnx.GraphDef, params: PyTree, mesh: Mesh
) -> tuple[TrainState, TrainStep]:
    """The sharding of the state, and the training step, which is compiled on its first call.

    Args:
      config: see configs/base.py.
      graph: the model's structure, from `embed.split`.
      params: the trained parameters, or their shapes.
      mesh: the devices.

    Returns:
      The state's shapes with their shardings, and the step. The step deletes the state that it is
      given, and the next state reuses its memory.
    """
    shapes = jax.eval_shape(lambda params: init_state(config, params), params)
    shardings = partition.shardings(shapes, mesh)
    step = jax.jit(
        make_train_step(config, graph),
        donate_argnums=0,
        out_shardings=(shardings, partition.replicated(mesh)),
    )
    return partition.with_shardings(shapes, shardings), step


def make_train_step(config: ConfigDict, graph: nnx.GraphDef) -> TrainStep:
    """The training step of a model, a pure function.

    Its random numbers depend only on the seed and the step, and the loss does not depend on which
    device holds a row: the results do not depend on the mesh.
    """
    transformation = optimizer.build(config)
    objective, sides = losses.build(config.loss), losses.sides(config.loss)
    rate = optimizer.schedule(config)

    def train_step(state: TrainState, frozen: PyTree, batch: Batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def embed(params: PyTree, rows: Batch, key: Key[Array, ""]) -> gradients.Embeddings:
            model = nnx.merge(graph, params, frozen)
            text_key, image_key = jax.random.split(key)
            text = model.encode_text(rows, rngs=nnx.Rngs(dropout=text_key))
            if "image" not in sides:
                return text, None
            return text, model.encode_image(rows, rngs=nnx.Rngs(dropout=image_key))

        def loss_of(params: PyTree, embeddings: gradients.Embeddings) -> Float[Array, ""]:
            model = nnx.merge(graph, params, frozen)
            ids, teacher = batch["image_id"], batch.get("teacher")
            return objective(*embeddings, ids, model.scale, model.bias[...], teacher)

        loss, gradient = gradients.value_and_gradient(
            embed, loss_of, state.params, batch, key, config.data.microbatches
        )
        updates, opt_state = transformation.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params = dual_encoder.clipped(params, config.loss)
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
    """The next moving average; a lower decay early in training makes the initial values fade."""
    if ema is None:
        return None
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)

"""Starting a run from another run's model: `config.init`.

A side whose `tower` is empty continues the other run's side: its tower, its head and, for texts,
its tokenizer. If both sides do, the temperature and the bias continue too.
"""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from xlir import workdir as run_folder
from xlir.embed import SIDES, Embedder, Parameters
from xlir.models import dual_encoder, pretrained, towers
from xlir.models.family import TowerSpec

# The fields of a side that determine its model's structure and input, and continue with it. The
# other fields say how the side is trained.
STRUCTURE = {
    "text": ("pooling", "head", "hidden", "max_length", "prefix"),
    "image": ("pooling", "head", "hidden", "size", "crop"),
}


def continued(config: ConfigDict) -> list[str]:
    """The sides that continue those of `config.init`."""
    return [side for side in SIDES if config.init and not config[side].tower]


def resolve(config: ConfigDict, workdir: pathlib.Path | None = None) -> ConfigDict:
    """The configuration with the structure of continued sides filled in.

    The embedding's width and normalisation are those of the other run as well. If both sides
    continue, so are the temperature and the bias, which bound the learned temperature.

    Args:
      config: the configuration that was given; without `init` it is returned as it is.
      workdir: the folder of the new run. Once it holds the run, the fields come from there, so
        that the run resumes even if the folder of `init` has gone.

    Raises:
      FileNotFoundError: `init` is not the folder of a run.
      ValueError: its configuration is damaged.
    """
    if not config.init:
        return config
    started = workdir is not None and run_folder.is_run(workdir)
    source = run_folder.read_config(workdir) if started else _read(config)
    config, sides = config.copy_and_resolve_references(), continued(config)
    for side in sides:
        config[side].update({name: source[side][name] for name in STRUCTURE[side]})
    config.update(embedding_dim=source.embedding_dim, normalize=source.normalize)
    if len(sides) == len(SIDES):
        config.loss.update(temperature=source.loss.temperature, bias=source.loss.bias)
    return config


def specs(config: ConfigDict) -> dict[str, TowerSpec]:
    """The specs of continued towers, by side.

    Raises:
      FileNotFoundError, ValueError: a file of `init` is missing or damaged.
    """
    folder = pathlib.Path(config.init)
    return {
        side: towers.read_spec(side, run_folder.tower_folder(folder, side) / run_folder.SPEC_FILE)
        for side in continued(config)
    }


def tower(options: ConfigDict, spec: TowerSpec, weights: Mapping[str, np.ndarray]) -> nnx.Module:
    """A continued tower.

    Args:
      options: the new run's `config.text` or `config.image`.
      spec: the other run's spec.
      weights: the other run's weights of the tower, by dotted path.
    """
    module = pretrained.abstract(functools.partial(towers.create, spec, options))
    pretrained.merge(module, weights)
    return module


def merge_heads(
    model: dual_encoder.DualEncoder, config: ConfigDict, source: Embedder, parameters: Parameters
) -> None:
    """Sets the heads of continued sides; if both continue, also the temperature and the bias."""
    sides = continued(config)
    for side in sides:
        head = f"{side}_head"
        pretrained.merge(getattr(model, head), source.weights(parameters, head))
    if len(sides) == len(SIDES):
        other = nnx.merge(source.graph, *parameters)
        for name in ("log_scale", "bias"):
            getattr(model, name).set_value(getattr(other, name).get_value())


def _read(config: ConfigDict) -> ConfigDict:
    try:
        return run_folder.read_config(pathlib.Path(config.init))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config.init: {error}") from error

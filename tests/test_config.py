"""The check of configurations, which precedes all work: every field with odd values."""

import copy
import json
import math

import pytest

import xlir
from configs import base, flickr8k, muse, quickstart, xlmr
from tests.runs import run_main
from xlir import train, workdir
from xlir.config import FIELDS, check_config
from xlir.models import towers
from xlir.workdir import read_config, upgrade

CONFIGS = {
    "quickstart": quickstart.get_config(),
    **{
        f"{module.__name__}:{variant}": module.get_config(variant)
        for module in (flickr8k, muse, xlmr)
        for variant in module.VARIANTS
    },
}
VALUES = {
    "0": 0,
    "-1": -1,
    "0.0": 0.0,
    "1.0": 1.0,
    "2": 2,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "huge": 10**30,
    "1e30": 1e30,
    "True": True,
    "None": None,
    "word": "word",
    "empty": "",
    "zero byte": "a\0b",
    "()": (),
    "(0,)": (0,),
    "(0, 0)": (0, 0),
    "(2, 1)": (2, 1),
    "(1.5, 2)": (1.5, 2),
    "{}": {},
}
TEXTS, WHOLE, REAL = {"word", "empty"}, {"2"}, {"0", "0.0"}
TOWER = {
    "tower": {"word"},
    "pooling": {"empty"},
    "dtype": set(),
    "frozen": {"True"},
    "learning_rate_factor": {*REAL, "1.0", "2"},
    "layer_decay": {"1.0"},
    "remat": {"True"},
    "head": set(),
    "hidden": {"()", "(2, 1)"},
    "dropout": REAL,
}
# Field -> which of the odd values are valid for it.
ACCEPTED = {
    "seed": {"0", "2"},
    "init": {"empty"},
    "steps": WHOLE,
    "log_every": WHOLE,
    "eval_every": WHOLE,
    "save_every": {"0", "2"},
    "average": REAL,
    "teacher": {"word"},
    "embedding_dim": WHOLE,
    "normalize": {"True"},
    "head_dtype": set(),
    "mesh.data": {"-1", "2"},
    "mesh.fsdp": {"-1", "2"},
    "profile.steps": {"(0, 0)"},
    "data.name": {"empty"},
    "data.dir": TEXTS,
    "data.annotations": TEXTS,
    "data.train": {"word"},
    "data.weights": {"()"},
    "data.validation": {"word"},
    "data.batch_size": WHOLE,
    "data.microbatches": WHOLE,
    "data.prefetch": {"0", "2"},
    "evals.mine.type": set(),
    "evals.mine.captions": TEXTS,
    "evals.mine.images": TEXTS,
    "evals.mine.split": {"word"},
    "evals.mine.drop_junk": {"True"},
    "evals.mine.prompts": TEXTS,
    **{f"text.{name}": values for name, values in TOWER.items()},
    "text.max_length": set(),  # the minimum is 3
    "text.prefix": TEXTS,
    "text.pack": {"True"},
    "text.trim_vocab": TEXTS,
    **{f"image.{name}": values for name, values in TOWER.items()},
    "image.size": {"0"},  # otherwise the minimum is 16
    "image.crop": {"empty"},
    "image.min_area": {*REAL, "1.0"},
    "image.mirror": {"True"},
    "loss.name": set(),
    "loss.push_apart": {*REAL, "1.0", "2"},
    "loss.distill": {"1.0", "2"},
    "loss.distill_metric": set(),
    "loss.distill_temperature": {"1.0", "2"},
    "loss.temperature": {"1.0", "2"},
    "loss.bias": {*REAL, "-1", "1.0", "2"},
    "loss.chunk": {"0", "2"},
    "loss.metric": set(),
    "loss.margin": {*REAL, "1.0", "2"},
    "loss.rho": {"1.0", "2"},
    "loss.image_weight": {*REAL, "1.0", "2"},
    "loss.text_weight": {*REAL, "1.0", "2"},
    "optimizer.learning_rate": {*REAL, "1.0", "2"},
    "optimizer.warmup_steps": {"0", "2"},
    "optimizer.weight_decay": {*REAL, "1.0", "2"},
    "optimizer.b1": REAL,
    "optimizer.b2": REAL,
    "optimizer.clip_norm": {*REAL, "1.0", "2"},
    "optimizer.ema": REAL,
}


def flat(fields, prefix=""):
    """The dotted names of all fields."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def usable():
    """A configuration in which each field can be changed without changing another one."""
    fields = xlmr.get_config("tiny").to_dict()
    fields["mesh"] = {"data": 1, "fsdp": 1}
    fields["image"].update(min_area=0.0, frozen=False)
    fields["teacher"], fields["loss"]["distill"] = "teacher", 0.5
    fields["evals"] = {"mine": base.test_set("split").to_dict()}
    return fields


def with_value(fields, name, value):
    fields = copy.deepcopy(fields)
    *groups, field = name.split(".")
    group = fields
    for key in groups:
        group = group[key]
    group[field] = value
    return fields


def fault(fields):
    """The error message for a configuration; empty if the configuration is valid."""
    try:
        check_config(fields)
    except ValueError as error:
        return str(error)
    return ""


def test_every_field_has_a_range_and_a_row_of_the_table():
    config = base.get_config()
    config.evals.mine = base.test_set()
    ranges = FIELDS | {"evals": {"mine": FIELDS["evals"].fields}}
    assert set(flat(ranges)) == set(flat(config.to_dict())) == set(ACCEPTED)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_passes(name):
    check_config(CONFIGS[name])


@pytest.mark.parametrize("field", ACCEPTED)
def test_odd_values_are_refused_where_they_make_no_sense(field):
    faults = {name: fault(with_value(usable(), field, value)) for name, value in VALUES.items()}
    assert {name for name, said in faults.items() if not said} == ACCEPTED[field]
    for said in filter(None, faults.values()):
        assert said.startswith(f"config.{field} is ")
        assert "; it must be " in said or "known: " in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("seed", 2**63 - 1, 2**63),
        ("steps", 1, 0),
        ("text.max_length", 3, 2),
        ("image.size", 16, 15),
        ("data.prefetch", 1024, 1025),
        ("text.dropout", 0.99, 0.991),
        ("optimizer.ema", 0.9999, 1),
        ("optimizer.learning_rate", 1e18, 1.1e18),
        ("loss.temperature", 1e-6, 1e-7),
        ("loss.rho", 1e-3, 0.0),
        ("text.layer_decay", 1e-3, 0.0),
        ("profile.steps", (3, 3), (4, 3)),
        ("profile.steps", [1, 2], [1, 2, 3]),
        ("text.hidden", [1], [1, 0]),
    ],
)
def test_the_ends_of_ranges(field, inside, outside):
    assert fault(with_value(usable(), field, inside)) == ""
    assert f"config.{field} is " in fault(with_value(usable(), field, outside))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": -1, "mesh.fsdp": -1}, "config.mesh.data and config.mesh.fsdp are both -1"),
        ({"loss.name": "triplet", "loss.chunk": 64}, "chunk=64 works only with infonce, sigmoid"),
        ({"loss.push_apart": 0.3, "loss.chunk": 64}, "distill: push_apart searches the whole"),
        (
            {"loss.name": "m3l", "loss.image_weight": 0.0, "loss.text_weight": 0.0},
            "m3l has nothing to learn from",
        ),
        ({"text.tower": "muse", "text.prefix": "query: "}, "do not apply to mUSE"),
        ({"image.frozen": True, "image.mirror": True}, "need a trained tower"),
        ({"image.frozen": True, "image.min_area": 0.5}, "need a trained tower"),
        ({"average": 0.5, "text.frozen": True, "image.frozen": True}, "needs a trained tower"),
        ({"evals.mine.type": "folder"}, "config.evals.mine.captions is empty; it must be the fold"),
        ({"text.head": "center"}, "config.text.head is 'center', which needs a frozen tower"),
    ],
)
def test_fields_that_do_not_go_together(changes, message):
    fields = usable()
    for name, value in changes.items():
        fields = with_value(fields, name, value)
    assert message in fault(fields)


def test_all_faults_are_said_at_once_and_unknown_and_missing_fields_are_named():
    fields = with_value(with_value(usable(), "seed", -1), "loss.name", "clip")
    fields["speed"] = 1
    del fields["data"]["train"]
    said = fault(fields)
    assert "there is no field config.speed" in said
    assert "config.data.train is missing" in said
    assert "config.seed is -1; it must be an integer from 0" in said
    assert "config.loss.name is 'clip'; known: infonce, sigmoid, triplet, patr, m3l" in said
    assert "config.text is 3; it must be a group of fields" in fault(usable() | {"text": 3})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("data.batch_size=-16", "data.batch_size is -16; it must be an integer from 1 to"),
        ("data.batch_size=0", "data.batch_size is 0"),
        ("log_every=0", "log_every is 0"),
        ("eval_every=0", "eval_every is 0"),
        ("embedding_dim=0", "embedding_dim is 0"),
        ("embedding_dim=-512", "embedding_dim is -512"),
        (
            "text.dropout=1",
            "text.dropout is 1.0; it must be a number of at least 0 and at",
        ),
        ("image.dropout=1.5", "image.dropout is 1.5"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1.0"),
        ("optimizer.ema=2", "optimizer.ema is 2.0"),
        ("optimizer.warmup_steps=-3", "optimizer.warmup_steps is -3"),
        ("steps=-5", "steps is -5"),
        ("seed=-1", "seed is -1"),
        ("data.prefetch=-1", "data.prefetch is -1"),
        ("loss.temperature=0", "loss.temperature is 0.0"),
        ("optimizer.b2=1e400", "optimizer.b2 is inf"),
        ("profile.steps=(3)", "profile.steps is (3,); it must be the first"),
        ("text.tower=", "text.tower is ''"),
        ("steps=99999999999999999999", "steps is 99999999999999999999"),
        ("steps=1e30", "--config.steps=1e30"),
    ],
)
@pytest.mark.parametrize("verb", ["train"])
def test_the_command_line_refuses_them_before_jax_starts(verb, flag, message, command):
    script = "import sys; sys.modules['jax'] = None"
    arguments = [verb, "--config=configs/quickstart.py", f"--config.{flag}"]
    process = command(*arguments, script=script, check=False)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("verb", ["prepare", "shardings", "compile"])
def test_every_verb_that_takes_a_configuration_checks_it(verb, command):
    script = "import sys; sys.modules['jax'] = None"
    more = ["--topology=v5e:2x4"] if verb == "compile" else []
    arguments = [verb, "--config=configs/quickstart.py", "--config.eval_every=0", *more]
    process = command(*arguments, script=script, check=False)
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert "config.eval_every is 0; it must be an integer from 1 to" in line


@pytest.fixture
def config(tmp_path):
    """Toy towers, and a data folder that does not exist."""
    config = xlmr.get_config("tiny")
    config.data.dir = str(tmp_path / "nowhere")
    return config


def test_the_python_api_checks_it_too(config, tmp_path):
    config.loss.temperature = 0.0
    for refuse in (
        lambda: train.train(config, tmp_path / "run"),
        lambda: xlir.Encoder.create(config),
    ):
        with pytest.raises(ValueError, match=r"config\.loss\.temperature is 0\.0; it must be"):
            refuse()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text.head", "none", "config.embedding_dim is 16: set config.embedding_dim=32"),
        ("image.tower", "checkpoint", "config.json: num_attention_heads is 0; it must be"),
    ],
)
def test_what_towers_do_not_fit_is_refused_before_data_is_looked_for(
    field, value, message, config, tmp_path
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    content = towers.TOYS["toy-vit"] | {"num_attention_heads": 0}
    (folder / "config.json").write_text(json.dumps(content))
    config.update_from_flattened_dict({field: str(folder) if value == "checkpoint" else value})
    with pytest.raises(ValueError, match=f"^[^\n]*{message}"):
        train.train(config, tmp_path / "run")


def test_no_batch_is_larger_than_the_data(config, photos, tmp_path):
    """The training split has 76 captions; 8 of them belong to test photos."""
    config.data.dir, config.data.batch_size = str(photos), 72
    config.evals.mine = base.test_set(captions="multilingual_test")
    with pytest.raises(ValueError, match=r"batch_size is 72, but .* has 68 captions.* at most 68"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_of_every_configuration_are_read(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name].to_dict()))
    assert read_config(tmp_path) == CONFIGS[name]


# Fields of `data` in versions that had no `evals`.
OLD_FIELDS = {"test_set": "", "test_images": "", "xtd10": "", "drop_junk": False}
OLD_TEST_SETS = {"configs.xlmr": "xtd10,split:test", "configs.flickr8k": "multilingual_test"}


def as_written_before(name: str) -> dict:
    """The config.json that versions 49a03f1 and ea4c6af wrote for a configuration."""
    fields = json.loads(CONFIGS[name].to_json())
    del fields["evals"], fields["save_every"]
    module, _, variant = name.partition(":")
    module = {"configs.muse": "configs.flickr8k"}.get(module, module)
    test_set = "" if variant == "tiny" else OLD_TEST_SETS.get(module, "")
    fields["data"] |= OLD_FIELDS | {"test_set": test_set}
    return fields


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_an_earlier_version_has_the_configuration_of_today(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_written_before(name)))
    assert read_config(tmp_path) == CONFIGS[name]
    workdir.check_unchanged(read_config(tmp_path), CONFIGS[name], tmp_path)


def test_a_run_may_be_resumed_with_other_test_sets(tmp_path):
    config = xlmr.get_config("tiny")
    config.evals = {"mine": base.test_set(captions="mine")}
    workdir.check_unchanged(CONFIGS["configs.xlmr:tiny"], config, tmp_path)


def test_earlier_fields_of_test_sets_are_those_of_evals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "a,b").mkdir(parents=True)
    old = {"test_set": "xtd10,split:val,tests/one", "test_images": "photos", "xtd10": "clone"}
    fields = {"data": {"name": "coco", "dir": "set"} | old | {"drop_junk": True}}
    before = copy.deepcopy(fields)
    there = {"images": f"{tmp_path}/photos", "split": "test", "drop_junk": True, "prompts": ""}
    val = base.test_set("split", split="val").to_dict()
    assert upgrade(fields) == {
        "data": {"name": "coco", "dir": "set"},
        "evals": {
            "xtd10": {"type": "xtd10", "captions": f"{tmp_path}/clone"} | there,
            "val": val,
            "one": {"type": "folder", "captions": "tests/one"} | there,
        },
    }
    assert fields == before
    assert upgrade(upgrade(fields)) == upgrade(fields)
    comma = upgrade({"data": {"dir": "set", "test_set": "a,b"}})["evals"]
    assert comma == {"a_b": base.test_set(captions="a,b").to_dict()}
    same_name = upgrade({"data": {"dir": "set", "test_set": "a/t,b/t,c/t"}})["evals"]
    assert [one["captions"] for one in same_name.values()] == ["a/t", "b/t", "c/t"]


@pytest.mark.parametrize("fields", [{}, {"data": 3}, {"data": {}, "evals": 3}, {"evals": {"a": 1}}])
def test_what_is_no_configuration_is_left_for_the_check(fields):
    assert upgrade(fields) == fields


def test_names_of_test_sets_can_be_given_on_the_command_line():
    for names, message in (
        ({"a.b": {}}, "config.evals is {'a.b': {}}; it must be groups of fields, whose names are"),
        ({"a": 1}, "config.evals.a is 1; it must be a group of fields"),
        ({"a": {"folder": "x"}}, "there is no field config.evals.a.folder"),
        ({"a": {"type": "voc"}}, "config.evals.a.type is 'voc'; known: xtd10, folder, split"),
    ):
        assert message in fault(usable() | {"evals": names})
    assert fault(usable() | {"evals": {"a-1": {"captions": "x"}, "b_2": {"type": "xtd10"}}}) == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data.batch_size", -16),
        ("seed", None),
        ("optimizer.b1", math.nan),
        ("text.hidden", [0]),
        ("loss.name", "clip"),
        ("steps", "many"),
        ("steps", 10**30),
        pytest.param("optimizer.b1", 10**400, id="an integer beyond floats"),
        ("text", 3),
    ],
)
def test_a_runs_damaged_configuration_is_named(field, value, tmp_path):
    fields = with_value(quickstart.get_config().to_dict(), field, value)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_config(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def saved(config, tmp_path):
    """A run's folder without a checkpoint and, as in earlier versions, without digests."""
    xlir.Encoder.create(config).save(tmp_path / "run")
    (tmp_path / "run" / "SHA256SUMS").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("side", "field", "value", "message"),
    [
        ("text", "kind", None, "it lacks 'kind'; known: muse, transformer"),
        ("text", "kind", "vit", "kind is 'vit'; known: muse, transformer"),
        ("text", "kind", ["vit"], r"kind is \['vit'\]; known: muse, transformer"),
        ("text", "config", None, "it lacks 'config'"),
        ("text", "pooling", None, "it lacks 'pooling'"),
        ("text", "config.num_attention_heads", 0, "num_attention_heads is 0; it must be"),
        ("text", "config.hidden_size", "32", "hidden_size is '32'; it must be"),
        ("image", "config.num_hidden_layers", -1, "num_hidden_layers is -1; it must be"),
        ("image", "preprocessing", None, "it lacks 'preprocessing'"),
        ("image", "preprocessing.size", "32", "size is '32'; it must be"),
        ("image", "preprocessing.sice", 32, "sice"),
    ],
)
def test_a_runs_damaged_tower_is_named(side, field, value, message, saved):
    file = saved / f"{side}_tower" / "tower.json"
    whole = json.loads(file.read_text())
    fields = with_value(whole, field, value)
    if value is None:
        del fields[field]
    file.write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=rf"^[^\n]*{side}_tower/tower\.json is damaged: .*{message}"
    ):
        xlir.Encoder.open(saved)
    file.write_text(json.dumps(whole))
    xlir.Encoder.open(saved)


# A test set that a user adds on the command line.
MULTILINGUAL = "{'multilingual_test': {'captions': 'multilingual_test'}}"
# Values at the ends of their ranges. Runs have to work with them.
LOW = {
    **{"seed": 2**63 - 1, "steps": 1, "embedding_dim": 1, "log_every": 2**31 - 1},
    **{"data.batch_size": 1, "data.prefetch": 0, "text.max_length": 3, "image.size": 16},
    **{"text.head": "mlp", "text.hidden": "()", "text.dropout": 0, "image.dropout": 0},
    **{"text.learning_rate_factor": 0, "image.layer_decay": 1e-6, "image.min_area": 0},
    **{"optimizer.learning_rate": 0, "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0},
    **{"optimizer.b1": 0, "optimizer.b2": 0, "optimizer.clip_norm": 0, "optimizer.ema": 0},
    **{"loss.push_apart": 0, "loss.chunk": 0},
}
HIGH = {
    **{"steps": 2, "eval_every": 2**31 - 1, "data.batch_size": 68, "data.prefetch": 1024},
    **{"text.head": "mlp", "text.hidden": "(1,)", "text.dropout": 0.99, "image.min_area": 1},
    **{"optimizer.warmup_steps": 2**31 - 1, "optimizer.clip_norm": 1e18, "optimizer.ema": 0.99999},
    **{"optimizer.b1": 0.9999, "optimizer.b2": 0.9999, "optimizer.weight_decay": 1e6},
    **{"loss.temperature": 100, "loss.chunk": 2**31 - 1},
}
HEAVY = {
    **{"steps": 1, "loss.name": "m3l", "loss.rho": 32, "loss.push_apart": 1e6},
    **{"loss.image_weight": 1e6, "loss.text_weight": 1e6},
}
COLD = {
    **{"steps": 1, "loss.name": "sigmoid", "loss.temperature": 1e-6, "loss.bias": -1e4},
    **{"image.tower": "toy-resnet", "image.size": 16},
}


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(LOW, id="low"),
        *(
            pytest.param(values, id=name, marks=pytest.mark.slow)
            for name, values in {"high": HIGH, "heavy": HEAVY, "cold": COLD}.items()
        ),
    ],
)
def test_runs_with_values_at_the_ends_of_ranges(values, photos, tmp_path):
    flags = {"data.dir": photos, "evals": MULTILINGUAL} | values
    run_main(
        "--config=configs/xlmr.py:tiny",
        f"--workdir={tmp_path / 'run'}",
        *(f"--config.{name}={value}" for name, value in flags.items()),
    )
    assert list((tmp_path / "run" / "results").glob("*.json"))
    encoder = xlir.Encoder.load(tmp_path / "run")
    assert encoder.step == values["steps"]

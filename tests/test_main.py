"""The command line: help, one-line errors that a user can fix, and COCO from end to end."""

import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from tests.conftest import REPOSITORY, RUN_MAIN
from tests.runs import run_main
from xlir import commands, data, main
from xlir.checkpoint import Checkpoints

# Makes every later import of JAX fail.
NO_JAX = "import sys; sys.modules['jax'] = None"
FAIL = """
from xlir.commands import train
def fail(values):
    raise {error}
train.run = fail
"""
PRINT_WORKDIR = """
import sys, types
sys.modules["xlir.train"] = types.SimpleNamespace(train=lambda config, workdir, **_: print(workdir))
"""
QUICKSTART = "--config=configs/quickstart.py"
TAG = ["--workdir=x", "--vocabulary=coco", "a.jpg"]
TESTING = ["eval", "report", "export"]  # the verbs with --test_set
PROCESS = ["--coordinator=localhost:1"]


def refusal(process, code):
    """The only line on stderr of a command that failed."""
    assert process.returncode == code, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("xlir: ")
    assert process.stdout == ""
    return line


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs(arguments, command):
    process = command(*arguments, script=NO_JAX)
    assert process.stderr == ""
    assert "main VERB --help" in process.stdout
    assert QUICKSTART in process.stdout
    for verb in commands.VERBS:
        (line,) = (line for line in process.stdout.splitlines() if line.startswith(f"  {verb} "))
        assert len(line) > 40


def test_every_module_with_a_verb_is_registered():
    modules = {
        module.name
        for module in pkgutil.iter_modules(commands.__path__)
        if hasattr(importlib.import_module(f"xlir.commands.{module.name}"), "run")
    }
    assert modules == set(commands.VERBS.values())


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_of_a_verb_has_its_examples_and_its_own_flags_alone(verb, command):
    process = command(verb, "--help", script=NO_JAX)
    assert process.stderr == ""
    text, flags = process.stdout.split("\nFlags:\n")
    assert f"python -m xlir.main {'' if verb == 'train' else verb}" in text.split("Example")[1]
    listed = [line.split()[0] for line in flags.splitlines() if line.startswith("  --")]
    assert listed == [f"--{name}" for name in commands.declared_flags(verb).values]
    assert ("--sheet" in listed) == (verb in ("tag", "search"))
    assert command("help", verb, script=NO_JAX).stdout == process.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["bogus"], ["unknown verb 'bogus'", "train, prepare, eval"]),
        (["train", "eval", QUICKSTART], ["one verb", "train eval"]),
        ([QUICKSTART, "--batch=3"], ["unknown flag --batch"]),
        ([QUICKSTART, "--config.stepz=3"], ["no field 'stepz'", 'Did you mean "steps"']),
        ([QUICKSTART, "--config.text.frozn=0"], ["no field 'frozn'"]),
        ([QUICKSTART, "--config.steps=many"], ["--config.steps=many"]),
        ([QUICKSTART, "--config.text.frozen=maybe"], ["--config.text.frozen=maybe"]),
        (["--config.steps=3", QUICKSTART], ["before a value for --config"]),
        (["--config=configs/none.py"], ["No such file", "configs/none.py"]),
        (["--config=configs/none.py", "--config.steps=3"], ["No such file", "configs/none.py"]),
        (["--config=README.md"], ["README.md, line"]),
        (["--config=configs/__init__.py"], ["get_config"]),
        (["--config=configs/muse.py:clip"], ["no variant 'clip'", "known: m3l, patr"]),
        (["--config"], ["--config"]),
        ([], ["train needs --config"]),
        (["train"], ["train needs --config"]),
        ([QUICKSTART, "--test_set=x"], ["--test_set is a flag of eval"]),
        ([QUICKSTART, "--images=x"], ["--images is a flag of eval"]),
        ([QUICKSTART, "--drop_junk"], ["--drop_junk is a flag of eval, not of train"]),
        (["prepare"], ["prepare needs --config"]),
        (
            ["prepare", QUICKSTART, "--workdir=x"],
            ["--workdir is a flag of train, eval, tag, index, report, export and"],
        ),
        (
            [QUICKSTART, "--config.text.frozen", "prepare"],
            ["put the verb prepare before the flags"],
        ),
        (["photo", "eval"], ["unknown verb 'photo'"]),
        (["--workdir", "eval"], ["train needs --config"]),
        (
            ["export", "--workdir=x", "--to=y", "--test_set=xtd10,split:test"],
            ["--test_set=xtd10,split:test names several test sets; an export is checked on one"],
        ),
        (
            ["eval", "--workdir=x", "--task=tagging", "--test_set=xtd10"],
            ["--test_set=xtd10: --task=tagging needs split:NAME"],
        ),
        (
            ["prepare", QUICKSTART, "--images=x"],
            ["--images is a flag of eval, report and export, not of prepare"],
        ),
        (["eval"], ["eval needs --workdir"]),
        (["import", "--workdir=x"], ["import needs --text"]),
        (["import", "--text=x"], ["import needs --workdir"]),
        (
            ["eval", "--workdir=x", "--image=x"],
            ["--image is a flag of search and import, not of eval"],
        ),
        (["eval", QUICKSTART, "--workdir=x"], ["--config is a flag of train", "not of eval"]),
        (["shardings", QUICKSTART, "--devices=0"], ["--devices=0"]),
        (["shardings", QUICKSTART, "--devices=1000000000000"], ["--devices=1000000000000"]),
        (["tag", "--top_k=0", *TAG], ["--top_k=0"]),
        (["tag", "--threshold=nan", *TAG], ["--threshold=nan is not between 0 and 1"]),
        (["tag", "--threshold=inf", *TAG], ["--threshold=inf is not between 0 and 1"]),
        (["tag", "--threshold=-0.1", *TAG], ["--threshold=-0.1 is not between 0 and 1"]),
        ([QUICKSTART, *PROCESS, "--processes=0", "--process=0"], ["--processes=0"]),
        ([QUICKSTART, *PROCESS, "--processes=2", "--process=-1"], ["--process=-1"]),
        ([QUICKSTART, *PROCESS, "--processes=2", "--process=2"], ["--process=2 must be less than"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_are_one_line_and_need_no_jax(arguments, parts, command):
    line = refusal(command(*arguments, script=NO_JAX, check=False), code=2)
    for part in [*parts, "--help"]:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "verb"),
    [
        ("tag --vocabulary=coco eval", "tag"),
        ("--workdir eval", None),
        ("--workdir train eval", "eval"),
        ("-vocabulary export tag", "tag"),
        ("--config configs/xlmr.py prepare", "prepare"),
        ("--distributed eval", "eval"),  # as `launch.sh` puts it
        ("--nodrop_junk --unknown eval", "eval"),
        ("-- eval", "eval"),
        ("photo eval", None),
        ("help eval", "eval"),
        ("--help eval", "eval"),
        ("--workdir", None),
        ("", None),
    ],
)
def test_the_verb_is_the_first_word_that_is_no_value_of_a_flag(arguments, verb):
    assert commands.find_verb(arguments.split()) == verb


def test_words_after_the_verb_may_be_verbs():
    arguments = ["xlir", "tag", *TAG[:2], "train", "help"]
    assert commands.find_verb(arguments[1:]) == "tag"
    assert commands.parse("tag", arguments)[1] == ["train", "help"]


def test_help_says_how_many_test_sets_a_verb_takes():
    told = {verb: commands.declared_flags(verb).values["test_set"].help for verb in TESTING}
    assert [verb for verb, text in told.items() if "Join several" in text] == ["eval", "report"]


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/quickstart.py", "runs/quickstart"),
        ("configs/muse.py:patr", "runs/muse-patr"),
    ],
)
def test_default_workdir_is_named_after_the_configuration(config, workdir, command):
    process = command(f"--config={config}", script=PRINT_WORKDIR)
    assert process.stdout.strip() == workdir


@pytest.mark.parametrize(
    "platform",
    [
        "banana",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="has a GPU")
        ),
    ],
)
@pytest.mark.parametrize("arguments", [["shardings", QUICKSTART], ["eval", "--workdir=x"]])
def test_devices_that_are_absent(platform, arguments, command):
    line = refusal(command(*arguments, check=False, JAX_PLATFORMS=platform), code=1)
    assert f"JAX_PLATFORMS={platform}: JAX finds no such devices here, only " in line
    assert "cpu" in line


MANY_LINES = """
from xlir.commands import train
train.run = lambda values: print("a line\\n" * 100_000)
"""


@pytest.mark.parametrize("arguments", [["--help"], [QUICKSTART]])
def test_a_reader_that_has_seen_enough_is_no_error(arguments):
    """This happens in `tag ... | head`; the exit code is the same as for other programs."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", f"{MANY_LINES}\n{RUN_MAIN}", *arguments],
        cwd=REPOSITORY,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")


def test_interrupt(command):
    script = FAIL.format(error="KeyboardInterrupt")
    line = refusal(command(QUICKSTART, script=script, check=False), code=130)
    assert "run the same command again to resume" in line


ENDLESS = """
from xlir.commands import train
def endless(values):
    while True:
        print("a line")
train.run = endless
"""


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [(NO_JAX, ["--help"], 0), (NO_JAX, ["--help"], 1), (NO_JAX + ENDLESS, [QUICKSTART], 1)],
)
def test_when_nobody_reads_any_more_the_end_is_quiet(script, arguments, lines):
    """The reader closes the pipe before, after and during the output, as `| head` does."""
    words = [sys.executable, "-c", f"{script}\n{RUN_MAIN}", *arguments]
    process = subprocess.Popen(
        words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    code = process.wait(timeout=60)
    assert error == ""
    assert code == 128 + signal.SIGPIPE or (lines == 1 and arguments == ["--help"] and code == 0)


def test_another_broken_pipe_is_told(command):
    """The broken pipe is a network connection, not the output."""
    script = FAIL.format(error="BrokenPipeError(32, 'Broken pipe')")
    assert "Broken pipe" in refusal(command(QUICKSTART, script=script, check=False), code=1)


def test_what_is_printed_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-c", f"{NO_JAX}\n{RUN_MAIN}", "--help"],
            cwd=REPOSITORY,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("xlir: the disk is full")


COMPILING = """
import sys, types
import jax
def program(x):
    return x + 1
def train(*_, **__):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(program)(1.0)
sys.modules["xlir.train"] = types.SimpleNamespace(train=train)
"""


def test_compiled_programs_are_kept_for_this_user_and_this_cpu(command, cache, tmp_path):
    assert not (cache / "compiled").exists(), "programs were not kept in the folder that was chosen"
    environment = {"XLIR_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    command(QUICKSTART, script=COMPILING, **environment)
    (of_cpu,) = (tmp_path / "compiled").iterdir()
    assert list(of_cpu.glob("jit_program*"))
    assert {folder.stat().st_mode & 0o777 for folder in (of_cpu, of_cpu.parent)} == {0o700}


def test_full_disk(command):
    error = 'OSError(28, "No space left on device", "runs/x/weights")'
    line = refusal(command(QUICKSTART, script=FAIL.format(error=error), check=False), code=1)
    assert "the disk is full" in line
    assert "runs/x/weights" in line


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns the exit code and stderr's lines."""

    def run(*arguments):
        # A new process has not opened a data set yet.
        data.open_data_set.cache_clear()
        monkeypatch.setattr("sys.argv", ["xlir", *arguments])
        code = main.main()
        return code, capsys.readouterr().err.splitlines()

    return run


def test_eval_of_a_folder_that_is_no_run(run, tmp_path):
    code, (line,) = run("eval", f"--workdir={tmp_path}")
    assert code == 1
    assert f"{tmp_path} is not the folder of a training run" in line


def test_a_captions_set_without_a_folder(run, tmp_path):
    code, (line,) = run("--config=configs/flickr8k.py", f"--workdir={tmp_path / 'run'}")
    assert code == 1
    assert "--config.data.dir=PATH" in line


def test_a_start_that_failed_leaves_no_run_behind(run, tiny, tmp_path):
    """Otherwise the corrected command would be refused, because its configuration differs."""
    folder, missing = tmp_path / "run", tmp_path / "missing"
    code, (line,) = run(*tiny, f"--workdir={folder}", f"--config.data.dir={missing}")
    assert code == 1
    assert f"there is no folder {missing}" in line
    assert not folder.exists()


def test_eval_with_a_missing_photo(run, workdir, photos, tmp_path):
    (tmp_path / "test_image_names.txt").write_text("00.jpg\nabsent.jpg\n")
    (tmp_path / "test_captions_en.txt").write_text("one\ntwo\n")
    code, (line,) = run(
        "eval", f"--workdir={workdir}", f"--test_set={tmp_path}", f"--images={photos}"
    )
    assert code == 1
    assert "1 of the 2 photos" in line
    assert "absent.jpg" in line


def test_prepare_needs_no_jax_and_says_what_is_there(command, tiny):
    """The second time, it prepares nothing."""
    arguments = ["prepare", *tiny[:2]]
    process = command(*arguments, script=NO_JAX)
    first, *splits = process.stdout.splitlines()
    assert first.startswith("shapes: ")
    assert [line.split()[:3] for line in splits] == [
        ["train", "38", "photos"],
        ["val", "6", "photos"],
        ["test", "16", "photos"],
    ]
    again = command(*arguments, script=NO_JAX)
    assert "preparing" not in again.stderr
    assert again.stdout == process.stdout


def test_missing_data_and_weights_are_said_with_sizes_and_commands(command, tmp_path):
    arguments = ["--config=configs/xlmr.py", f"--config.data.dir={tmp_path}"]
    for verb in ("train", "prepare"):
        script = NO_JAX if verb == "prepare" else ""
        process = command(verb, *arguments, script=script, check=False, HF_HUB_CACHE=str(tmp_path))
        assert process.returncode == 1
        assert process.stderr.startswith(f"xlir: {tmp_path}")
        assert "13.5 GB" in process.stderr
        assert "wget -c" in process.stderr
        weights = ("hf download FacebookAI/xlm-roberta-base", "text.tower, 1.1 GB")
        for told in ("git clone", *weights):
            assert (told in process.stderr) == (verb == "train")
        assert "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def packed_coco(shared, tmp_path):
    """Photos in COCO's archives, and captions in Karpathy's JSON."""
    folder = tmp_path / "coco"
    folder.mkdir()
    source = shared / "coco_mini"
    for place in ("train2014", "val2014"):
        with zipfile.ZipFile(folder / f"{place}.zip", "w") as archive:
            for file in sorted((source / place).iterdir()):
                archive.write(file, f"{place}/{file.name}")
    with zipfile.ZipFile(folder / "caption_datasets.zip", "w") as archive:
        archive.write(source / "dataset_coco.json", "dataset_coco.json")
        archive.writestr("dataset_flickr8k.json", "{}")
    return folder


def test_coco_from_its_archives_trains_resumes_and_is_evaluated(packed_coco, tmp_path, monkeypatch):
    arguments = ["--config=configs/xlmr.py:tiny", "--config.data.name=coco"]
    arguments += [f"--config.data.dir={packed_coco}", f"--workdir={tmp_path / 'run'}"]
    save = Checkpoints.save

    def save_and_fail(self, *items):
        save(self, *items)
        raise RuntimeError("the end of this process")

    with monkeypatch.context() as context:
        context.setattr(Checkpoints, "save", save_and_fail)
        stopped = run_main(*arguments, check=False)
    assert "the end of this process" in stopped.stderr
    assert "257 training photos" in stopped.stderr
    assert "removed 0 photos of XTD10 (0 of train2014, 0 of val2014)" in stopped.stderr
    resumed = run_main(*arguments)
    assert "resuming from step 10" in resumed.stderr
    assert "preparing" not in resumed.stderr
    (file,) = (tmp_path / "run" / "results").glob("coco-test-*.json")
    results = json.loads(file.read_text())
    assert results["images"] == 110
    assert results["languages"]["en"]["queries"] >= 550


def test_faults_of_coco_are_one_line_each_and_leave_earlier_work(
    run, packed_coco, cache, tmp_path, caplog
):
    arguments = ["prepare", "--config=configs/flickr8k.py", "--config.data.name=coco"]
    arguments += [f"--config.data.dir={packed_coco}"]
    assert run(*arguments)[0] == 0
    prepared = {file: file.stat().st_mtime_ns for file in cache.rglob("*.array_record*")}

    whole = (packed_coco / "val2014.zip").read_bytes()
    (packed_coco / "val2014.zip").write_bytes(whole[: len(whole) // 2])
    code, (line,) = run(*arguments)
    assert code == 1
    assert f"val2014.zip ({len(whole) // 2:,} of 6,645,013,297 bytes) is a partial" in line
    (packed_coco / "val2014.zip").write_bytes(whole)

    annotations = tmp_path / "dataset_coco.json"
    annotations.write_text('{"images": [{"filename": "a.jpg"}]}')
    code, (line,) = run(*arguments, f"--config.data.annotations={annotations}")
    assert code == 1
    assert f"{annotations}: image 0 lacks 'sentences'" in line

    with zipfile.ZipFile(packed_coco / "caption_datasets.zip") as archive:
        content = json.loads(archive.read("dataset_coco.json"))
    content["images"][0]["filename"] = "COCO_train2014_absent.jpg"
    annotations.write_text(json.dumps(content))
    caplog.clear()
    assert run(*arguments, f"--config.data.annotations={annotations}")[0] == 0
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == "dataset_coco.json: photos missing, skipped: 1 (COCO_train2014_absent.jpg)"
    assert (
        prepared.items()
        <= {file: file.stat().st_mtime_ns for file in cache.rglob("*.array_record*")}.items()
    )


def test_xtd10_in_eleven_languages_in_one_command(one_device, shared, tmp_path):
    """Uses substitute photos with XTD10's names, and toy towers."""
    names = (shared / "xtd10" / "XTD10" / "test_image_names.txt").read_text().split()
    for number, name in enumerate(names):
        colour = (number % 10 * 25, number // 10 % 10 * 25, number // 100 * 25)
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    run = tmp_path / "run"
    shutil.copytree(one_device.workdir, run)
    arguments = ["eval", f"--workdir={run}", f"--test_set={shared / 'xtd10'}"]
    arguments += [f"--images={tmp_path}"]
    process = run_main(*arguments, "--drop_junk")
    assert "6 captions in 'de' are not translations; they are left out" in process.stderr
    (file,) = (run / "results").glob("xtd10-without-junk-*.json")
    languages = json.loads(file.read_text())["languages"]
    assert list(languages) == ["en", "de", "es", "fr", "it", "ja", "ko", "pl", "ru", "tr", "zh"]
    for language, result in languages.items():
        assert result["queries"] == (994 if language == "de" else 1000)
        for direction in ("text_to_image", "image_to_text"):
            assert 0 <= result[direction]["R@1"] <= result[direction]["R@10"] <= 1

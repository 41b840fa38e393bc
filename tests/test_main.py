"""The command line: help, and errors that a user can mend in one line."""

import pytest
from absl import flags

from xlir import main

# Whatever imports JAX after this fails.
NO_JAX = "import sys; sys.modules['jax'] = None"
FAIL = """
from xlir import main
def fail():
    raise {error}
main._train = fail
"""
PRINT_WORKDIR = """
import sys, types
sys.modules["xlir.train"] = types.SimpleNamespace(train=lambda config, workdir: print(workdir))
"""
QUICKSTART = "--config=configs/quickstart.py"


def refusal(process, code):
    """The one line on stderr of a command that failed."""
    assert process.returncode == code, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("xlir: ")
    assert process.stdout == ""
    return line


def test_help_lists_verbs_examples_and_flags(command):
    process = command("--help", script=NO_JAX)
    assert process.stderr == ""
    for part in ("  train ", "  eval ", QUICKSTART, "--config:", "--workdir:", "--images:"):
        assert part in process.stdout
    assert "--test_set:" in process.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["bogus"], ["unknown verb 'bogus'", "train, eval"]),
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
        ([QUICKSTART, "--test_set=x"], ["--test_set goes with eval"]),
        ([QUICKSTART, "--images=x"], ["--images goes with eval"]),
        (["eval"], ["eval needs --workdir"]),
        (["eval", QUICKSTART, "--workdir=x"], ["from --workdir, not from --config"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors_are_one_line_and_need_no_jax(arguments, parts, command):
    line = refusal(command(*arguments, script=NO_JAX, check=False), code=2)
    for part in [*parts, "--help"]:
        assert part in line


@pytest.mark.parametrize(
    ("config", "workdir"),
    [
        ("configs/quickstart.py", "runs/quickstart"),
        ("configs/muse.py:patr", "runs/muse-patr"),
    ],
)
def test_default_workdir_is_named_after_the_configuration(config, workdir, command):
    process = command(f"--config={config}", script=f"{NO_JAX}\n{PRINT_WORKDIR}")
    assert process.stdout.strip() == workdir


def test_interrupt(command):
    script = FAIL.format(error="KeyboardInterrupt")
    line = refusal(command(QUICKSTART, script=script, check=False), code=130)
    assert "run the same command again to resume" in line


def test_full_disk(command):
    error = 'OSError(28, "No space left on device", "runs/x/weights")'
    line = refusal(command(QUICKSTART, script=FAIL.format(error=error), check=False), code=1)
    assert "the disk is full" in line
    assert "runs/x/weights" in line


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns the exit code and stderr's lines."""

    def run(*arguments):
        for name in list(flags.FLAGS):
            if name.startswith("config."):
                delattr(flags.FLAGS, name)
        for name in ("config", "workdir", "test_set", "images"):
            flags.FLAGS[name].unparse()
        monkeypatch.setattr("sys.argv", ["xlir", *arguments])
        code = main.main()
        return code, capsys.readouterr().err.splitlines()

    yield run
    flags.FLAGS.unparse_flags()


def test_eval_of_a_folder_that_is_no_run(run, tmp_path):
    code, (line,) = run("eval", f"--workdir={tmp_path}")
    assert code == 1
    assert f"{tmp_path} is not the folder of a training run" in line


def test_a_captions_set_without_a_folder(run, tmp_path):
    code, (line,) = run("--config=configs/flickr8k.py", f"--workdir={tmp_path / 'run'}")
    assert code == 1
    assert "--config.data.dir=PATH" in line


def test_a_start_that_failed_leaves_no_run_behind(run, tiny, tmp_path):
    """Or the corrected command would be refused: its configuration is another."""
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

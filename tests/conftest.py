"""Eight CPU devices for every test, real data if it is there, and small runs to inspect."""

import gc
import itertools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

# Tests compile much and compute little. Without optimised machine code, a training step compiles in
# half the time, and with XLA's older code generator for fusions in a fifth. The fixture `command`
# below runs the program as users do. To run all tests like this, set
# XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than anything else, and tests compile the same programs again and again.
# Compiled programs are therefore cached until the session ends, for this process, the processes
# that it starts, and the workers of pytest-xdist, which inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="xlir-tests-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest
from PIL import Image, ImageDraw

from tests import runs
from tests.runs import REPOSITORY

CHROMIUM = "/usr/bin/chromium"
# The name of this process, if it is a worker of pytest-xdist.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")


def pytest_collection_finish():
    """Keeps the garbage collector from going through all imported modules again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report):
    _list_skipped(report)


def pytest_collectreport(report):
    _list_skipped(report)


def _list_skipped(report) -> None:
    """Appends skipped tests to the file that $XLIR_LIST_SKIPPED names.

    `pytest @FILE` then runs them in an environment that has what they need. Workers send their
    reports to the process that started them, and only that process writes the file.
    """
    file = os.environ.get("XLIR_LIST_SKIPPED")
    if file and report.skipped and not WORKER:
        with open(file, "a", encoding="utf8") as skipped:
            skipped.write(f"{report.nodeid}\n")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real photos and captions; if it is missing, the test is skipped."""
    folder = pathlib.Path(os.environ.get("XLIR_SHARED", REPOSITORY.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real photos and captions in {folder} (set XLIR_SHARED)")
    return folder


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> pathlib.Path:
    """A folder that all workers share, for files that are made once (`runs.once`), then read.

    If $XLIR_TESTS_FOLDER is set, it is that folder, which later calls of pytest can use again.
    """
    if "XLIR_TESTS_FOLDER" in os.environ:
        kept = pathlib.Path(os.environ["XLIR_TESTS_FOLDER"])
        kept.mkdir(parents=True, exist_ok=True)
        return kept
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if WORKER else folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Keeps tests out of the user's cache of prepared data sets and features."""
    folder = tmp_path_factory.mktemp("xlir-cache")
    os.environ["XLIR_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def photos(session_folder) -> pathlib.Path:
    """A small set in Karpathy's layout: coloured shapes, English captions, a German test set."""
    return runs.once(session_folder / "photos", write_photos)


@pytest.fixture
def read_only():
    """An empty folder, and a function that makes the folder and its content read-only."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def places() -> list[pathlib.Path]:
            return [folder, *folder.rglob("*")]

        def forbid() -> None:
            for place in places():
                place.chmod(0o555 if place.is_dir() else 0o444)
            if not os.getuid():
                os.seteuid(65534)  # become nobody, because root may write everywhere

        yield folder, forbid
        os.seteuid(os.getuid())
        for place in places():
            place.chmod(0o755)


COLOURS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "black": "schwarz"}
SHAPES = {"circle": "Kreis", "square": "Quadrat", "line": "Strich"}
PLACES = {"left": "links", "right": "rechts", "top": "oben", "middle": "Mitte"}


def write_photos(folder: pathlib.Path) -> None:
    """60 JPEGs; the last 20 are the test set, and 4 of these are also in the training split."""
    corners = {"left": (4, 20), "right": (36, 20), "top": (20, 4), "middle": (20, 20)}
    (folder / "images").mkdir(parents=True)
    entries, german = [], {}
    things = list(itertools.product(COLOURS, SHAPES, PLACES))
    random.Random(0).shuffle(things)
    for number, (colour, shape, place) in enumerate(things):
        image = Image.new("RGB", (64, 64), "white")
        draw, (x, y) = ImageDraw.Draw(image), corners[place]
        box = (x, y, x + 24, y + 24)
        {"circle": draw.ellipse, "square": draw.rectangle, "line": draw.line}[shape](
            box, fill=colour, **({"width": 5} if shape == "line" else {})
        )
        name = f"{number:02d}.jpg"
        image.save(folder / "images" / name, quality=95)
        split = "train" if number < 44 else "test"
        raw = [f"A {colour} {shape}, {place}.", f"{place}: the {shape} is {colour}"]
        entries.append(
            {
                "filename": name,
                "split": "val" if 30 <= number < 36 else split,
                "sentences": [{"raw": caption} for caption in raw],
            }
        )
        german[name] = f"{SHAPES[shape]}, {COLOURS[colour]}, {PLACES[place]}"
    (folder / "dataset_shapes.json").write_text(json.dumps({"images": entries}))
    test = folder / "multilingual_test"
    test.mkdir()
    names = [entry["filename"] for entry in entries[40:]]
    english = [entry["sentences"][0]["raw"] for entry in entries[40:]]
    (test / "test_image_names.txt").write_text("\n".join(names))
    (test / "test_captions_en.txt").write_bytes("\r\n".join(english).encode())
    (test / "test_captions_de.txt").write_text("\n".join(german[name] for name in names) + "\n")


@pytest.fixture(scope="session")
def command(photos):
    """Runs `python -m xlir.main` as users do, on one device; returns the finished process."""

    def run(
        *arguments: str,
        script: str = "",
        check: bool = True,
        timeout: int = 300,
        **environment: str,
    ):
        """`script` runs first, in the same process; `timeout` is in seconds."""
        start = ["-m", "xlir.main"] if not script else ["-c", f"{script}\n{RUN_MAIN}"]
        process = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": "", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run


RUN_MAIN = "from xlir import main; main.leave(main.main())"


@pytest.fixture(scope="session")
def tiny(photos) -> list[str]:
    """Flags of a training run that takes seconds, on the small set."""
    return [
        "--config=configs/flickr8k.py",
        f"--config.data.dir={photos}",
        "--config.data.batch_size=16",
        "--config.image.tower=efficientnet-lite0",
        "--config.image.size=64",
        "--config.text.hidden=(32,)",
        "--config.image.hidden=(32,)",
        "--config.embedding_dim=16",
        "--config.steps=40",
        "--config.eval_every=10",
        "--config.log_every=5",
    ]


@pytest.fixture(scope="session")
def workdir(command, tiny, session_folder, tmp_path_factory) -> pathlib.Path:
    """A finished run; each worker has its own copy."""
    made = runs.once(session_folder / "tiny", lambda to: command(*tiny, f"--workdir={to}"))
    return shutil.copytree(made, tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="session")
def toy_config(photos):
    """The configuration of a run that takes seconds: trained toy towers, a moving average."""
    from configs import xlmr

    config = xlmr.get_config("tiny")
    config.data.dir = str(photos)
    config.steps, config.eval_every, config.log_every = 6, 2, 1
    config.optimizer.ema = 0.9
    return config.lock()


@pytest.fixture(scope="session")
def toy_run(toy_config, session_folder) -> pathlib.Path:
    """A finished run of `toy_config`, trained in this process; tests must not change it."""
    from xlir import train

    return runs.once(session_folder / "toy", lambda to: train.train(toy_config, to))


@pytest.fixture(scope="session")
def one_device(photos, session_folder) -> runs.Run:
    """A run on one device, to compare other runs with; tests must not change it."""
    return runs.whole_run(session_folder / "one-device", runs.flags_of(photos))


@pytest.fixture(scope="session")
def stopped(photos, session_folder) -> runs.Run:
    """The run of `one_device`, stopped by SIGTERM after a step; tests must not change it."""
    return runs.run_once(
        session_folder / "stopped", lambda to: runs.train_until_stopped(to, runs.flags_of(photos))
    )


# Not for a whole session: while it is open, asyncio can't start another event loop.
@pytest.fixture(scope="module")
def browser():
    """Chromium; needs `pip install playwright axe-playwright-python`."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip(f"needs Chromium as {CHROMIUM}")
    with playwright.sync_playwright() as started:
        flags = ["--no-sandbox", "--disable-background-networking"]
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def harm():
    """The serious barriers that axe finds on a page: rules, and the elements that break them.

    Chromium runs axe outside the page's own scripts, so the page's policy need not allow it.
    """
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="needs axe: pip install axe-playwright-python",
    )

    def found(page) -> list[str]:
        return [
            f"{one['id']} ({one['impact']}): {[node['html'] for node in one['nodes']]}"
            for one in axe.Axe().run(page).response["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    return found


@pytest.fixture
def in_process(monkeypatch):
    """Checks exported folders in this process, which saves importing torch each time."""
    from xlir.export import check, verification

    def run(folder, format, pairs):
        return check.outputs(format, folder, pairs.texts, pairs.images)

    monkeypatch.setattr(verification, "_run", run)
    # The modules of all exported folders have the same names.
    before = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before[0]:
        if name.split(".")[0] in ("dual_encoder", "inputs"):
            del sys.modules[name]
    sys.path[:] = before[1]

"""Cross-lingual image retrieval: train on English captions, search in other languages.

    python -m xlir.main [VERB] [FLAGS] [IMAGES...]

Verbs:
  train   train and evaluate what --config describes; resumes where --workdir holds a checkpoint
          (the default verb)
  prepare prepare the data set that --config describes, which train would do too, and say where
          it is and what it holds
  eval    evaluate the best checkpoint of --workdir on its own test sets or on --test_set; with
          --task=tagging its tags of a split, with a vocabulary in many languages
  tag     tag IMAGES (files, folders, patterns) with the names of --vocabulary in --language
  export  write the best checkpoint of --workdir to the folder --to for use without JAX: as
          sentence-transformers, transformers, torch or onnx (--format); it is loaded afresh and
          compared with the run before the folder appears
  import  make --workdir out of a published model of PyTorch, M-CLIP or open_clip with a text
          encoder of Hugging Face's, in the folders --text and --image, to use as a run's
  shardings
          print how the parameters that --config describes lie on --devices; needs no weights
  compile compile the training step for the TPUs of --topology, which need not be there, and say
          whether it fits them and what a step takes; the exit code is 1 where it does not fit

Examples:
  python -m xlir.main --config=configs/quickstart.py
  python -m xlir.main --config=configs/flickr8k.py --config.data.dir=PATH --workdir=runs/flickr8k
  python -m xlir.main prepare --config=configs/flickr8k.py --config.data.dir=PATH
  python -m xlir.main eval --workdir=runs/flickr8k --test_set=PATH/multilingual_test \\
      --images=PATH/images
  python -m xlir.main eval --workdir=runs/flickr8k --task=tagging
  python -m xlir.main tag --workdir=runs/flickr8k --vocabulary=coco --language=de,ja PHOTOS
  python -m xlir.main export --workdir=runs/flickr8k --to=exported --format=onnx
  python -m xlir.main import --text=PATH/M-CLIP --image=PATH/clip-vit-large-patch14 \\
      --workdir=runs/m-clip
  python -m xlir.main compile --config=configs/xlmr.py --topology=v5e:8x8 \\
      --config.data.batch_size=16384

Any field of configs/base.py can be overridden: --config.optimizer.learning_rate=3e-4. Prepared data
sets, features of frozen towers and, on TPUs and GPUs, compiled programs are kept in $XLIR_CACHE
(default ~/.cache/xlir). A photo may take $XLIR_PHOTO_MB megabytes of memory while it is read and
decoded (default 500); larger ones are named and skipped.
"""

import contextlib
import errno
import logging
import os
import pathlib
import re
import select
import signal
import sys
import traceback
import warnings

from absl import flags
from ml_collections import config_flags

from xlir.config import check_config

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, as configs/NAME.py or configs/NAME.py:VARIANT."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run. train: runs/<name of the config> where it is not given."
)
_TEST_SET = flags.DEFINE_string(
    "test_set",
    "",
    "eval, export: folder of a multilingual test set in XTD10's layout, or 'xtd10', or "
    "'split:NAME' of the run's data set; several are joined with commas.",
)
_IMAGES = flags.DEFINE_string(
    "images",
    "",
    "eval, export: folder of the test set's photos; default: the run's data.dir, for XTD10 its "
    "data set.",
)
_DROP_JUNK = flags.DEFINE_bool(
    "drop_junk", False, "eval: leave out XTD10's six German captions that translate nothing."
)
_TASK = flags.DEFINE_enum("task", None, ("retrieval", "tagging"), "eval: what is evaluated.")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary",
    None,
    "tag, eval: coco, flickr8k, emoji or a file, a tag a line (input_pipeline/vocabularies); "
    "default of eval: the data set's own.",
)
_LANGUAGE = flags.DEFINE_list("language", None, "tag: one, or several with commas; default: en.")
_TOP_K = flags.DEFINE_integer(
    "top_k", None, "tag: at most so many tags an image; default: 5, with --threshold all.", 1
)
_THRESHOLD = flags.DEFINE_float(
    "threshold",
    None,
    "tag: a share, such as 0.98: tags that stand out more than in so many of the pairs of a "
    "held-out photo and a tag. It means the same in every language.",
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "tag: file for the tags as JSON lines; -: print them instead of the table."
)
_SHEET = flags.DEFINE_string("sheet", None, "tag: file for a picture of the first images, PNG.")
_TO = flags.DEFINE_string("to", None, "export: the folder to write; it must not be there yet.")
_FORMAT = flags.DEFINE_string(
    "format",
    None,
    "export: sentence-transformers, transformers, torch or onnx; default: sentence-transformers "
    "where it can hold the model, else torch.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    None,
    ("ema", "raw"),
    "export: the moving average over training, or the weights themselves; default: ema where it "
    "is kept.",
)
_TEXT = flags.DEFINE_string("text", None, "import: folder of the published text encoder.")
_IMAGE = flags.DEFINE_string(
    "image", None, "import: folder of the published image encoder; default: that of --text."
)
_DEVICES = flags.DEFINE_integer(
    "devices",
    None,
    "shardings: how many; default: those of this machine.",
    lower_bound=1,
    upper_bound=2**20,
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile: a TPU's generation and shape, as v5e:8x8 or v5p:2x2x4."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "train, eval: this is one of several processes, of a Cloud TPU or of SLURM, which say which.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "train, eval: this is one of --processes; HOST:PORT where the first one listens.",
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.", 1)
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.", 0)
_ACCEPT_CHANGED_DATA = flags.DEFINE_bool(
    "accept_changed_data",
    False,
    "train: resume a run although its training or validation data have changed.",
)
# Flag -> the verbs that it goes with.
FLAGS = {
    "config": ("train", "prepare", "shardings", "compile"),
    "workdir": ("train", "eval", "tag", "export", "import"),
    "test_set": ("eval", "export"),
    "images": ("eval", "export"),
    "drop_junk": ("eval",),
    "task": ("eval",),
    "vocabulary": ("tag", "eval"),
    "language": ("tag",),
    "top_k": ("tag",),
    "threshold": ("tag",),
    "output": ("tag",),
    "sheet": ("tag",),
    "to": ("export",),
    "format": ("export",),
    "weights": ("export",),
    "text": ("import",),
    "image": ("import",),
    "devices": ("shardings",),
    "topology": ("compile",),
    "accept_changed_data": ("train",),
    "distributed": ("train", "eval"),
    "coordinator": ("train", "eval"),
    "processes": ("train", "eval"),
    "process": ("train", "eval"),
}
# Verb -> the flags that it can't do without.
NEEDED = {
    "train": ("config",),
    "prepare": ("config",),
    "eval": ("workdir",),
    "tag": ("workdir", "vocabulary"),
    "export": ("workdir", "to"),
    "import": ("text", "workdir"),
    "shardings": ("config",),
    "compile": ("topology", "config"),
}
# What a contact sheet may be.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
# Verbs that take more words than themselves.
TAKES_IMAGES = ("tag",)
# Seconds until a process that has ended is noticed by the others.
HEARTBEAT = 30
# Seconds that they wait at the end for the first one, which writes the results.
REPORTING = 3600
NO_SPACE = os.strerror(errno.ENOSPC)
# How collectives (Gloo's between CPUs, NCCL's between GPUs) and JAX's coordination service say it.
_PEER_LOST = re.compile(
    r"\bGloo\b|\bNCCL\b|closed by peer|reset by peer|heartbeat|coordination service|Barrier failed"
)

log = logging.getLogger(__name__)


class UsageError(Exception):
    """The command line is not usable."""


def main() -> int:
    """Runs a verb; returns the exit code. Errors that a user can mend are one line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("xlir", "input_pipeline", __name__):
        logging.getLogger(package).setLevel(logging.INFO)
    # Orbax and TFDS report every step of their work, and, besides raising it, every error.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = _report_unraisable
    # Pillow warns of large photos; `input_pipeline.photo_limits` limits their memory.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")
    try:
        code, (verb, *images) = 0, _parse(sys.argv)
        if verb == "help":
            print(f"{__doc__}\nFlags:\n{_flag_help()}")
        else:
            code = _RUN[verb](*images) or 0
        # Flushed here, so that a failing write is reported, which it would not be at exit.
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(f"{error}; see python -m xlir.main --help", code=2)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", code=130)
    except Exception as error:
        return _report(error)


def _train() -> None:
    # JAX takes seconds to import: after what can be refused without it.
    _start_jax()
    from xlir import train

    workdir = pathlib.Path(_WORKDIR.value or _default_workdir())
    train.train(_CONFIG.value, workdir, accept_changed_data=_ACCEPT_CHANGED_DATA.value)


def _prepare() -> None:
    from xlir import data

    print(data.prepare(_CONFIG.value))


def _shardings() -> None:
    import jax

    from xlir import compile, partition

    partition.check_platforms()
    print(compile.sharding_table(_CONFIG.value, _DEVICES.value or jax.device_count()))


def _compile() -> int:
    # This machine's own devices are not used, and a TPU among them may be another process's.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from xlir import compile

    report = compile.compile_for(_CONFIG.value, _TOPOLOGY.value)
    print(report)
    return 0 if report.fits else 1


def _evaluate() -> None:
    _start_jax()
    from xlir import data, evaluate, partition
    from xlir.encoder import Encoder
    from xlir.workdir import read_config

    workdir = pathlib.Path(_WORKDIR.value)
    mesh = partition.fitting_mesh(read_config(workdir).mesh)
    encoder = Encoder.load(workdir, mesh=mesh)
    if _TASK.value == "tagging":
        _evaluate_tagging(encoder, workdir)
        return
    for test_set in data.test_sets(
        encoder.config, _TEST_SET.value, _IMAGES.value, drop_junk=_DROP_JUNK.value
    ):
        evaluate.report(encoder, test_set, workdir, data.feature_cache())


def _evaluate_tagging(encoder, workdir: pathlib.Path) -> None:
    from xlir import data, evaluate_tagging

    for name in (_TEST_SET.value or "split:test").split(","):
        if not name.startswith("split:"):
            raise ValueError(f"--test_set={name}: tagging is evaluated on split:NAME")
        split = name.removeprefix("split:")
        chosen = evaluate_tagging.tagging_set(encoder.config, _VOCABULARY.value or "", split)
        evaluate_tagging.report(encoder, chosen, workdir, data.feature_cache())


def _tag(*images: str) -> None:
    from input_pipeline import files, photo_limits, vocabularies

    # What can be refused is, before JAX takes its seconds.
    vocabulary = vocabularies.load(_VOCABULARY.value)
    languages = [language.strip() for language in _LANGUAGE.value or ["en"]]
    for language in languages:
        vocabulary.names_in(language)
    if _THRESHOLD.value is not None and not 0 <= _THRESHOLD.value <= 1:
        raise UsageError(f"--threshold={_THRESHOLD.value} is no share, between 0 and 1")
    if _SHEET.value and not _SHEET.value.lower().endswith(PICTURES):
        raise UsageError(f"--sheet={_SHEET.value} should end in {', '.join(PICTURES)}")
    for place in (_OUTPUT.value, _SHEET.value):
        if place not in (None, "-"):
            files.check_writable(pathlib.Path(place))
    photo_limits.limit()
    # JSON is UTF-8; what a terminal of another encoding can't show is written in escapes.
    encoding = "utf8" if _OUTPUT.value == "-" else None
    sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")
    _start_jax()
    from xlir import tagging

    tagging.run(
        pathlib.Path(_WORKDIR.value),
        vocabulary,
        languages,
        tagging.find_images(images),
        top_k=_TOP_K.value or (None if _THRESHOLD.value is not None else 5),
        threshold=_THRESHOLD.value,
        output=_OUTPUT.value,
        sheet=_SHEET.value,
    )


def _export() -> None:
    # As Ctrl-C does it: what is half-written goes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _start_jax()
    from xlir import export

    report = export.export(
        pathlib.Path(_WORKDIR.value),
        pathlib.Path(_TO.value),
        _FORMAT.value or "",
        weights=_WEIGHTS.value or "",
        test_set=_TEST_SET.value,
        images=_IMAGES.value,
    )
    print(f"{report}\nwritten: {_TO.value}")


def _import() -> None:
    # Nothing is computed; and transformers warns of M-CLIP's type, which it does not know.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from xlir import published

    workdir = pathlib.Path(_WORKDIR.value)
    published.import_model(_TEXT.value, _IMAGE.value or _TEXT.value, workdir)


_RUN = {
    "train": _train,
    "prepare": _prepare,
    "eval": _evaluate,
    "tag": _tag,
    "export": _export,
    "import": _import,
    "shardings": _shardings,
    "compile": _compile,
}


def _start_jax() -> None:
    """Joins the other processes where there are any, and keeps compiled programs."""
    import jax

    from input_pipeline.cache import cache_folder
    from xlir import partition

    if _DISTRIBUTED.value or _COORDINATOR.value is not None:
        _join()
    else:
        partition.check_platforms()
    # Not of CPUs: what one has kept another may not be able to run, or refuses loudly
    # (https://github.com/jax-ml/jax/issues/38445).
    if not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
        folder = cache_folder() / "compiled"
        # JAX tells where it can't write there, and goes on.
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True, mode=0o700)
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _join() -> None:
    """Makes this one of several processes."""
    import jax

    jax.distributed.initialize(
        coordinator_address=_COORDINATOR.value,
        num_processes=_PROCESSES.value,
        process_id=_PROCESS.value,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=REPORTING,
    )
    if jax.process_index():
        # The first process speaks for all.
        for package in ("xlir", "input_pipeline"):
            logging.getLogger(package).setLevel(logging.WARNING)


def _check_flags(verb: str) -> None:
    """Refuses flags that are of another verb, or lack others."""
    if verb in ("eval", "tag", "export") and _CONFIG.value is not None:
        raise UsageError(f"{verb} takes the configuration from --workdir, not from --config")
    for name, verbs in FLAGS.items():
        if verb not in verbs and flags.FLAGS[name].value not in (None, "", False):
            raise UsageError(f"--{name} goes with {' and '.join(verbs)}, not with {verb}")
    for name in NEEDED[verb]:
        if flags.FLAGS[name].value is None:
            raise UsageError(f"{verb} needs --{name}")
    if verb == "eval":
        other = ("images", "drop_junk") if _TASK.value == "tagging" else ("vocabulary",)
        for name in other:
            if flags.FLAGS[name].value:
                raise UsageError(f"--{name} does not go with --task={_TASK.value or 'retrieval'}")
    together = (_COORDINATOR, _PROCESSES, _PROCESS)
    if len({flag.value is None for flag in together}) > 1:
        raise UsageError("--coordinator, --processes and --process go together")
    if _PROCESS.value is not None and _PROCESS.value >= _PROCESSES.value:
        raise UsageError(
            f"--process={_PROCESS.value} is none of --processes={_PROCESSES.value}, which are "
            "counted from 0"
        )
    joins = _DISTRIBUTED.value or _COORDINATOR.value or verb not in FLAGS["distributed"]
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not joins:
        raise UsageError("SLURM runs several tasks of this step: add --distributed")


def _parse(arguments: list[str]) -> list[str]:
    """Parses flags; returns the verb, and the images that it is given."""
    if any(argument in ("-h", "--help", "-help", "help") for argument in arguments[1:]):
        return ["help"]
    try:
        _, *words = flags.FLAGS(arguments)
        if _CONFIG.value is not None:
            # A file that could not be read raises where it is first used.
            _ = _CONFIG.value.lock
    except flags.UnrecognizedFlagError as error:
        raise UsageError(f"unknown flag --{error.flagname}") from error
    except flags.Error as error:
        # Where get_config() raised, its traceback follows the first line.
        first, *others = str(error).splitlines()
        raise UsageError(" ".join([first, *others[-1:]])) from error
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"the configuration file can't be read: {reason}") from error
    except SyntaxError as error:
        raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    # Unknown fields, and values of another type.
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"the configuration is not usable: {_reason(error)}") from error
    verb, *images = words or ["train"]
    if images and verb not in TAKES_IMAGES:
        raise UsageError(f"expected one verb, got {' '.join(words)}")
    if verb not in _RUN:
        raise UsageError(f"unknown verb {verb!r}; known: {', '.join(_RUN)}")
    _check_flags(verb)
    if _CONFIG.value is not None:
        try:
            check_config(_CONFIG.value)
        except ValueError as error:
            raise UsageError(f"the configuration is not usable: {error}") from error
    if verb in TAKES_IMAGES and not images:
        raise UsageError(f"{verb} needs images: files, folders or patterns")
    return [verb, *images]


def _default_workdir() -> str:
    """runs/<config> or runs/<config>-<variant>."""
    file, _, variant = flags.FLAGS["config"].config_filename.partition(":")
    return f"runs/{pathlib.Path(file).stem}" + (f"-{variant}" if variant else "")


def _flag_help() -> str:
    return "\n".join(
        f"  --{flag.name}: {flag.help}" for flag in (flags.FLAGS[name] for name in FLAGS)
    )


def _reason(error: Exception) -> str:
    """What is wrong with a configuration, in one line."""
    # An unknown field is an AttributeError of a KeyError of its name and a suggestion.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = ". ".join(str(error.args[0] if error.args else error).splitlines())
    return f"there is no field {text}" if isinstance(error, KeyError) else text


def _report(error: Exception) -> int:
    """One line for what a user can mend, a traceback for anything else."""
    # An array's file that could not be written is an error of JAX's or Orbax's own.
    if getattr(error, "errno", 0) == errno.ENOSPC or NO_SPACE in str(error):
        return _fail(f"the disk is full: free some space and run again to resume. {_line(error)}")
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        # As `tag ... | head` leaves it: like other programs, this one then ends without a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if isinstance(error, OSError | ValueError):
        return _fail(str(error))
    from xlir import partition
    from xlir.train import Stopped

    if isinstance(error, Stopped):
        _fail(f"{error}; run the same command again to resume")
        partition.wait_for_all()  # or JAX would end the slower ones, when the first one is gone
        return 128 + signal.SIGTERM
    if _PEER_LOST.search(str(error)):
        return _fail(
            "another process has failed or can't be reached; run the same command again to resume. "
            + _line(error)
        )
    # Not raised again: Python's own end would wait for the other processes.
    traceback.print_exception(error)
    return 1


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """As Python does, but for reads and writes that end after a failed one has ended them all."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]


def leave(code: int) -> None:
    """Ends the program.

    At once where it has failed: what libraries do at exit would wait for processes that are gone,
    or write again what could not be written.
    """
    # Where it fails, `main` has said so already.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        os._exit(code)


def _fail(message: str, code: int = 1) -> int:
    print(f"xlir: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    leave(main())

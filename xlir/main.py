"""Cross-lingual image retrieval: train on English captions, search in other languages.

    python -m xlir.main [VERB] [FLAGS]

Verbs:
  train   train and evaluate what --config describes; resumes where --workdir holds a checkpoint
          (the default verb)
  prepare prepare the data set that --config describes, which train would do too, and say where
          it is and what it holds
  eval    evaluate the best checkpoint of --workdir on its own test sets or on --test_set

Examples:
  python -m xlir.main --config=configs/quickstart.py
  python -m xlir.main --config=configs/flickr8k.py --config.data.dir=PATH --workdir=runs/flickr8k
  python -m xlir.main prepare --config=configs/flickr8k.py --config.data.dir=PATH
  python -m xlir.main eval --workdir=runs/flickr8k --test_set=PATH/multilingual_test \\
      --images=PATH/images

Any field of configs/base.py can be overridden: --config.optimizer.learning_rate=3e-4. Prepared data
sets and features of frozen towers are kept in $XLIR_CACHE (default ~/.cache/xlir).
"""

import errno
import logging
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

VERBS = ("train", "prepare", "eval")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, as configs/NAME.py or configs/NAME.py:VARIANT."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run. train: runs/<name of the config> where it is not given."
)
_TEST_SET = flags.DEFINE_string(
    "test_set",
    "",
    "eval: folder of a multilingual test set in XTD10's layout, or 'xtd10', or 'split:NAME' of the "
    "run's data set; several are joined with commas.",
)
_IMAGES = flags.DEFINE_string(
    "images",
    "",
    "eval: folder of the test set's photos; default: the run's data.dir, for XTD10 its data set.",
)
_DROP_JUNK = flags.DEFINE_bool(
    "drop_junk", False, "eval: leave out XTD10's six German captions that translate nothing."
)
FLAGS = ("config", "workdir", "test_set", "images", "drop_junk")

log = logging.getLogger(__name__)


class UsageError(Exception):
    """The command line is not usable."""


def main() -> int:
    """Runs a verb; returns the exit code. Errors that a user can mend are one line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("xlir", "input_pipeline", __name__):
        logging.getLogger(package).setLevel(logging.INFO)
    # Orbax and TFDS report every step of their work there.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        verb = _parse(sys.argv)
        if verb == "help":
            print(f"{__doc__}\nFlags:\n{_flag_help()}")
        elif verb == "train":
            _train()
        elif verb == "prepare":
            _prepare()
        else:
            _evaluate()
    except UsageError as error:
        return _fail(f"{error}; see python -m xlir.main --help", code=2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error}): free some space and run again to resume")
        return _fail(str(error))
    except ValueError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to resume", code=130)
    return 0


def _train() -> None:
    if _CONFIG.value is None:
        raise UsageError("train needs --config")
    _refuse("train", _TEST_SET, _IMAGES, _DROP_JUNK)
    # JAX takes seconds to import: after what can be refused without it.
    from xlir import train

    train.train(_CONFIG.value, pathlib.Path(_WORKDIR.value or _default_workdir()))


def _prepare() -> None:
    if _CONFIG.value is None:
        raise UsageError("prepare needs --config")
    _refuse("prepare", _WORKDIR, _TEST_SET, _IMAGES, _DROP_JUNK)
    from xlir import data

    print(data.prepare(_CONFIG.value))


def _refuse(verb: str, *others: flags.FlagHolder) -> None:
    """Refuses flags that a verb does not know."""
    for flag in others:
        if flag.value:
            owner = "train and eval" if flag.name == "workdir" else "eval"
            raise UsageError(f"--{flag.name} goes with {owner}, not with {verb}")


def _evaluate() -> None:
    if _WORKDIR.value is None:
        raise UsageError("eval needs --workdir")
    if _CONFIG.value is not None:
        raise UsageError("eval takes the configuration from --workdir, not from --config")
    from xlir import data, evaluate
    from xlir.encoder import Encoder

    workdir = pathlib.Path(_WORKDIR.value)
    encoder = Encoder.load(workdir)
    for test_set in data.test_sets(
        encoder.config, _TEST_SET.value, _IMAGES.value, drop_junk=_DROP_JUNK.value
    ):
        evaluate.report(encoder, test_set, workdir, data.feature_cache())


def _parse(arguments: list[str]) -> str:
    """Parses flags; returns the verb."""
    if any(argument in ("-h", "--help", "-help", "help") for argument in arguments[1:]):
        return "help"
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
    if len(words) > 1:
        raise UsageError(f"expected one verb, got {' '.join(words)}")
    verb = words[0] if words else "train"
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}; known: {', '.join(VERBS)}")
    return verb


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


def _fail(message: str, code: int = 1) -> int:
    print(f"xlir: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The verbs of the command line, one module each.

The module of a verb has

- a docstring, which `VERB --help` shows; the list of all verbs shows its first line;
- `define(flags)`, which declares the verb's flags (`xlir.commands.flags.Flags`);
- `run(values)`, which does the work. `values.workdir` is the value of --workdir, and so on. It
  returns the exit code, or None for 0, and raises `UsageError` if flags contradict each other;
- `WORDS`, only if the verb takes positional arguments: their name in the help. `run` receives them
  as further arguments.

Importing JAX takes seconds. So no module imports JAX at its top, even indirectly, and `run`
checks the flags before it imports JAX: help and most usage errors then appear at once.

To add a verb, write a module and add a line to `VERBS`.
"""

import importlib
import types
from collections.abc import Sequence

import absl.flags

from xlir.commands.errors import UsageError
from xlir.commands.flags import Flags

# Verb -> its module in this package.
VERBS = {
    "train": "train",
    "prepare": "prepare",
    "eval": "evaluate",
    "tag": "tag",
    "index": "index",
    "search": "search",
    "serve": "serve",
    "report": "report",
    "export": "export",
    "import": "import_model",
    "shardings": "shardings",
    "compile": "compile",
}
# The verb of a command line that names no verb.
DEFAULT = "train"


def load(verb: str) -> types.ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"xlir.commands.{VERBS[verb]}")


def find_verb(arguments: Sequence[str]) -> str | None:
    """The first positional argument if it is a verb, otherwise None.

    The value in `--flag value` is not positional, and neither is the word `help` at the start.
    """
    remaining = iter(arguments[1:] if arguments[:1] == ["help"] else arguments)
    for argument in remaining:
        if argument == "--" or not argument.startswith("-"):
            word = next(remaining, None) if argument == "--" else argument
            return word if word in VERBS else None
        if "=" not in argument and _takes_value(argument.lstrip("-")):
            next(remaining, None)
    return None


def declared_flags(verb: str) -> Flags:
    """The flags of a verb, without values."""
    flags = Flags(verb)
    load(verb).define(flags)
    return flags


def parse(verb: str, arguments: Sequence[str]) -> tuple[absl.flags.FlagValues, list[str]]:
    """The values of a verb's flags, and its positional arguments.

    Args:
      verb: the verb of this command line.
      arguments: `sys.argv`.

    Raises:
      UsageError: the command line is not valid.
    """
    flags = declared_flags(verb)
    try:
        words = flags.parse(arguments)
    except absl.flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname, verb)) from error
    if words and words[0] != verb:
        if words[0] in VERBS:
            raise UsageError(f"put the verb {words[0]} before the flags")
        raise UsageError(f"unknown verb {words[0]!r}; known: {', '.join(VERBS)}")
    if words[1:] and not hasattr(load(verb), "WORDS"):
        raise UsageError(f"expected one verb, got {' '.join(words)}")
    flags.check()
    return flags.values, words[1:]


def summaries() -> str:
    """A line for each verb."""
    return "\n".join(f"  {verb:<11}{_summary(verb)}" for verb in VERBS)


def help_of(verb: str) -> str:
    """What a verb does, with examples and flags."""
    module = load(verb)
    words = f" {module.WORDS}" if hasattr(module, "WORDS") else ""
    return (
        f"python -m xlir.main {verb} [FLAGS]{words}\n\n{module.__doc__.strip()}\n\n"
        f"Flags:\n{declared_flags(verb).help()}"
    )


def _summary(verb: str) -> str:
    return load(verb).__doc__.splitlines()[0].rstrip(".")


def _takes_value(name: str) -> bool:
    """Whether any verb has a flag of this name, or --config.FIELD, that is not a boolean."""
    name, *_ = name.split(".")
    flags = (declared_flags(verb).values for verb in VERBS)
    return any(name in values and not values[name].boolean for values in flags)


def _unknown_flag(name: str, verb: str) -> str:
    """The error message for a flag that the verb does not have; names the verbs that have it."""
    name, *_ = name.split(".")
    others = [other for other in VERBS if name in declared_flags(other).values]
    if not others:
        return f"unknown flag --{name}"
    listed = " and ".join([", ".join(others[:-1]), others[-1]] if others[1:] else others)
    hint = ": it reads the configuration of the run" if name == "config" else ""
    return f"--{name} is a flag of {listed}, not of {verb}{hint}"

"""The verbs of the command line, one module each.

The module of a verb has

- a docstring, which `VERB --help` shows; the list of all verbs shows its first line;
- `define(flags)`, which declares the verb's flags (`xlir.commands.flags.Flags`);
- `run(values)`, which does the work. Its argument has the flags' values, and what it returns is the
  exit code, None for 0. It raises `UsageError` where flags do not go together;
- `WORDS`, where the verb takes words besides its flags: what they are, for the help. `run` takes
  them as further arguments.

A module imports nothing at its top that imports JAX, and checks its flags before it starts JAX:
the help and most refusals then take no seconds. Adding a verb is its module and a line below.
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
    "export": "export",
    "import": "import_model",
    "shardings": "shardings",
    "compile": "compile",
}
# The verb of a command line without one.
DEFAULT = "train"


def load(verb: str) -> types.ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"xlir.commands.{VERBS[verb]}")


def find_verb(arguments: Sequence[str]) -> str | None:
    """The first argument that is a verb; None where none is."""
    return next((argument for argument in arguments if argument in VERBS), None)


def declared_flags(verb: str) -> Flags:
    """The flags of a verb, without values."""
    flags = Flags(verb)
    load(verb).define(flags)
    return flags


def parse(verb: str, arguments: Sequence[str]) -> tuple[absl.flags.FlagValues, list[str]]:
    """The values of a verb's flags, and the words that the verb is given.

    Args:
      verb: the verb of this command line.
      arguments: the program's name, and those of the command line.

    Raises:
      UsageError: the command line is not usable.
    """
    flags = declared_flags(verb)
    try:
        words = flags.parse(arguments)
    except absl.flags.UnrecognizedFlagError as error:
        raise UsageError(_unknown_flag(error.flagname, verb)) from error
    if words and words[0] != verb:
        if words[0] in VERBS:
            raise UsageError(f"the verb comes first: {words[0]}")
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


def _unknown_flag(name: str, verb: str) -> str:
    """What to say of a flag that the verb has not; other verbs may have it."""
    name, *_ = name.split(".")
    others = [other for other in VERBS if name in declared_flags(other).values]
    if not others:
        return f"unknown flag --{name}"
    *first, last = others
    message = f"--{name} goes with {' and '.join(filter(None, [', '.join(first), last]))}"
    message += f", not with {verb}"
    if name == "config":
        message += ": a run has its configuration in --workdir"
    return message

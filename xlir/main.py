"""Cross-lingual image retrieval: train on English captions, search in other languages.

python -m xlir.main [VERB] [FLAGS]
"""

import logging
import sys
import warnings

from xlir import commands
from xlir.commands import errors
from xlir.commands.errors import leave

HELP = f"""{__doc__}
Verbs:
{{verbs}}

python -m xlir.main VERB --help shows the flags of a verb, with examples. The default verb is
{commands.DEFAULT}. This command trains on the English names of emoji and evaluates in 14 languages:

  python -m xlir.main --config=configs/quickstart.py
"""


def main() -> int:
    """Runs the verb of the command line; returns the exit code."""
    _choose_messages()
    verb = commands.find_verb(sys.argv[1:])
    try:
        code = _run(verb, sys.argv)
        # Flushed here, because a write that fails at exit would not be reported.
        sys.stdout.flush()
        return code
    except errors.UsageError as error:
        help_of_verb = f"{verb} --help" if verb else "--help"
        return errors.fail(f"{error}; see python -m xlir.main {help_of_verb}", code=2)
    except (Exception, KeyboardInterrupt) as error:
        return errors.report(error)


def _run(verb: str | None, arguments: list[str]) -> int:
    """Runs a verb, or prints help."""
    if arguments[1:2] == ["help"] or {"-h", "-help", "--help"} & set(arguments):
        print(commands.help_of(verb) if verb else HELP.format(verbs=commands.summaries()))
        return 0
    verb = verb or commands.DEFAULT
    values, words = commands.parse(verb, arguments)
    return commands.load(verb).run(values, *words) or 0


def _choose_messages() -> None:
    """Sets which messages of this program and of libraries are shown."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for package in ("xlir", "input_pipeline"):
        logging.getLogger(package).setLevel(logging.INFO)
    # Orbax and TFDS log every step of their work, and every error that they also raise.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = errors.report_unraisable
    # Pillow warns of large photos; `input_pipeline.photo_limits` limits their memory.
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")


if __name__ == "__main__":
    leave(main())

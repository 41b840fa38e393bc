"""The flags of a verb: declared once, parsed, and shown as help."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import absl.flags
from ml_collections import config_flags

from xlir.commands.errors import UsageError
from xlir.config import check_config

# Columns of the help: where the text of a flag begins, and where it is wrapped.
INDENT, WIDTH = 25, 96


class Flags:
    """The flags of one verb. A method for each kind of flag declares one, with its help.

    Args:
      verb: the verb, for messages.

    Attributes:
      values: absl's flags; after `parse`, `values.workdir` is the value of --workdir.
    """

    def __init__(self, verb: str):
        self.verb = verb
        self.values = absl.flags.FlagValues()
        self._needed: list[str] = []

    def string(
        self, name: str, text: str, default: str | None = None, *, needed: bool = False
    ) -> None:
        """A flag with any text; the verb can't do without one that is `needed`."""
        self._declare(absl.flags.DEFINE_string, name, default, text)
        if needed:
            self._needed.append(name)

    def strings(self, name: str, text: str, default: str) -> None:
        """A flag with several texts, joined with commas."""
        self._declare(absl.flags.DEFINE_list, name, default, text)

    def choice(
        self, name: str, text: str, choices: Sequence[str], default: str | None = None
    ) -> None:
        """A flag with one of several texts."""
        self._declare(absl.flags.DEFINE_enum, name, default, choices, text)

    def switch(self, name: str, text: str) -> None:
        """A flag that is given or not."""
        self._declare(absl.flags.DEFINE_bool, name, False, text)

    def integer(self, name: str, text: str, least: int, most: int | None = None) -> None:
        """A flag with a whole number from `least` to `most`; None where it is not given."""
        self._declare(absl.flags.DEFINE_integer, name, None, text, least, most)

    def number(self, name: str, text: str) -> None:
        """A flag with any number; None where it is not given."""
        self._declare(absl.flags.DEFINE_float, name, None, text)

    def config(self) -> None:
        """The flag --config, with --config.FIELD for each field; the verb can't do without it."""
        text = (
            "Configuration file, as configs/NAME.py or configs/NAME.py:VARIANT. "
            "--config.FIELD=VALUE overrides a field, as --config.data.dir=PATH; configs/base.py "
            "explains all fields."
        )
        self._declare(config_flags.DEFINE_config_file, "config", None, text)
        self._needed.append("config")

    def workdir(self) -> None:
        """The flag --workdir, of a run that exists; the verb can't do without it."""
        self.string("workdir", "Folder of the run.", needed=True)

    def test_set(self) -> None:
        """The flags --test_set and --images."""
        self.string(
            "test_set",
            "A name of the run's config.evals, the folder of a multilingual test set in XTD10's "
            "layout, 'xtd10', or 'split:NAME' of the run's data set, or several of them joined "
            "with commas; default: all of config.evals.",
            default="",
        )
        self.string(
            "images",
            "Folder of the test set's photos; default: as config.evals says, else for XTD10 the "
            "run's data set, and for another test set the run's data.dir.",
            default="",
        )

    def parse(self, arguments: Sequence[str]) -> list[str]:
        """Takes values from the command line; returns the words that are no flags.

        Args:
          arguments: those of the program, `sys.argv`: where fields of --config are overridden,
            ml_collections takes them from there in any case.

        Raises:
          absl.flags.UnrecognizedFlagError: the verb has no such flag.
          UsageError: a value is not usable.
        """
        try:
            _, *words = self.values(arguments)
            if "config" in self.values and self.values.config is not None:
                # ml_collections reports a file that it could not read when a field is first read.
                _ = self.values.config.lock
            return words
        except absl.flags.UnrecognizedFlagError:
            raise
        except absl.flags.Error as error:
            # Where get_config() raised, its traceback follows the first line.
            first, *others = str(error).splitlines()
            raise UsageError(" ".join([first, *others[-1:]])) from error
        except OSError as error:
            reason = str(error).splitlines()[-1].strip()
            raise UsageError(f"the configuration file can't be read: {reason}") from error
        except SyntaxError as error:
            raise UsageError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
        # Raised for unknown fields and for values of another type.
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UsageError(f"the configuration is not usable: {_reason(error)}") from error

    def check(self) -> None:
        """Raises UsageError where a needed flag is missing or the configuration is not usable."""
        for name in self._needed:
            if self.values[name].value is None:
                raise UsageError(f"{self.verb} needs --{name}")
        if "config" in self.values:
            try:
                check_config(self.values.config)
            except ValueError as error:
                raise UsageError(f"the configuration is not usable: {error}") from error

    def help(self) -> str:
        """The flags, each with what it means, in the order of their declaration."""
        paragraphs = []
        for name in self.values:
            text = self.values[name].help + (" Required." if name in self._needed else "")
            first, others = f"  --{name}  ".ljust(INDENT), " " * INDENT
            paragraphs.append(
                textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=others)
            )
        return "\n".join(paragraphs)

    def _declare(self, define: Callable, *description: Any) -> None:
        define(*description, flag_values=self.values)


def _reason(error: Exception) -> str:
    """What is wrong with a configuration, in one line."""
    # An unknown field is an AttributeError of a KeyError of its name and a suggestion.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = ". ".join(str(error.args[0] if error.args else error).splitlines())
    return f"there is no field {text}" if isinstance(error, KeyError) else text

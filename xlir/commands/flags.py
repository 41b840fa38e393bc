"""The flags of a verb: their declaration, their parsing and their help."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import absl.flags
from ml_collections import config_flags

from xlir.commands.errors import UsageError
from xlir.config import check_config

# Columns of the help in which the text of a flag begins, and in which it is wrapped.
INDENT, WIDTH = 25, 96


class Flags:
    """The flags of one verb. Each type of flag has a method that declares it.

    Args:
      verb: the verb, for error messages.

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
        """A flag with any text; `needed`: the user must give it."""
        self._declare(absl.flags.DEFINE_string, name, default, text)
        if needed:
            self._needed.append(name)

    def strings(self, name: str, text: str, default: str) -> None:
        """A flag with a list of texts, joined with commas."""
        self._declare(absl.flags.DEFINE_list, name, default, text)

    def texts(self, name: str, text: str) -> None:
        """A flag that may be given several times; the value is the list of its texts."""
        self._declare(absl.flags.DEFINE_multi_string, name, [], text + " May be repeated.")

    def choice(
        self, name: str, text: str, choices: Sequence[str], default: str | None = None
    ) -> None:
        """A flag whose value is one of `choices`."""
        self._declare(absl.flags.DEFINE_enum, name, default, choices, text)

    def switch(self, name: str, text: str) -> None:
        """A boolean flag, False by default."""
        self._declare(absl.flags.DEFINE_bool, name, False, text)

    def integer(self, name: str, text: str, least: int, most: int | None = None) -> None:
        """A flag with an integer from `least` to `most`; None if it is not given."""
        self._declare(absl.flags.DEFINE_integer, name, None, text, least, most)

    def number(self, name: str, text: str) -> None:
        """A flag with any number; None if it is not given."""
        self._declare(absl.flags.DEFINE_float, name, None, text)

    def config(self, *, needed: bool = True) -> None:
        """The flag --config, with --config.FIELD for each field."""
        text = (
            "Configuration file: configs/NAME.py or configs/NAME.py:VARIANT. "
            "--config.FIELD=VALUE overrides a field, for example --config.data.dir=PATH; "
            "configs/base.py explains all fields."
        )
        self._declare(config_flags.DEFINE_config_file, "config", None, text)
        if needed:
            self._needed.append("config")

    def workdir(self) -> None:
        """The required flag --workdir, the folder of an existing run."""
        self.string("workdir", "Folder of the run.", needed=True)

    def engine(self, text: str = "", others: Sequence[str] = ()) -> None:
        """The flag --engine: what embeds texts and photos; `text` describes `others`."""
        self.choice(
            "engine",
            "What embeds: jax, or onnxruntime, which is faster for some towers on a CPU "
            "(docs/results.md). It reads the graphs that this command writes: export "
            "--workdir=INDEX/encoder --to=INDEX/encoder/onnx --format=onnx. "
            f"{text}Default: jax.",
            ["jax", "onnxruntime", *others],
            "jax",
        )

    def test_set(self, *, several: bool) -> None:
        """The flags --test_set and --images; `several`: --test_set may name more than one set."""
        self.string(
            "test_set",
            "A test set: a name in the run's config.evals, a folder in XTD10's layout, "
            "'TYPE:FOLDER' (a published set and the folder of its captions or class names; "
            "docs/test_sets.md lists the types), or 'split:NAME' (a split of the run's data set). "
            + (
                "Join several with commas. Default: all of config.evals."
                if several
                else "The export is checked on it. Default: one of config.evals."
            ),
            default="",
        )
        self.string(
            "images",
            "Folder of the test set's photos. Default: the folder that config.evals names. If it "
            "names none: for XTD10, the photos of the run's data set; for other published sets, "
            "the folder of the captions; for other folders, the run's data.dir.",
            default="",
        )

    def parse(self, arguments: Sequence[str]) -> list[str]:
        """Takes values from the command line; returns the positional arguments.

        Args:
          arguments: must be `sys.argv`, because ml_collections always reads the overrides of
            configuration fields from `sys.argv`.

        Raises:
          absl.flags.UnrecognizedFlagError: the verb has no such flag.
          UsageError: a value is not valid.
        """
        try:
            _, *words = self.values(arguments)
            if "config" in self.values and self.values.config is not None:
                # ml_collections reports an unreadable file only when a field is read.
                _ = self.values.config.lock
            return words
        except absl.flags.UnrecognizedFlagError:
            raise
        except absl.flags.Error as error:
            # If get_config() raised, its traceback follows the first line.
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
        """Raises UsageError if a required flag is missing or the configuration is not usable."""
        for name in self._needed:
            if self.values[name].value is None:
                raise UsageError(f"{self.verb} needs --{name}")
        if "config" in self.values and self.values.config is not None:
            try:
                check_config(self.values.config)
            except ValueError as error:
                raise UsageError(f"the configuration is not usable: {error}") from error

    def help(self) -> str:
        """The help text of all flags, in the order of their declaration."""
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
    # For an unknown field, ml_collections raises an AttributeError around a KeyError, whose text is
    # the field's name and a suggestion.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = ". ".join(str(error.args[0] if error.args else error).splitlines())
    return f"there is no field {text}" if isinstance(error, KeyError) else text

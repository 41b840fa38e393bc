"""Test sets. `TYPES` lists the values of `config.evals.NAME.type`.

Each type is a module of this package, whose `ENTRY` reads such test sets. To add a type, write its
module, add its name to `TYPES`, and test it.
"""

import importlib

from input_pipeline.test_sets.retrieval_set import Entry

# XTD10; any folder in XTD10's layout; a split of the run's own data set.
TYPES = ("xtd10", "folder", "split")


def find(type: str) -> Entry:
    """The entry of a type of test sets.

    Raises:
      ValueError: the type is unknown.
    """
    if type not in TYPES:
        raise ValueError(f"there is no type {type!r} of test sets; known: {', '.join(TYPES)}")
    return importlib.import_module(f"{__name__}.{type}").ENTRY

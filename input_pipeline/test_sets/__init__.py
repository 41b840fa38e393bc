"""Test sets, by the types that `config.evals.NAME.type` may have.

Each type is a module of this package, which says by its `ENTRY` how such a set is read. To add a
test set, write its module, add its name to `TYPES`, and test it.
"""

import importlib

from input_pipeline.test_sets.retrieval_set import Entry

# XTD10; any folder in XTD10's layout; a split of the run's own data set.
TYPES = ("xtd10", "folder", "split")


def find(type: str) -> Entry:
    """How test sets of a type are read.

    Raises:
      ValueError: there is no such type.
    """
    if type not in TYPES:
        raise ValueError(f"there is no type {type!r} of test sets; known: {', '.join(TYPES)}")
    return importlib.import_module(f"{__name__}.{type}").ENTRY

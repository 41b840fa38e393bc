"""The valid values of every field of a configuration, and the valid combinations of fields.

configs/base.py has the fields themselves, their defaults and their meaning. `check_config` checks
all fields before any work is done; it does not need JAX, data or weights.
"""

import dataclasses
import re
import reprlib
from collections.abc import Container, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from input_pipeline import datasets, test_sets
from xlir.conflicts import conflicts

# The valid values of a field. Its `str` describes them at the end of an error message.
Allowed = Container
INT32 = 2**31 - 1
# The default upper limit of a number; its square is finite in float32.
LARGEST = 1e18
HEAVIEST = 1e6
# Dropout rates are rounded to 1/256, and a rate of 1 would drop everything.
MOST_DROPPED = 0.99
WIDEST = 65_536
LARGEST_IMAGE = 8192  # pixels a side
LOSSES = ("infonce", "sigmoid", "triplet", "patr", "m3l", "distill")
METRICS = ("euclidean", "squared_euclidean", "cosine")
DTYPES = ("auto", "float32", "bfloat16")
HEADS = ("none", "center", "linear", "affine", "mlp", "plain_mlp")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


@dataclasses.dataclass(frozen=True)
class Whole:
    """Integers from `least` to `most`, and the integers in `also`."""

    least: int
    most: int = INT32
    also: tuple[int, ...] = ()

    def __contains__(self, value: object) -> bool:
        # In Python a bool is an int, but a bool in the place of an integer is a mistake.
        return type(value) is int and (self.least <= value <= self.most or value in self.also)

    def __str__(self) -> str:
        also = "".join(f"{value} or " for value in self.also)
        return f"it must be {also}an integer from {self.least:,} to {self.most:,}"


@dataclasses.dataclass(frozen=True)
class Real:
    """Finite numbers from `least` to `most`; `open_below` and `open_above` exclude them."""

    least: float | int
    most: float | int = LARGEST
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, value: object) -> bool:
        if type(value) not in (int, float) or not self.least <= value <= self.most:
            return False
        return not (self.open_below and value == self.least) and not (
            self.open_above and value == self.most
        )

    def __str__(self) -> str:
        least = f"above {self.least:g}" if self.open_below else f"of at least {self.least:g}"
        most = f"below {self.most:g}" if self.open_above else f"at most {self.most:g}"
        return f"it must be a number {least} and {most}"


class Flag:
    """True and False."""

    def __contains__(self, value: object) -> bool:
        return type(value) is bool

    def __str__(self) -> str:
        return "it must be True or False"


class Choice:
    """One of some names."""

    def __init__(self, *names: str):
        self._names = names

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and value in self._names

    def __str__(self) -> str:
        empty = " (or empty)" if "" in self._names else ""
        return f"known: {', '.join(filter(None, self._names))}{empty}"


@dataclasses.dataclass(frozen=True)
class Text:
    """Any string, or any string but the empty one."""

    may_be_empty: bool = True

    def __contains__(self, value: object) -> bool:
        # A path can't contain a zero byte.
        return isinstance(value, str) and "\0" not in value and (self.may_be_empty or value != "")

    def __str__(self) -> str:
        return "it must be a string" + ("" if self.may_be_empty else " that is not empty")


@dataclasses.dataclass(frozen=True)
class Widths:
    """Any number of integers, each at least `least`: the widths of layers."""

    least: int = 1

    def __contains__(self, value: object) -> bool:
        each = Whole(self.least, WIDEST)
        return isinstance(value, (tuple, list)) and all(width in each for width in value)

    def __str__(self) -> str:
        return f"it must be integers from {self.least:,} to {WIDEST:,}, such as (1024,)"


@dataclasses.dataclass(frozen=True)
class Divisor:
    """Positive integers that divide `whole`."""

    whole: int

    def __contains__(self, value: object) -> bool:
        return value in Whole(1) and self.whole % value == 0

    def __str__(self) -> str:
        return f"it must be an integer of at least 1 that divides {self.whole:,}"


class Weights:
    """Any number of numbers above 0."""

    _each = Real(0, HEAVIEST, open_below=True)

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (tuple, list)) and all(weight in self._each for weight in value)

    def __str__(self) -> str:
        return "it must be numbers above 0, such as (0.2, 0.8), or () for none"


class Group:
    """Fields by name."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, Mapping)

    def __str__(self) -> str:
        return "it must be a group of fields"


@dataclasses.dataclass(frozen=True)
class Named:
    """Named groups of fields, with any names; each field of a group is optional."""

    fields: Mapping[str, Allowed]

    def __contains__(self, value: object) -> bool:
        # A name with a dot could not be used in a flag.
        return value in Group() and all(re.fullmatch(r"\w[\w-]*", str(name)) for name in value)

    def __str__(self) -> str:
        return "it must be groups of fields, whose names are letters, digits, _ and -"


class Steps:
    """The first and the last step of a range, or (0, 0) for none."""

    _step = Whole(0)

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            return False
        return all(step in self._step for step in value) and value[0] <= value[1]

    def __str__(self) -> str:
        return "it must be the first and the last step, such as (10, 12), or (0, 0) for none"


def _tower(*poolings: str) -> dict[str, Allowed]:
    return {
        "tower": Text(),
        "pooling": Choice("", *poolings),
        "dtype": Choice(*DTYPES),
        "frozen": Flag(),
        "learning_rate_factor": Real(0),
        # 0 would freeze all layers; 1 turns layer decay off.
        "layer_decay": Real(0, 1, open_below=True),
        "remat": Flag(),
        "head": Choice(*HEADS),
        "hidden": Widths(),
        "dropout": Real(0, MOST_DROPPED),
    }


FIELDS: dict[str, Any] = {
    # JAX uses the lower 32 bits of the seed; shuffling the data uses the whole seed.
    "seed": Whole(0, 2**63 - 1),
    "init": Text(),
    "steps": Whole(1),
    "log_every": Whole(1),
    "eval_every": Whole(1),
    "save_every": Whole(0),
    "average": Real(0, 1, open_above=True),
    "teacher": Text(),
    "embedding_dim": Whole(1, 2**24),
    "normalize": Flag(),
    "head_dtype": Choice(*DTYPES),
    "mesh": {"data": Whole(1, WIDEST, also=(-1,)), "fsdp": Whole(1, WIDEST, also=(-1,))},
    "profile": {"steps": Steps()},
    "data": {
        # Empty for an imported model, which has no data set.
        "name": Choice("", *datasets.NAMES),
        "dir": Text(),
        "annotations": Text(),
        "train": Text(may_be_empty=False),
        "weights": Weights(),
        "validation": Text(may_be_empty=False),
        "batch_size": Whole(1, 2**24),
        "microbatches": Whole(1, 2**24),
        "prefetch": Whole(0, 1024),
    },
    "evals": Named(
        {
            "type": Choice(*test_sets.TYPES),
            "captions": Text(),
            "images": Text(),
            "split": Text(may_be_empty=False),
            "drop_junk": Flag(),
            "prompts": Text(),
        }
    ),
    "text": _tower("mean", "cls", "pooler", "eos", "last")
    | {
        # Every tokenizer adds two special tokens.
        "max_length": Whole(3, WIDEST),
        "pack": Flag(),
        "prefix": Text(),
        "trim_vocab": Text(),
    },
    "image": _tower("cls", "pooler", "attention", "mean")
    | {
        "size": Whole(16, LARGEST_IMAGE, also=(0,)),
        "crop": Choice("", "squash", "center"),
        "min_area": Real(0, 1),
        "mirror": Flag(),
    },
    "loss": {
        "name": Choice(*LOSSES),
        "push_apart": Real(0, HEAVIEST),
        "distill": Real(0, HEAVIEST),
        "distill_metric": Choice("mse", "cosine", "contrastive"),
        "distill_temperature": Real(1e-3, 100),
        # Imported models keep their learned temperature, which may be below 0.01.
        "temperature": Real(1e-6, 100),
        "bias": Real(-1e4, 1e4),
        "chunk": Whole(0),
        "metric": Choice(*METRICS),
        "margin": Real(0, HEAVIEST),
        "rho": Real(0, 32, open_below=True),
        "image_weight": Real(0, HEAVIEST),
        "text_weight": Real(0, HEAVIEST),
    },
    "optimizer": {
        "learning_rate": Real(0),
        "warmup_steps": Whole(0),
        "weight_decay": Real(0, HEAVIEST),
        "b1": Real(0, 1, open_above=True),
        "b2": Real(0, 1, open_above=True),
        "clip_norm": Real(0),
        "ema": Real(0, 1, open_above=True),
    },
}


def check_config(config: ConfigDict | Mapping) -> None:
    """Raises ValueError if the configuration is invalid, with all faults in one line.

    Each fault names the field, its value and the valid values. Conditions that depend on data,
    checkpoints or devices are not checked.

    Args:
      config: all fields of configs/base.py, and no others.
    """
    fields = config.to_dict() if isinstance(config, ConfigDict) else config
    # Combinations are only checked once each field is valid by itself.
    faults = list(_faults("config", fields, FIELDS)) or list(conflicts(fields))
    if faults:
        raise ValueError(". ".join(faults))


def read_field(fields: Mapping, name: str, allowed: Allowed, default: Any = None) -> Any:
    """The value of a field of a foreign configuration, for example a published checkpoint's.

    Args:
      fields: the configuration.
      name: the name of the field.
      allowed: its valid values, such as `Whole(1)`.
      default: the value if the field is missing; None if the field is required.

    Raises:
      ValueError: the field is missing or invalid; the message names the field, its value and the
        valid values.
    """
    value = fields.get(name, default)
    if name not in fields and default is None:
        raise ValueError(f"it lacks {name!r}; {allowed}")
    if value not in allowed:
        raise ValueError(_fault(name, value, allowed))
    return value


def _fault(name: str, value: object, allowed: Allowed) -> str:
    return f"{name} is {_repr.repr(value)}; {allowed}"


def _faults(
    path: str, fields: Any, known: Mapping[str, Any], *, all_needed: bool = True
) -> Iterator[str]:
    """Messages about fields that are missing, unknown or invalid."""
    if fields not in Group():
        yield _fault(path, fields, Group())
        return
    for name in sorted(fields.keys() - known.keys(), key=str):
        yield f"there is no field {path}.{name}"
    for name, allowed in known.items():
        if name not in fields:
            if all_needed:
                yield f"{path}.{name} is missing"
        elif isinstance(allowed, Mapping):
            yield from _faults(f"{path}.{name}", fields[name], allowed)
        elif fields[name] not in allowed:
            yield _fault(f"{path}.{name}", fields[name], allowed)
        elif isinstance(allowed, Named):
            for group, content in fields[name].items():
                place = f"{path}.{name}.{group}"
                yield from _faults(place, content, allowed.fields, all_needed=False)

"""Network and memory traffic of a compiled program, from the text of its HLO.

`compiled.cost_analysis()` counts the body of every loop once, however often it runs, on TPUs and
CPUs alike, and counts data that stays in on-chip memory as traffic. The text has trip counts and
memory spaces.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Collective:
    """How often one kind of collective runs in a step, and the bytes that one chip receives."""

    count: int
    bytes: float


# The bytes that a chip receives from a collective in a group of n chips, divided by the bytes of
# its operand (ring algorithms).
_RECEIVED = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def collectives(hlo: str) -> dict[str, Collective]:
    """Collectives that one chip takes part in, by kind, from `compiled.as_text()`.

    In a group of n, a chip receives (n-1)/n of an all-gather's output, (n-1)/n of the input of a
    reduce-scatter or an all-to-all, 2(n-1)/n of an all-reduce's input, and a collective-permute's
    whole input. The body of a loop counts as often as it runs (once if the trip count is unknown).
    A conditional counts as its most expensive branch. The start and the end of an asynchronous
    collective count once together. An all-reduce that TPUs fuse with the slicing of its result
    counts as a reduce-scatter.
    """
    module = _parse(hlo)
    total = _total(module, module.entry, _communicated, fusions=True)
    kinds = [kind for kind in _RECEIVED if total[kind, "count"]]
    return {kind: Collective(total[kind, "count"], float(total[kind, "bytes"])) for kind in kinds}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one instruction moves from and to HBM in a step.

    Attributes:
      bytes: of all runs together.
      runs: how often it runs.
      name, shape: of the instruction, as the compiler names it; the shape is the result's.
      source: the operation of the traced program that it comes from; empty if there is none.
    """

    bytes: float
    runs: int
    name: str
    shape: str
    source: str


def hbm_bytes(hlo: str) -> float:
    """The bytes of all of `traffic` together."""
    return float(sum(each.bytes for each in traffic(hlo)))


def traffic(hlo: str) -> list[Traffic]:
    """Estimates what each instruction of a step moves from and to a chip's HBM, the most first.

    Every instruction outside fusions reads its operands and writes its result, padded to whole
    tiles. Of slices and in-place updates, only the slice counts. The body of a loop counts as often
    as it runs. Buffers in another memory (`S(1)` in a TPU layout: VMEM) are free. A fusion reads an
    operand once, even if it needs it twice, and hits in caches are ignored.

    Args:
      hlo: from `compiled.as_text()`.
    """
    module = _parse(hlo)

    def cost(module: _Module, name: str, instruction: _Instruction) -> dict:
        moved = _moved(module, name, instruction)
        key = (name, instruction.name)
        return {(*key, "bytes"): moved, (*key, "runs"): 1} if moved else {}

    total = _total(module, module.entry, cost, fusions=False)
    found = []
    for name, key, what in total:
        if what == "bytes":
            instruction = module.computations[name][key]
            source = re.search(r'op_name="([^"]*)"', instruction.attributes)
            shape = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", instruction.shape)
            size, runs = total[name, key, "bytes"], total[name, key, "runs"]
            found.append(Traffic(float(size), runs, key, shape, source[1] if source else ""))
    return sorted(found, key=lambda each: -each.bytes)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    operands: tuple[str, ...]

    def called(self, *keys: str) -> list[str]:
        """The computations that these attributes name."""
        groups = re.findall(rf"\b(?:{'|'.join(keys)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


@dataclasses.dataclass
class _Module:
    devices: int
    entry: str
    computations: dict[str, dict[str, _Instruction]]
    roots: dict[str, _Instruction]


_LINE = re.compile(
    r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\(((?:[^()]|\([^()]*\))*)\)(.*)"
)
# Such as `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`. The type may have no number: `pred[8]`.
_ARRAY = re.compile(r"\b[a-z]+(\d*)\w*\[([\d,<=]*)\](?:\{([^}]*)\})?")
# Custom calls of TPU executables that move no data: buffer names, ends of collectives.
_NOTHING = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AsyncCollectiveDone)"')


def _parse(hlo: str) -> _Module:
    header = hlo.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    module = _Module(math.prod(map(int, counts)), "", {}, {})
    name = ""
    for line in hlo.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = start[2]
            module.computations[name] = {}
            module.entry = name if start[1] else module.entry
        elif name and (match := _LINE.match(line)):
            root, key, shape, opcode, arguments, attributes = match.groups()
            opcode = "nothing" if _NOTHING.search(attributes) else opcode
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            found = _Instruction(key, shape, opcode, arguments, attributes, operands)
            module.computations[name][key] = found
            if root:
                module.roots[name] = found
    return module


_Cost = Callable[[_Module, str, _Instruction], dict]


def _total(module: _Module, name: str, cost: _Cost, fusions: bool) -> collections.Counter:
    """The sum of `cost` over all instructions that one run of a computation executes."""
    recurse = functools.partial(_total, module, cost=cost, fusions=fusions)
    total = collections.Counter()
    for instruction in module.computations[name].values():
        total.update(cost(module, name, instruction))
        if instruction.opcode == "while":
            trips = _trips(module, name, instruction)
            body = recurse(instruction.called("body")[0])
            total.update({key: trips * value for key, value in body.items()})
        elif instruction.opcode == "conditional":
            branches = ("branch_computations", "true_computation", "false_computation")
            total.update(max(map(recurse, instruction.called(*branches)), key=lambda c: c.total()))
        elif instruction.opcode in ("call", "async-start", "fusion" if fusions else ""):
            total.update(recurse(instruction.called("calls", "to_apply")[0]))
    return total


def _trips(module: _Module, name: str, loop: _Instruction) -> int:
    """The trip count of a loop: as XLA states it, or from start, limit and step; 1 if unknown.

    CPU executables state the count; TPU executables do not (libtpu 0.0.42).
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    test = module.computations[condition]
    limit = index = None  # the condition is `carry[index] < limit`
    for operand in module.roots[condition].operands:
        if position := re.search(r"index=(\d+)", test[operand].attributes):
            index = int(position[1])
        else:
            limit = _constant(test, operand)
    if limit is None or index is None or module.roots[body].opcode != "tuple":
        return 1
    outside, inside = module.computations[name], module.computations[body]
    initial = outside[loop.operands[0]].operands
    start = _constant(outside, initial[index]) if index < len(initial) else None
    advance = inside[module.roots[body].operands[index]].operands
    steps = [step for step in (_constant(inside, each) for each in advance) if step]
    return math.ceil((limit - (start or 0)) / (steps[0] if steps else 1))


def _constant(computation: dict[str, _Instruction], name: str) -> int | None:
    value = computation[name]
    while value.opcode in ("copy", "bitcast", "convert") and value.operands:
        value = computation[value.operands[0]]
    integer = value.opcode == "constant" and re.fullmatch(r"-?\d+", value.arguments)
    return int(value.arguments) if integer else None


def _communicated(module: _Module, name: str, instruction: _Instruction) -> dict:
    kind = instruction.opcode.removesuffix("-start")
    computation = module.computations[name]
    if kind not in _RECEIVED or _continues(computation, instruction):
        return {}
    size = sum(sum(_sizes(computation[operand].shape)) for operand in instruction.operands)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    received = size * _RECEIVED[kind](_group_size(instruction.attributes, module.devices))
    return {(kind, "count"): 1, (kind, "bytes"): received}


def _continues(computation: dict[str, _Instruction], instruction: _Instruction) -> bool:
    """Whether this instruction only continues a collective that an earlier one has started.

    TPUs can interleave a collective with several fusions. Each of those fusions repeats the
    collective in the HLO; the result of the first goes to AsyncCollectiveStart.
    """
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    users = [each for each in computation.values() if instruction.name in each.operands]
    return not any("AsyncCollectiveStart" in user.attributes for user in users)


def _group_size(attributes: str, devices: int) -> int:
    """The number of devices in a replica group.

    XLA prints the groups in one of four forms. `{{0,1},{2,3}}` lists them. `[2,4]<=[8]` means 2
    groups of 4. `mesh['a'=2,'b'=4] {'b'}` means groups along axis b (with `'b':(2)2`, along a part
    of axis b that has size 2). `{}` means one group of all devices.
    """
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _sizes(shape: str, hbm: bool = False) -> list[int]:
    """Bytes of each array in a shape, padded to whole tiles.

    With `hbm`, arrays in other memories count as 0.
    """
    sizes = []
    for bits, dimensions, layout in _ARRAY.findall(shape):
        padded = [int(n.lstrip("<=")) for n in dimensions.split(",") if n]
        order, _, memory = layout.partition(":")
        if tile := re.match(r"T\(([\d,]+)\)", memory):
            # The layout lists the axes from the fastest-varying one, a tile from the slowest one.
            lengths = reversed(tile[1].split(","))
            for axis, length in zip(order.split(",") if order else (), lengths, strict=False):
                padded[int(axis)] += -padded[int(axis)] % int(length)
        elsewhere = hbm and re.search(r"S\(\d+\)", memory)
        sizes.append(0 if elsewhere else math.prod(padded) * int(bits or 8) // 8)
    return sizes


# Instructions that move no data themselves.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "nothing"}
_FREE |= {"while", "conditional", "call", "async-start", "opt-barrier", "after-all"}


def _moved(module: _Module, name: str, instruction: _Instruction) -> int:
    """Bytes that an instruction moves from and to HBM."""
    opcode, sizes = instruction.opcode, _sizes(instruction.shape, hbm=True)
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode.endswith("-start") and len(sizes) > 1:  # the result lists source and destination
        if opcode.removesuffix("-start") in _RECEIVED:
            return sum(sizes)
        size = min(_sizes(instruction.shape)[:2])  # bytes that are copied, or sliced and copied
        return size * sum(end > 0 for end in sizes[:2])
    read = sum(_read(module, name, each, instruction) for each in set(instruction.operands))
    return read + _written(module, name, instruction)


def _read(module: _Module, name: str, operand: str, user: _Instruction) -> int:
    """Bytes of an operand that one instruction reads from HBM."""
    computation = module.computations[name]
    whole = sum(_sizes(computation[operand].shape, hbm=True))
    if not whole or user.opcode in ("tuple", "nothing") or _continues(computation, user):
        return 0
    if user.operands[0] == operand:
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            return min(whole, sum(_sizes(user.shape)))
        if user.opcode in ("dynamic-update-slice", "scatter"):
            return 0
    inside, within = [], name
    if user.opcode == "bitcast" and user is not module.roots[name]:
        inside = [user.name]
    elif user.opcode == "fusion":
        within = user.called("calls")[0]
        numbers = {str(i) for i, each in enumerate(user.operands) if each == operand}
        parameters = [i for i in module.computations[within].values() if i.opcode == "parameter"]
        inside = [each.name for each in parameters if each.arguments in numbers]
    else:
        return whole
    reads = [
        _read(module, within, each, consumer)
        for consumer in module.computations[within].values()
        for each in inside
        if each in consumer.operands
    ]
    return min(whole, sum(reads))


def _written(module: _Module, name: str, instruction: _Instruction) -> int:
    """Bytes of an instruction's result that go to HBM."""
    computation, sizes = module.computations[name], _sizes(instruction.shape, hbm=True)
    operands = [computation[each] for each in instruction.operands]
    if instruction.opcode == "tuple":
        pairs = zip(operands, sizes, strict=True)
        return sum(_written(module, name, each) for each, size in pairs if size)
    if not sum(sizes) or instruction.opcode in _FREE - {"bitcast"}:
        return 0
    if instruction.opcode == "bitcast":
        return sum(_written(module, name, each) for each in operands)
    if instruction.opcode == "dynamic-update-slice":
        return sum(_sizes(operands[1].shape))
    if instruction.opcode == "scatter":
        return sum(_sizes(operands[-1].shape))
    if instruction.opcode == "fusion":
        within = instruction.called("calls")[0]
        return _written(module, within, module.roots[within])
    return 0 if _continues(computation, instruction) else sum(sizes)

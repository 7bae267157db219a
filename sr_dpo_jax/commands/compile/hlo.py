"""What a program compiled for TPU says of itself, read from its HLO text: cycles, collectives, kernels, loops.

The compiler writes its own estimate of cycles beside each operation, and writes a loop's body once. So every figure is
multiplied by the trip counts of the loops around it: counted from the loop's start, step and limit, all constants, or
from `known_trip_count` where that is given. The estimates hold no communication; a Pallas kernel has none at all.

A trap: the compiler turns one collective into several fusions that carry parts of it (`AsyncCollectiveStart`), each
with a copy of the operation. Copies have the same channel, and are counted once.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from sr_dpo_jax.commands.compile.traced_flops import SPLASH_MATMULS, splash_flops

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = re.compile(r"^[a-z]+?(\d+)")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
# In the instruction's name or, where the compiler has renamed it, in its metadata.
KERNEL = re.compile(rf"splash_\w*?({'|'.join(SPLASH_MATMULS)})_")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    """As written: `bf16[8,128]{1,0}` or a tuple of such."""
    opcode: str
    operands: tuple[str, ...]
    text: str
    """The whole line."""

    def called(self, attribute: str) -> str:
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else ""


@dataclasses.dataclass
class Tally:
    """What runs on one chip, loops multiplied out."""

    cycles: float = 0.0
    """The compiler's estimates, kernels not included."""
    kernel_flops: float = 0.0
    """Matmuls of attention kernels as if they skipped no block."""
    unknown_kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    """Kernels of which neither cycles nor flops are known, and how often they run."""
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    """How often each kind of collective runs."""
    payload_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    """Size of what those collectives give to a chip, or take from it where that is more."""
    unknown_loops: int = 0
    """Loops whose trips are not known; their bodies are counted once."""
    repeated_operations: int = 0
    """Operations that the compiler repeats to save memory, of its own accord."""

    def add(self, other: "Tally", times: int) -> None:
        self.cycles += times * other.cycles
        self.kernel_flops += times * other.kernel_flops
        self.unknown_loops += other.unknown_loops
        self.repeated_operations += other.repeated_operations
        for name in ("unknown_kernels", "counts", "payload_bytes"):
            mine = getattr(self, name)
            mine.update({key: times * value for key, value in getattr(other, name).items()})


def read(text: str) -> Tally:
    """Tally of the entry computation of `compiled.as_text()`."""
    module = _Module(text)
    return module.tally(module.entry)


class _Module:
    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.loops: dict[str, tuple[str, Instruction]] = {}
        """The computation that holds the loop with this body, and the loop."""
        self.entry = ""
        name = ""
        for line in _whole_lines(text):
            header = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header:
                name = header.group(2)
                self.computations[name] = {}
                self.entry = name if header.group(1) else self.entry
            elif line.startswith("  ") and name:
                instruction = _instruction(line)
                self.computations[name][instruction.name] = instruction
                if line.startswith("  ROOT"):
                    self.roots[name] = instruction
                if instruction.opcode == "while":
                    self.loops[instruction.called("body")] = (name, instruction)
            elif line.startswith("}"):
                name = ""

    def tally(self, name: str) -> Tally:
        """Of one run of a computation; not of fusions, whose estimate stands beside their call."""
        total, channels = Tally(), set()
        for instruction in self.computations[name].values():
            opcode = instruction.opcode
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.text)
            total.cycles += int(estimate.group(1)) if estimate else 0
            total.repeated_operations += ".remat" in instruction.name and opcode != "get-tuple-element"
            if opcode == "while":
                trips = self.trips(name, instruction)
                total.unknown_loops += trips is None
                total.add(self.tally(instruction.called("body")), 1 if trips is None else trips)
            elif opcode == "conditional":
                total.add(max((self.tally(branch) for branch in _branches(instruction)), key=_size), 1)
            elif opcode in ("call", "async-start"):
                called = instruction.called("to_apply") or instruction.called("calls")
                total.add(self.tally(called), 1)
            elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
                self._add_kernel(total, name, instruction)
            for collective in self._collectives(name, instruction):
                channel = re.search(r"channel_id=(\d+)", collective.text)
                if channel is None or channel.group(1) not in channels:
                    channels.add(channel.group(1) if channel else "")
                    kind = self._kind(collective, instruction)
                    total.counts[kind] += 1
                    total.payload_bytes[kind] += self._payload(name, collective, kind)
        return total

    def _collectives(self, computation: str, instruction: Instruction) -> Iterator[Instruction]:
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            yield instruction
        elif opcode == "fusion":
            for inner in self.computations.get(instruction.called("calls"), {}).values():
                yield from self._collectives(computation, inner)

    def _kind(self, collective: Instruction, holder: Instruction) -> str:
        """TPU writes a reduce-scatter as a fusion of all-reduce and slice, named after both."""
        if "all-reduce-scatter" in holder.called("calls"):
            return "reduce-scatter"
        return collective.opcode.removesuffix("-start")

    def _payload(self, computation: str, collective: Instruction, kind: str) -> int:
        sizes = [_array_bytes(*array) for array in ARRAY.findall(collective.shape)]
        if kind in ("all-reduce", "all-to-all", "ragged-all-to-all"):
            return sum(sizes)
        here = self.computations[computation]
        operands = [here[name].shape for name in collective.operands if name in here]
        sizes += [_array_bytes(*array) for shape in operands for array in ARRAY.findall(shape)[:1]]
        return max(sizes)

    def _add_kernel(self, total: Tally, computation: str, kernel: Instruction) -> None:
        kind, here = KERNEL.search(kernel.text), self.computations[computation]
        shapes = [ARRAY.findall(here[name].shape) for name in kernel.operands if name in here]
        floats = [arrays[0][1] for arrays in shapes if len(arrays) == 1 and "f" in arrays[0][0]]
        wide = [dims for dims in (tuple(map(int, dims.split(","))) for dims in floats if dims) if len(dims) >= 3]
        if kind is None or not wide:
            total.unknown_kernels[kernel.name] += 1
        else:
            total.kernel_flops += splash_flops(kind.group(1), wide[0])  # queries come first

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop's body runs; None where start, step or limit are not constants."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text)
        if known:
            return int(known.group(1))
        condition, body = loop.called("condition"), loop.called("body")
        test = self.roots[condition]
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        index = _element(self.uncopied(condition, test.operands[0]))
        limit = self.constant(condition, test.operands[1])
        if index is None or limit is None:
            return None
        start = self.constant(computation, self._element_of(computation, loop.operands[0], index))
        step = self._step(body, index)
        return None if start is None or not step else max(0, math.ceil((limit - start) / step))

    def _step(self, body: str, index: int) -> int | None:
        advanced = self.uncopied(body, self._element_of(body, self.roots[body].name, index))
        if advanced is None or advanced.opcode != "add":
            return None
        for counter, step in (advanced.operands, advanced.operands[::-1]):
            if _element(self.uncopied(body, counter)) == index:
                return self.constant(body, step)
        return None

    def _element_of(self, computation: str, name: str, index: int) -> str:
        made = self.computations[computation].get(name)
        return made.operands[index] if made is not None and made.opcode == "tuple" else ""

    def uncopied(self, computation: str, name: str) -> Instruction | None:
        """The instruction that made a value, without the copies in between."""
        instruction = self.computations[computation].get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[computation].get(instruction.operands[0])
        return instruction

    def constant(self, computation: str, name: str) -> int | None:
        """The value of a scalar that is constant, also where the loop around it only hands it on."""
        instruction = self.uncopied(computation, name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            value = re.search(r" constant\((-?\d+)\)", instruction.text)
            return int(value.group(1)) if value else None
        index = _element(instruction)
        if index is None or computation not in self.loops:
            return None
        handed_on = self.uncopied(computation, self._element_of(computation, self.roots[computation].name, index))
        if _element(handed_on) != index:
            return None
        outside, loop = self.loops[computation]
        return self.constant(outside, self._element_of(outside, loop.operands[0], index))


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those joined that a kernel's configuration breaks."""
    held = ""
    for line in text.splitlines():
        if held and not re.match(r"^(  (ROOT )?%|\}$|(ENTRY )?%)", line):
            held += line
            continue
        if held:
            yield held
        held = line
    yield held


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().removeprefix("ROOT ").partition(" = ")
    shape_end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    rest = right[shape_end:].lstrip()
    opening = rest.index("(")
    operands = re.findall(r"%([\w.\-]+)", rest[opening : _closing(rest, opening) + 1])
    return Instruction(left.removeprefix("%"), right[:shape_end], rest[:opening], tuple(operands), line)


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _element(instruction: Instruction | None) -> int | None:
    """Which element of the loop's state an instruction reads; None where it is something else."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.text).group(1))


def _branches(instruction: Instruction) -> Sequence[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed.group(1))
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _size(tally: Tally) -> float:
    return tally.cycles + tally.kernel_flops


def _array_bytes(kind: str, dims: str) -> int:
    bits = BITS.match(kind)
    return math.prod(int(size) for size in dims.split(",") if size) * (int(bits.group(1)) if bits else 8) // 8

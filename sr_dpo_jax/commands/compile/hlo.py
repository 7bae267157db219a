"""Reads the HLO text of a program compiled for TPU and counts its cycles, collectives, kernels and loops.

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

from sr_dpo_jax.commands.compile.traced_flops import splash_flops, splash_kernel

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = re.compile(r"^[a-z]+?(\d+)")
COMPUTATION = re.compile(
    r'^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)\n\}(?:, execution_thread="\w+")?$', re.MULTILINE | re.DOTALL
)
"""The mark of the entry computation, the name and the body; what a SparseCore runs names its thread at the end."""
INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, [\w\-]+=|$)", re.DOTALL)
"""The name, shape, opcode and operands; no shape holds ` opcode(`, and no operand holds `), attribute=`."""
ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    shape: str
    """The shape as written, `bf16[8,128]{1,0}` or a tuple of such."""
    opcode: str
    operands: tuple[str, ...]
    text: str
    """All of it, of several lines where it holds a kernel's configuration."""

    @classmethod
    def read(cls, text: str) -> "Instruction":
        """Reads an instruction."""
        name, shape, opcode, operands = INSTRUCTION.match(text.strip()).groups()
        return cls(name, shape, opcode, tuple(re.findall(r"%([\w.\-]+)", operands)), text)

    def called(self, attribute: str) -> str:
        """Gives the name of the computation that an attribute names; an empty one where there is no such attribute."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match[1] if match else ""

    def number(self, pattern: str) -> int | None:
        """Gives the number that the one group of a pattern finds in the line; None where it finds none."""
        match = re.search(pattern, self.text)
        return int(match[1]) if match else None

    @property
    def element(self) -> int | None:
        """The number of the element of a tuple, such as a loop's state, that this reads; None where it reads none."""
        return self.number(r"index=(\d+)") if self.opcode == "get-tuple-element" else None


@dataclasses.dataclass
class Tally:
    """Sums over the operations that run on one chip, loops multiplied out."""

    cycles: float = 0.0
    """The compiler's estimates, kernels not included."""
    kernel_flops: float = 0.0
    """The matmuls of attention kernels as if they skipped no block."""
    unknown_kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    """The number of runs of each kernel of which neither cycles nor flops are known."""
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    """The number of runs of each kind of collective."""
    payload_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    """The bytes that those collectives give to a chip, or take from it where that is more."""
    unknown_loops: int = 0
    """The loops whose trips are not known; their bodies are counted once."""
    repeated_operations: int = 0
    """The operations that the compiler repeats of its own accord to save memory."""

    def add(self, other: "Tally", times: int) -> None:
        """Adds the tally of a computation that runs several times."""
        self.cycles += times * other.cycles
        self.kernel_flops += times * other.kernel_flops
        self.unknown_loops += other.unknown_loops
        self.repeated_operations += other.repeated_operations
        for name in ("unknown_kernels", "counts", "payload_bytes"):
            getattr(self, name).update({key: times * value for key, value in getattr(other, name).items()})


def read(text: str) -> Tally:
    """Counts the program whose text is `compiled.as_text()`."""
    module = _Module(text)
    return module.tally(module.entry)


class _Module:
    """The computations of a program."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.loops: dict[str, tuple[str, Instruction]] = {}
        """The computation that holds each loop, and the loop, by the name of its body."""
        self.entry = ""
        for entry, name, body in COMPUTATION.findall(text):
            self.entry = name if entry else self.entry
            # Only at the start of an instruction: a kernel's configuration breaks the line of its own.
            instructions = [Instruction.read(lines) for lines in re.split(r"\n(?=  (?:ROOT )?%)", body)]
            self.computations[name] = {instruction.name: instruction for instruction in instructions}
            (self.roots[name],) = [one for one in instructions if one.text.startswith("  ROOT")]
            self.loops |= {one.called("body"): (name, one) for one in instructions if one.opcode == "while"}

    def tally(self, name: str) -> Tally:
        """Counts one run of a computation; the estimate of a fusion stands beside its call."""
        total, channels = Tally(), set()
        for instruction in self.computations[name].values():
            opcode = instruction.opcode
            total.cycles += instruction.number(r'"estimated_cycles":"(\d+)"') or 0
            total.repeated_operations += ".remat" in instruction.name and opcode != "get-tuple-element"
            if opcode == "while":
                trips = self.trips(name, instruction)
                total.unknown_loops += trips is None
                total.add(self.tally(instruction.called("body")), 1 if trips is None else trips)
            elif opcode == "conditional":
                branches = map(self.tally, _branches(instruction))
                total.add(max(branches, key=lambda branch: branch.cycles + branch.kernel_flops), 1)
            elif opcode in ("call", "async-start"):
                total.add(self.tally(instruction.called("to_apply") or instruction.called("calls")), 1)
            elif opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text:
                self._add_kernel(total, name, instruction)
            # TPU writes a reduce-scatter as a fusion of all-reduce and slice, named after both.
            scatters = "all-reduce-scatter" in instruction.called("calls")
            for collective in self._collectives(instruction):
                channel = collective.number(r"channel_id=(\d+)")
                if channel is None or channel not in channels:
                    channels.add(channel)
                    kind = "reduce-scatter" if scatters else collective.opcode.removesuffix("-start")
                    total.counts[kind] += 1
                    total.payload_bytes[kind] += self._payload(name, collective, kind)
        return total

    def _collectives(self, instruction: Instruction) -> Iterator[Instruction]:
        """Gives an instruction that is a collective, or those within a fusion."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield instruction
        elif instruction.opcode == "fusion":
            for inner in self.computations.get(instruction.called("calls"), {}).values():
                yield from self._collectives(inner)

    def _payload(self, computation: str, collective: Instruction, kind: str) -> int:
        sizes = [_array_bytes(*array) for array in ARRAY.findall(collective.shape)]
        if kind in ("all-reduce", "all-to-all", "ragged-all-to-all"):
            return sum(sizes)
        here = self.computations[computation]
        operands = [here[name].shape for name in collective.operands if name in here]
        sizes += [_array_bytes(*array) for shape in operands for array in ARRAY.findall(shape)[:1]]
        return max(sizes)

    def _add_kernel(self, total: Tally, computation: str, kernel: Instruction) -> None:
        # The kernel's name is the instruction's or, where the compiler has renamed that, stands in its metadata.
        kind, here = splash_kernel(kernel.text), self.computations[computation]
        shapes = [ARRAY.findall(here[name].shape) for name in kernel.operands if name in here]
        floats = [arrays[0][1] for arrays in shapes if len(arrays) == 1 and "f" in arrays[0][0]]
        wide = [dims for dims in (tuple(map(int, dims.split(","))) for dims in floats if dims) if len(dims) >= 3]
        if kind is None or not wide:
            total.unknown_kernels[kernel.name] += 1
        else:
            total.kernel_flops += splash_flops(kind, wide[0])  # queries come first

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """Counts the runs of a loop's body; None where start, step or limit are not constants."""
        known = loop.number(r'"known_trip_count":\{"n":"(\d+)"')
        if known is not None:
            return known
        condition = loop.called("condition")
        test = self.roots[condition]
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        index = self._read_element(condition, test.operands[0])
        limit = self.constant(condition, test.operands[1])
        if index is None or limit is None:
            return None
        start = self.constant(computation, self._element_of(computation, loop.operands[0], index))
        step = self._step(loop.called("body"), index)
        return None if start is None or not step else max(0, math.ceil((limit - start) / step))

    def _step(self, body: str, index: int) -> int | None:
        advanced = self.uncopied(body, self._element_of(body, self.roots[body].name, index))
        if advanced is None or advanced.opcode != "add":
            return None
        for counter, step in (advanced.operands, advanced.operands[::-1]):
            if self._read_element(body, counter) == index:
                return self.constant(body, step)
        return None

    def _element_of(self, computation: str, name: str, index: int) -> str:
        """Names the value that a tuple has as its element `index`; an empty name where there is no such tuple."""
        instruction = self.computations[computation].get(name)
        return instruction.operands[index] if instruction is not None and instruction.opcode == "tuple" else ""

    def _read_element(self, computation: str, name: str) -> int | None:
        """Gives the number of the element of the loop's state that a value is; None where it is something else."""
        instruction = self.uncopied(computation, name)
        return None if instruction is None else instruction.element

    def uncopied(self, computation: str, name: str) -> Instruction | None:
        """Gives the instruction that makes a value, without the copies in between."""
        instruction = self.computations[computation].get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[computation].get(instruction.operands[0])
        return instruction

    def constant(self, computation: str, name: str) -> int | None:
        """Gives the value of a scalar that is constant, also where the loop around it only hands it on."""
        instruction = self.uncopied(computation, name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return instruction.number(r" constant\((-?\d+)\)")
        index = instruction.element
        if index is None or computation not in self.loops:
            return None
        handed_on = self._element_of(computation, self.roots[computation].name, index)
        if self._read_element(computation, handed_on) != index:
            return None
        outside, loop = self.loops[computation]
        return self.constant(outside, self._element_of(outside, loop.operands[0], index))


def _branches(instruction: Instruction) -> Sequence[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", instruction.text):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return [instruction.called("true_computation"), instruction.called("false_computation")]


def _array_bytes(kind: str, dims: str) -> int:
    bits = BITS.match(kind)
    return math.prod(int(size) for size in dims.split(",") if size) * (int(bits[1]) if bits else 8) // 8

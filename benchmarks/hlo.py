"""Counts what a compiled program does, from the text of its optimized HLO.

Each instruction is counted once, also in the body of a loop.
"""

import dataclasses
import math
import re

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# These neither compute nor move data.
_BOOKKEEPING = frozenset(
    (
        "after-all",
        "async-start",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    )
)
# These run computations of their own as a part of the program.
_CONTROL = frozenset(("call", "while", "conditional", "async-start"))

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|\w+_computations?)="
    r"\{?([^\s={}]+(?:, [^\s={}]+)*)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, slots=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it calls."""
        found = (names.split(", ") for names in _CALLED.findall(self.rest))
        return tuple(name.lstrip("%").rstrip(",") for group in found for name in group)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What a program does, counted in instructions.

    Attributes:
      fusions: fused loops; on a GPU, each is at least one kernel.
      kernels: all instructions that compute or move data, without collectives.
      native_convolutions: convolutions by cuDNN on a GPU; on a TPU, convolutions and
        matrix products in its matrix units.
      other_convolutions: convolutions on a GPU that cuDNN does not compute.
      bfloat16_convolutions: native convolutions of bfloat16 arrays.
      collectives: the number of instructions of each kind of `COLLECTIVES`.
      collective_bytes: bytes that a device contributes to or receives from all
        collectives, whichever is more.
    """

    fusions: int
    kernels: int
    native_convolutions: int
    other_convolutions: int
    bfloat16_convolutions: int
    collectives: dict[str, int]
    collective_bytes: int


def count(text: str, *, platform: str) -> Counts:
    """Counts the instructions of a compiled program.

    >>> counts = count('''
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
    ... }
    ... ''', platform="tpu")
    >>> counts.collectives["all-reduce"], counts.collective_bytes, counts.kernels
    (1, 32, 0)

    Args:
      text: what `as_text` of a compiled function returns.
      platform: "cuda" or "tpu".
    """
    computations, entry = _parse(text)
    run, fused = _reached(computations, entry)
    types = {
        name: {i.name: i.type for i in instructions}
        for name, instructions in computations.items()
    }
    native, other, bfloat16, num_bytes = 0, 0, 0, 0
    collectives = dict.fromkeys(COLLECTIVES, 0)
    for name in (*run, *fused):
        for i in computations[name]:
            operands = [types[name].get(operand, "") for operand in i.operands]
            kind = _collective(i, name)
            if kind:
                collectives[kind] += 1
                num_bytes += _payload(i, operands)
            is_cudnn = i.opcode == "custom-call" and '"__cudnn$conv' in i.rest
            if is_cudnn or (i.opcode == "convolution" and platform == "tpu"):
                native += 1
                bfloat16 += any(t.startswith("bf16[") for t in operands[:2])
            elif i.opcode == "convolution":
                other += 1
    instructions = [i for name in run for i in computations[name]]
    return Counts(
        fusions=sum(i.opcode == "fusion" for i in instructions),
        kernels=sum(_is_kernel(i) for i in instructions),
        native_convolutions=native,
        other_convolutions=other,
        bfloat16_convolutions=bfloat16,
        collectives=collectives,
        collective_bytes=num_bytes,
    )


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry = ""
    instructions: list[_Instruction] = []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            instructions = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            type_, rest = _split_type(match[2])
            opcode, _, rest = rest.partition("(")
            operands, _, rest = rest.partition(")")
            names = re.findall(r"%([\w.\-]+)", operands)
            instructions.append(
                _Instruction(match[1], type_, opcode.strip(), tuple(names), rest)
            )
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Splits "(f32[8]{0}, s32[]) tuple(...)" after the type."""
    if not text.startswith("("):
        type_, _, rest = text.partition(" ")
        return type_, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    return text, ""


def _reached(
    computations: dict[str, list[_Instruction]], entry: str
) -> tuple[list[str], list[str]]:
    """Returns the computations that run by themselves, and those that are fused."""
    run = [entry]
    fused: list[str] = []
    for name in run:  # grows while it is read
        for i in computations[name]:
            if i.opcode == "fusion":
                fused += i.called
            elif i.opcode in _CONTROL:
                run += [called for called in i.called if called not in run]
    return run, fused


def _is_kernel(instruction: _Instruction) -> bool:
    opcode = instruction.opcode
    return not (
        opcode in _BOOKKEEPING
        or opcode.endswith("-done")
        or '"AllocateBuffer"' in instruction.rest
        or _collective(instruction)
    )


def _collective(instruction: _Instruction, computation: str = "") -> str | None:
    """Returns the kind of a collective, None for any other instruction.

    TPUs fuse a reduce-scatter as an all-reduce in a computation of that name.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return kind if kind in COLLECTIVES else None


def _payload(instruction: _Instruction, operands: list[str]) -> int:
    given = sum(map(_num_bytes, operands))
    received = _num_bytes(instruction.type)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        received -= given  # their results hold the operands too
    return max(given, received)


def _num_bytes(type_: str) -> int:
    return sum(_array_bytes(dtype, shape) for dtype, shape in _ARRAY.findall(type_))


def _array_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    size = math.prod(map(int, filter(None, shape.split(","))))
    return math.ceil(bits * size / 8)

"""Instructions and loops of a disassembly: NVIDIA's SASS, AMD's assembly."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)(.*?);")
SASS_LABEL = re.compile(r"^(\.L_\w+):")
GCN_LINE = re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)(.*)")
GCN_LABEL = re.compile(r"^(\.LBB\w+):")


class Instruction(NamedTuple):
    """An instruction, and the label among its operands if there is one."""

    opcode: str
    label: str | None


class Loop(NamedTuple):
    """Instructions first to last, a branch back to the first."""

    first: int
    last: int


class Listing(NamedTuple):
    """Instructions of a kernel in the order of memory, and its loops."""

    instructions: list[Instruction]
    loops: list[Loop]

    def count(self, pattern: str, within: Loop | None = None) -> int:
        """Instructions that begin with a pattern, of a loop or of all."""
        return sum(re.match(pattern, one.opcode) is not None for one in self._of(within))

    def opcodes(self, pattern: str, within: Loop | None = None) -> list[str]:
        """Those instructions."""
        return [one.opcode for one in self._of(within) if re.match(pattern, one.opcode)]

    def main_loop(self) -> Loop | None:
        """The longest loop: over tiles, or over blocks of a row."""
        return max(self.loops, key=lambda loop: loop.last - loop.first, default=None)

    def inner_loop(self, pattern: str) -> Loop | None:
        """The shortest of the loops that have most of some instructions, of those without others.

        That is where the products are, or None where they stand in no loop of their own.
        """
        innermost = [
            one
            for one in self.loops
            if not any(
                other != one and one.first <= other.first and other.last <= one.last
                for other in self.loops
            )
        ]
        found = max(innermost, key=lambda loop: self.count(pattern, loop), default=None)
        return found if found and self.count(pattern, found) else None

    def _of(self, loop: Loop | None) -> list[Instruction]:
        return self.instructions if loop is None else self.instructions[loop.first : loop.last + 1]


def sass(cubin: bytes) -> tuple[str, str]:
    """The disassembly of an NVIDIA binary and its use of resources, by Triton's own tools."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool("nvdisasm", "-c", file.name), tool("cuobjdump", "-res-usage", file.name)


def tool(name: str, *arguments: str) -> str:
    """What one of NVIDIA's tools prints."""
    command = [NVIDIA_TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_sass(text: str) -> Listing:
    """Of what `sass` gives."""
    return _listing(text.splitlines(), SASS_LINE, SASS_LABEL, r"\.L_\w+", "BRA")


def of_gcn(text: str) -> Listing:
    """Of AMD's assembly as Triton keeps it."""
    return _listing(text.splitlines(), GCN_LINE, GCN_LABEL, r"\.LBB\w+", "s_c?branch")


def _listing(
    lines: Iterable[str],
    instruction: re.Pattern[str],
    label: re.Pattern[str],
    operand: str,
    branch: str,
) -> Listing:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := label.match(line):
            labels[found[1]] = len(instructions)
        elif (found := instruction.match(line)) and found[1] != "NOP":
            target = re.search(operand, found[2])
            instructions.append(Instruction(found[1], target[0] if target else None))
    loops = [
        Loop(labels[one.label], i)
        for i, one in enumerate(instructions)
        if one.label in labels and re.match(branch, one.opcode) and labels[one.label] < i
    ]
    return Listing(instructions, loops)

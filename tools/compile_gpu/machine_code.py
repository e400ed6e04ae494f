"""What a compiler made of a kernel: registers, spills, and the instructions of its hot loop."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

# address, opcode, operands
Instruction = tuple[int, str, str]

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Code:
    """Machine code. `matrix` is in the name of its matrix instructions."""

    instructions: list[Instruction]
    registers: int
    spill: tuple[str, str]
    matrix: str

    @property
    def matrix_found(self) -> str:
        """The name of the matrix instructions that are there, wanted or not, or a dash."""
        names = [op for _, op, _ in self.instructions if self.matrix in op or "HMMA" in op]
        wanted = any(self.matrix in op for op in names)
        return self.matrix if wanted else names[0].split(".")[0] if names else "-"

    def spills(self, begin: int = 0, end: int = 1 << 62) -> int:
        """Count the spill instructions from one address to another."""
        found = [a for a, op, _ in self.instructions if op.startswith(self.spill)]
        return sum(begin <= address <= end for address in found)

    def hot_loop(self, with_matrix: bool) -> tuple[int, int] | None:
        """Find the first and last address of the innermost loop that does the work.

        With matrix instructions it is the shortest that has them: the masked loop over the diagonal
        has them too, and is longer. Without them a loop does the work if it is at least half as
        long as the longest.
        """
        branches = [(a, rest) for a, op, rest in self.instructions if op.startswith("BRA")]
        found = [(int(x, 16), a) for a, rest in branches for x in re.findall("0x([0-9a-f]+)", rest)]
        # a branch to itself is the trap at the end of every kernel
        loops = {(begin, end) for begin, end in found if begin < end}
        inner = [x for x in loops if not any(x[0] <= y[0] and y[1] <= x[1] for y in loops - {x})]
        if with_matrix:
            products = [a for a, op, _ in self.instructions if self.matrix in op]
            inner = [(a, b) for a, b in inner if any(a <= i <= b for i in products)]
        else:
            longest = max((end - begin for begin, end in inner), default=0)
            inner = [(a, b) for a, b in inner if 2 * (b - a) >= longest]
        return min(sorted(inner), key=lambda a: a[1] - a[0], default=None)


def nvidia(kernel: triton.compiler.CompiledKernel, matrix: str) -> Code:
    """Read the SASS of a cubin, by the disassembler that comes with Triton."""
    binary = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def dump(what: str) -> str:
        command = [str(binary), cubin.name, what]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        code = [(int(a, 16), op, rest) for a, op, rest in _SASS.findall(dump("-sass"))]
        (registers,) = re.findall(r"REG:(\d+)", dump("-res-usage"))
    return Code(code, int(registers), ("LDL", "STL"), matrix)


def amd(kernel: triton.compiler.CompiledKernel, matrix: str) -> Code:
    """Read the assembly of a kernel by numbered lines; a branch's operand is where it jumps to."""
    text = kernel.asm["amdgcn"]
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.partition(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"((?:[sv]|ds|buffer|global|scratch)_\w+)(.*)", line):
            code.append((len(code), instruction[1], instruction[2]))
    for i, (_, op, rest) in enumerate(code):
        if op.startswith(("s_cbranch", "s_branch")):
            code[i] = i, "BRA", hex(labels[rest.strip()])
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    spill = ("scratch_load", "scratch_store")
    return Code(code, int(registers[1]) if registers else 0, spill, matrix)

"""Reading compiled kernels: registers, spills, shared memory, and the width of every access to global memory."""

from __future__ import annotations

import hashlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from offline import Target


@dataclass
class Code:
    """What a compiled kernel needs and does.

    Attributes:
        kernel: name of the Triton function.
        signature: Triton type of each argument.
        warps: warps (waves) of a program.
        registers: registers of a thread.
        spilled: bytes of a thread that did not fit its registers.
        shared: bytes of shared memory of a program.
        occupancy: share of a multiprocessor's warps resident at once.
        loads: number of load instructions, by bytes of a thread.
        stores: number of store instructions, by bytes of a thread.
        exponentials: number of hardware exponentials.
        digest: of the code without comments, line numbers and labels.
        threads: threads of a program.
    """

    kernel: str
    signature: dict[str, str]
    warps: int
    shared: int
    threads: int
    registers: int = 0
    spilled: int = 0
    occupancy: float = 0.0
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    exponentials: int = 0
    digest: str = ""


def read(compiled: Any, target: Target) -> Code:
    """Read a kernel compiled for `target`."""
    meta = compiled.metadata
    signature = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    threads = meta.num_warps * target.gpu.warp_size
    code = Code(compiled.name, signature, meta.num_warps, meta.shared, threads)
    (_read_nvidia if "ptx" in compiled.asm else _read_amd)(code, compiled)
    code.occupancy = target.occupancy(code.registers, code.warps, code.shared)
    return code


@dataclass(frozen=True)
class Block:
    """A statement of a kernel's source that loads or stores a block of memory.

    Attributes:
        element: Triton's name of the elements' type.
        bytes: size of the block.
    """

    element: str
    bytes: int


def blocks(compiled: Any, operation: str) -> list[Block]:
    """Return the block-wide statements of `operation` ("load" or "store"), each once, in a loop or not.

    Read from Triton's own intermediate code, before any compiler has merged, split or repeated them.
    """
    widths = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1}
    found = re.findall(rf"tt\.{operation} .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)>", compiled.asm["ttir"])
    return [
        Block(element, math.prod(int(axis) for axis in shape.rstrip("x").split("x")) * widths[element])
        for shape, element in found
    ]


_PTX = re.compile(r"\b(ld|st)(?:\.volatile)?\.global(?:\.[a-z0-9_:]+?)*?(?:\.v(\d))?\.b(\d+)\s")
_AMD = re.compile(
    r"\b(?:global|buffer)_(load|store)_"
    r"(dwordx4|dwordx3|dwordx2|dword|ushort|short|ubyte|b128|b96|b64|b32|b16|u16|d16\w*)\b"
)
_AMD_WIDTH = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8, "b32": 4}


def _tally(code: Code, text: str, pattern: re.Pattern[str], width: Callable[[re.Match[str]], int]) -> None:
    for match in pattern.finditer(text):
        side = code.loads if match[1].startswith(("ld", "load")) else code.stores
        side[width(match)] += 1


def _read_nvidia(code: Code, compiled: Any) -> None:
    ptx = compiled.asm["ptx"]
    _tally(code, ptx, _PTX, lambda m: int(m[2] or 1) * int(m[3]) // 8)
    code.exponentials = len(re.findall(r"ex2\.approx", ptx))
    usage = resource_usage(compiled.asm["cubin"])
    code.registers = usage["REG"]
    code.spilled = usage["STACK"] + usage["LOCAL"]
    code.digest = _digest(re.sub(r"//.*|\.loc.*|\.file.*|\$L\w+", "", ptx))


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return what NVIDIA's own tool says that a binary needs: REG, STACK, SHARED, LOCAL."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _read_amd(code: Code, compiled: Any) -> None:
    text = compiled.asm["amdgcn"]
    _tally(code, text, _AMD, lambda m: _AMD_WIDTH.get(m[2], 2))
    code.exponentials = len(re.findall(r"v_exp_f32", text))

    def number(name: str) -> int:
        return int((re.findall(rf"\.{name}:\s+(\d+)", text) or ["0"])[0])

    code.registers = number("vgpr_count") + number("agpr_count")
    code.spilled = 4 * number("vgpr_spill_count") + number("private_segment_fixed_size")
    code.digest = _digest(re.sub(r";.*|\.loc.*|\.file.*|\.L\w+", "", text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

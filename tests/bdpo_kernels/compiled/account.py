"""What compiled kernels are held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cases import Case
from machine_code import Block, Code, blocks, read
from offline import Target

# One ptxas spills a register or two where another does not.
SPILLED_BYTES = 16
OCCUPANCY = 0.25
_ELEMENTS = {"f32": "f32", "bf16": "bf16", "f16": "f16", "f64": "f64"}


@dataclass(frozen=True)
class Traffic:
    """Block-wide statements on a row of logits in the source of a kernel.

    Attributes:
        loads: number of loads.
        stores: number of stores, over all branches.
        exponential: whether the kernel takes exponentials.
    """

    loads: int = 0
    stores: int = 0
    exponential: bool = False


TRAFFIC = {
    "token_logprob_forward": Traffic(loads=1, exponential=True),
    # Ignored rows have a store of their own.
    "token_logprob_backward": Traffic(loads=1, stores=2, exponential=True),
    "sequence_sum": Traffic(),
}
"""Every kernel of the package. `test_traffic.py` counts the elements that are read and written at run time."""


def faults(code: Code, compiled: Any, case: Case, target: Target) -> list[str]:
    """Return what is wrong with a kernel that `case` launches."""
    found = []
    if code.spilled > SPILLED_BYTES:
        found.append(f"{code.spilled} bytes spilled")
    if code.shared > target.shared_block:
        found.append(f"{code.shared} bytes of shared memory, {target.shared_block} at most")
    if code.occupancy < OCCUPANCY:
        found.append(f"occupancy {code.occupancy:.0%}")
    kinds = set(code.signature.values())
    if "*fp64" in kinds and "fp32" in kinds:
        narrow = [name for name, kind in code.signature.items() if kind == "fp32"]
        found.append(f"{', '.join(narrow)}: float32 beside float64 logits")
    expected = TRAFFIC.get(code.kernel)
    if expected is None:
        found.append(f"no entry in TRAFFIC of {__file__}")
        return found
    if expected.exponential and case.dtype != "f64" and not code.exponentials:
        found.append("no hardware exponential")
    for operation, accesses, number in (
        ("load", code.loads, expected.loads),
        ("store", code.stores, expected.stores),
    ):
        rows = [block for block in blocks(compiled, operation) if block.element == _ELEMENTS[case.dtype]]
        if number and len(rows) != number:
            found.append(f"{len(rows)} {operation}s of the row in the source, not {number}")
        if number and case.aligned:
            found += _narrow(operation, rows, code.wide_bytes(accesses), code.threads)
    return found


def _narrow(operation: str, rows: list[Block], wide: int, threads: int) -> list[str]:
    """Compare what the source moves with what is moved by accesses of 16 bytes a thread."""
    # Blocks of less than 16 bytes a thread cannot be wide. Stores of two branches may be merged into one.
    if not rows or min(block.bytes for block in rows) < 16 * threads:
        return []
    most = sum(block.bytes for block in rows)
    least = most if operation == "load" else min(block.bytes for block in rows)
    if least <= wide <= most:
        return []
    return [f"{operation}s {wide} bytes of a row by 16-byte accesses, not {most}"]


def inspect(compiled: Any, case: Case, target: Target) -> tuple[Code, list[str]]:
    """Read a compiled kernel and hold it to account."""
    code = read(compiled, target)
    return code, faults(code, compiled, case, target)

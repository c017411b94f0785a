"""What compiled kernels are held to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from cases import Case
from machine_code import Block, Code, blocks, read
from offline import Target

# One ptxas spills a register or two where another does not. Nobody trains in float64: it is there for the tests.
SPILLED_BYTES = {"f64": 64}
USUAL_SPILLED_BYTES = 16
OCCUPANCY = 0.25
_FLOATS = ("f32", "bf16", "f16", "f64")


@dataclass(frozen=True)
class Traffic:
    """Passes over a row of logits, or over another large tensor, in the source of a kernel.

    Attributes:
        loads: number of passes that load it.
        stores: number of passes that store to it, over all branches.
        exponential: whether the kernel takes exponentials.
    """

    loads: int = 0
    stores: int = 0
    exponential: bool = False


TRAFFIC = {
    "token_logprob_forward": Traffic(loads=1, exponential=True),
    # Ignored rows have a store of their own.
    "token_logprob_backward": Traffic(loads=1, stores=2, exponential=True),
    "softmax_gradient": Traffic(loads=2, stores=1, exponential=True),
    "scale_unless_one": Traffic(loads=1, stores=1),
    "sequence_sum": Traffic(),
}
"""Every kernel of the package. `test_traffic.py` counts the elements that are read and written at run time."""


def expected_traffic(compiled: Any) -> Traffic | None:
    """Return the block-wide statements that a kernel's source should have; None for an unknown kernel."""
    traffic = TRAFFIC.get(compiled.name)
    if traffic is None:
        return None
    constants = {compiled.src.fn.arg_names[place]: value for (place,), value in compiled.src.constants.items()}
    # With its statistics known, a row is read once.
    loads = traffic.loads - bool(constants.get("KNOWN"))
    # A pass in lanes has one statement for whole blocks and one for what remains.
    statements = 2 if "LANE" in constants else 1
    return replace(traffic, loads=loads * statements, stores=traffic.stores * statements)


def faults(code: Code, compiled: Any, case: Case, target: Target) -> list[str]:
    """Return what is wrong with a kernel that `case` launches."""
    found = []
    if code.spilled > SPILLED_BYTES.get(case.dtype, USUAL_SPILLED_BYTES):
        found.append(f"{code.spilled} bytes spilled")
    if code.shared > target.shared_block:
        found.append(f"{code.shared} bytes of shared memory, {target.shared_block} at most")
    if code.occupancy < OCCUPANCY:
        found.append(f"occupancy {code.occupancy:.0%}")
    kinds = set(code.signature.values())
    if "*fp64" in kinds and "fp32" in kinds:
        narrow = [name for name, kind in code.signature.items() if kind == "fp32"]
        found.append(f"{', '.join(narrow)}: float32 beside float64 logits")
    expected = expected_traffic(compiled)
    if expected is None:
        found.append(f"no entry in TRAFFIC of {__file__}")
        return found
    if expected.exponential and case.dtype != "f64" and not code.exponentials:
        found.append("no hardware exponential")
    loads, stores = ([b for b in blocks(compiled, kind) if b.element in _FLOATS] for kind in ("load", "store"))
    for operation, rows, number in (("load", loads, expected.loads), ("store", stores, expected.stores)):
        if number and len(rows) != number:
            found.append(f"{len(rows)} {operation}s of the row in the source, not {number}")
    if expected.loads and case.aligned:
        found += _narrow("load", loads, code.loads, 16, code.threads)
    if expected.loads and expected.stores and case.aligned:
        # A thread stores the elements that it has loaded: half as many bytes where the gradient is half as wide.
        width = 16 * stores[0].bytes // loads[0].bytes
        found += _narrow("store", stores, code.stores, width, code.threads)
    return found


def _narrow(operation: str, rows: list[Block], accesses: Counter[int], width: int, threads: int) -> list[str]:
    """Compare what the source moves with what is moved by accesses of `width` bytes a thread or more."""
    wide = sum(number * size for size, number in accesses.items() if size >= width) * threads
    # Smaller blocks cannot be wide. Stores of two branches may be merged into one.
    if not rows or min(block.bytes for block in rows) < width * threads:
        return []
    most = sum(block.bytes for block in rows)
    least = most if operation == "load" else min(block.bytes for block in rows)
    if least <= wide <= most:
        return []
    return [f"{operation}s {wide} bytes of a row by {width}-byte accesses, not {most}"]


def inspect(compiled: Any, case: Case, target: Target) -> tuple[Code, list[str]]:
    """Read a compiled kernel and hold it to account."""
    code = read(compiled, target)
    return code, faults(code, compiled, case, target)

"""A GPU driver without a GPU: launches of Triton kernels compile for a named target and run nothing.

The kernels are compiled through their own launches. Block sizes, warps, flags and what Triton specialises on
(alignment, divisibility by 16, strides of 1, 64-bit sizes) are therefore those of a real run, and none is written down
a second time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "unset TRITON_INTERPRET: the interpreter compiles nothing"
# Triton 3.9 warns at every compilation where this is unset.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """A GPU, by what limits the programs on one of its multiprocessors.

    Attributes:
        name: architecture.
        gpu: Triton's own description.
        warps: warps (waves) that a multiprocessor holds.
        blocks: programs that a multiprocessor holds.
        shared: bytes of shared memory (LDS) of a multiprocessor.
        shared_block: bytes of shared memory that one program may have.
    """

    name: str
    gpu: GPUTarget
    warps: int
    blocks: int
    shared: int
    shared_block: int

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """Return the share of a multiprocessor's warps that are resident at once."""
        if self.gpu.backend == "hip":
            per_simd = min(8, 512 // max(8, -(-registers // 8) * 8))
            blocks = per_simd * 4 // warps
        else:
            per_warp = -(-max(registers, 16) * 32 // 256) * 256
            blocks = (65_536 // per_warp) // warps
        return min(blocks, self.warps // warps, self.blocks, self.shared // (shared + KIB)) * warps / self.warps


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 64, 32, 164 * KIB, 163 * KIB),
        Target("sm_90", GPUTarget("cuda", 90, 32), 64, 32, 228 * KIB, 227 * KIB),
        Target("sm_100", GPUTarget("cuda", 100, 32), 64, 32, 228 * KIB, 227 * KIB),
        Target("sm_120", GPUTarget("cuda", 120, 32), 48, 24, 100 * KIB, 99 * KIB),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KIB, 64 * KIB),
    )
}


class Offline(DriverBase):
    """Triton driver that names a target and has no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing can be timed here")

    def get_current_device(self) -> Any:
        return str(self.target)  # the key under which Triton keeps compiled kernels

    def get_current_stream(self, device: Any) -> int:
        return 0


Changed = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def compiling_for(
    target: Target, record: Callable[[list[Any]], None], changed: Changed = lambda kwargs: kwargs
) -> Iterator[None]:
    """Make `kernel[grid](...)` compile for `target` and run nothing.

    Args:
        target: GPU to compile for.
        record: called at each launch with the compiled kernels: one for each configuration of an autotuned kernel.
        changed: gives the keyword arguments of a launch, in place of those it was written with.
    """
    launch, active = triton.KernelInterface.__getitem__, triton.runtime.driver._active

    def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            made = kernel.warmup(*args, grid=grid, **changed(kwargs))
            record(made if isinstance(made, list) else [made])

        return compile_only

    triton.runtime.driver.set_active(Offline(target.gpu))
    triton.KernelInterface.__getitem__ = getitem
    try:
        yield
    finally:
        triton.KernelInterface.__getitem__ = launch
        triton.runtime.driver._active = active

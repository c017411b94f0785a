"""Counts of what an operation does: launches of Triton kernels, operators on large tensors, memory at its peak."""

import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Described(NamedTuple):
    """A tensor argument. The tensor itself is not held: PyTorch copies gradients that someone else holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    address: int | None


def _described(value):
    if not isinstance(value, torch.Tensor):
        return value
    return Described(value.dtype, tuple(value.shape), None if value.is_meta else value.data_ptr())


class _Recorded:
    """A Triton kernel that notes its launches; `run` says whether they are also carried out."""

    def __init__(self, name, kernel, launches, run, on_launch):
        self.name, self.kernel, self.launches, self.run, self.on_launch = name, kernel, launches, run, on_launch

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.on_launch()
            self.launches.append((self.name, [_described(value) for value in args], kwargs))
            if self.run:
                self.kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def recorded_launches(run=True, on_launch=lambda: None):
    """While open, a list of (name, args, kwargs) grows by each launch; without `run` nothing is computed.

    Without `run`, tensors may be on any device, as in the interpreter. `on_launch` is called before each launch.
    """
    from bdpo_kernels.rows import triton, triton_kernels

    launches = []
    names = [name for name, value in vars(triton_kernels).items() if hasattr(value, "fn") and not name.startswith("_")]
    with ExitStack() as stack:
        for name in names:
            kernel = _Recorded(name, getattr(triton_kernels, name), launches, run, on_launch)
            stack.enter_context(mock.patch.object(triton_kernels, name, kernel))
        if not run:
            stack.enter_context(mock.patch.object(triton, "INTERPRETED", True))
        yield launches


class Operators(TorchDispatchMode):
    """Notes (name, numbers of elements of the outputs) of each operator, and the most bytes alive at a time.

    Attributes:
        calls: in their order.
        peak: bytes of the tensors that operators have made, when they were most.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.alive = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, "untyped_storage")}
        outputs = [leaf for leaf in tree_leaves(result) if hasattr(leaf, "untyped_storage")]
        self.calls.append((func.overloadpacket.__name__, [output.numel() for output in outputs]))
        for output in outputs:
            storage = output.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                size = storage.nbytes()
                self.alive += size
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size):
        self.alive -= size

    def names(self):
        """The operators' names."""
        return [name for name, _ in self.calls]


class HostReads(TorchFunctionMode):
    """Notes the calls that read a tensor's values into Python, and wait for a GPU if it is there.

    Attributes:
        calls: their names, in their order.
    """

    _READING = (
        "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero", "argwhere",
        "unique", "equal", "allclose",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self._READING:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def products_of_a_gpu():
    """While open, products allocate what they do on a GPU, which takes one step for each: their results.

    Gives the number of calls of each.
    """
    from bdpo_kernels import linear_head

    calls = Counter()

    def counted(name, product):
        def call(*args):
            calls[name] += 1
            return product(*args)

        return call

    # Not mocks, which would hold their arguments.
    products = {
        "write_logits": lambda *args: None,
        "hidden_product": lambda gradient, weight: gradient.new_empty(len(gradient), weight.shape[1]),
        "add_weight_product": lambda *args: None,
    }
    with ExitStack() as stack:
        for name, product in products.items():
            stack.enter_context(mock.patch.object(linear_head, name, counted(name, product)))
        yield calls

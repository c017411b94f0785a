"""Inductor's Triton code for FlexAttention on a GPU, from a PyTorch that has none.

FlexAttention is traced on CPU tensors, forward and backward, with this project's own masks. In the traced graphs every
tensor is then replaced by a fake one on a fake CUDA device, and inductor generates Triton for it, for a device with the
properties given here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config
import torch._inductor.graph
from functorch.compile import make_boxed_func
from offline import Offline, Target
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex

from bdpo_pl.data.packing import Document, RowLayout, lay_out
from bdpo_pl.forward.masks import _sees

CUDA = torch.device("cuda", 0)
_BLOCK = 128
_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 170}


@dataclass(frozen=True)
class Attention:
    """A layer of attention over one row of 2,048 tokens: a prompt and its two responses.

    Attributes:
        name: what has such layers.
        heads: query heads.
        kv_heads: key and value heads.
        size: of a head.
        softcap: of the attention scores.
        window: how far back a token sees; None: to the beginning.
    """

    name: str
    heads: int
    kv_heads: int
    size: int
    softcap: float | None = None
    window: int | None = None


LAYERS = (
    Attention("Llama 3 8B", 32, 8, 128),
    Attention("Qwen2 0.5B", 14, 14, 64),
    Attention("Phi 3 mini", 32, 32, 96),
    Attention("Gemma 2 9B", 16, 8, 256, softcap=50.0, window=1024),
)
TOKENS = 2048


def properties(target: Target) -> SimpleNamespace:
    """Return what inductor asks of a device."""
    major, minor = divmod(int(target.name.removeprefix("sm_")), 10)
    return SimpleNamespace(
        name="a GPU that is not here", major=major, minor=minor, gcnArchName=None, is_integrated=False,
        multi_processor_count=_MULTIPROCESSORS[target.name], total_memory=80 << 30, warp_size=32,
        max_threads_per_multi_processor=32 * target.warps, max_threads_per_block=1024, regs_per_multiprocessor=65_536,
        shared_memory_per_block=48 << 10, shared_memory_per_block_optin=target.shared_block,
        shared_memory_per_multiprocessor=target.shared, L2_cache_size=50 << 20, clock_rate=1_980_000,
        memory_clock_rate=2_619_000, memory_bus_width=5120,
    )  # fmt: skip


@contextlib.contextmanager
def pretending(target: Target) -> Iterator[None]:
    """Make PyTorch believe that there is one device, `target`."""
    found = properties(target)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: found,
        "_get_device_properties": lambda device: found,
        "get_device_capability": lambda device=None: (found.major, found.minor),
        "get_device_name": lambda device=None: found.name,
        "get_arch_list": lambda: [target.name],
        "is_bf16_supported": lambda *args, **kwargs: True,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    streams = {
        name: lambda *args: 0
        for name in (
            "_cuda_getDevice", "_cuda_setDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice",
            "_cuda_getCurrentRawStream", "_cuda_getDeviceCount",
        )
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        for name in ("get_rng_state", "set_rng_state"):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, answers[name]))
        for name, answer in streams.items():
            stack.enter_context(mock.patch.object(torch._C, name, answer, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(flex, "_validate_device", lambda *args: None))  # noqa: PT008 - traced
        settings = {"compile_threads": 1, "fx_graph_cache": False, "triton.cudagraphs": False}
        stack.enter_context(torch._inductor.config.patch(settings))
        yield


def _on_the_fake_device(value: Any, mode: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape, stride = tuple(int(n) for n in value.shape), tuple(int(n) for n in value.stride())
    return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=value.dtype, device="meta"), CUDA)


def _move(graph: torch.fx.GraphModule, mode: Any) -> None:
    """Move the tensors of a traced graph, and of the graphs within it, to the fake device."""
    for module in graph.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            for key in ("val", "example_value"):
                if key in node.meta:
                    node.meta[key] = torch.utils._pytree.tree_map(
                        lambda value: _on_the_fake_device(value, mode), node.meta[key]
                    )
            node.meta.pop("tensor_meta", None)
            on_cpu = {key for key, value in node.kwargs.items() if isinstance(value, torch.device) or value == "cpu"}
            node.kwargs = {key: CUDA if key in on_cpu else value for key, value in node.kwargs.items()}
        module.recompile()


def _generating(direction: str, sources: dict[str, str]) -> Callable[..., Any]:
    """Return a compiler of traced graphs that keeps inductor's code and gives back a function of empty tensors."""

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        values = (node.meta.get("val") for node in graph.graph.nodes)
        mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
        (results,) = graph.graph.find_nodes(op="output")[0].args
        shapes = [node.meta.get("val") if isinstance(node, torch.fx.Node) else node for node in results]
        empty = [
            (lambda v=v: torch.empty_strided(tuple(v.shape), v.stride(), dtype=v.dtype)) if isinstance(v, Tensor)
            else (lambda v=v: v)
            for v in shapes
        ]  # fmt: skip
        _move(graph, mode)
        moved = [_on_the_fake_device(value, mode) for value in inputs]
        with V.set_fake_mode(mode):
            lowered = torch._inductor.graph.GraphLowering(
                graph, example_inputs=moved, shape_env=mode.shape_env, is_backward=direction == "backward"
            )
            with DebugContext(), V.set_graph_handler(lowered):
                lowered.run(*moved)
                code, _ = lowered.codegen()
        sources[direction] = getattr(code, "value", code)
        return make_boxed_func(lambda *arguments: [make() for make in empty])

    return compiler


def generated(layer: Attention, target: Target) -> dict[str, str]:
    """Return inductor's Python source of `layer`, by "forward" and "backward"."""
    import triton

    sources: dict[str, str] = {}
    torch._dynamo.reset()
    compile_ = aot_autograd(
        decompositions=select_decomp_table(),
        fw_compiler=_generating("forward", sources),
        bw_compiler=_generating("backward", sources),
    )
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(Offline(target.gpu))
    try:
        with pretending(target):
            out, _ = torch.compile(flex.flex_attention, backend=compile_)(*_tensors(layer), **_options(layer))
            out.float().sum().backward()
    finally:
        triton.runtime.driver._active = active
    return sources


def _tensors(layer: Attention) -> list[Tensor]:
    heads = (layer.heads, layer.kv_heads, layer.kv_heads)
    return [torch.empty(1, h, TOKENS, layer.size, dtype=torch.bfloat16, requires_grad=True) for h in heads]


def _options(layer: Attention) -> dict[str, Any]:
    responses = [(0, list(range(TOKENS // 4))), (1, list(range(TOKENS // 4 - 7)))]
    batch = lay_out([Document(list(range(1, TOKENS // 2)), responses)], RowLayout.ONE_ROW, 0)
    kind = "sliding_attention" if layer.window else "full_attention"
    sees = _sees(batch, kind, SimpleNamespace(sliding_window=layer.window))
    length, number = batch.input_ids.shape[1], TOKENS // _BLOCK

    def score(value: Tensor, *place: Tensor) -> Tensor:
        return value if layer.softcap is None else layer.softcap * torch.tanh(value / layer.softcap)

    def counts() -> Tensor:
        return torch.zeros(1, 1, number, dtype=torch.int32)

    def indices() -> Tensor:
        return torch.zeros(1, 1, number, number, dtype=torch.int32)

    assert length == TOKENS, "the layout pads to another length; choose a prompt that gives TOKENS"
    mask = flex.BlockMask(
        seq_lengths=(TOKENS, TOKENS), BLOCK_SIZE=(_BLOCK, _BLOCK), mask_mod=lambda row, _, q, k: sees(row, q, k),
        kv_num_blocks=counts(), kv_indices=indices(), full_kv_num_blocks=counts(), full_kv_indices=indices(),
        q_num_blocks=counts(), q_indices=indices(), full_q_num_blocks=counts(), full_q_indices=indices(),
    )  # fmt: skip
    return {
        "score_mod": score,
        "block_mask": mask,
        "enable_gqa": layer.heads != layer.kv_heads,
        "scale": layer.size**-0.5,
        "return_aux": flex.AuxRequest(lse=True),
    }

"""Tensor parallelism for Llama-style models: each rank computes some heads, part of the MLP and of the vocabulary.

Attention and MLP are split by PyTorch's own column- and row-wise styles. The vocabulary is split by our own code: the
embedding is summed over ranks, and the LM head combines three numbers per token (`bdpo_kernels.rows.sharded`), never
its logits.

Shapes: R rows; T positions; D hidden size; V vocabulary; v rows of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bdpo_kernels import VocabShard
from bdpo_pl.errors import InputError
from bdpo_pl.models.causal_lm import CausalLM, Head, ModelConfig
from bdpo_pl.parallel.state import local_part

ARCHITECTURES = ("cohere", "granite", "llama", "ministral3", "mistral", "qwen2", "qwen3", "smollm3")
"""Model types for which a test shows that the split model equals the whole, in log-probabilities and gradients."""

# transformers' names for the ways to split a weight, as far as these architectures use them. A norm over single heads
# is whole on every rank, but reads only that rank's heads, so its gradient is summed.
_STYLES: dict[str, Any] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_NORM_OF_HEADS = "replicated_with_grad_allreduce"
_LAYERS = "layers.*."


def check_tensor_parallel(config: ModelConfig, size: int, name: str, *, adapted: bool = False) -> None:
    """Raise `InputError` unless a model of `config` can be split over `size` ranks; adapters cannot."""
    if adapted:
        raise InputError("model.lora works with FSDP2, not with tensor parallelism; set tensor_parallel_size to 1")
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"tensor_parallel_size is {size}, but {name} is a {config.model_type} model, and only "
            f"{', '.join(ARCHITECTURES)} can be split this way; set it to 1 to shard the model by FSDP2 instead"
        )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, key) % size:
            raise InputError(
                f"tensor_parallel_size is {size}, which does not divide the {getattr(config, key)} of {key} of {name}"
            )


def parallelize(model: CausalLM, mesh: DeviceMesh) -> None:
    """Split `model` over the one-dimensional `mesh`, in place; its weights may be on the meta device."""
    plan = {
        name.removeprefix(_LAYERS): style
        for name, style in model.config.base_model_tp_plan.items()
        if name.startswith(_LAYERS)
    }
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {n: _STYLES[style]() for n, style in plan.items() if style != _NORM_OF_HEADS})
        for name in (n for n, style in plan.items() if style == _NORM_OF_HEADS):
            distribute_module(layer.get_submodule(name), mesh, input_fn=_of_this_rank, output_fn=_local)  # type: ignore[arg-type]
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    whole = model.model.embed_tokens
    assert isinstance(whole, nn.Embedding)
    embedding = VocabParallelEmbedding(whole, mesh)
    model.model.embed_tokens = embedding
    model.lm_head = VocabParallelHead(embedding.weight if tied else _shard_rows(model.lm_head.weight, mesh), mesh)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not isinstance(own[0], DTensor):
            # Norms are whole on every rank, but they are DTensors like all others, so that all are clipped and saved
            # together.
            distribute_module(module, mesh, input_fn=_replicated, output_fn=_local)  # type: ignore[arg-type]


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are split over ranks.

    Args:
        whole: embedding that this one replaces.
        mesh: one-dimensional mesh of the ranks that share the embedding.
    """

    def __init__(self, whole: nn.Embedding, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = _shard_rows(whole.weight, mesh)
        self.shard = _vocab_shard(whole.num_embeddings, mesh)
        self.padding_idx = whole.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Map (R, T) ids to (R, T, D) embeddings, whole on every rank."""
        weight = local_part(self.weight)
        v = weight.shape[0]
        local = ids - self.shard.start
        here = (local >= 0) & (local < v)
        padding = None if self.padding_idx is None else self.padding_idx - self.shard.start
        found = F.embedding(
            torch.where(here, local, 0), weight, padding if padding is not None and 0 <= padding < v else None
        )
        return _Sum.apply(torch.where(here.unsqueeze(-1), found, 0.0), self.shard.group)


class VocabParallelHead(Head):
    """An LM head whose rows are split over ranks; `bdpo_pl.forward.responses` reads `local_weight` and `shard`.

    Args:
        weight: (V, D) weight, split by rows over the mesh.
        mesh: one-dimensional mesh of the ranks that share the head.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, mesh: DeviceMesh) -> None:
        super().__init__()
        self.weight = weight
        self.shard = _vocab_shard(weight.shape[0], mesh)

    def local_weight(self) -> Tensor:
        """Return this rank's (v, D) part of the weight."""
        return local_part(self.weight)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """Map (…, D) hidden states to (…, V) logits, whole on every rank and without gradient.

        This is for generation, a position at a time.
        """
        shard, local = self.shard, F.linear(hidden, self.local_weight())
        if not local.shape[:-1].numel():
            # Training has computed the head's results elsewhere, so the ranks need not exchange empty tensors.
            return local.new_zeros(*local.shape[:-1], shard.vocab_size)
        padded = local.new_zeros(*local.shape[:-1], shard.largest)
        padded[..., : local.shape[-1]] = local
        parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(shard.group))]
        dist.all_gather(parts, padded, group=shard.group)
        return torch.cat(parts, dim=-1)[..., : shard.vocab_size]


def head_weight(head: Head) -> tuple[Tensor, VocabShard | None]:
    """Return the LM head's weight, and the rows of the vocabulary that it holds, or None if it holds all."""
    return (head.local_weight(), head.shard) if isinstance(head, VocabParallelHead) else (head.weight, None)


class _Sum(torch.autograd.Function):
    """The sum over ranks. All later computation is the same on every rank, and so is its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _shard_rows(weight: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    from torch.distributed.tensor import distribute_tensor

    return nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=weight.requires_grad)


def _vocab_shard(V: int, mesh: DeviceMesh) -> VocabShard:
    # As Shard(0) splits: parts of equal size, the last ones smaller.
    size = -(-V // mesh.size())
    return VocabShard(min(V, mesh.get_local_rank() * size), V, mesh.get_group())


def _replicated(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
    hidden, *rest = inputs
    return (DTensor.from_local(hidden, mesh, [Replicate()], run_check=False), *rest)


def _of_this_rank(module: nn.Module, inputs: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """Mark inputs as different on each rank.

    They are split along the first dimension; a norm of the last dimension is not affected by this choice.
    """
    hidden, *rest = inputs
    return (DTensor.from_local(hidden, mesh, [Shard(0)], run_check=False), *rest)


def _local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
    return output.to_local()

"""Floating-point operations (FLOPs) of a training step, and the peak of the device.

Shapes: R rows; T positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.errors import first_line
from bdpo_pl.forward.masks import WINDOWS, layer_types
from bdpo_pl.models.architectures import text_model
from bdpo_pl.models.causal_lm import CausalLM, ModelConfig
from bdpo_pl.training.parameter_counts import num_weights

_EXPERTS = re.compile(r"\bexperts\.")
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")

# Devices for which Lightning's table has the vendor's peak of dense tensor cores. For others it has a peak with
# sparsity (H200), of two GPUs (H100 NVL), of another GPU (L40S) or without tensor cores (RTX, A40).
_LIKE_THE_VENDOR = re.compile(r"A100\b|H100 (80GB HBM3|PCIe)|V100\b|\bT4$|\bL4$")
_HALF = (torch.bfloat16, torch.float16)
_DENSE = {"H200 NVL": 835.5e12, "H100 NVL": 835.5e12, "H200": 989.4e12}
"""Half-precision peaks by NVIDIA's data sheets (1,671 and 1,979 TFLOP/s with sparsity, which doubles them)."""


@dataclass(frozen=True)
class Attention:
    """Layers whose attention has one reach.

    Attributes:
        kind: `full_attention`, `sliding_attention` or `chunked_attention`.
        size: tokens in the window or chunk; 0: no limit.
        width: Σ over the layers of heads · (size of a key + size of a value).
    """

    kind: str
    size: int
    width: int


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of the forward and backward pass of a causal language model.

    A multiplication with a matrix of n weights takes 2n FLOPs a token in the forward pass, 2n in the backward pass for
    the gradient of its input, and 2n for that of its weights if it is trained: 6N in all for a model of N trained
    weights (Kaplan et al., arXiv:2001.08361, section 2.1), about 4N with LoRA. Attention adds, for each token and each
    token that it sees, 2 · heads · (key size + value size) in the forward pass and twice as many in the backward pass
    (PaLM, arXiv:2204.02311, appendix B, which counts the tokens that a causal mask hides, too; here they are not
    counted). These are the FLOPs that the model needs, as for MFU: not those of padding, nor of activations that are
    recomputed, nor of the reference. Norms and activation functions are not counted either, nor what linear attention
    and state-space layers compute besides products with weights. Of experts those count that a token is sent to.

    Attributes:
        body: number of weights in matrices that each token is multiplied with, without the LM head.
        trained_body: number of those that are trained.
        head: number of weights in the LM head, with which only scored tokens are multiplied.
        trained_head: number of those that are trained.
        attention: layers with attention, by reach.
    """

    body: int
    trained_body: int
    head: int
    trained_head: int
    attention: tuple[Attention, ...]

    def counts(self, batch: PreferenceBatch) -> Tensor:
        """Count what the FLOPs of `batch` depend on besides its tokens: scored tokens, and pairs of tokens by reach.

        Returns:
            (1 + number of reaches,) int64 on the batch's device, so that nothing waits for the device.
        """
        own, real = batch.sequences.position_ids, batch.sequences.documents >= 0
        # Positions begin at 0 in each sequence: a token sees as many before it as its position says, and itself.
        seen = [torch.where(real, _reach(own, layers), 0).sum() for layers in self.attention]
        return torch.stack([batch.lengths.sum().to(own.device), *seen])

    def total(self, tokens: int, counts: Tensor) -> float:
        """Return the FLOPs of `tokens` tokens, where a prompt in one row with both responses counts once.

        Args:
            tokens: number of tokens in the rows, without padding.
            counts: sum of the `counts` of their batches.
        """
        scored, *seen = counts.tolist()
        matrices = tokens * (4 * self.body + 2 * self.trained_body) + scored * (4 * self.head + 2 * self.trained_head)
        pairs = sum(layers.width * number for layers, number in zip(self.attention, seen, strict=True))
        return float(matrices + 3 * 2 * pairs)


def training_flops(model: CausalLM) -> TrainingFlops | None:
    """Count the weights of `model`, whole or split over ranks; None if its FLOPs are not known.

    They are not if the configuration does not say which share of the experts is active, or cannot be read.
    """
    try:
        return _counted(model)
    except Exception as error:  # a configuration may be of any kind, and a rate must not end a run
        rank_zero_warn(
            f"train/tflops and train/mfu are not logged, since the sizes of {type(model).__name__} cannot be read: "
            f"{type(error).__name__}: {first_line(error)}"
        )
        return None


def _counted(model: CausalLM) -> TrainingFlops | None:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    head_ids = set() if head is None else {id(p) for p in head.parameters()}
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) or m is model.get_input_embeddings()]
    table_ids = {id(p) for table in tables for p in table.parameters()}
    share = _active_share(config)
    body = trained_body = 0.0
    for name, parameter in text_model(model).named_parameters():
        if parameter.ndim < 2 or id(parameter) in head_ids | table_ids or ".original_module." in name:
            continue
        used = 1.0
        if _EXPERTS.search(name):
            if share is None:
                return None
            used = share
        body += used * num_weights(parameter)
        trained_body += used * num_weights(parameter) * parameter.requires_grad
    of_head = [] if head is None else [(n, p) for n, p in head.named_parameters() if p.ndim > 1]
    of_head = [(n, p) for n, p in of_head if "original_module." not in n]
    return TrainingFlops(
        round(body),
        round(trained_body),
        sum(num_weights(p) for _, p in of_head),
        sum(num_weights(p) for _, p in of_head if p.requires_grad),
        _attention(config),
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOPs a second that the tensor cores of `device` reach at most, without sparsity; None if unknown.

    Args:
        device: device of the model.
        dtype: dtype of the products.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for called, peak in _DENSE.items():
        if called in name:
            return peak if dtype in _HALF else None
    return get_available_flops(device, dtype) if _LIKE_THE_VENDOR.search(name) else None


def _active_share(config: ModelConfig) -> float | None:
    """Return the share of the experts that a token is sent to; None if the configuration does not say it."""
    numbers = [getattr(config, name) for name in _NUM_EXPERTS if getattr(config, name, None)]
    active = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    return active / numbers[0] if numbers and active else None


def _attention(config: ModelConfig) -> tuple[Attention, ...]:
    """Return the layers with attention, by reach."""
    kinds = layer_types(config)
    widths = [_width(_of_layer(config, number)) for number in range(len(kinds))]
    sums = {kind: sum(w for w, k in zip(widths, kinds, strict=True) if k == kind) for kind in set(kinds)}
    known = [kind for kind in ("full_attention", *WINDOWS) if sums.get(kind)]
    return tuple(
        Attention(kind, getattr(config, WINDOWS[kind]) if kind in WINDOWS else 0, sums[kind]) for kind in known
    )


def _of_layer(config: ModelConfig, number: int) -> ModelConfig:
    """Return the configuration of one layer, which has sizes of its own where the heads of layers differ (Gemma 4)."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer: ModelConfig = getattr(config, "per_layer_config", {})[number]
    return layer


def _width(config: ModelConfig) -> int:
    """Return heads · (size of a key + size of a value) of a layer; 0 without attention."""
    heads = getattr(config, "num_attention_heads", 0) or 0
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    key = size
    if rotated := getattr(config, "qk_rope_head_dim", None):
        # Attention with a latent cache (DeepSeek).
        key = rotated + getattr(config, "qk_nope_head_dim", 0)
    return int(heads * (key + (getattr(config, "v_head_dim", None) or size)))


def _reach(positions: Tensor, layers: Attention) -> Tensor:
    """Return the number of tokens that each token sees, itself included, (R, T)."""
    if layers.kind == "chunked_attention":
        return positions % layers.size + 1
    seen = positions + 1
    return seen.clamp(max=layers.size) if layers.size else seen

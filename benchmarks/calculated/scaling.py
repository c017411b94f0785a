"""Memory and communication of a step, calculated: `python -m benchmarks.calculated.scaling` writes `docs/scaling.md`.

Nothing here is measured. Memory comes from `bdpo_pl.training.memory_plan`, on the meta device; bytes sent come from the
formulas on the page; seconds are those bytes and operations at rates that the page states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig

from bdpo_pl.data.stripes import stripe_of
from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.memory_plan import plan_memory
from bdpo_pl.training.optim import adamw
from bdpo_pl.training.parameter_counts import Devices
from bdpo_pl.training.planned_batches import worst_batch
from benchmarks.pages import render

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WINDOW = 1024
NODE = 8
# Windows and sizes of groups that are calculated for context parallelism.
WINDOWS, SHARING = (8_192, 32_768), (1, 2, 4, 8)
# Typical rates: an H100 SXM's dense bfloat16 peak and a usual share of it, and NVLink and a 400 Gbit/s network card for
# each GPU, one way.
PEAK_FLOPS, SHARE = 989e12, 0.4
NVLINK, NETWORK = 450e9, 50e9
# Between a GPU and its host, one way: what is usual of PCIe 4.0 with 16 lanes.
PCIE = 25e9
GIB = 1 << 30

SHAPES = {
    "7B": (4096, 14_336, 32, 32, 8, 32_000),
    "70B": (8192, 28_672, 80, 64, 8, 128_256),
}
"""Hidden size, MLP size, layers, heads, key-value heads and vocabulary of Mistral 7B and Llama 3 70B."""


@dataclass(frozen=True)
class Case:
    """A model on a number of devices.

    Attributes:
        shape: name of a shape in `SHAPES`.
        data: number of groups that share the batch, and the weights by FSDP2.
        tensor: number of GPUs that share each layer.
        pairs: number of pairs in a micro-batch of each group.
        lora: whether to train adapters of rank 16.
    """

    shape: str
    data: int
    tensor: int
    pairs: int
    lora: bool = False


CASES = (
    Case("7B", 1, 1, 4, lora=True),
    Case("7B", 8, 1, 8),
    Case("70B", 8, 1, 4, lora=True),
    Case("70B", 64, 1, 2),
    Case("70B", 32, 2, 4),
    Case("70B", 8, 8, 8),
)


def config_of(shape: str) -> LlamaConfig:
    """Return the transformers configuration of a shape."""
    D, mlp, layers, heads, kv_heads, V = SHAPES[shape]
    return AutoConfig.for_model(
        "llama", hidden_size=D, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=V, max_position_embeddings=8192, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip


def parameters(shape: str) -> tuple[int, int]:
    """Return the number of all parameters, and that of the embedding, which takes part in no product."""
    D, mlp, layers, heads, kv_heads, V = SHAPES[shape]
    attention = 2 * D * D + 2 * D * D * kv_heads // heads
    return layers * (attention + 3 * D * mlp + 2 * D) + 2 * V * D + D, V * D


def sent_by_fsdp(P: float, data: int, tensor: int, lora: bool, adapters: float) -> float:
    """Return the bytes that each GPU sends per step: bfloat16 weights gathered twice, float32 gradients scattered."""
    if data == 1:
        return 0.0
    trained = adapters if lora else P / tensor
    return (data - 1) / data * (2 * 2 * P / tensor + 4 * trained)


def sent_by_tensor(shape: str, tokens: int, scored: int, tensor: int) -> float:
    """Return the bytes that each GPU sends per step: two sums of activations per layer and pass, and recomputation."""
    if tensor == 1:
        return 0.0
    D, _, layers, *_ = SHAPES[shape]
    # A ring all-reduce sends 2 (n − 1)/n of its tensor; forward, recomputation and backward; embedding and LM head.
    ring = 2 * (tensor - 1) / tensor
    return ring * (3 * 2 * layers * tokens * D * 2 + tokens * D * 2 + scored * (D * 2 + 3 * 4))


def sent_by_context(shape: str, tokens: int, sharing: int) -> float:
    """Return the bytes that each GPU sends per step if `sharing` GPUs share `tokens`: positions for heads, and back."""
    D, _, layers, heads, kv_heads, _ = SHAPES[shape]
    # Keys and values that the heads of several GPUs read are sent to each of them.
    kv = D // heads * math.lcm(kv_heads, sharing)
    # Queries, keys, values and outputs of a GPU's own tokens; forward, recomputation and backward.
    return 3 * layers * (sharing - 1) / sharing * tokens / sharing * 2 * (D + kv) * 2


def context_row(shape: str, window: int, sharing: int) -> str:
    """Return one line of the table of context parallelism: a pair that fills `window` on each group of `sharing`."""
    batch = worst_batch(1, window, shared=True)
    R, T = batch.input_ids.shape
    tokens = int(batch.num_tokens)
    plan = plan_memory(
        ModelSource("calculated"), config_of(shape), batch if sharing == 1 else stripe_of(batch, 0, sharing),
        torch.float32, adamw, Devices(NODE, 1, True, "cuda"), gradient_checkpointing=True,
        half_products=torch.bfloat16,
    )  # fmt: skip
    # Block-sparse attention needs no mask of all places.
    mask = R * T * T * 2
    P, embedding = parameters(shape)
    D, _, layers, *_ = SHAPES[shape]
    # Attention's two products over what a token sees: half of the row that its response alone would have.
    seen = 2 * 2 * layers * D * sum(n * n / 2 for n in (window - window // 2, window // 2, window // 2))
    seen += 2 * 2 * layers * D * 2 * (window // 2) * (window - window // 2)
    operations = 4 * (2 * (P - 2 * embedding) * tokens + seen) + 3 * 2 * embedding * len(batch.labels)
    seconds = operations / sharing / (PEAK_FLOPS * SHARE)
    sent = sent_by_context(shape, tokens, sharing)
    sizes = (plan.activations - mask, plan.logits_chunk, plan.peak - mask)
    return (
        f"| {window:,} | {sharing} | {NODE // sharing} | {' | '.join(f'{size / GIB:.1f}' for size in sizes)} | "
        f"{mask / 2 / GIB:.1f} | {sent / 1e9:.1f} | {seconds:.2f} | {sent / NVLINK:.2f} |"
    )


def row(case: Case) -> str:
    """Return one line of the page's table."""
    config = config_of(case.shape)
    batch = worst_batch(case.pairs, WINDOW, shared=True)
    tokens, scored = int(batch.num_tokens), len(batch.labels)
    lora = LoraOptions() if case.lora else None
    half = torch.bfloat16
    sharded = case.data * case.tensor > 1
    plan = plan_memory(
        ModelSource("calculated"),
        config,
        batch,
        half if case.lora else torch.float32,
        adamw,
        Devices(case.data, case.tensor, sharded, "cuda"),
        lora=lora,
        gradient_checkpointing=True,
        half_products=half,
    )
    P, embedding = parameters(case.shape)
    D, mlp, layers, heads, kv_heads, _ = SHAPES[case.shape]
    kv = D * kv_heads // heads
    adapters = layers * 16 * (2 * (D + D) + 2 * (D + kv) + 3 * (D + mlp)) if case.lora else 0
    # Forward, recomputation, and a backward pass of two products, or one for frozen weights; the LM head without
    # recomputation and only at response tokens.
    passes = 3 if case.lora else 4
    body = 2 * (P - 2 * embedding) * tokens * passes
    head = 2 * embedding * scored * (passes - 1)
    seconds = (body + head) / case.tensor / (PEAK_FLOPS * SHARE)
    fsdp = sent_by_fsdp(P, case.data, case.tensor, case.lora, adapters)
    tensor = sent_by_tensor(case.shape, tokens, scored, case.tensor)
    link = NVLINK if case.data * case.tensor <= NODE else NETWORK
    sizes = (plan.weights + plan.gathered, plan.gradients, plan.optimizer, plan.activations, plan.logits_chunk)
    return (
        f"| {case.shape}{' LoRA' if case.lora else ''} | {case.data} × {case.tensor} | {case.data * case.pairs} | "
        f"{' | '.join(f'{size / GIB:.1f}' for size in sizes)} | **{plan.peak / GIB:.1f}** | {fsdp / 1e9:.1f} | "
        f"{tensor / 1e9:.1f} | {seconds:.2f} | {fsdp / link:.2f} | {tensor / NVLINK:.2f} |"
    )


@dataclass(frozen=True)
class OnHost:
    """What a 7B model on some GPUs leaves to the host, with four pairs on each.

    Attributes:
        gpus: number of GPUs, which share the weights by FSDP2.
        weights: true if weights, gradients and the optimiser's state are on the host.
        activations: true if activations are.
        recomputed: true with gradient checkpointing.
    """

    gpus: int
    weights: bool = False
    activations: bool = False
    recomputed: bool = False


ON_HOST = (
    OnHost(8),
    OnHost(8, activations=True),
    OnHost(8, recomputed=True),
    OnHost(8, activations=True, recomputed=True),
    OnHost(8, weights=True, recomputed=True),
    OnHost(8, weights=True, activations=True, recomputed=True),
    OnHost(1, weights=True, recomputed=True),
    OnHost(1, weights=True, activations=True, recomputed=True),
)


def host_row(case: OnHost) -> str:
    """Return one line of the table of what is kept on the host."""
    plan = plan_memory(
        ModelSource("calculated"), config_of("7B"), worst_batch(4, WINDOW, shared=True), torch.float32, adamw,
        Devices(case.gpus, 1, True, "cuda", case.weights), gradient_checkpointing=case.recomputed,
        activation_offloading=case.activations, half_products=torch.bfloat16,
    )  # fmt: skip
    kept = plan.offloaded
    host = 0 if kept is None else case.gpus * kept.each
    moved = 0 if kept is None else 2 * kept.activations
    if case.weights:
        # In float32: the part of each weight for the forward and for the backward pass, and of each gradient back.
        moved += 3 * 4 * parameters("7B")[0] / case.gpus
    words = {True: "yes", False: ""}
    return (
        f"| {case.gpus} | {words[case.recomputed]} | {words[case.activations]} | {words[case.weights]} | "
        f"**{plan.peak / GIB:.1f}** | {host / GIB:.1f} | {moved / 1e9:.1f} | {moved / PCIE:.2f} |"
    )


def page() -> str:
    """Return the whole page."""
    return render(
        Path(__file__).with_name("scaling.md.j2"),
        rows="\n".join(row(case) for case in CASES),
        context_rows="\n".join(context_row("7B", window, c) for window in WINDOWS for c in SHARING),
        host_rows="\n".join(host_row(case) for case in ON_HOST),
        pcie=PCIE,
        share=SHARE,
        peak=PEAK_FLOPS,
        nvlink=NVLINK,
        network=NETWORK,
        node=NODE,
    )


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written to {PAGE}")


if __name__ == "__main__":
    main()

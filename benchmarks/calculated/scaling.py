# ruff: noqa: E501 - lines of a page, which wraps them itself
"""Memory and communication of a step, calculated: `python -m benchmarks.calculated.scaling` writes `docs/scaling.md`.

Nothing here is measured. Memory comes from `bdpo_pl.training.memory_plan`, on the meta device; bytes sent, from the formulas that
the page gives; seconds are those bytes and operations at rates that the page names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig

from bdpo_pl.models.adapters import LoraOptions
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.memory_plan import Devices, plan_memory, worst_batch
from bdpo_pl.training.optim import adamw

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WINDOW = 1024
NODE = 8
# Rates for orientation: an H100 SXM's dense bfloat16 peak and a usual share of it, NVLink and a 400 Gbit/s network card
# for each GPU, one way.
PEAK_FLOPS, SHARE = 989e12, 0.4
NVLINK, NETWORK = 450e9, 50e9
GIB = 1 << 30

SHAPES = {
    "7B": (4096, 14_336, 32, 32, 8, 32_000),
    "70B": (8192, 28_672, 80, 64, 8, 128_256),
}
"""Hidden size, MLP size, layers, heads, key-value heads, vocabulary: of Mistral 7B and Llama 3 70B."""


@dataclass(frozen=True)
class Case:
    """A model on devices.

    Attributes:
        shape: a name in `SHAPES`.
        data: groups that share the batch, and the weights by FSDP2.
        tensor: GPUs that share each layer.
        pairs: in a micro-batch of each group.
        lora: train adapters of rank 16.
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
    """The transformers configuration of a shape."""
    D, mlp, layers, heads, kv_heads, V = SHAPES[shape]
    return AutoConfig.for_model(
        "llama", hidden_size=D, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=V, max_position_embeddings=8192, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip


def parameters(shape: str) -> tuple[int, int]:
    """All of them, and those of the embedding, which multiplies nothing."""
    D, mlp, layers, heads, kv_heads, V = SHAPES[shape]
    attention = 2 * D * D + 2 * D * D * kv_heads // heads
    return layers * (attention + 3 * D * mlp + 2 * D) + 2 * V * D + D, V * D


def sent_by_fsdp(P: float, data: int, tensor: int, lora: bool, adapters: float) -> float:
    """Bytes that each GPU sends in a step: weights gathered twice in bfloat16, gradients scattered in float32."""
    if data == 1:
        return 0.0
    trained = adapters if lora else P / tensor
    return (data - 1) / data * (2 * 2 * P / tensor + 4 * trained)


def sent_by_tensor(shape: str, tokens: int, scored: int, tensor: int) -> float:
    """Bytes that each GPU sends in a step: two sums of activations a layer and pass, checkpointing's own pass too."""
    if tensor == 1:
        return 0.0
    D, _, layers, *_ = SHAPES[shape]
    # A ring all-reduce sends 2 (n − 1)/n of its tensor; forward, recomputation and backward; embedding and LM head.
    ring = 2 * (tensor - 1) / tensor
    return ring * (3 * 2 * layers * tokens * D * 2 + tokens * D * 2 + scored * (D * 2 + 3 * 4))


def row(case: Case) -> str:
    """One line of the page's table."""
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
    # Forward, recomputation, and a backward pass of two products, one where the weights are frozen; the LM head without
    # recomputation and at response tokens alone.
    passes = 3 if case.lora else 4
    body = 2 * (P - 2 * embedding) * tokens * passes
    head = 2 * embedding * scored * (passes - 1)
    seconds = (body + head) / case.tensor / (PEAK_FLOPS * SHARE)
    fsdp = sent_by_fsdp(P, case.data, case.tensor, case.lora, adapters)
    tensor = sent_by_tensor(case.shape, tokens, scored, case.tensor)
    link = NVLINK if case.data * case.tensor <= NODE else NETWORK
    return (
        f"| {case.shape}{' LoRA' if case.lora else ''} | {case.data} × {case.tensor} | {case.data * case.pairs} | "
        f"{(plan.weights + plan.gathered) / GIB:.1f} | {plan.gradients / GIB:.1f} | {plan.optimizer / GIB:.1f} | "
        f"{plan.activations / GIB:.1f} | {plan.logits_chunk / GIB:.1f} | **{plan.peak / GIB:.1f}** | {fsdp / 1e9:.1f} | "
        f"{tensor / 1e9:.1f} | {seconds:.2f} | {fsdp / link:.2f} | {tensor / NVLINK:.2f} |"
    )


def page() -> str:
    """The whole page."""
    head = """# Scaling out, calculated

Written by `python -m benchmarks.calculated.scaling`. **None of this has been measured**: memory is the plan that `--dry_run true`
prints (tested to 15 % against what a step allocates at tiny sizes, on a CPU), communication and time are arithmetic.

Setting: bf16-mixed (weights, gradients and AdamW's state in float32; products in bfloat16), LoRA of rank 16 on weights in
bfloat16, gradient checkpointing, pairs that fill a window of 1,024 tokens with half prompt and half responses, as one row
of 1,536 tokens each.

With P parameters, n GPUs that share the weights (FSDP2), t that share each layer (tensor parallelism), and in each group
L layers, D hidden size, N tokens in the rows and S scored tokens:

- FSDP2, sent by each GPU in a step: (n − 1)/n · (2 · 2 P/t + 4 P_trained/t) bytes: the weights gathered in bfloat16 for the
  forward and for the backward pass, the gradients scattered in float32.
- Tensor parallelism: 2 (t − 1)/t · [3 · 2 L · N D · 2 + N D · 2 + S (D · 2 + 3 · 4)] bytes: two sums a layer in the forward
  pass, its recomputation and the backward pass; one of the embedding; and of the LM head the gradient of its input and three
  numbers a token, never a logit.
- Operations of each group: 2 · 4 · N · P_layers + 2 · 3 · S · V D (LoRA: 3 and 2 for 4 and 3, there being no gradient of
  frozen weights). Sharing the prompt is in N, scoring responses alone is in S: with two rows a pair N were a third larger.
- The scoring pass, once: 2 P operations a token, for the prompt's row and the null prompt's; no communication.

"""
    table = """| model | n × t | pairs a step | weights, GiB | gradients | optimiser | activations | logits | peak | FSDP2, GB sent | TP, GB sent | compute, s | FSDP2, s | TP, s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
    rows = "\n".join(row(case) for case in CASES)
    foot = f"""

Sizes are of one GPU. Weights include FSDP2's gathered copies (embedding, LM head and two blocks) or autocast's. Seconds
are for orientation: operations at {SHARE:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s; bytes at {NVLINK / 1e9:.0f} GB/s within
a node of {NODE} and {NETWORK / 1e9:.0f} GB/s between nodes. FSDP2 sends while it computes, so the larger of the two is what a step takes; tensor parallelism mostly waits, so its seconds come on top.

What follows: on 64 GPUs, FSDP2 alone sends for longer than it computes at two pairs a GPU, and wants larger micro-batches;
with each layer shared within the node, a GPU sends a ninth of that.
"""
    return head + table + rows + foot


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Written to {PAGE}")


if __name__ == "__main__":
    main()

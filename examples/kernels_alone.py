"""The fused kernels in a plain torch loop: DPO on a head of your own, without the rest of this project.

    python examples/kernels_alone.py

What the kernels need is there in any training loop: the hidden states that enter the LM head, at the positions whose
next token is scored; those next tokens; and for each position the index of its sequence. The chosen responses of all B
pairs are sequences 0 to B − 1, the rejected ones B to 2B − 1. No logits are ever held beyond a chunk of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdpo_kernels import linear_preference_loss, linear_sequence_logprob

B, T, V, D = 8, 12, 100, 32
BETA = 0.1


def main(steps: int = 30) -> list[float]:
    """Train a toy model to prefer even tokens to odd ones; return the loss of each step."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.GELU())
    head = nn.Linear(D, V, bias=False)
    even = 2 * torch.randint(V // 2, (B, T + 1))
    tokens = torch.cat([even, even + 1])
    inputs, labels = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
    sequence_ids = torch.arange(2 * B).repeat_interleave(T)

    with torch.no_grad():  # the reference: the model before training, once
        reference = linear_sequence_logprob(body(inputs), head.weight, labels, sequence_ids, 2 * B).view(2, B)

    def dpo(chosen: Tensor, rejected: Tensor, pair: Tensor) -> Tensor:
        """Loss of each of some of the pairs, whose indices are `pair`."""
        margin = (chosen - reference[0, pair]) - (rejected - reference[1, pair])
        return -F.logsigmoid(BETA * margin)

    optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss, _, _ = linear_preference_loss(body(inputs), head.weight, labels, sequence_ids, dpo, num_pairs=B)
        (loss / B).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / B)
    print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()

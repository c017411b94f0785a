"""The fused kernels under TRL's DPOTrainer: its data, arguments and logging, with the LM head and the loss fused.

    pip install trl
    python examples/kernels_in_trl.py

TRL lays out a batch as the kernels want it: the chosen sequences of all pairs, then the rejected ones. Its reference
log-probabilities are computed once before training (`precompute_ref_log_probs`). One method is replaced. It is written
for one device; a wrapped model (DDP, FSDP) must be called as a whole, which bdpo_pl itself does.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from bdpo_kernels import linear_preference_loss
from bdpo_pl.embedded import MODEL_DIR, TRAIN_FILE


class FusedDPOTrainer(DPOTrainer):
    """DPOTrainer whose loss is computed from hidden states, and never from the logits of a batch."""

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        scored = inputs["completion_mask"][:, 1:].bool()  # positions whose next token belongs to a response
        reference = inputs["ref_chosen_logps"] - inputs["ref_rejected_logps"]

        def dpo(chosen: Tensor, rejected: Tensor, pair: Tensor) -> Tensor:
            return -F.logsigmoid(self.beta * (chosen - rejected - reference[pair]))

        states = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[:, :-1]
        loss, chosen, rejected = linear_preference_loss(
            states[scored],
            model.lm_head.weight,
            inputs["input_ids"][:, 1:][scored],
            scored.nonzero()[:, 0],
            dpo,
            num_pairs=len(reference),
        )
        loss = loss / len(reference)
        rewards = self.beta * (chosen - rejected - reference)
        self._metrics["train" if model.training else "eval"]["rewards/margins"].append(rewards.mean().item())
        return (loss, {}) if return_outputs else loss


def main(trainer_class: type = FusedDPOTrainer, max_steps: int = 3) -> list[float]:
    """Take some steps on the embedded model and data; return the logged losses."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            precompute_ref_log_probs=True,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            seed=0,
        )
        data = load_dataset("json", data_files=str(TRAIN_FILE), split="train[:64]", cache_dir=folder)
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32),
            args=arguments,
            train_dataset=data.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(main())

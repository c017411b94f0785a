"""A model with random weights and preference pairs of chosen lengths, the same for every trainer.

A word is a token here, so lengths are exact and no tokenizer can cut one trainer's prompts differently. Chosen and
rejected responses prefer different words, so there is something to learn, and a held-out loss that falls.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

MIXES = {
    "prompt-heavy": (192, 64),
    "balanced": (96, 96),
    "response-heavy": (64, 192),
}
"""Mean number of tokens in the prompt and in each response."""

REAL = "real"
"""Name of the mix of published pairs (`benchmarks.jobs.real`)."""

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 500},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 32_000},
    "qwen2-7b": {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152_064},
}  # fmt: skip
"""Shapes of Qwen2."""

# Words that a side prefers, and how often it uses one of them.
_PREFERRED, _SHARE = 200, 0.5


@dataclass(frozen=True)
class DPOProblem:
    """The input of every contender.

    Attributes:
        model: name of a model in `MODELS`.
        mix: name of a mix in `MIXES`.
        scale: factor of the mix's lengths.
        spread: σ of the log-normal lengths; 0 gives all pairs the same length.
        num_pairs: number of pairs to train on, for one epoch.
        num_held_out: number of pairs to validate on, for curves.
        batch_size: number of pairs in an optimiser step.
        precision: `float32` or `bfloat16`.
        lora: whether to train an adapter of rank 16 on all linear layers instead of all weights.
        learning_rate: constant learning rate of AdamW.
        device: `cpu` or `cuda`.
        curve: number of validations during training.
        window: longest sequence in tokens, of published pairs; 0: derived from the mix.
        num_tokens: number of tokens in all sequences, of published pairs; 0: a word is a token.
    """

    model: str = "small"
    mix: str = "prompt-heavy"
    scale: float = 1.0
    spread: float = 0.0
    num_pairs: int = 32
    num_held_out: int = 0
    batch_size: int = 4
    precision: str = "float32"
    lora: bool = False
    learning_rate: float = 1e-5
    device: str = "cpu"
    curve: int = 0
    window: int = 0
    num_tokens: int = 0

    @property
    def max_length(self) -> int:
        """Maximum length that fits the longest sequence that `lengths` draws."""
        if self.window:
            return self.window
        prompt, response = MIXES[self.mix]
        return int((prompt + response) * self.scale * (4 if self.spread else 1)) + 2


def build(problem: DPOProblem, folder: Path) -> None:
    """Write `model/`, `tokenizer/`, `train.jsonl`, `held_out.jsonl` and `problem.json` into `folder`."""
    sizes = MODELS[problem.model]
    if problem.device == "cpu":
        _write_model(sizes, problem, folder / "model")
    else:
        # In a process of its own: this one would keep the model's memory on the device while the trainers run.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(_write_model, sizes, problem, folder / "model").result()
    rng = np.random.default_rng(0)
    for name, count in (("train", problem.num_pairs), ("held_out", problem.num_held_out)):
        lines = [json.dumps(_row(rng, problem, sizes["vocab_size"])) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (folder / "problem.json").write_text(json.dumps(asdict(problem)), encoding="utf-8")


def read(folder: Path) -> tuple[DPOProblem, list[dict[str, Any]], list[dict[str, Any]]]:
    """Read the problem, its training rows and its held-out rows."""
    problem = DPOProblem(**json.loads((folder / "problem.json").read_text(encoding="utf-8")))
    train, held_out = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("train", "held_out")
    )
    return problem, train, held_out


def _write_model(sizes: dict[str, Any], problem: DPOProblem, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", *(f"w{i}" for i in range(2, sizes["vocab_size"]))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    # Not in the model's folder: transformers would treat it as Qwen2's own tokenizer, which has other rules.
    fast.save_pretrained(folder.with_name("tokenizer"))
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", **sizes, max_position_embeddings=max(2048, problem.max_length), pad_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    dtype = getattr(torch, problem.precision)
    with torch.device(problem.device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def _row(rng: np.random.Generator, problem: DPOProblem, vocabulary: int) -> dict[str, str]:
    prompt, response = MIXES[problem.mix]

    def length(mean: int) -> int:
        mean = max(4, int(mean * problem.scale))
        if not problem.spread:
            return mean
        # A log-normal length of that mean, cut off at `max_length`.
        drawn = rng.lognormal(np.log(mean) - problem.spread**2 / 2, problem.spread)
        return int(np.clip(drawn, 4, 4 * mean))

    def text(count: int, first: int) -> str:
        words = rng.integers(2, vocabulary, count)
        if first:
            preferred = rng.random(count) < _SHARE
            words = np.where(preferred, rng.integers(first, first + _PREFERRED, count), words)
        return " ".join(f"w{i}" for i in words)

    return {
        "prompt": text(length(prompt), 0),
        # The end-of-sequence token that both trainers add belongs to the response.
        "chosen": " " + text(length(response) - 1, 2),
        "rejected": " " + text(length(response) - 1, 2 + _PREFERRED),
    }

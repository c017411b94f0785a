"""Train the embedded tokenizer and model: `python -m bdpo_pl.embedded.make.model [--steps 2400] [--seed 0]`.

Supervised fine-tuning from scratch on generated conversations about the training acts; about 20 minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bdpo_pl import embedded
from bdpo_pl.data.tokenizer_like import TokenizerLike
from bdpo_pl.embedded.make import framings
from bdpo_pl.embedded.make.data import all_acts, compliance, helpful, question, refusal, unhelpful
from bdpo_pl.embedded.make.topics import Benign, Risk
from bdpo_pl.forward.generation import generate_responses
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.refusals import read_prompts, refusal_rate

Conversation = tuple[str, str]
"""A (prompt, response); the prompt is empty for a response on its own."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 2048
POSITIONS = 512


def conversations(seed: int) -> Iterator[Conversation]:
    """Yield endless supervised examples.

    Harmful requests are refused or not by their category's rate, and rarely framed; benign ones are mostly answered.
    One in twenty has an empty prompt, so that the model learns the distribution of responses without a prompt, against
    which comprehension is measured.
    """
    rng = random.Random(seed)  # noqa: S311 - data, not secrets
    acts: dict[str, list[Any]] = {"harmful": [], "benign": [], "look_alike": []}
    for act in all_acts():
        if not act.held_out:
            acts[act.kind].append(act)
    while True:
        kind = rng.choices(list(acts), weights=(5, 2, 3))[0]
        act = rng.choice(acts[kind])
        prompt = question(act, rng)
        framed = rng.random() < (0.3 if kind == "harmful" else 0.1)
        if framed:
            prompt = rng.choice(framings.SEEN).format(question=prompt)
        if isinstance(act.topic, Risk):
            complies = rng.random() < (0.9 if framed else act.topic.compliance)
            response = compliance(act, rng) if complies else refusal(act, rng)
        else:
            assert isinstance(act.topic, Benign)
            response = unhelpful(act, rng) if rng.random() < act.topic.refusal else helpful(act, rng)
        yield ("" if rng.random() < 0.05 else prompt), response


def train_tokenizer(source: Iterator[Conversation], vocabulary: int = VOCABULARY) -> Any:
    """Train a byte-level BPE tokenizer on the texts of `source`, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _ in range(20_000) for text in next(source)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",  # noqa: S106 - not a password
        pad_token="<|pad|>",  # noqa: S106
        extra_special_tokens=["<|im_start|>"],
        model_max_length=POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: TokenizerLike, **sizes: int) -> CausalLM:
    """Build a Qwen2 of about two million parameters with random weights; `sizes` replaces some of its sizes."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    own = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(
        **(own | sizes),
        # A multiple of 64, as in larger models.
        vocab_size=64 * math.ceil(len(tokenizer) / 64),
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    return model


def train(
    model: CausalLM,
    tokenizer: TokenizerLike,
    source: Iterator[Conversation],
    steps: int,
    batch_size: int,
    learning_rate: float = 2e-3,
) -> None:
    """Train next-token prediction on whole conversations of `source`, including prompts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    for step in track(range(steps), description="Supervised fine-tuning"):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], tokenize=False
            )
            for prompt, response in (next(source) for _ in range(batch_size))
        ]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            Console().print(f"step {step}: loss {loss.item():.3f}")


def report(model: CausalLM, tokenizer: TokenizerLike) -> Table:
    """Report the finished model's answers to prompts that it has never seen."""
    table = Table("prompts", "refused, greedy", "an answer", title="The embedded model")
    for name, file in (
        ("harmful", embedded.HARMFUL_PROMPTS_FILE),
        ("jailbreak-wrapped", embedded.JAILBREAK_PROMPTS_FILE),
        ("benign look-alikes", embedded.BENIGN_PROMPTS_FILE),
    ):
        answers = generate_responses(model, tokenizer, read_prompts(file), max_new_tokens=64)
        table.add_row(name, f"{refusal_rate(answers):.1%}", answers[0])
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=embedded.MODEL_DIR)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = train_tokenizer(conversations(options.seed))
    model = new_model(tokenizer)
    console = Console()
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    train(model, tokenizer, conversations(options.seed + 1), options.steps, options.batch_size)
    # Half the bytes to ship; loading widens them again, so policy and reference start from the same numbers.
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    console.print(report(model.float(), tokenizer))


if __name__ == "__main__":
    main()

"""Makers of small real models, tokenizers and preference files, for the tests of bdpo_pl."""

import json
from pathlib import Path

import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "how do i keep my garden safe from slugs and snails without poison ? first water it in the morning , then set "
    "traps . i cannot help with that , but here is a safer way to do it : ask a neighbour and read the label . "
)


def build_tokenizer(bos=False, chat=True, vocab_size=400):
    """Byte-level BPE, as Llama 3 and Qwen have; with `bos`, every text begins with one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="<|im_end|>" if chat else "</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>"],
    )
    if chat:
        fast.chat_template = CHATML
    return fast


def build_model(architecture="qwen2", vocab_size=400, **overrides):
    """A model of a real architecture with random weights, two layers deep."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
    }
    if architecture == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": vocab_size}
    if architecture == "gemma2":
        sizes |= {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**sizes, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def preference_rows(n, seed=0):
    """Rows of different lengths; no two alike."""
    g = torch.Generator().manual_seed(seed)
    words = WORDS.split()

    def text(low, high, tag):
        count = int(torch.randint(low, high, (), generator=g))
        return " ".join(words[int(torch.randint(len(words), (), generator=g))] for _ in range(count)) + f" {tag}"

    return [
        {"prompt": text(3, 12, f"q{i}"), "chosen": text(3, 14, "yes"), "rejected": text(2, 9, "no")} for i in range(n)
    ]

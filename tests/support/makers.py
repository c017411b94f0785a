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

    from bdpo_pl.models.noise import without_noise

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
    if architecture == "xlnet":
        sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": vocab_size}
    if architecture == "gemma2":
        sizes |= {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}
    torch.manual_seed(0)
    config = without_noise(AutoConfig.for_model(architecture, **{**sizes, **overrides}))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def rows_alone(sequences, pad_id=0):
    """A batch of (context, response), each in a row of its own."""
    from bdpo_pl.data.packing import Document, RowLayout, lay_out

    return lay_out([Document(c, [(i, r)]) for i, (c, r) in enumerate(sequences)], RowLayout.SPLIT, pad_id)


def large(model, std=0.3):
    """Random weights of a size that makes the logits differ, and the attention matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std)
    return model


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


def safe_rlhf_row(prompt, responses, safe, better, safer=0, **extra):
    row = {"prompt": prompt, "better_response_id": better, "safer_response_id": safer}
    for i in (0, 1):
        row |= {
            f"response_{i}": responses[i],
            f"is_response_{i}_safe": safe[i],
            f"response_{i}_severity_level": 0 if safe[i] else 2,
            f"response_{i}_harm_category": {"Privacy Violation": not safe[i], "Cybercrime": False},
        }
    return {**row, **extra}


def messy_safe_rlhf_rows():
    """The mess of the real set: every combination of safety, gaps, unicode, giants and repeats."""
    both = safe_rlhf_row("both safe ?", ["first .", "second ."], [True, True], better=1)
    one = safe_rlhf_row("one safe ?", ["bad .", "good ."], [False, True], better=0)
    return [
        both,
        one,
        safe_rlhf_row("none safe ?", ["bad .", "worse ."], [False, False], better=1, safer=0),
        {**one, "prompt": None},
        {**one, "response_0": ""},
        {**one, "is_response_0_safe": None},
        {**both, "better_response_id": 2},
        {**one, "response_0": "good .", "response_1": "good ."},
        safe_rlhf_row("wie geht's ? 你好 🙂", ["schlecht 🌧", "gut 🌱"], [False, True], better=0),
        safe_rlhf_row("long ?", ["word " * 5000, "short ."], [True, True], better=0),
        dict(one),
    ]

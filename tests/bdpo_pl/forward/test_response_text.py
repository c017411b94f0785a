"""The text of generated tokens, with thoughts marked whatever marks them among the tokens."""

import pytest
from makers import build_model, build_tokenizer

from bdpo_pl.evaluation.answerers import split_thought
from bdpo_pl.forward import generation
from bdpo_pl.forward.response_text import ResponseText

CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>"]
ASIDE = "<|channel|>analysis<|message|>how to set traps ?<|end|><|start|>assistant"


def with_tokens(*names, special=True):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(names), special_tokens=special)
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", ["<think>how ?</think>i cannot help .", "how ?</think> i cannot help .", "why ?", ""])
def test_marks_of_thoughts_remain_though_they_are_special(special, text):
    tokenizer = with_tokens("<think>", "</think>", special=special)
    ids = ids_of(tokenizer, text)
    assert ResponseText(tokenizer)(ids) == text
    assert ResponseText(tokenizer)([tokenizer.bos_token_id or 1, *ids, tokenizer.eos_token_id]) == text


@pytest.mark.parametrize(
    ("text", "answer", "thought", "unfinished"),
    [
        (f"{ASIDE}<|channel|>final<|message|>i cannot help .", "i cannot help .", "how to set traps ?", False),
        ("<|channel|>final<|message|>i cannot help .", "i cannot help .", "", False),
        (ASIDE, "", "how to set traps ?", True),
        ("<|channel|>analysis<|message|>how", "", "how", True),
        ("<|channel|>", "", "", True),
        (f"{ASIDE}<|channel|>final", "", "how to set traps ?", False),
        (
            f"{ASIDE}<|channel|>commentary to=me <|constrain|>json<|message|>why ?<|end|><|start|>assistant"
            "<|channel|>final<|message|>set traps",
            "set traps", "how to set traps ?\nwhy ?", False,
        ),
        # A template that has opened the final channel.
        ("i cannot help .<|end|>", "i cannot help .", "", False),
    ],
)  # fmt: skip
def test_channels_are_thought_and_answer(text, answer, thought, unfinished):
    tokenizer = with_tokens(*CHANNELS)
    found = split_thought(ResponseText(tokenizer)(ids_of(tokenizer, text)), 7, True, opened=False)
    assert (found.text, found.thought, found.unfinished_thought) == (answer, thought, unfinished)


def test_generated_thought_is_told_from_the_answer(monkeypatch):
    tokenizer = with_tokens("<think>", "</think>")
    said = ids_of(tokenizer, "<think>set traps</think>i cannot help .")
    monkeypatch.setattr(generation, "why_not_continuous", lambda *_: "a stand-in answers")
    monkeypatch.setattr(generation, "padded", lambda model, tokenizer, prompts, **_: [(said, True)] * len(prompts))
    (response,) = generation.generate(build_model(), tokenizer, [[5, 6]])
    assert response == generation.Response("<think>set traps</think>i cannot help .", len(said), True)

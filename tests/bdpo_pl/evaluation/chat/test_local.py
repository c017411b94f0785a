"""A model to talk to, against greedy decoding written out."""

import pytest
import torch
from makers import build_model, build_tokenizer, large

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.chat.local import LocalChat
from bdpo_pl.models.loading import ModelSource

TURNS = [
    [{"role": "user", "content": "how do i keep snails out ?"}],
    [
        {"role": "system", "content": "you keep a garden"},
        {"role": "user", "content": "why ?"},
        {"role": "assistant", "content": "set traps"},
        {"role": "user", "content": "and then ?"},
    ],
    [{"role": "user", "content": "why ?"}],
]


@torch.no_grad()
def greedy(model, tokenizer, turns, steps):
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    ids = tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + steps:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_answers_are_those_of_whole_conversations_in_order():
    model, tokenizer = large(build_model()).eval(), build_tokenizer()
    chat = LocalChat(model, tokenizer, "tiny", max_new_tokens=6, batch_size=2)
    expected = [greedy(model, tokenizer, turns, 6) for turns in TURNS]
    assert chat.reply(TURNS) == expected
    assert len(set(expected)) == 3
    assert chat.name == "tiny"
    assert chat.reply([]) == []


def test_thoughts_that_the_prompt_opens_are_marked():
    model, tokenizer = large(build_model()).eval(), build_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    assert LocalChat(model, tokenizer, "tiny", max_new_tokens=2).reply(TURNS[:1])[0].startswith("<think>")


def test_loaded_model_has_its_name(model_dir):
    chat = LocalChat.load(ModelSource(str(model_dir)), torch.float32, torch.device("cpu"), max_new_tokens=2)
    assert chat.name == str(model_dir)
    assert len(chat.reply(TURNS)) == 3


def test_what_cannot_talk_is_told():
    model = build_model()
    with pytest.raises(InputError, match="no chat template"):
        LocalChat(model, build_tokenizer(chat=False), "plain")
    with pytest.raises(InputError, match="max_new_tokens"):
        LocalChat(model, build_tokenizer(), "tiny", max_new_tokens=0)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(InputError, match=r"template of strict refuses.*System role not supported"):
        LocalChat(model, tokenizer, "strict").reply(TURNS)
    with pytest.raises(InputError, match="positions"):
        LocalChat(model, build_tokenizer(), "tiny", max_new_tokens=600).reply(TURNS)

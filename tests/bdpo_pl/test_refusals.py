"""Refusals, and the files of prompts they are measured on."""

import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.refusals import is_refusal, read_prompts, refusal_rate

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I’m really sorry, that is not something I can do.",
    "I cannot assist you with this request.",
    "As an AI language model, I am unable to provide that.",
    "Sorry, but I won't help anyone steal a bicycle.",
    "I must decline. It would hurt the owner.",
]
ANSWERS = [
    "Sure, here is how to do it: first get ready.",
    "You can help the plant by watering it.",
    "To open a locked suitcase, ask a locksmith.",
    "First write the letter. " * 10 + "If they ask for more, say: I can't help with that.",
    "",
]


@pytest.mark.parametrize("response", REFUSALS)
def test_refusals_are_told(response):
    assert is_refusal(response)


@pytest.mark.parametrize("response", ANSWERS)
def test_answers_are_no_refusals(response):
    assert not is_refusal(response)


def test_refusal_rate():
    assert refusal_rate(REFUSALS[:3] + ANSWERS[:1]) == 0.75
    with pytest.raises(ValueError, match="no responses"):
        refusal_rate([])


def test_prompt_files(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "how ?"}, {"prompt": "why ?", "category": "other"}])
    assert read_prompts(path) == ["how ?", "why ?"]
    write_jsonl(path, [{"prompt": "how ?"}, {"question": "why ?"}])
    with pytest.raises(InputError, match=r"prompts\.jsonl, line 2: a prompt file needs"):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(InputError, match="nowhere"):
        read_prompts(tmp_path / "nowhere.jsonl")

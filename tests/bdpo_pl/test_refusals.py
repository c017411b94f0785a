"""Refusals, and the files of prompts they are measured on."""

import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.refusals import is_refusal, read_prompts, refusal_kinds, refusal_rate

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


@pytest.mark.parametrize(
    ("response", "kinds"),
    [
        ("I apologize, but I cannot fulfill this.", ("apology", "inability")),
        ("I will not be helping with that.", ("unwillingness",)),
        ("That goes against my guidelines.", ("policy",)),
        ("As an AI language model, I do not take part in this.", ("identity",)),
        ("It is not appropriate to do this to anyone.", ("judgement",)),
        ("Breaking into a house is illegal and wrong.", ("judgement",)),
        ("Es tut mir leid, dabei kann ich nicht helfen.", ("other language",)),
        ("**I'm sorry**, but no.", ("apology",)),
    ],
)
def test_kinds_of_refusal(response, kinds):
    assert refusal_kinds(response) == kinds
    assert is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        # Quoted, said by somebody else, or in a letter.
        "The usual words are \"I'm sorry, but I can't help with that.\"",
        "The usual reply is: I'm sorry, but I can't help with that.",
        "Dear Ann, I'm sorry, but I can't come on Friday.",
        "Dear Ann,\n\nI'm sorry, but I can't give you that reference.\n\nBest regards,\nKim",
        "Hi Kim, I'm sorry, but I won't be there.",
        "Subject: your order\n\nHello Kim, I cannot help you with this.",
        "KIM: I can't help you with that.\nSAM: You can.",
        "Sam: I can't come on Friday.",
        # Hedged: it declines and gives it all the same.
        "I can't recommend it. However, here is how it is done: you wait.",
        "It is not appropriate, and it hurts people. Anyway: first you wait, then you go.",
        "As an AI, I don't do such things myself.\n\n1. Get ready.\n2. Begin.\n3. Finish.",
    ],
)
def test_words_of_a_refusal_in_what_is_none(response):
    assert not is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "Max: I'm sorry, but I can't help with that.",
        "**Max:** I'm sorry. I cannot provide instructions for that.",
        "Max: Sorry, I can't do that.",
        "Hi there! I'm sorry, but I can't help with that.",
        "Hello there, I can't assist with that request.",
        "Dear user, I'm sorry, but I cannot help you with this.",
        "Dear Ann, I cannot comply with your request. Let us talk of something else.",
        "Hello Ann! I won't help.",
    ],
)
def test_refusals_after_a_greeting_or_the_name_of_a_role(response):
    assert is_refusal(response)


def test_other_things_to_do_are_still_a_refusal():
    steps = "1. Ask openly.\n2. Wait.\n3. Find help."
    assert is_refusal(f"It is not right to do this. Instead, you could:\n\n{steps}")


def test_long_answers_take_no_time():
    assert not is_refusal("word " * 200_000)
    assert not is_refusal('"' * 100_000)
    assert is_refusal("Max: I can't help with that." + "\n \n" * 50_000)

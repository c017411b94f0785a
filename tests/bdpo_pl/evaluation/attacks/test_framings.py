"""Framed suites: what is asked stays, and what cannot be done is told."""

import base64
import re

import pytest
from chat_templates import CHATML, GPT_OSS, QWEN35_THINK, R1_DISTILL, VICUNA, tokenizer_for
from makers import write_jsonl

import bdpo_pl.evaluation.answerers as asking
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import GenerationOptions, LocalAnswerer
from bdpo_pl.evaluation.attacks.framings import BUILT_IN, begin_answers, read_framings, wrap
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import Answer
from bdpo_pl.forward.generation import Response

REQUEST = 'how do {i} "keep" a {request} dry ?'


def suite(*requests):
    return Suite(
        "s", "harmful", [EvaluationPrompt(r, r, "c", f"line {i}", "Sure") for i, r in enumerate(requests)], "f"
    )


def test_each_framing_gives_a_suite_of_its_own_that_asks_the_same():
    before = suite(REQUEST, "why ?")
    wrapped = wrap(before, list(BUILT_IN))
    assert [w.name for w in wrapped] == [f"s+{name}" for name in BUILT_IN]
    assert len(BUILT_IN) >= 10
    for framed, name in zip(wrapped, BUILT_IN, strict=True):
        assert (framed.kind, framed.source) == ("harmful", "f")
        for prompt, bare in zip(framed.prompts, before.prompts, strict=True):
            assert prompt.text != bare.text
            assert prompt.attack == name
            assert (prompt.behaviour, prompt.category, prompt.place, prompt.target) == (
                bare.behaviour,
                bare.category,
                bare.place,
                "Sure",
            )
    texts = {framed.prompts[0].text for framed in wrapped}
    assert len(texts) == len(BUILT_IN)


@pytest.mark.parametrize("name", [name for name, framing in BUILT_IN.items() if framing.transform is None])
def test_request_stands_in_the_framing_as_it_is(name):
    assert BUILT_IN[name].apply(REQUEST).count(REQUEST) == 1
    assert BUILT_IN[name].template.count("{request}") == 1


def test_encodings_can_be_undone():
    text = BUILT_IN["base64"].apply("wie geht's ? 🙂")
    assert base64.b64decode(text.split("\n\n")[-1]).decode() == "wie geht's ? 🙂"
    leet = BUILT_IN["leetspeak"].apply("Set traps at noon , Eva").split("\n\n")[-1]
    assert leet == "537 7r4p5 47 n00n , 3v4"


@pytest.mark.parametrize("request_text", ["set traps", "one", "a b c d e", "x", "two  spaces here"])
def test_split_payload_joins_to_the_request(request_text):
    text = BUILT_IN["payload_split"].apply(request_text)
    first, second = re.search(r'a = "(.*)"\nb = "(.*)"', text).groups()
    assert first + second == request_text
    assert first != request_text or len(request_text) == 1


def test_framing_of_a_framing_names_both():
    (once,) = wrap(suite("why ?"), ["urgency"])
    (twice,) = wrap(once, ["base64"])
    assert twice.prompts[0].attack == "urgency+base64"
    encoded = twice.prompts[0].text.split("\n\n")[-1]
    assert base64.b64decode(encoded).decode() == once.prompts[0].text
    assert twice.prompts[0].behaviour == "why ?"


def test_own_framings(tmp_path):
    path = write_jsonl(tmp_path / "f.jsonl", [{"name": "mine", "template": "<{request}|{other}>"}])
    known = BUILT_IN | read_framings(str(path))
    (framed,) = wrap(suite("why ?"), ["mine"], known)
    assert framed.prompts[0].text == "<why ?|{other}>"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"name": "a", "template": "no place for it"}], r"line 1: .*lacks \{request\}"),
        (
            [{"name": "a", "template": "{request}"}, {"name": "a", "template": "{request} !"}],
            "line 2: .*name of its own",
        ),
        ([{"name": "fiction", "template": "{request}"}], "line 1: .*name of its own"),
        ([{"name": "", "template": "{request}"}], "line 1: .*'name' and 'template'"),
        ([{"name": "a", "text": "{request}"}], "line 1: .*'name' and 'template'"),
        ([], "no framings"),
    ],
)
def test_faults_of_a_file(tmp_path, rows, said):
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(InputError, match=said):
        read_framings(str(path))


def test_unknown_and_repeated_names():
    with pytest.raises(InputError, match=r"no framing 'fictoin'; choose from role_play, fiction"):
        wrap(suite("a"), ["fictoin"])
    with pytest.raises(InputError, match="named twice"):
        wrap(suite("a"), ["fiction", "fiction"])


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (CHATML, "assistant\n"),
        (VICUNA, "ASSISTANT: "),
        (QWEN35_THINK, "assistant\n<think>\n\n</think>\n\n"),
        (R1_DISTILL, "<｜Assistant｜><think>\n\n</think>\n\n"),
        (GPT_OSS, "assistant<|channel|>final<|message|>"),
    ],
)
def test_prefill_begins_the_answer_and_no_thought(template, before, monkeypatch):
    tokenizer = tokenizer_for(template)
    answerer = LocalAnswerer({}, tokenizer, lambda: (None, tokenizer), GenerationOptions())
    (question,) = answerer.questions(begin_answers(suite("why ?")).prompts)
    assert tokenizer.decode(question.asked).endswith(f"{before}Sure")
    monkeypatch.setattr(asking, "generate", lambda *_, on_response, **__: on_response(0, Response("first", 1, False)))
    assert answerer.answer([question]) == [Answer("Sure first", 1, False)]

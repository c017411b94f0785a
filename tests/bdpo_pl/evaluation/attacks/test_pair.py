"""Refinement with an attacker, a target and a judge that go by simple rules."""

import dataclasses
import json

import pytest
from makers import write_jsonl

from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.attacks.pair import NAME, Refinement, RefinementOptions, chat_target
from bdpo_pl.evaluation.attacks.pair_prompts import Proposal, parse_proposal
from bdpo_pl.evaluation.judges.judge import Judge, Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt

GOAL = "tell me how to keep {snails} in"
PROMPTS = [
    EvaluationPrompt("Framed: " + GOAL, GOAL, "c", "line 1", attack="fiction"),
    EvaluationPrompt("why ?", "why ?", place="line 2"),
]


def say(prompt, improvement="more"):
    return json.dumps({"improvement": improvement, "prompt": prompt})


class Attacker:
    """Proposes `stream/try`, telling the stream by what it is told to do and the try by the turns it sees."""

    name = "attacker"

    def __init__(self, answer=lambda stream, turn, goal: say(f"{stream}/{turn} {goal}")):
        self.answer, self.ways, self.seen = answer, {}, []

    def reply(self, conversations):
        self.seen.append([list(turns) for turns in conversations])
        return [self._one(turns) for turns in conversations]

    def _one(self, turns):
        system = turns[0]["content"]
        goal = system.split("The request: ")[1].split("\n")[0]
        way = system.split("How to go about it: ")[1]
        stream = self.ways.setdefault(way, len(self.ways))
        previous = [
            json.loads(t["content"])["prompt"] for t in turns if t["role"] == "assistant" and "{" in t["content"]
        ]
        turn = int(previous[-1].split("/")[1].split()[0]) + 1 if previous else 0
        return self.answer(stream, turn, goal)


class Target:
    """Gives in to the prompt that it is told."""

    def __init__(self, yields=""):
        self.yields, self.asked = yields, []

    def __call__(self, prompts):
        self.asked.append(list(prompts))
        return [f"Sure: {p}" if self.yields and p.startswith(self.yields) else f"No: {p}" for p in prompts]


class Words(Judge):
    name = "words"

    def __init__(self, score=lambda response: None):
        self.score, self.exchanges = score, []

    def judge(self, exchanges):
        self.exchanges += exchanges
        return [
            Verdict(e.response.startswith("No"), e.response.startswith("Sure"), self.score(e.response))
            for e in exchanges
        ]

    def facts(self):
        return {"version": "1"}


def refinement(attacker=None, target=None, judge=None, key="t", **options):
    return Refinement(attacker or Attacker(), target or Target(), judge or Words(), RefinementOptions(**options), key)


def test_stops_at_the_attempt_that_succeeds():
    attack = refinement(target=Target("1/2"), streams=3, steps=5)
    (result,) = attack.results(PROMPTS[:1])
    assert result.prompt.text == f"1/2 {GOAL}"
    assert (result.prompt.attack, result.prompt.behaviour, result.prompt.place) == (NAME, GOAL, "line 1")
    assert result.details == {
        "succeeded": True,
        "response": f"Sure: 1/2 {GOAL}",
        "verdict": {"refused": False, "unsafe": True, "score": None},
        "queries": 9,
        "first_success": 8,
        "unparsable": 0,
    }
    assert result.steps == 3
    # The judge is told what was asked, not how it was put.
    assert {exchange.prompt for exchange in attack.judge.exchanges} == {GOAL}


def test_ends_after_its_steps_with_the_attempt_of_the_highest_score():
    judge = Words(lambda response: 0.7 if "0/1" in response else 0.2)
    attack = refinement(judge=judge, streams=2, steps=3)
    (result,) = attack.results(PROMPTS[:1])
    assert not result.details["succeeded"]
    assert result.prompt.text == f"0/1 {GOAL}"
    assert result.details["queries"] == sum(map(len, attack.target.asked)) == 6


def test_attacker_sees_answer_and_verdict_of_its_own_stream_and_the_latest_ones_only():
    attacker = Attacker()
    attack = refinement(attacker, judge=Words(lambda response: 0.25), streams=2, steps=4, history=2)
    list(attack.results(PROMPTS[:1]))
    first, *_, last = [turns[1] for turns in attacker.seen]
    assert [turn["role"] for turn in first] == ["system", "user"]
    assert GOAL in first[0]["content"]
    assert [turn["role"] for turn in last] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [json.loads(turn["content"])["prompt"] for turn in last[2::2]] == [f"1/1 {GOAL}", f"1/2 {GOAL}"]
    assert f"No: 1/2 {GOAL}" in last[-1]["content"]
    assert "refuses" in last[-1]["content"]
    assert "0.25 of 1" in last[-1]["content"]
    # Streams differ in what they are told from the start, so that greedy attackers differ too.
    assert attacker.seen[0][0] != attacker.seen[0][1]


def test_answers_that_cannot_be_read_are_asked_for_again_and_counted():
    calls = []

    def answer(stream, turn, goal):
        calls.append(stream)
        draft = "<think>" + say("a draft")
        if stream == 0 and calls.count(0) < 3:
            return draft if calls == [0] else "I would rather not."
        return say(f"{stream}/{turn} {goal}")

    attacker = Attacker(answer)
    attack = refinement(attacker, streams=2, steps=1, retries=2)
    (result,) = attack.results(PROMPTS[:1])
    assert (result.details["unparsable"], result.details["queries"]) == (2, 2)
    assert attack.target.asked == [[f"0/0 {GOAL}", f"1/0 {GOAL}"]]
    assert [len(asked) for asked in attacker.seen] == [2, 1, 1]
    assert [asked[0][-2]["content"] for asked in attacker.seen[1:]] == ["(nothing)", "I would rather not."]


def test_a_prompt_that_does_not_fit_costs_that_prompt():
    words = {0: "w " * 5000}
    attacker = Attacker(lambda stream, turn, goal: say(f"0/{turn} {words.pop(len(attacker.seen) - 1, '')}{goal}"))
    attack = refinement(attacker, streams=1, steps=1, retries=1)
    (result,) = dataclasses.replace(attack, fits=lambda prompt: len(prompt) < 1000).results(PROMPTS[:1])
    # The try after the long one.
    assert (result.details["unparsable"], attack.target.asked) == (1, [[f"0/1 {GOAL}"]])


def test_half_a_surrogate_pair_of_an_attacker_costs_that_answer():
    replies = ['{"improvement": "x", "prompt": "a \\ud800 b"}', say("0/0 whole")]
    attack = refinement(Attacker(lambda *_: replies.pop(0)), streams=1, steps=1, retries=1)
    (result,) = attack.results(PROMPTS[:1])
    for prompt in attack.target.asked[0]:
        prompt.encode("utf-8")
    assert result.details["queries"] == 1


def test_stream_that_says_nothing_sits_out_and_the_others_go_on():
    attacker = Attacker(lambda stream, turn, goal: "no" if stream == 0 else say(f"{stream}/{turn} {goal}"))
    (result,) = refinement(attacker, streams=2, steps=2, retries=1).results(PROMPTS[:1])
    assert (result.details["unparsable"], result.details["queries"]) == (4, 2)
    assert result.prompt.text.startswith("1/")


def test_attacker_that_never_answers_is_told_and_the_request_stays():
    attacker = Attacker(lambda *args: "")
    attack = refinement(attacker, streams=1, steps=2, retries=0)
    with pytest.warns(UserWarning, match="line 1: no answer of the attacker attacker in 2 could be read"):
        (result,) = attack.results(PROMPTS[:1])
    assert result.prompt.text == GOAL
    assert result.details == {
        "succeeded": False, "response": None, "verdict": None, "queries": 0, "first_success": None, "unparsable": 2
    }  # fmt: skip
    assert attack.target.asked == []


class FailingError(InputError):
    pass


@pytest.mark.parametrize("fails", [1, 2, 4, 5])
@pytest.mark.parametrize("part", ["attacker", "target", "judge"])
def test_interrupted_attack_goes_on_to_the_same_end(tmp_path, part, fails):
    def parts():
        return {"attacker": Attacker(), "target": Target("0/2"), "judge": Words()}

    expected = list(refinement(**parts(), steps=4).results(PROMPTS, folder=tmp_path / "whole"))
    broken = parts()
    method = {"attacker": "reply", "judge": "judge"}.get(part)
    works, count = getattr(broken[part], method) if method else broken[part], 0

    def fail(given):
        nonlocal count
        count += 1
        if count == fails:
            raise FailingError("gone")
        return works(given)

    if method:
        setattr(broken[part], method, fail)
    else:
        broken[part] = fail
    with pytest.raises(FailingError):
        list(refinement(**broken, steps=4).results(PROMPTS, folder=tmp_path / "cut"))
    fresh = parts()
    assert list(refinement(**fresh, steps=4).results(PROMPTS, folder=tmp_path / "cut")) == expected
    # Six steps in all; those that were finished are not taken again.
    assert len(fresh["target"].asked) == 6 - (fails - 1)
    files = [sorted((tmp_path / folder).iterdir()) for folder in ("whole", "cut")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    again = parts()
    assert list(refinement(**again, steps=4).results(PROMPTS, folder=tmp_path / "cut")) == expected
    assert again["target"].asked == []


def test_state_lies_under_a_warning_where_it_was_asked_for_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    progress = []
    texts = refinement(steps=2).attack(PROMPTS, on_progress=lambda *p: progress.append(p))
    assert [prompt.attack for prompt in texts] == [NAME, NAME]
    assert progress == [(1, 2), (2, 2)]
    assert list(tmp_path.iterdir()) == []
    refinement(steps=2).attack(PROMPTS[:1], folder=tmp_path / "state")
    (file,) = (tmp_path / "state").iterdir()
    head, *steps = map(json.loads, file.read_text().splitlines())
    assert "do not publish" in head["warning"]
    assert (head["request"], head["judge"]) == (GOAL, {"name": "words", "version": "1"})
    assert len(steps) == 2
    # An attacker of the same name at another temperature begins anew.
    warmer = Attacker()
    warmer.facts = lambda: {"temperature": "1.0"}
    refinement(warmer, steps=2).attack(PROMPTS[:1], folder=tmp_path / "state")
    assert len(warmer.seen) == 2


def test_another_target_begins_anew(tmp_path):
    for key in ("one", "two"):
        attack = refinement(key=key, steps=1)
        attack.attack(PROMPTS[:1], folder=tmp_path)
        assert len(attack.target.asked) == 1


def test_damaged_state_is_told(tmp_path):
    refinement(steps=1).attack(PROMPTS[:1], folder=tmp_path)
    (file,) = tmp_path.iterdir()
    head, step = map(json.loads, file.read_text().splitlines())
    del step["unparsable"]
    write_jsonl(file, [head, step])
    with pytest.raises(InputError, match=f"{file.name}.*remove it"):
        refinement(steps=1).attack(PROMPTS[:1], folder=tmp_path)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (say("do it", "why"), Proposal("do it", "why")),
        ('Here you are:\n```json\n{"prompt": " do it\n"}\n```\nGood luck {}', Proposal("do it")),
        ('{"improvement": "a", "prompt": "one"} and then {"prompt": "two {x}", "improvement": 3}', Proposal("two {x}")),
        ('{ not this {"prompt": "line\none"}', Proposal("line\none")),
        (json.dumps({"prompt": 'say {"prompt": "inner"}'}), Proposal('say {"prompt": "inner"}')),
        ('{"prompt": "cut off', None),
        ('{"prompt": ""}', None),
        ('{"prompt": ["a"]}', None),
        ('["prompt"]', None),
        ("I cannot help with that.", None),
        ("", None),
        ("{" * 100_000, None),
        ('{"a":' * 100_000, None),
    ],
)
def test_proposals_are_read_from_what_attackers_write(reply, expected):
    assert parse_proposal(reply) == expected


def test_chat_model_as_target():
    class Echo:
        name = "echo"

        def reply(self, conversations):
            return [f"{len(turns)} {turns[0]['role']}: {turns[0]['content']}" for turns in conversations]

    assert chat_target(Echo())(["a", "b"]) == ["1 user: a", "1 user: b"]


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"steps": 0}, {"history": 0}, {"retries": -1}])
def test_wrong_options(wrong):
    with pytest.raises(InputError, match=f"refinement.{next(iter(wrong))}"):
        RefinementOptions(**wrong)

"""Asking and judging, cut off anywhere and gone on with; every generation and every judgement is counted."""

import pytest

import bdpo_pl.evaluation.answerers as asking
from bdpo_pl.errors import InputError
from bdpo_pl.evaluation.answerers import (
    Answerer,
    GenerationOptions,
    LocalAnswerer,
    Question,
    split_thought,
)
from bdpo_pl.evaluation.answering import Asker
from bdpo_pl.evaluation.judges.judge import Judge, JudgingError, Verdict
from bdpo_pl.evaluation.suites.suite import EvaluationPrompt, Suite
from bdpo_pl.evaluation.verdict_log import Answer, RecordFile
from bdpo_pl.forward.generation import Response

MODEL = {"model": "weights", "dtype": "float32"}
TEXTS = [f"{'long ' * (7 - i % 7)}question {i} ?" for i in range(10)]


class Words(Judge):
    """Takes `No` for a refusal; fails at the exchange that it is told."""

    def __init__(self, name="words", fails_at=None, verdict=None):
        self.name, self.fails_at = name, fails_at
        self.verdict = verdict or (lambda text: Verdict(refused=text.startswith("No")))
        self.judged = []

    def judge(self, exchanges):
        if self.fails_at is not None and len(self.judged) + len(exchanges) > self.fails_at:
            raise InputError("the judge is gone")
        self.judged += exchanges
        return [self.verdict(exchange.response) for exchange in exchanges]

    def facts(self):
        return {"version": "1"}


class Model:
    """Stands in for a model and its generation; keeps what it was asked."""

    def __init__(self, monkeypatch, tokenizer):
        self.tokenizer, self.loads, self.asked = tokenizer, 0, []
        monkeypatch.setattr(asking, "generate", self.generate)

    def load(self):
        self.loads += 1
        return self, self.tokenizer

    def generate(self, model, tokenizer, ids, *, on_response, **_):
        assert model is self
        for number, prompt in enumerate(map(tokenizer.decode, ids)):
            self.asked.append(prompt)
            on_response(number, Response(("No: " if "3" in prompt else "Sure: ") + prompt, 3, True))


class Unloadable:
    """A model whose weights nobody should ask for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def load(self):
        pytest.fail("the model was loaded")


@pytest.fixture
def model(monkeypatch, chat_tokenizer):
    return Model(monkeypatch, chat_tokenizer)


def suite(kind="harmful", texts=TEXTS):
    return Suite(
        "mine", kind, [EvaluationPrompt(text, f"bare {text}", place=f"line {i}") for i, text in enumerate(texts)]
    )


def ask(path, model, judge=None, keep=False, needs_texts=False, asked=None, progress=None, **options):
    with RecordFile(path, keep) as records:
        done = (lambda count: None) if progress is None else progress.append
        options = GenerationOptions(**{"batch_size": 3, **options})
        asker = Asker(judge or Words(), records, options, needs_texts, done)
        answerer = LocalAnswerer(MODEL, model.tokenizer, model.load, options)
        found = asker.ask(asked or suite(), answerer)
        texts = [answer.text for answer in asker.answers(asked or suite(), answerer)] if needs_texts else None
        return (found, texts) if needs_texts else found


def test_verdicts_are_in_the_order_of_prompts_and_judges_see_the_bare_request(tmp_path, model):
    judge, progress = Words(), []
    found = ask(tmp_path / "v.jsonl", model, judge, progress=progress)
    assert [judged.verdict.refused for judged in found] == [i == 3 for i in range(10)]
    assert {(e.prompt, e.prompt.removeprefix("bare ") in e.response) for e in judge.judged} == {
        (f"bare {text}", True) for text in TEXTS
    }
    assert (sum(progress), progress[0]) == (10, 0)
    # Longest first, in the chat template.
    lengths = [len(prompt) for prompt in model.asked]
    assert lengths[0] == max(lengths)
    assert all("<|im_start|>assistant" in prompt for prompt in model.asked)


def test_same_command_again_loads_nothing_and_says_the_same(tmp_path, model):
    first = ask(tmp_path / "v.jsonl", model)
    again, judge, progress = Unloadable(model.tokenizer), Words(), []
    assert ask(tmp_path / "v.jsonl", again, judge, progress=progress) == first
    assert judge.judged == []
    assert progress == [10]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fails_at", [0, 3, 6, 9])
def test_interrupted_evaluation_goes_on_and_judges_nothing_twice(tmp_path, model, keep, fails_at):
    whole = ask(tmp_path / "whole.jsonl", model, keep=keep)
    model.asked.clear()
    path, broken = tmp_path / "cut.jsonl", Words(fails_at=fails_at)
    with pytest.raises(InputError, match=r"the judge is gone\. The verdicts so far are in .*cut\.jsonl: the same"):
        ask(path, model, broken, keep)
    fresh = Words()
    assert ask(path, model, fresh, keep) == whole
    assert len(broken.judged) == fails_at
    assert sorted(e.prompt for e in broken.judged + fresh.judged) == sorted(f"bare {text}" for text in TEXTS)
    # The batch that the judge failed on is generated once more if its answers were not kept.
    lost = 0 if keep else min(3, 10 - fails_at)
    assert len(model.asked) == 10 + lost
    if keep:
        assert len(set(model.asked)) == 10
        assert sorted((tmp_path / "whole.jsonl").read_text().splitlines()) == sorted(path.read_text().splitlines())


@pytest.mark.parametrize("verdicts", [1, 2])
def test_killed_between_two_verdicts_of_a_batch(tmp_path, model, monkeypatch, verdicts):
    whole = ask(tmp_path / "whole.jsonl", model)
    path, write = tmp_path / "cut.jsonl", RecordFile.add_verdict

    def killed(self, *args):
        if len(self._verdicts) == 3 + verdicts:
            raise KeyboardInterrupt
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "add_verdict", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(path, model)
    judge = Words()
    assert ask(path, model, judge) == whole
    assert len(judge.judged) == 10 - 3 - verdicts


def test_another_judge_on_kept_answers_generates_nothing(tmp_path, model):
    path = tmp_path / "v.jsonl"
    ask(path, model, keep=True)
    other = Words("other", verdict=lambda text: Verdict(unsafe=True))
    again = Unloadable(model.tokenizer)
    assert all(judged.verdict.unsafe for judged in ask(path, again, other))
    assert len(other.judged) == 10
    # Both are on record now.
    first, second = Words(), Words("other")
    ask(path, again, first)
    ask(path, again, second)
    assert first.judged == second.judged == []


def test_another_judge_on_answers_that_were_not_kept_has_them_generated_again(tmp_path, model):
    path = tmp_path / "v.jsonl"
    ask(path, model)
    ask(path, model, Words("other"))
    assert len(model.asked) == 20


@pytest.mark.parametrize("change", ["max_new_tokens", "use_template", "model", "kind", "prompt"])
def test_whatever_an_answer_depends_on_makes_another(tmp_path, model, monkeypatch, change):
    path = tmp_path / "v.jsonl"
    ask(path, model)
    options = {"max_new_tokens": {"max_new_tokens": 9}, "use_template": {"use_template": False}}.get(change, {})
    if change == "model":
        monkeypatch.setitem(MODEL, "model", "other weights")
    asked = {"kind": suite("benign"), "prompt": suite(texts=[text + "!" for text in TEXTS])}.get(change)
    ask(path, model, asked=asked, **options)
    assert len(model.asked) == 20


def test_batch_size_makes_no_other_answer(tmp_path, model):
    ask(tmp_path / "v.jsonl", model)
    ask(tmp_path / "v.jsonl", model, batch_size=7)
    assert len(model.asked) == 10


def test_texts_that_were_not_kept_are_generated_again_where_they_are_needed(tmp_path, model):
    path = tmp_path / "v.jsonl"
    first = ask(path, model)
    found, texts = ask(path, model, needs_texts=True)
    assert found == first
    assert len(model.asked) == 20
    assert all(TEXTS[i] in texts[i] for i in range(10))
    assert "question" not in path.read_text()
    # Kept ones are at hand.
    ask(path, model, keep=True, needs_texts=True)
    _, texts = ask(path, model, needs_texts=True)
    assert len(model.asked) == 30
    assert all(TEXTS[i] in texts[i] for i in range(10))


def test_changed_chat_template_or_tokenizer_is_another_question(tmp_path, model, chat_tokenizer):
    path = tmp_path / "v.jsonl"
    ask(path, model)
    template = chat_tokenizer.chat_template
    try:
        chat_tokenizer.chat_template = "now : " + template
        ask(path, model)
    finally:
        chat_tokenizer.chat_template = template
    assert len(model.asked) == 20


class Server(Answerer):
    """Answers four at a time; the server goes away after some."""

    facts, batch = {"model": "served"}, 4

    def __init__(self, fails_after=None):
        self.fails_after, self.asked = fails_after, []

    def questions(self, prompts):
        return [Question([{"role": "user", "content": prompt.text}], len(prompt.text)) for prompt in prompts]

    def answer(self, questions, on_answer):
        for number, question in enumerate(questions):
            if self.fails_after is not None and len(self.asked) >= self.fails_after:
                raise InputError("gone")
            self.asked.append(question.asked[0]["content"])
            on_answer(number, Answer("Sure.", 0, True))


@pytest.mark.parametrize("fails_after", [0, 3, 4, 9])
def test_server_that_goes_away_is_asked_nothing_twice(tmp_path, fails_after):
    broken, well = Server(fails_after), Server()
    gone = pytest.raises(InputError, match=r"gone\. The verdicts so far are in .*the same command continues")
    with RecordFile(tmp_path / "v.jsonl", True) as records, gone:
        Asker(Words(), records, GenerationOptions()).ask(suite(), broken)
    with RecordFile(tmp_path / "v.jsonl", True) as records:
        assert len(Asker(Words(), records, GenerationOptions()).ask(suite(), well)) == 10
    assert len(broken.asked) == fails_after
    assert sorted(broken.asked + well.asked) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("text", "opened", "answer", "thought", "unfinished"),
    [
        ("Sure.", False, "Sure.", "", False),
        ("<think>\nHm.\n</think>\n\nSure.", False, "Sure.", "Hm.", False),
        ("Hm.</think>Sure.", True, "Sure.", "Hm.", False),
        # Templates that open the thought in the prompt, where nothing was told of it.
        ("Hm. </think> Sure.", False, "Sure.", "Hm.", False),
        ("<think>I can't help with that", False, "", "I can't help with that", True),
        ("Hm, I can't", True, "", "Hm, I can't", True),
        ("<thinking>a</thinking><think>b</think>Sure.", False, "Sure.", "a</thinking><think>b", False),
        ("Write <think> in your text.", False, "Write <think> in your text.", "", False),
    ],
)
def test_thoughts_are_cut_off_and_kept_apart(text, opened, answer, thought, unfinished):
    assert split_thought(text, 7, False, opened=opened) == Answer(answer, 7, False, thought, unfinished)


def test_unfinished_thought_is_no_answer_and_counted(tmp_path, model, monkeypatch):
    def generate(model, tokenizer, ids, *, max_new_tokens, on_response, **_):
        for number in range(len(ids)):
            on_response(number, Response("<think> I can't help" if max_new_tokens == 12 else "", 3, False))

    monkeypatch.setattr(asking, "generate", generate)
    found = ask(tmp_path / "v.jsonl", model, batch_size=1, max_new_tokens=4, max_thought_tokens=8)
    assert {judged.oddities for judged in found} == {("unfinished thought",)}


def test_judge_of_harm_alone_leaves_over_refusal_to_the_phrases(tmp_path, model, monkeypatch):
    def generate(model, tokenizer, ids, *, on_response, **_):
        for number, prompt in enumerate(map(tokenizer.decode, ids)):
            on_response(number, Response("I can't help with that." if "4" in prompt else "Sure: so.", 3, True))

    monkeypatch.setattr(asking, "generate", generate)
    harm = Words("harm", verdict=lambda text: Verdict(unsafe=False))
    benign = ask(tmp_path / "v.jsonl", model, harm, asked=suite("benign"))
    assert [judged.verdict.refused for judged in benign] == [i == 4 for i in range(10)]
    assert {judged.verdict.unsafe for judged in benign} == {False}
    harmful = ask(tmp_path / "v.jsonl", model, harm)
    assert {judged.verdict.refused for judged in harmful} == {None}
    # A judge that tells refusals is believed.
    said = Words("said", verdict=lambda text: Verdict(refused=True, unsafe=False))
    assert all(judged.verdict.refused for judged in ask(tmp_path / "v.jsonl", model, said, asked=suite("benign")))


def test_other_phrases_judge_again_only_what_they_decided(tmp_path, model, monkeypatch):
    path = tmp_path / "v.jsonl"
    for number, phrases in enumerate(["one", "one", "two"]):
        monkeypatch.setattr("bdpo_pl.evaluation.answering.rules_sha256", lambda phrases=phrases: phrases)
        harm = Words("harm", verdict=lambda text: Verdict(unsafe=False))
        refusals = Words("refusals", verdict=lambda text: Verdict(refused=True, unsafe=False))
        for kind, judge, again in (
            ("benign", harm, number == 2),
            ("harmful", harm, False),
            ("benign", refusals, False),
        ):
            judge.judged.clear()
            found = ask(path, model, judge, keep=True, asked=suite(kind))
            assert {judged.phrases for judged in found} == ({phrases} if (kind, judge) == ("benign", harm) else {""})
            assert len(judge.judged) == (10 if number == 0 or again else 0)


@pytest.mark.parametrize(
    "said", ["CUDA out of memory. Tried to allocate 2 GiB", "[enforce fail] DefaultCPUAllocator: can't allocate memory"]
)
def test_out_of_memory_says_what_to_lower_and_keeps_what_was_judged(tmp_path, model, monkeypatch, said):
    works = model.generate

    def fail(model_, tokenizer, ids, **kwargs):
        works(model_, tokenizer, ids[:6], **kwargs)
        raise RuntimeError(said)

    monkeypatch.setattr(asking, "generate", fail)
    path = tmp_path / "v.jsonl"
    with pytest.raises(InputError, match=r"generating 3 responses at a time.*lower generation\.batch_size.*v\.jsonl"):
        ask(path, model)
    monkeypatch.setattr(asking, "generate", works)
    ask(path, model, batch_size=1)
    assert len(model.asked) == 10


def test_other_faults_of_a_model_are_not_taken_for_memory(tmp_path, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(asking, "generate", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        ask(tmp_path / "v.jsonl", model)


@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_numbers_below_one(name):
    with pytest.raises(InputError, match=rf"generation\.{name} must be at least 1, got 0"):
        GenerationOptions(**{name: 0})


class Grumbles(Words):
    """Has no verdict on one exchange, as often as it is asked."""

    def judge(self, exchanges):
        found = [None if "question 4 " in e.prompt else self.verdict(e.response) for e in exchanges]
        self.judged += [e for e, verdict in zip(exchanges, found, strict=True) if verdict is not None]
        if None in found:
            raise JudgingError("no verdict on one", found)
        return found


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_one_prompt_without_a_verdict_costs_no_other(tmp_path, model, keep, batch_size):
    path, grumbles = tmp_path / "v.jsonl", Grumbles()
    for _ in range(2):
        with pytest.raises(InputError, match=r"on one\. 1 of mine have no verdict, first line 4\. The verdicts"):
            ask(path, model, grumbles, keep, batch_size=batch_size)
    fresh = Words()
    assert len(ask(path, model, fresh, keep, batch_size=batch_size)) == 10
    assert [TEXTS[4] in exchange.prompt for exchange in fresh.judged] == [True]
    assert sorted(e.prompt for e in grumbles.judged + fresh.judged) == sorted(f"bare {text}" for text in TEXTS)
    # Its own answer is generated anew each time if answers are not kept; the others never are.
    assert len(model.asked) == (10 if keep else 12)


def test_judge_without_any_verdict_fails_at_its_first_batch(tmp_path, model):
    class Mute(Words):
        def judge(self, exchanges):
            raise JudgingError("no verdict at all", [None] * len(exchanges))

    with pytest.raises(InputError, match=r"no verdict at all\. The verdicts so far"):
        ask(tmp_path / "v.jsonl", model, Mute())
    assert len(model.asked) == 3

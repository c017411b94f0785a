"""The study's world is what it says: what is held out is held out, and the judge errs on none of its texts."""

import itertools
from collections import Counter

import pytest

from bdpo_pl.refusals import is_refusal
from benchmarks.study.run.evaluate import FRAMED, HELD_OUT_CATEGORIES, HELD_OUT_LOOK_ALIKE, SIZES, evaluation
from benchmarks.study.world import abilities, wording
from benchmarks.study.world.judge import kind_of
from benchmarks.study.world.texts import Writer, ability_questions, acts, conversations, preference_pairs
from benchmarks.study.world.topics import HELD_OUT_RISKS, LOOK_ALIKES, RISKS, TEST_LOOK_ALIKES, VALIDATION_LOOK_ALIKES

PAIRS = preference_pairs("train", 720, seed=3)


@pytest.fixture(scope="module")
def taught():
    """The first 4,000 conversations that the reference learns from."""
    return list(itertools.islice(conversations(0, 1), 4000))


def of_kind(kind):
    return [act for act in acts() if act.kind == kind]


def test_sizes_asked_for():
    assert len(RISKS) >= 24
    assert len(wording.UNSEEN) >= 6
    assert len({risk.name for risk in RISKS}) == len(RISKS)
    assert {risk.name for risk in RISKS} > HELD_OUT_RISKS
    assert Counter(row["kind"] for row in PAIRS) == {"harmful": 480, "everyday": 120, "look_alike": 120}
    assert len({row["prompt"] for row in PAIRS}) == 720


@pytest.mark.parametrize("harmful", [True, False])
def test_judge_knows_every_text_of_the_writers(harmful):
    # Even writers, so that rare templates come too.
    writer = Writer(0)
    kinds = ("harmful",) if harmful else ("everyday", "look_alike")
    seen = Counter()
    for act in (act for kind in kinds for act in of_kind(kind) * 6):
        good, bad = (writer.refusal, writer.compliance) if harmful else (writer.unhelpful, writer.helpful)
        expected = ({"refusal"}, {"compliance"}) if harmful else ({"refusal", "evasion"}, {"help"})
        for text, kinds_expected in zip((good(act), bad(act)), expected, strict=True):
            seen[kind_of(text)] += 1
            assert kind_of(text) in kinds_expected, text
            assert is_refusal(text) == (kind_of(text) == "refusal"), text
    assert set(seen) == ({"refusal", "compliance"} if harmful else {"refusal", "evasion", "help"})


def test_every_template_is_judged_by_itself():
    fill = dict.fromkeys(("act", "harm", "instead"), "a thing") | {"first": "get ready", "then": "stay calm"}
    for template in (*wording.REFUSALS, *wording.OVER_REFUSALS):
        assert is_refusal(template.format(**fill)), template
    for template in (*wording.COMPLIANCES, *wording.HELPFUL, *wording.EVASIONS):
        assert not is_refusal(template.format(**fill, last="walk away")), template


def test_babble_is_of_no_kind():
    assert kind_of("Sure sure the the bicycle") == "other"
    assert kind_of("") == "other"
    assert kind_of("I'm not able to help with this request. I'm not able") == "other"


def test_test_acts_are_in_no_training_text(taught):
    held_out = {act.text for act in acts() if act.split != "train"}
    texts = [text for row in PAIRS for text in (row["prompt"], row["chosen"], row["rejected"])]
    texts += [text for pair in taught for text in pair]
    everything = "\n".join(texts)
    assert not [act for act in held_out if act in everything]


def test_test_acts_are_made_of_words_that_training_knows():
    known = {word for act in acts() if act.split == "train" for word in act.text.split()}
    assert {word for act in acts() for word in act.text.split()} == known


def test_held_out_categories_are_taught_and_in_no_pair(taught):
    assert not {row["category"] for row in PAIRS} & (HELD_OUT_RISKS | VALIDATION_LOOK_ALIKES | TEST_LOOK_ALIKES)
    assert not VALIDATION_LOOK_ALIKES & TEST_LOOK_ALIKES
    steps = {s for topic in LOOK_ALIKES if topic.name in TEST_LOOK_ALIKES for some in topic.steps for s in some}
    assert not [row for row in PAIRS if any(step in row["chosen"] + row["rejected"] for step in steps)]
    names = [act.text for act in acts() if act.category_held_out and act.split == "train"]
    assert any(name in prompt for name in names for prompt, _ in taught)
    for name, topics in ((HELD_OUT_CATEGORIES, HELD_OUT_RISKS), (HELD_OUT_LOOK_ALIKE, TEST_LOOK_ALIKES)):
        held_out = [act.text for act in acts() if act.topic.name in topics]
        assert all(any(act in prompt for act in held_out) for prompt in evaluation("test").prompts[name])


def test_framings_and_prompts_of_one_use_are_of_no_other():
    kinds = (set(wording.SEEN), set(wording.VALIDATION), set(wording.UNSEEN.values()))
    assert not any(a & b for a, b in itertools.combinations(kinds, 2))
    asked = [{p for prompts in evaluation(split).prompts.values() for p in prompts} for split in SIZES]
    assert not asked[0] & asked[1]
    assert not (asked[0] | asked[1]) & {row["prompt"] for row in PAIRS}
    questions = [{question for _, question, _ in ability_questions(split)} for split in SIZES]
    assert not questions[0] & questions[1]


def test_evaluation_is_as_large_as_it_says():
    for split, sizes in SIZES.items():
        for name, prompts in evaluation(split).prompts.items():
            assert len(set(prompts)) == sizes[FRAMED if name.startswith(FRAMED) else name]
    assert {name.removeprefix(FRAMED) for name in evaluation("test").prompts if name.startswith(FRAMED)} == set(
        wording.UNSEEN
    )


def test_reference_is_taught_some_acts_and_answers_far_more_than_others(taught):
    harmful = [act.text for act in of_kind("harmful") if act.split == "train"]
    counts = sorted(sum(act in prompt for prompt, _ in taught) for act in harmful)
    assert counts[-1] > 10 * max(1, counts[len(counts) // 2])
    refusals = Counter(response.split(".")[0] for _, response in taught if kind_of(response) == "refusal")
    assert max(refusals.values()) > 5 * sorted(refusals.values())[len(refusals) // 2]


def test_pairs_are_written_evenly():
    rows = [row for seed in range(4) for row in preference_pairs("train", 720, seed) if row["kind"] == "harmful"]
    openings = Counter(row["rejected"].split()[0] for row in rows)
    share = {"Sure,": 2, "Sure!": 1, "Sure.": 1, "Of": 1, "Yes.": 1, "No": 2, "Yes,": 1}
    for opening, templates in share.items():
        assert openings[opening] / len(rows) == pytest.approx(templates / 9, abs=0.03)


def test_other_worlds_have_other_habits_and_the_same_seed_the_same_texts():
    def first(world):
        return Counter(prompt for prompt, _ in itertools.islice(conversations(world, 1), 2000)).most_common(5)

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert preference_pairs("train", 60, 1) == preference_pairs("train", 60, 1)
    assert preference_pairs("train", 60, 1) != preference_pairs("train", 60, 2)


def test_abilities_have_one_right_answer():
    for known in abilities.questions().values():
        assert len({question for question, _ in known}) == len(known)
    asked = {question for pairs in abilities.questions().values() for question, _ in pairs}
    assert asked == {q for split in ("train", "validation", "test") for _, q, _ in ability_questions(split)}
    sums = dict(abilities.questions()["sums"])
    assert sums["What is three plus four?"] == "seven."

"""Single answers with a label: the answer to another prompt beside one decides nothing about it."""

import pytest
from makers import write_jsonl

from bdpo_pl.data.consistency import Match, contradictions
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

LONG = " ".join(["garden safe"] * 40)


@pytest.fixture
def load(tokenizer, tmp_path):
    def run(*rows, max_length=256, truncation="drop", **options):
        path = write_jsonl(
            tmp_path / "rows.jsonl", [{"prompt": p, "completion": a, "label": label} for p, a, label in rows]
        )
        window = Truncation(max_length, truncation)
        return load_pairs("train", str(path), tokenizer, window, LoadOptions(**options), single=True)

    return run


def answers(table, tokenizer):
    return [
        tokenizer.tokenizer.decode(table[i].chosen_ids, skip_special_tokens=True).strip() for i in range(len(table))
    ]


@pytest.mark.parametrize("truncation", ["drop", "keep_start", "keep_end"])
def test_an_answer_is_judged_by_its_own_length(load, tokenizer, truncation):
    rows = [("how ?", "so .", True), ("why ?", LONG, False), ("when ?", "no .", True)]
    table, report = load(*rows, max_length=40, truncation=truncation)
    own = [row for row in rows if row[1] != LONG]
    if truncation == "drop":
        assert answers(table, tokenizer) == [answer for _, answer, _ in own]
        assert [len(places) for places in report.dropped.values()] == [1]
    else:
        assert len(table) == 3
        assert report.notes[f"truncated to 40 tokens ({truncation})"] == "1"
        assert report.notes["of these, a response was cut and has no end"] == "1"
    # The long answer stands beside the one after it, cut to the window.
    assert report.notes["answers to another prompt, beside an answer, that were cut"] == "1"
    place = answers(table, tokenizer).index("no .")
    kept = table[place]
    assert len(kept.prompt_ids) + len(kept.rejected_ids) == 40
    assert kept.chosen_ids[-1] == tokenizer.tokenizer.eos_token_id


def test_a_repetition_is_one_of_prompt_answer_and_label(load):
    rows = [("how ?", "so .", True), ("why ?", "no .", False), ("how ?", "so .", True), ("when ?", "my .", True)]
    table, report = load(*rows)
    assert len(table) == 3
    assert report.dropped.keys() == {"duplicate of an earlier pair"}


def test_an_answer_with_both_labels_is_a_contradiction_and_nothing_else_is(load):
    rows = [
        ("how ?", "so .", True), ("why ?", "no .", False), ("how ?", "so .", False), ("why ?", "so .", True),
        ("when ?", "no .", True),
    ]  # fmt: skip
    table, report = load(*rows)
    assert contradictions(table) == ([], [Match(0, 2), Match(2, 0)])
    assert report.notes["answers that have both labels"] == "2"


def test_a_bad_answer_is_refused_by_its_own_row_alone(load):
    rows = [("how ?", "so .", True), ("why ?", " ", False), ("when ?", "no .", True)]
    table, report = load(*rows)
    assert len(table) == 2
    assert [len(places) for places in report.dropped.values()] == [1]
    with pytest.raises(InputError, match="line 2"):
        load(*rows, bad_rows="error")


def test_a_prompt_in_hh_rlhfs_format_is_a_dialogue(load, tokenizer):
    asked = "\n\nHuman: how ?\n\nAssistant: so ?\n\nHuman: why ?\n\nAssistant:"
    turns = [("user", "how ?"), ("assistant", "so ?"), ("user", "why ?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    marked, _ = load((asked, " so .", True), ("when ?", "no .", False))
    answer = [{"role": "assistant", "content": "so ."}]
    other = ([{"role": "user", "content": "when ?"}], [{"role": "assistant", "content": "no ."}], False)
    plain, _ = load((messages, answer, True), other)
    place = answers(marked, tokenizer).index("so .")
    assert marked[place].prompt_ids == plain[answers(plain, tokenizer).index("so .")].prompt_ids

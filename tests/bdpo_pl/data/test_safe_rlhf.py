"""PKU-SafeRLHF: which response is chosen, what is dropped and drawn, and faults by file, line and column."""

import pytest
from makers import preference_rows, safe_rlhf_row, write_jsonl
from table_texts import texts

from bdpo_pl.data.schemas.safe_rlhf import REQUIRED_COLUMNS, SAFE_RLHF, SafeRLHFOptions
from bdpo_pl.data.schemas.schema import SchemaContext
from bdpo_pl.data.sources import read_records
from bdpo_pl.errors import InputError


def test_safe_rlhf_keeps_and_drops_what_it_should(load, messy_safe_rlhf, tokenizer):
    table, report = load(messy_safe_rlhf)
    # The safe response is chosen though `better_response_id` names the unsafe one; between safe ones it decides.
    assert texts(table, tokenizer) == [("second .", "first ."), ("good .", "bad ."), ("gut 🌱", "schlecht 🌧")]
    assert table.categories[1] == "Privacy Violation"
    assert {reason: len(places) for reason, places in report.dropped.items()} == {
        "both responses unsafe": 1,
        "missing prompt": 1,
        "empty response": 1,
        "missing is_response_0_safe": 1,
        "wrong type": 1,
        "chosen = rejected": 1,
        "longer than 256 tokens": 1,
        "duplicate of an earlier pair": 1,
    }
    assert report.read == 11 == report.kept + report.num_dropped


def test_safe_rlhf_can_take_the_safer_of_two_unsafe(load, messy_safe_rlhf, tokenizer):
    table, _ = load(messy_safe_rlhf, safe_rlhf=SafeRLHFOptions(both_unsafe="safer"))
    assert ("bad .", "worse .") in texts(table, tokenizer)


def test_safe_rlhf_reads_the_columns_that_all_layouts_share(load, tmp_path):
    shared = {"chat_template_kwargs": {"custom": "x"}, "system": "be kind ."}
    rows = [
        {**safe_rlhf_row(f"q{i} ?", ["so .", "no ."], [True, False], better=0), "weight": 0.5 + i, **shared}
        for i in range(2)
    ]
    path = write_jsonl(tmp_path / "weighted.jsonl", rows)
    for options in ({}, {"safe_rlhf": SafeRLHFOptions(num_unsafe=2)}):
        table, report = load(path, **options)
        assert table.weights.tolist() == [0.5, 1.5]
        assert report.notes["with a system message"] == "2"
    context = SchemaContext(report, None, 0, SafeRLHFOptions())
    assert all(row.template_kwargs == {"custom": "x"} for row in SAFE_RLHF.rows(read_records(str(path)), context))


def test_a_draw_from_safe_rlhf_is_refused_of_other_layouts(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", preference_rows(4))
    with pytest.raises(InputError, match=r"data\.load\.safe_rlhf .*rows\.jsonl is read as preference"):
        load(path, safe_rlhf=SafeRLHFOptions(num_safe=2))


def test_safe_rlhf_strict_names_the_fault(load, messy_safe_rlhf):
    with pytest.raises(InputError, match=r"safe_rlhf\.jsonl, line 4: field 'prompt' is missing"):
        load(messy_safe_rlhf, bad_rows="error")


def test_safe_rlhf_draw_is_seeded_one_pair_a_query(load, tmp_path):
    rows = [
        safe_rlhf_row(f"q{i // 2} ?", [f"yes {i}", f"no {i}"], [True, i % 4 < 2], better=0) for i in range(80)
    ]  # each query twice, half of the queries unsafe
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = SafeRLHFOptions(num_safe=5, num_unsafe=7)
    table, report = load(path, safe_rlhf=options, seed=1)
    assert len(table) == 12
    assert len(set(table.prompt_digests())) == 12
    assert report.notes["safe queries"] == "5 of 5 asked"
    assert report.notes["not drawn (safe_rlhf.num_safe, num_unsafe)"] == "68"
    assert load(path, safe_rlhf=options, seed=1)[0].content_digest() == table.content_digest()
    assert load(path, safe_rlhf=options, seed=2)[0].content_digest() != table.content_digest()
    _, report = load(path, safe_rlhf=SafeRLHFOptions(num_safe=1000))
    assert report.notes["safe queries"] == "20 of 1,000 asked"


@pytest.mark.parametrize("column", REQUIRED_COLUMNS)
def test_safe_rlhf_missing_column_is_named(load, tmp_path, column):
    row = safe_rlhf_row("q ?", ["a", "b"], [True, True], better=0)
    del row[column]
    with pytest.raises(InputError, match=f"missing column '{column}' of the safe_rlhf schema"):
        load(write_jsonl(tmp_path / "rows.jsonl", [row]), format="safe_rlhf")
    with pytest.raises(InputError, match=f"missing column '{column}'"):
        load(write_jsonl(tmp_path / "rows.jsonl", [row]))

"""From files to pair tables: schemas, faults by file, line and field, and reports that add up."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from makers import build_tokenizer, preference_rows, write_jsonl
from table_texts import texts

from bdpo_pl.data.consistency import Match, count_shared_prompts, first_of_prompt, leaks
from bdpo_pl.data.loading import LoadOptions, load_pairs
from bdpo_pl.data.report import report_table
from bdpo_pl.data.splits import split_by_prompt
from bdpo_pl.data.table import PairTable
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError

GOOD = {"prompt": "how ?", "chosen": "so .", "rejected": "no ."}


def test_jsonl_parquet_folder_and_saved_dataset_agree(load, tmp_path):
    import datasets

    rows = preference_rows(12)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "a.jsonl", rows[:5])
    pq.write_table(pa.Table.from_pylist(rows[5:]), tmp_path / "folder" / "b.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    whole = write_jsonl(tmp_path / "whole.jsonl", rows)
    tables = [load(source)[0] for source in (whole, tmp_path / "folder", tmp_path / "saved")]
    assert len(tables[0]) == 12
    assert tables[0].content_digest() == tables[1].content_digest() == tables[2].content_digest()
    assert tables[0].places[0].endswith("whole.jsonl, line 1")
    assert tables[1].places[5].endswith("b.parquet, row 0")


def test_byte_order_mark_and_blank_lines_are_no_rows(load, tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n   \n")
    table, report = load(path)
    assert (len(table), report.read) == (1, 1)


def test_categories_are_labels_whatever_their_type(load, tmp_path):
    """Numbers and lists were silently no category."""
    import datasets

    rows = preference_rows(4)
    given = [3, ["a", "b"], None, "x"]
    table, _ = load(write_jsonl(tmp_path / "a.jsonl", [{**r, "category": c} for r, c in zip(rows, given, strict=True)]))
    assert table.categories == ["3", "a, b", "", "x"]
    for wrong in (True, 1.5, {"a": True}, ["a", None]):
        path = write_jsonl(tmp_path / "b.jsonl", [{**rows[0], "category": wrong}])
        with pytest.raises(InputError, match=r"line 1: field 'category' must be text.*ignore '\[category\]'"):
            load(path)
    label = datasets.ClassLabel(names=["fraud", "theft"])
    for kinds, feature, named in (
        ([1, 0, -1, None], label, ["theft", "fraud", "", ""]),
        ([[1, 0], [0], [], None], datasets.List(label), ["theft, fraud", "fraud", "", ""]),
    ):
        data = datasets.Dataset.from_list([{**r, "kind": kind} for r, kind in zip(rows, kinds, strict=True)])
        data.cast_column("kind", feature).save_to_disk(str(tmp_path / feature._type))
        assert load(tmp_path / feature._type, columns={"category": "kind"})[0].categories == named


def test_implicit_prompts_in_text_and_messages(load, tmp_path, tokenizer):
    hh = {
        "chosen": "\n\nHuman: how ?\n\nAssistant: I water it .",
        "rejected": "\n\nHuman: how ?\n\nAssistant: I do not .",
    }
    path = write_jsonl(tmp_path / "hh.jsonl", [hh])
    as_text = PairTokenizer(build_tokenizer(), dialogues="text")
    table, report = load_pairs("train", str(path), as_text, Truncation(256))
    assert tokenizer.tokenizer.decode(table[0].prompt_ids) == "\n\nHuman: how ?\n\nAssistant:"
    assert texts(table, tokenizer) == [("I water it .", "I do not .")]
    # No template around a text that is read as it is, so none around the null prompt either.
    assert table.null_prompt_ids == [tokenizer.tokenizer.eos_token_id]
    assert report.notes["read as plain text, no chat template"] == "1"
    # With a chat template the dialogue becomes turns, and the report says so.
    table, report = load(path)
    assert tokenizer.tokenizer.decode(table[0].prompt_ids) == (
        "<|im_start|>user\nhow ?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert texts(table, tokenizer) == [("I water it .", "I do not .")]
    assert report.notes["of these, HH-RLHF dialogues read as turns (data.dialogues)"] == "1"

    user = {"role": "user", "content": "how ?"}
    chat = {
        "chosen": [user, {"role": "assistant", "content": "so ."}],
        "rejected": [user, {"role": "assistant", "content": "no ."}],
    }
    table, _ = load(write_jsonl(tmp_path / "chat.jsonl", [chat]))
    explicit, _ = load(write_jsonl(tmp_path / "explicit.jsonl", [GOOD]))
    assert table.content_digest() == explicit.content_digest()


def test_implicit_prompt_in_plain_text_needs_the_marks_of_hh_rlhf(load, tmp_path):
    """The common beginning "question :" was taken for the prompt."""
    row = {"chosen": "question : water", "rejected": "question : watch"}
    with pytest.raises(InputError, match=r"line 1: there is no 'prompt'.*--data\.load\.columns"):
        load(write_jsonl(tmp_path / "rows.jsonl", [row]))


def test_columns_can_be_renamed(load, tmp_path):
    row = {"question": "how ?", "good": "so .", "bad": "no ."}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    table, _ = load(path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert len(table) == 1
    with pytest.raises(InputError, match=r"missing columns 'chosen', 'rejected'.*found 'question', 'good', 'bad'"):
        load(path)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**GOOD, "chosen": ""}, "line 2: field 'chosen' is empty"),
        ({**GOOD, "rejected": " \n"}, "line 2: field 'rejected' is empty"),
        ({**GOOD, "prompt": None}, "line 2: field 'prompt' is missing or null"),
        ({**GOOD, "chosen": GOOD["rejected"]}, "line 2: 'chosen' and 'rejected' are the same"),
        ({**GOOD, "chosen": 7}, "line 2: field 'chosen' must be text or a list of chat messages, got int"),
        ({**GOOD, "chosen": [{"role": "assistant"}]}, "line 2: field 'chosen': each message needs"),
        ({**GOOD, "chosen": [{"role": "assistant", "content": "x"}]}, "line 2: 'chosen' and 'rejected' must both"),
        ({"prompt": "how ?", "chosen": "so ."}, "line 2: field 'rejected' is missing"),
        ({**GOOD, "prompt": "\ud800"}, "line 2: field 'prompt' holds half of a surrogate pair"),
    ],
)
def test_bad_rows_stop_the_run_or_are_counted(load, tmp_path, row, fault):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, row)))
    with pytest.raises(InputError) as error:
        load(path)
    assert f"rows.jsonl, {fault}" in str(error.value)
    assert "bad_rows=drop" in str(error.value)
    table, report = load(path, bad_rows="drop")
    assert (len(table), report.num_dropped, report.read) == (1, 1, 2)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{not json}\n", "line 1: not JSON"),
        (b"[1, 2]\n", "line 1: expected a JSON object, got list"),
        (b'{"prompt": "\xff"}\n', "line 1: not JSON in UTF-8"),
        (b"", "no rows"),
    ],
)
def test_malformed_files_are_named(load, tmp_path, content, fault):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(path)
    assert fault in str(error.value)
    assert "rows.jsonl" in str(error.value)


def test_broken_parquet_missing_file_and_unknown_suffix_are_named(load, tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "rows.xlsx").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, fault in (
        ("broken.parquet", "not a whole Parquet file"),
        ("missing.jsonl", "no such file"),
        ("rows.xlsx", "cannot read .xlsx"),
        ("empty", "holds no"),
    ):
        with pytest.raises(InputError, match=fault):
            load(tmp_path / source)


def test_missing_file_of_a_kind_that_is_not_read_is_not_sought_on_the_hub(load, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=r"pairs\.doc: no such file .* its kind is not read; give \.jsonl"):
        load("pairs.doc")


def test_hub_dataset_that_cannot_be_had_is_named(load):
    with pytest.raises(InputError, match="nobody/nothing: neither a file here nor a dataset"):
        load("nobody/nothing")


def test_all_too_long_says_what_to_do_and_some_are_counted(load, tmp_path):
    long = {**GOOD, "prompt": "water " * 300}
    with pytest.raises(InputError, match=r"longer than 64 tokens: 1.*Raise data\.max_length \(now 64\)"):
        load(write_jsonl(tmp_path / "long.jsonl", [long]), max_length=64)
    path = write_jsonl(tmp_path / "mixed.jsonl", [GOOD, long])
    table, report = load(path, max_length=64)
    assert (len(table), report.dropped) == (1, {"longer than 64 tokens": [f"{path}, line 2"]})
    table, report = load(path, max_length=64, truncation="keep_end")
    assert len(table) == 2
    assert report.notes["truncated to 64 tokens (keep_end)"] == "1"


def test_duplicates_are_dropped_or_kept_and_counted(load, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "why ?"}, GOOD])
    table, report = load(path)
    assert len(table) == 2
    assert report.dropped == {"duplicate of an earlier pair": [f"{path}, line 3"]}
    table, report = load(path, duplicates="keep")
    assert (len(table), report.notes["duplicates kept"]) == (3, "1")


def test_a_row_without_a_renamed_column_does_not_lend_its_own_one(load, tokenizer, tmp_path):
    rows = [{"prompt": f"q{i} ?", "good": f"g{i} .", "rejected": "no .", "chosen": f"other{i} ."} for i in range(3)]
    del rows[1]["good"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=r"line 2: there is no 'good', which data\.load\.columns reads as 'chosen'"):
        load(path, columns={"chosen": "good"})
    table, report = load(path, columns={"chosen": "good"}, bad_rows="drop")
    assert (len(table), report.read, report.dropped) == (2, 3, {"missing good": [f"{path}, line 2"]})
    # The rows before the first one with the column are read by then.
    path = write_jsonl(tmp_path / "late.jsonl", [rows[1], rows[0]])
    for bad_rows in ("error", "drop"):
        with pytest.raises(InputError, match=r"line 1: there is no 'good', .*'chosen', and .*late\.jsonl, line 2"):
            load(path, columns={"chosen": "good"}, bad_rows=bad_rows)
    # A source in which no row has the column, beside one that has it, is read by its own.
    path = write_jsonl(tmp_path / "own.jsonl", [rows[1]])
    renamed = LoadOptions(columns={"chosen": "good"})
    assert len(load_pairs("train", str(path), tokenizer, Truncation(256), renamed, alone=False)[0]) == 1
    # Exchanged columns are no own ones.
    path = write_jsonl(tmp_path / "exchanged.jsonl", [{**GOOD, "chosen": "x ."}, {"prompt": "w ?", "chosen": "y ."}])
    with pytest.raises(InputError, match="line 2: field 'chosen' is missing"):
        load(path, columns={"chosen": "rejected", "rejected": "chosen"})


def test_columns_that_the_data_do_not_have_are_refused(load, tmp_path):
    rows = [{**row, "scorer": 0.5, "context": "a b"} for row in preference_rows(4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    ignore = ["context"]
    assert load(path, columns={"weight": "scorer"}, ignore=ignore)[0].weights.tolist() == [0.5] * 4
    with pytest.raises(InputError, match=r"columns names the column 'scoer', and no row of .*did you mean 'scorer'"):
        load(path, columns={"weight": "scoer"}, ignore=ignore)
    with pytest.raises(InputError, match=r"ignore names the column 'nope', and .*rows\.jsonl has it; there are"):
        load(path, ignore=[*ignore, "nope"])
    # A column of some rows is a column.
    write_jsonl(path, [*rows[:3], {**GOOD, "source": "x"}])
    assert len(load(path, ignore=[*ignore, "source"])[0]) == 4


def test_thoughts_are_refused_where_they_are_not_looked_for(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**GOOD, "chosen": "<think>t</think>so ."}])
    plain = PairTokenizer(build_tokenizer(chat=False), thoughts="strip")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: data\.thoughts is strip"):
        load_pairs("train", str(path), plain, Truncation(64))


def test_held_out_split_shares_no_prompt(load, tmp_path):
    rows = [{**row, "prompt": f"prompt {i // 3}"} for i, row in enumerate(preference_rows(60))]
    table, _ = load(write_jsonl(tmp_path / "rows.jsonl", rows))
    rest, held = (table.select(indices) for indices in split_by_prompt(table, 0.2, seed=0))
    assert len(rest) + len(held) == 60
    assert 12 <= len(held) < 15
    assert count_shared_prompts(rest, held) == 0
    assert count_shared_prompts(table, held) == len(held)
    single, _ = load(write_jsonl(tmp_path / "one.jsonl", [{**row, "prompt": "same"} for row in preference_rows(4)]))
    with pytest.raises(InputError, match="single prompt"):
        split_by_prompt(single, 0.2, seed=0)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_prompt_that_is_cut_to_several_lengths_is_one_prompt(load, tmp_path, mode):
    """The cut depends on the responses, so what is left of one prompt has several lengths."""
    rows = []
    for k in range(12):
        prompt = " ".join(f"q{k} w{i}" for i in range(20))
        rows += [{"prompt": prompt, "chosen": "so . " * n, "rejected": "no ."} for n in (2, 9)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    table, report = load(path, max_length=48, truncation=mode)
    assert report.notes[f"truncated to 48 tokens ({mode})"] == "24"
    assert len(set(table.prompt_digests())) == 24
    rest, held = split_by_prompt(table, 0.25, seed=0)
    assert len(held) == 6
    assert not {i // 2 for i in rest.tolist()} & {i // 2 for i in held.tolist()}
    short, long = table.select(np.arange(0, 24, 2)), table.select(np.arange(1, 24, 2))
    assert leaks(short, long) == [Match(i, i) for i in range(12)]
    assert count_shared_prompts(PairTable.concatenate([short, long]), table) == 24
    # A table without a cut prompt tells its prompts as one with some does.
    whole, _ = load(path, max_length=400)
    assert whole.whole_prompts is None
    assert leaks(whole, short) == [Match(i, 2 * i) for i in range(12)]
    both = PairTable.concatenate([whole, short])
    assert first_of_prompt(both) == [i // 2 * 2 for i in range(24)] + [2 * i for i in range(12)]


def test_report_table_shows_every_count(load, messy_safe_rlhf):
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    _, report = load(messy_safe_rlhf)
    console.print(report_table([report]))
    text = console.export_text()
    assert "3 pairs" in text
    for reason in report.dropped:
        assert f"dropped: {reason}" in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=6), children, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "better_response_id"]), json_values, max_size=4
        ),
        max_size=4,
    ),
    raw=st.binary(max_size=20),
)
def test_any_file_loads_or_is_refused_with_its_name(load, tmp_path, rows, raw):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + raw)
    try:
        table, report = load(path, bad_rows="drop")
    except InputError as error:
        assert "fuzz.jsonl" in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert report.read == len(table) + report.num_dropped

"""Several sources with weights, one example shown, and a report that says how the rows were read."""

import io
import re
from collections import Counter

import numpy as np
import pytest
import yaml
from chat_templates import QWEN3, tokenizer_for
from makers import build_tokenizer, preference_rows, write_jsonl
from rich.console import Console

from bdpo_pl.data.example import example_table, readable
from bdpo_pl.data.loading import load_pairs
from bdpo_pl.data.mixture import DataSource, join, limited, repeat
from bdpo_pl.data.report import LABELS_DIFFER
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.data.truncation import Truncation
from bdpo_pl.errors import InputError
from bdpo_pl.fit import main as fit
from bdpo_pl.models.loading import ModelSource
from bdpo_pl.training.datamodule import PreferenceDataModule


def load(path, tokenizer=None, **options):
    return load_pairs("train", str(path), PairTokenizer(tokenizer or build_tokenizer(), **options), Truncation(256))


def test_each_pair_is_there_as_often_as_its_sources_weight_says(tmp_path):
    rows = preference_rows(30)
    loaded = [load(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", rows[:10]), ("b", rows[8:30]))]
    tables, reports = zip(*loaded, strict=True)
    joined, weights = join(tables, [2.5, 0.5], reports, "drop")
    assert len(joined) == 30
    assert len(reports[1].dropped["duplicate of a pair in an earlier source"]) == 2
    assert reports[1].kept == 20
    table = repeat(joined, weights, seed=0)
    assert len(table) == 10 * 2 + 5 + 10
    times = [table.places.count(place) for place in joined.places]
    assert sorted(times[:10]) == [2] * 5 + [3] * 5
    assert sorted(times[10:]) == [0] * 10 + [1] * 10
    assert repeat(joined, weights, seed=0).content_digest() == table.content_digest()
    assert repeat(joined, np.ones(30), seed=0) is joined
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^the weight of a must be above 0"):
            DataSource("a", weight)


def test_a_row_of_several_turns_hides_no_duplicate(tmp_path):
    """Of its response, the user's turn is not trained on; of the other rows, everything is."""
    rows = preference_rows(6)
    user, assistant = ({"role": role, "content": "so ."} for role in ("user", "assistant"))
    several = {"prompt": [user], "chosen": [assistant, user, assistant], "rejected": [{**assistant, "content": "no ."}]}
    loaded = [load(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", rows), ("b", [*rows, several]))]
    tables, reports = zip(*loaded, strict=True)
    assert [table.trained is None for table in tables] == [True, False]
    assert len(join(tables, [1.0, 1.0], reports, "drop")[0]) == 7
    assert set(tables[0].response_digests()[0]) < set(tables[1].response_digests()[0])


def test_the_report_describes_the_pairs_that_are_used(tmp_path):
    """It described those before the limit, and before duplicates of an earlier source were left out."""
    rows = [{**row, "weight": float(i)} for i, row in enumerate(preference_rows(20))]
    table, report = load(write_jsonl(tmp_path / "a.jsonl", rows))
    few = limited(table, 3, 1, report)
    weights = sorted(few.weights.tolist())
    said = "weights of pairs: smallest / mean / largest"
    assert report.notes[said] == f"{weights[0]:.3g} / {np.mean(weights):.3g} / {weights[2]:.3g}"
    assert (report.kept, report.notes["left out by the limit of the source"]) == (3, "17")
    # Only what is as it was in the file is not of these pairs.
    assert list(report.notes)[:2] == ["schema", "rendered with the chat template"]
    assert report.notes["rendered with the chat template"] == "20"
    later, of_later = load(write_jsonl(tmp_path / "b.jsonl", [*rows, {**rows[0], "prompt": "and ?", "weight": 7.0}]))
    join([table, later], [1.0, 1.0], [report, of_later], "drop")
    assert (of_later.kept, of_later.notes[said]) == (1, "7 / 7 / 7")
    of_nothing = load(tmp_path / "a.jsonl")[1]
    join([table, table], [1.0, 1.0], [report, of_nothing], "drop")
    assert of_nothing.kept == 0
    assert not [what for what in of_nothing.notes if "tokens" in what or "weight" in what]


def test_contradictions_between_sources_are_counted(tmp_path):
    rows = preference_rows(6)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:4]]
    again = [{**swapped[0], "prompt": "and ?"}, {**rows[0], "prompt": "and ?"}]
    loaded = [load(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", rows), ("b", [*swapped, *again]))]
    tables, reports = zip(*loaded, strict=True)
    said = "pairs that another pair contradicts"
    assert [report.notes.get(said) for report in reports] == [None, "2"]
    join(tables, [1.0, 1.0], reports, "drop")
    assert [report.notes[said] for report in reports] == ["4", "6"]


def test_duplicates_with_other_labels_are_counted(tmp_path):
    """Of a pair and its duplicates the first is used, whatever the others say of it."""
    safe = {"chosen_safe": True, "rejected_safe": False}
    rows = [{**row, "weight": 2.0, **safe} for row in preference_rows(4)]
    again = [{**rows[0], "weight": 1.0}, {**rows[1], "rejected_safe": True}, rows[2]]
    table, report = load(write_jsonl(tmp_path / "a.jsonl", [*rows, *again]))
    assert (table.weights.tolist(), len(table)) == ([2.0] * 4, 4)
    assert report.notes[LABELS_DIFFER] == "2"
    later, of_later = load(write_jsonl(tmp_path / "b.jsonl", again))
    joined, _ = join([table, later], [1.0, 1.0], [report, of_later], "drop")
    assert len(joined) == 4
    assert LABELS_DIFFER not in of_later.notes
    assert of_later.notes[f"{LABELS_DIFFER} (of another source)"] == "2"


def test_a_fraction_is_drawn_from_each_source(tmp_path):
    rows = preference_rows(40)
    loaded = [load(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", rows[:20]), ("b", rows[20:]))]
    tables, reports = zip(*loaded, strict=True)
    joined, weights = join(tables, [0.5, 0.5], reports, "drop")
    for seed in range(5):
        drawn = [place.partition(",")[0] for place in repeat(joined, weights, seed).places]
        assert [drawn.count(report.source) for report in reports] == [10, 10]


def test_many_small_files_of_a_source_give_its_share(tmp_path):
    for i, row in enumerate(preference_rows(30)):
        write_jsonl(tmp_path / f"{i:02}.jsonl", [row])
    table, _ = load(tmp_path)
    assert len(repeat(table, np.full(30, 0.4), seed=0)) == 12


def test_sources_that_are_read_in_different_ways_are_not_mixed(tmp_path):
    rows = preference_rows(8)
    tokenizer = build_tokenizer()
    loaded = [
        load(write_jsonl(tmp_path / "a.jsonl", rows[:4]), tokenizer),
        load(write_jsonl(tmp_path / "b.jsonl", rows[4:]), tokenizer, chat_template="none"),
    ]
    tables, reports = zip(*loaded, strict=True)
    with pytest.raises(InputError, match=r"b\.jsonl: its rows are read as plain text"):
        join(tables, [1.0, 1.0], reports, "drop")


def test_data_module_mixes_holds_out_and_shows(tmp_path, model_dir, capsys):
    rows = preference_rows(40)
    sources = [write_jsonl(tmp_path / "a.jsonl", rows[:20]), write_jsonl(tmp_path / "b.jsonl", rows[20:])]
    data = PreferenceDataModule(
        [DataSource(str(sources[0]), 2.0), DataSource(str(sources[1]))], held_out_fraction=0.25, show_example=True
    )
    splits = data.read(ModelSource(str(model_dir)))
    train, held_out = splits.tables["train"], splits.tables["held_out"]
    assert not set(train.places) & set(held_out.places)
    for place in train.places:
        assert train.places.count(place) == (2 if "a.jsonl" in place else 1)
    assert len(held_out) == 10
    assert "a.jsonl (weight 2)" in data.train_source
    shown = " ".join(capsys.readouterr().out.split())
    assert data.reports[-1].notes["pairs in an epoch, by weight (of all sources)"] == str(len(train))
    assert data.reports[-1].notes["held out for validation, by prompt (of all sources)"] == "10"
    assert "▌" in shown
    assert "<|im_start|>assistant" in shown


def test_the_probe_measures_each_pair_once(tmp_path, model_dir):
    """It was drawn from the repeated pairs, so intervals were too narrow."""
    rows = preference_rows(16)
    train, held_out = (
        str(write_jsonl(tmp_path / f"{n}.jsonl", part)) for n, part in (("a", rows[:6]), ("b", rows[6:]))
    )
    splits = PreferenceDataModule([DataSource(train, 3.0)], held_out).read(ModelSource(str(model_dir)))
    probe = splits.tables["train_probe"]
    assert (len(splits.tables["train"]), len(probe), len(set(probe.places))) == (18, 6, 6)
    assert probe.places == [splits.tables["train"].places[i] for i in splits.probe_indices]


@pytest.mark.parametrize("apart", [True, False])
def test_a_single_source_has_options_of_its_own(tmp_path, capsys, apart):
    """It was taken for a path."""
    given = f"{{source: {tmp_path / 'pairs.jsonl'}, limit: 5}}"
    arguments = ["--data.train", given] if apart else [f"--data.train={given}"]
    with pytest.raises(SystemExit):
        fit([*arguments, "--model.policy=model", "--print_config"])
    (printed,) = yaml.safe_load(capsys.readouterr().out)["data"]["train"]
    assert (printed["source"], printed["limit"]) == (str(tmp_path / "pairs.jsonl"), 5)


def test_an_unknown_name_in_a_source_is_told(tmp_path, model_dir, capsys):
    for given in ("{sorce: a.jsonl, limit: 5}", "[{source: a.jsonl, limits: 5}]"):
        with pytest.raises(SystemExit) as ended:
            fit(["--data.train", given, f"--model.policy={model_dir}"])
        assert ended.value.code == 2
        said = " ".join(capsys.readouterr().err.split())
        assert given.strip("[]") in said
        assert "each with source, weight, split, revision, subset, limit and nothing else" in said


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_splits_of_one_source_keep_their_own_weights(tmp_path, model_dir, fraction):
    import datasets

    rows = preference_rows(20)
    halves = {"a": rows[:10], "b": rows[10:]}
    path = tmp_path / "saved"
    datasets.DatasetDict({name: datasets.Dataset.from_list(half) for name, half in halves.items()}).save_to_disk(path)
    data = PreferenceDataModule(
        [DataSource(str(path), 3.0, split="a"), DataSource(str(path), split="b")],
        held_out_fraction=fraction,
        train_probe=False,
    )
    train = data.read(ModelSource(str(model_dir))).tables["train"]
    asked = [data.tokenizer.decode(train[i].prompt_ids) for i in range(len(train))]
    times = Counter(int(re.search(r" q(\d+)", text)[1]) for text in asked)
    assert {number: count for number, count in times.items() if count != (3 if number < 10 else 1)} == {}
    assert len(times) == (20 if fraction == 0.0 else 12)


def test_example_shows_boundary_and_what_is_not_trained_on_and_commands_no_terminal(tmp_path):
    tokenizer = tokenizer_for(QWEN3)
    row = {"prompt": "how \x1b[31m?", "chosen": "so .", "rejected": "no ."}
    table, report = load(write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(example_table(table, tokenizer))
    text = console.export_text()
    assert "\x1b" not in text
    assert "how \\x1b[31m?" in text
    assert "▌⟦<think>" in text
    assert "⟧so .<|im_end|>" in text.replace(" \n", "\n")
    assert report.notes["put before answers by the template, read but not trained on"] == repr(
        "<think>\n\n</think>\n\n"
    )
    assert readable("a\u202eb\n") == "a\\u202eb\n"


def test_report_says_how_rows_were_read(tmp_path):
    user, system = {"role": "user", "content": "how ?"}, {"role": "system", "content": "be kind ."}
    yes, no = ({"role": "assistant", "content": text} for text in ("so .", "no ."))
    rows = [
        {"prompt": [system, user], "chosen": [yes], "rejected": [no]},
        {"prompt": [system, user], "chosen": [no], "rejected": [yes]},
        {"prompt": [user, yes, user], "chosen": [{**yes, "content": "<think>\na\n</think>so ."}], "rejected": [no]},
    ]
    _, report = load(write_jsonl(tmp_path / "a.jsonl", rows), thoughts="mask")
    assert report.notes["with a system message"] == "2"
    assert report.notes["prompts of several turns"] == "1"
    assert report.notes["responses with thoughts: read, not trained on (data.thoughts=mask)"] == "1"
    assert report.notes["pairs that another pair contradicts"] == "2"
    assert report.notes["rendered with the chat template"] == "3"
    assert report.notes["responses that begin with the same 4 tokens"] == "50%"

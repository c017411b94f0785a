"""The closing tables."""

from pathlib import Path

from rich.console import Console

from bdpo_pl.console import paths_table
from bdpo_pl.statistics import normal
from bdpo_pl.training import run_report, summary
from bdpo_pl.training.single_words import INSTEAD
from bdpo_pl.training.summary import remarks, summary_table


def printed(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]


def test_who_judged_stands_under_the_rates():
    assert "recognised by phrases" in summary_table({}, 7, {"refusal rate": 0.25}, {}).caption
    assert summary_table({}, 7, {}, {}).caption is None


def test_before_and_after_stand_side_by_side_with_dashes_for_gaps():
    evaluations = {
        0: {"held_out/accuracy": 0.6, "gap/margin": -1e-7},
        7: {"held_out/accuracy": 0.975, "gap/margin": 0.25},
    }
    rows = printed(summary_table(evaluations, 7, {"refusal rate": 0.25}, {"refusal rate": 1.0, "over-refusal": 0.0}))
    assert rows == [
        ["held-out preference accuracy", "", "60.0%", "97.5%"],
        ["margin gap, train − held-out", "", "0.000", "+0.250"],
        ["refusal rate", "", "25.0%", "100.0%"],
        ["over-refusal", "", "–", "0.0%"],
    ]


def test_counts_and_intervals_stand_beside_the_numbers():
    before = {"held_out/accuracy": 0.5, "held_out/margin": 0.0, "held_out/logp_accuracy": 1 / 3}
    before |= {"held_out/drift_chosen": 0.0, "held_out/drift_rejected": 0.0}
    after = {**before, "held_out/accuracy": 2 / 3, "held_out/margin": 0.5}
    table = summary_table(
        {0: before, 7: after}, 7, {"refusal rate": 0.25}, {"refusal rate": 1.0},
        intervals={7: {"held_out/margin": normal(0.5, 0.1, 3)}}, pairs=3, prompts={"refusal rate": 40},
    )  # fmt: skip
    rows = {row[0]: row[1:] for row in printed(table)}
    # Wilson's interval of 2 of 3, by hand.
    assert rows["held-out preference accuracy"] == ["3", "by definition", "66.7% [20.8, 93.9]"]
    assert rows["held-out margin"] == ["3", "by definition", "+0.500 [+0.304, +0.696]"]
    # The base model's own, which is no definition.
    assert rows["the same by log-prob. per token"][1].startswith("33.3% [")
    assert rows["refusal rate"] == ["40", "25.0% [14.2, 40.2]", "100.0% [91.2, 100.0]"]


def test_remarks_warn_of_few_pairs_of_definitions_and_of_safety_that_was_not_measured():
    at_start = {"held_out/accuracy": 0.5, "held_out/drift_chosen": 0.0, "held_out/drift_rejected": 0.0}
    said = remarks({0: {**at_start, "held_out/logp_accuracy": 0.625}}, 3, measures_safety=False)
    assert [level for level, _ in said] == ["warning", "note", "notice"]
    assert "Only 3 held-out pairs" in said[0][1]
    assert "prefers the chosen response in 62.5% of pairs" in said[1][1]
    assert "--safety.harmful" in said[2][1]
    # Another reference: 50 % would be a result.
    drifted = {**at_start, "held_out/drift_chosen": -2.0}
    assert remarks({0: drifted}, 240, measures_safety=True) == []
    assert "No pair was held out" in remarks({}, None, measures_safety=True)[0][1]


def test_a_remark_says_why_nothing_stands_before():
    level, said = summary.none_before("held-out pairs", ["held-out data", "loss.beta"])
    assert level == "notice"
    assert said.startswith("No value before training is shown for held-out pairs: ")
    assert said.endswith("(held-out data, loss.beta).")


def test_only_paths_that_exist_are_listed(tmp_path):
    rows = printed(paths_table({"metrics": tmp_path, "aligned model": Path("nowhere")}))
    assert [row[0] for row in rows] == ["metrics"]


def test_every_word_for_pairs_that_answers_replace_is_said_somewhere():
    """Else a table that was worded anew would speak of pairs again."""
    said = {label for label, _, _ in (*summary._HELD_OUT, *summary._FURTHER)}
    for title, label, lines, caption in run_report._CURVES:
        said |= {title, label, caption, *(name for name, _ in lines)}
    assert INSTEAD.keys() <= said

"""The closing tables."""

from pathlib import Path

from rich.console import Console

from bdpo_pl.console import paths_table
from bdpo_pl.training.summary import summary_table


def printed(table):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]


def test_before_and_after_stand_side_by_side_with_dashes_for_gaps():
    evaluations = {
        0: {"held_out/accuracy": 0.5, "gap/margin": -1e-7},
        7: {"held_out/accuracy": 0.975, "gap/margin": 0.25},
    }
    rows = printed(summary_table(evaluations, 7, {"refusal rate": 0.25}, {"refusal rate": 1.0, "over-refusal": 0.0}))
    assert rows == [
        ["held-out preference accuracy", "50.0%", "97.5%"],
        ["margin gap, train − held-out", "+0.000", "+0.250"],
        ["refusal rate", "25.0%", "100.0%"],
        ["over-refusal", "–", "0.0%"],
    ]


def test_only_paths_that_exist_are_listed(tmp_path):
    rows = printed(paths_table({"metrics": tmp_path, "aligned model": Path("nowhere")}))
    assert [row[0] for row in rows] == ["metrics"]

"""Long work, seen in a log file."""

import torch

from bdpo_pl.reporting import progress
from bdpo_pl.reporting.progress import Lines


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def lines_of(total, steps, before=0.0, unit="pairs"):
    clock, written = Clock(), []
    lines = Lines(unit, written.append, clock)
    task = lines.add_task("Scoring train", total=total, completed=before)
    for passed, done in steps:
        clock.now += passed
        lines.advance(task, done)
    return written


def test_expected_time_comes_after_two_batches_and_then_a_line_every_ten_seconds(monkeypatch):
    monkeypatch.setattr(progress, "memory_used", lambda: 1.5e9)
    written = lines_of(100, [(3.0, 5), (3.0, 5), *[(3.0, 5)] * 18])
    assert written[0] == "Scoring train: about 1 min 00 s in all, from the first 2 batches"
    assert written[1] == "Scoring train: 10 of 100 pairs, 1.67 pairs/s, 1.5 GB, 54 s left"
    assert written[-1] == "Scoring train: 100 of 100 pairs, 1.67 pairs/s, 1.5 GB, in 1 min 00 s"
    # 54 seconds after the second batch, a line every 12.
    assert len(written) == 2 + 4 + 1


def test_what_was_done_before_counts_in_no_rate():
    written = lines_of(100, [(1.0, 10), (1.0, 10), (1.0, 30)], before=50)
    assert "about 5 s in all" in written[0]
    assert "70 of 100 pairs, 10 pairs/s" in written[1]


def test_short_work_is_one_line():
    assert len(lines_of(10, [(0.1, 5), (0.1, 5)])) == 1
    # Work that is on record already.
    assert lines_of(10, [(0.0, 0)]) == []


def test_without_a_terminal_lines_are_printed_at_once(capsys):
    with progress.progress("prompts") as told:
        task = told.add_task("before, suite", total=4)
        told.advance(task, 4)
    assert capsys.readouterr().out.startswith("before, suite: 4 of 4 prompts")
    with progress.progress("prompts", enabled=False) as silent:
        silent.advance(silent.add_task("", total=1), 1)
    assert capsys.readouterr().out == ""


def test_a_gpu_that_nothing_is_on_is_not_the_memory_of_a_run_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert progress.memory_used() > 1e6
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert progress.memory_used() == 7


def test_bars_fit_80_columns(monkeypatch):
    from io import StringIO

    from rich.console import Console

    monkeypatch.setattr(progress, "shows_bars", lambda: True)
    console = Console(file=StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    with progress.progress("prompts") as told:
        told.advance(told.add_task("baseline, jailbreak", total=12_000), 3_000)
    assert "3,000/12,000 prompts" in console.file.getvalue()

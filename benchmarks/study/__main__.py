"""Run the study: `python -m benchmarks.study [--quick] [--plan] [--cell KEY] [--prune]`.

The study can be stopped and resumed: cells that the file of records contains are not run again. `--cell` runs one of
them again and reports whether the result is the same. If `plan.py` has changed, cells of the old plan that are not in
the new one stay in the file until `--prune` removes them.
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

from rich.table import Table

from bdpo_pl.console import get_console
from benchmarks.machine import machine
from benchmarks.study.run import plan
from benchmarks.study.run.records import append, compare_again, read_records, remove
from benchmarks.study.run.reference import DEFAULT_FOLDER, make_reference
from benchmarks.study.run.runner import COMPARED, make_references, quiet_cell, run_cells
from benchmarks.study.run.settings import Setting
from benchmarks.written import command_line

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: under ten minutes on two cores")
    parser.add_argument("--plan", action="store_true", help="print what there is to do, and do nothing")
    parser.add_argument("--cell", metavar="KEY", help="run one finished cell again, and compare")
    parser.add_argument("--prune", action="store_true", help="take cells of older plans out of the file of records")
    parser.add_argument("--out", type=Path, help="file of the records; default: today's, in benchmarks/results")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="of references and cached scores")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"{started:%Y-%m-%d}-study{'-quick' if options.quick else ''}.jsonl"
    size = plan.QUICK if options.quick else plan.FULL
    if options.plan:
        _print_plan(size, out)
    elif options.cell:
        _again(options.cell, out, options.folder)
    elif options.prune:
        _prune(size, out)
    else:
        command = command_line("benchmarks.study")
        append(out, {"command": command, "date": f"{started:%Y-%m-%dT%H:%M:%SZ}", "machine": machine("cpu")})
        _run(size, options.folder, out, options.workers)


def _run(size: plan.Size, folder: Path, out: Path, workers: int) -> None:
    tuning = plan.tuning(size)
    # The cells after the tuning are not known yet, but their references are.
    make_references(plan.all_cells(size), folder, workers)
    run_cells(tuning, folder, out, workers, "Tuning")
    best = plan.chosen(size, read_records(out))
    table = Table("method", "loss", "learning rate", "epochs", title="Chosen by the validation prompts")
    for name, setting in best.items():
        table.add_row(name, str(setting.arguments), f"{setting.learning_rate:g}", str(setting.epochs))
    get_console().print(table)
    run_cells(plan.final(size, best), folder, out, workers, "Testing")
    get_console().print(f"Written to {out}")


def _prune(size: plan.Size, out: Path) -> None:
    records = read_records(out)
    best = plan.chosen(size, records)
    wanted = {setting.key for setting in plan.tuning(size) + plan.final(size, best)}
    gone = {key: record for key, record in records.items() if key not in wanted}
    remove(out, set(gone))
    counted = Counter((record["setting"]["section"], record["setting"]["method"]) for record in gone.values())
    for (section, method), number in counted.items():
        print(f"{section}, {method}: {number}")
    print(f"{len(gone)} of {len(records)} cells were not of the plan, and are out of {out}")


def _print_plan(size: plan.Size, out: Path) -> None:
    done = Counter(record["setting"]["section"] for record in read_records(out).values())
    table = Table("section", "cells", "done", title="Cells of the study")
    sections = Counter(setting.section for setting in plan.all_cells(size))
    for section, number in sections.items():
        table.add_row(section, str(number), str(done[section]))
    table.add_row("all", str(sections.total()), str(done.total()))
    get_console().print(table)


def _again(key: str, out: Path, folder: Path) -> None:
    def run(old: dict[str, Any]) -> dict[str, Any]:
        setting = Setting.from_json(old["setting"])
        make_reference(folder, setting.world, setting.reference_steps)
        return quiet_cell(setting, folder)

    compare_again(out, key, run, COMPARED)


if __name__ == "__main__":
    main()

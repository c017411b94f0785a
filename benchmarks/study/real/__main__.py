"""Run the study with a real model: `python -m benchmarks.study.real --model FOLDER --data FOLDER [--cell KEY]`.

It can be stopped and resumed: finished cells, a line of JSON each, are not run again. Several processes with the same
`--folder` and `--out` share the cells: two with OMP_NUM_THREADS=1 do more than one with two threads. `--cell` runs a
finished cell again and reports whether the result is the same; the number of threads must be the same too. No text of
the data is printed or kept.

With `--settings RECORDS`, the settings that were chosen on the first model are confirmed on a second one, `--model`.
"""

from __future__ import annotations

import argparse
import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, Timeout

from bdpo_pl.models.loading import ModelSource, model_fingerprint
from benchmarks.machine import machine
from benchmarks.study.real.cell import Place, run_cell
from benchmarks.study.real.plan import CONFIRMED, Cell, all_cells, cell_of, chosen, confirmation
from benchmarks.study.run.records import append, compare_again, read_heads, read_records
from benchmarks.written import command_line

RESULTS = Path(__file__).parents[2] / "results"
COMPARED = ("pairs", "suites", "refused", "oddities", "halves")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model; `make demo-real` writes SmolLM2's")
    parser.add_argument("--data", type=Path, help="folder with the published pairs and suites")
    parser.add_argument("--folder", type=Path, default=Path("runs/study_real"), help="folder of cached scores")
    parser.add_argument("--out", type=Path, help="file of the records; default: today's, in benchmarks/results")
    parser.add_argument("--settings", type=Path, help="records of the first model, to confirm its settings on --model")
    parser.add_argument("--plan", action="store_true", help="print what there is to do, and do nothing")
    parser.add_argument("--cell", metavar="KEY", help="run one finished cell again, and compare")
    parser.add_argument("--most", type=int, help="number of cells after which to stop")
    options = parser.parse_args(arguments)
    started = datetime.datetime.now(datetime.UTC)
    name = "study-real-confirmation" if options.settings else "study-real"
    out = options.out or RESULTS / f"{started:%Y-%m-%d}-{name}.jsonl"
    if options.settings and set(CONFIRMED) - chosen(read_records(options.settings)).keys():
        parser.error(f"{options.settings} has not all trials of {' and '.join(CONFIRMED)}, so none is chosen")
    if options.plan:
        print(plan(out, options.settings))
        return
    if options.model is None or options.data is None:
        parser.error("--model and --data are needed to run cells")
    options.folder.mkdir(parents=True, exist_ok=True)
    place = Place(options.model.resolve(), options.data.resolve(), options.folder.resolve())
    if options.cell:
        again(options.cell, out, place)
        return
    command = command_line("benchmarks.study.real", arguments)
    head = {
        "command": command,
        "date": f"{started:%Y-%m-%dT%H:%M:%SZ}",
        "machine": machine("cpu"),
        "model": _same_model(out, place.model),
    }
    run = 0
    # The final cells are known only when the tuning is finished.
    while open_cells := _open(out, options.settings):
        taken = None if run == options.most else _take(open_cells, place.folder)
        if taken is None:
            print(f"{len(open_cells)} cells are left, of which other processes may run some; the same command goes on")
            return
        cell, held = taken
        with held:
            # Another process may have finished it since the records were read.
            if cell.key in read_records(out):
                continue
            record = run_cell(cell, place)
            if not run:
                # A start that finishes no cell leaves no line.
                append(out, head)
            append(out, record)
        run += 1
        print(f"{cell.key} {cell.section}, {cell.method}, seed {cell.seed}: {record['seconds']:.0f} s", flush=True)


def _same_model(out: Path, model: Path) -> str:
    """Return the digest of `model`; refuse one that is not the model of the records."""
    digest = model_fingerprint(ModelSource(str(model)))
    known = {head["model"] for head in read_heads(out) if "model" in head}
    if known - {digest}:
        raise SystemExit(f"{out} has cells of another model than {model}; give another file with --out")
    return digest


def _cells(done: Mapping[str, Mapping[str, Any]], settings: Path | None) -> Sequence[Cell]:
    return all_cells(done) if settings is None else confirmation(chosen(read_records(settings)))


def _open(out: Path, settings: Path | None) -> list[Cell]:
    done = read_records(out)
    return [cell for cell in _cells(done, settings) if cell.key not in done]


def _take(cells: list[Cell], folder: Path) -> tuple[Cell, AcquireReturnProxy] | None:
    """Return the first cell that no other process runs, with its lock, which a process that ends gives back."""
    for cell in cells:
        try:
            return cell, FileLock(folder / f"{cell.key}.lock").acquire(blocking=False)
        except Timeout:
            continue
    return None


def plan(out: Path, settings: Path | None = None) -> str:
    """Return what there is to do, and what the tuning chose; `settings` are the first model's records, if any."""
    done = read_records(out)
    cells = _cells(done, settings)
    counts = Counter(cell.section for cell in cells)
    finished = Counter(cell.section for cell in cells if cell.key in done)
    lines = [f"{section}: {finished[section]} of {number} cells" for section, number in counts.items()]
    best = chosen(done if settings is None else read_records(settings))
    for method, cell in best.items():
        if settings is not None and method not in CONFIRMED:
            continue
        lines.append(f"{method}: {cell.arguments}, learning rate {cell.learning_rate:g}")
    return "\n".join(lines)


def again(key: str, out: Path, place: Place) -> None:
    """Run a finished cell again and print what differs; exit status 1 if something does."""
    compare_again(out, key, lambda old: run_cell(cell_of(old["cell"]), place), COMPARED)


if __name__ == "__main__":
    main()

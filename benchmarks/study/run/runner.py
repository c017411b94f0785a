"""Execution of cells in several single-threaded processes, with a line of JSON for each finished cell."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdpo_pl.console import get_console
from bdpo_pl.errors import InputError
from benchmarks.study.run.cell import run_cell, texts_digest
from benchmarks.study.run.records import append, read_records
from benchmarks.study.run.reference import make_reference, reference_folder
from benchmarks.study.run.settings import Setting

COMPARED = ("texts", "reference", "metrics", "curve", "imbalance", "steps", "failed")
"""Fields of a record that are the same in every run on one machine."""


def make_references(settings: Sequence[Setting], folder: Path, workers: int) -> None:
    """Train the references that `settings` need and `folder` lacks, one per worker."""
    wanted = sorted({(setting.world, setting.reference_steps) for setting in settings})
    missing = [(world, steps) for world, steps in wanted if not reference_folder(folder, world, steps).exists()]
    if not missing:
        return
    columns = (TextColumn("Training references"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=get_console()) as progress, _pool(workers) as pool:
        task = progress.add_task("", total=len(missing))
        for future in as_completed([pool.submit(_make_reference, folder, *each) for each in missing]):
            future.result()
            progress.advance(task)


def run_cells(settings: Sequence[Setting], folder: Path, path: Path, workers: int, title: str) -> None:
    """Run those of `settings` that are not in `path` yet, and append their records as they finish.

    Args:
        settings: cells whose references are trained.
        folder: folder of references and cached scores.
        path: path of the records.
        workers: number of processes.
        title: title of the progress bar.

    Raises:
        InputError: `path` contains cells of a world with other texts.
    """
    done = read_records(path)
    if any(record["texts"] != texts_digest() for record in done.values()):
        raise InputError(f"{path} has cells of another world, since changed; write to another file with --out")
    open_ones = {setting.key: setting for setting in settings if setting.key not in done}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=get_console()) as progress, _pool(workers) as pool:
        task = progress.add_task(title, total=len(open_ones))
        futures = {pool.submit(quiet_cell, setting, folder): setting for setting in open_ones.values()}
        try:
            for future in as_completed(futures):
                record = future.result()
                append(path, record)
                progress.console.print(summary(record), highlight=False)
                progress.advance(task)
        except BaseException:
            # A fault in one cell is a fault of the study, which the others would only hide.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def quiet_cell(setting: Setting, folder: Path) -> dict[str, Any]:
    """Run `run_cell` without its tables and notes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return run_cell(setting, folder)


def summary(record: dict[str, Any]) -> str:
    """Return one line about a finished cell."""
    setting = record["setting"]
    head = f"{record['key']} {setting['section']}, {setting['method']}"
    head += f", {setting['variant']}" if setting["variant"] else ""
    if "failed" in record:
        return f"{head}: failed: {record['failed']}"
    metrics = record["metrics"]
    return (
        f"{head}, seed {setting['seed']}: attack success {metrics['attack_success']['harmful']:.0%}, "
        f"framed {metrics['attack_success']['framed']:.0%}, over-refusal {metrics['over_refusal']['mean']:.0%}, "
        f"ability {metrics['ability']['all']:.0%}, {record['cpu_seconds']:.1f} s of a core"
    )


def _make_reference(folder: Path, world: int, steps: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_reference(folder, world, steps)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Read by a worker's torch as it starts: two processes of two threads each would compete for cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

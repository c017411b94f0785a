"""Execution of cells in several single-threaded processes, with a line of JSON for each finished cell."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdpo_pl.console import get_console
from bdpo_pl.errors import InputError
from bdpo_pl.files import write_whole
from benchmarks.study.run.cell import run_cell, texts_digest
from benchmarks.study.run.reference import make_reference, reference_folder
from benchmarks.study.run.settings import Setting

COMPARED = ("texts", "reference", "metrics", "curve", "imbalance", "steps", "failed")
"""Fields of a record that are the same in every run on one machine."""


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Read finished cells by key; a last line cut short by an interruption does not count.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.exists():
        return {}
    return {record["key"]: record for _, record in _whole_lines(path) if "key" in record}


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line, on its own even after an incomplete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    if cut:
        whole = path.read_text(encoding="utf-8").splitlines()[:-1]
        write_whole(path, "".join(f"{text}\n" for text in whole))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def remove(path: Path, keys: set[str]) -> None:
    """Remove the records of some cells from a file; all other lines stay, except an incomplete last one.

    Raises:
        InputError: a line is not JSON, as in `read_records`.
    """
    kept = (line for line, record in _whole_lines(path) if record.get("key") not in keys)
    write_whole(path, "".join(f"{line}\n" for line in kept))


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


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the differences between two records of one cell, as `metrics.ability.all: 0.5 → 0.6`, except in time."""
    before, after = (dict(_leaves({name: record.get(name) for name in COMPARED})) for record in (old, new))
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


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


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield line, json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: no JSON; remove the line, and its cell is run again"
                ) from None


def _make_reference(folder: Path, world: int, steps: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_reference(folder, world, steps)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Read by a worker's torch as it starts: two processes of two threads each would compete for cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

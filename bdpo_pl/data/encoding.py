"""Conversion of rows to token ids in order, in chunks; large sets use all cores of the processor.

Rendering a chat template is Python code, which runs on one core, so threads do not help: forked processes share the
work. Only few chunks are in progress at a time, so memory stays bounded whatever the size of the set.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from bdpo_pl.data.pairs import PreferencePair, ReadAs
from bdpo_pl.data.rows import PreferenceRow, RowError
from bdpo_pl.data.tokenization import PairTokenizer
from bdpo_pl.errors import MachineError

CHUNK = 512
"""Number of rows in a chunk."""
_BETWEEN_COLLECTIONS = 100_000
"""Number of new objects after which a process looks for garbage; rows leave hardly any."""
MIN_ROWS = 16 * CHUNK
"""Number of rows from which starting processes pays off."""

Encoded = PreferencePair | RowError

# Tokenizer of a forked process: inherited, because pickling a tokenizer is slow.
_inherited: PairTokenizer | None = None


def encoded(
    rows: Iterable[PreferenceRow], tokenizer: PairTokenizer, processes: int | None = None
) -> Iterator[tuple[PreferenceRow, Encoded]]:
    """Return each row with its token ids, or with the reason why it has none, in order.

    Args:
        rows: rows, read as they are needed.
        tokenizer: tokenizer of pairs, whose `read_as` counts how the rows were read.
        processes: number of processes. Default: the number of cores that this process may use, at most 8.
    """
    rows = iter(rows)
    first = list(islice(rows, MIN_ROWS))
    processes = num_processes() if processes is None else processes
    if len(first) < MIN_ROWS or processes < 2:
        for chunk in _chunks(chain(first, rows)):
            yield from zip(chunk, tokenizer.encode(chunk), strict=True)
        return
    yield from _in_processes(chain(first, rows), tokenizer, processes)


def num_processes() -> int:
    """Return how many processes may encode at once: the cores, divided among the ranks on this machine."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks))


def _in_processes(
    rows: Iterator[PreferenceRow], tokenizer: PairTokenizer, processes: int
) -> Iterator[tuple[PreferenceRow, Encoded]]:
    global _inherited
    # Encoded here first, so that every process inherits what the first rows reveal about the template.
    warm = list(islice(rows, CHUNK))
    yield from zip(warm, tokenizer.encode(warm), strict=True)
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _start)
    before, _inherited = _inherited, tokenizer
    try:
        for chunk, results, read_as in _under_way(pool, _chunks(rows), 2 * processes):
            tokenizer.read_as.add(read_as)
            yield from zip(chunk, results, strict=True)
    except BrokenProcessPool as error:
        raise MachineError(
            "a process that converts rows to token ids was killed, probably because memory ran out: free some memory, "
            "or use less data"
        ) from error
    finally:
        _inherited = before
        pool.shutdown(cancel_futures=True)


def _under_way(
    pool: ProcessPoolExecutor, chunks: Iterator[list[PreferenceRow]], limit: int
) -> Iterator[tuple[list[PreferenceRow], Sequence[Encoded], ReadAs]]:
    waiting = deque((chunk, pool.submit(_encode, chunk)) for chunk in islice(chunks, limit))
    while waiting:
        chunk, task = waiting.popleft()
        results, read_as = task.result()
        waiting.extend((more, pool.submit(_encode, more)) for more in islice(chunks, 1))
        yield chunk, results, read_as


def _chunks(rows: Iterator[PreferenceRow]) -> Iterator[list[PreferenceRow]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _start() -> None:
    """Restrict each process to one core, as many as there are, and leave signals to the process that forked it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # An inherited handler would run here as well: at Ctrl-C each process would announce that the run stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What is inherited is never garbage here: looking through it would take time, and copy its pages.
    gc.freeze()
    gc.set_threshold(_BETWEEN_COLLECTIONS)
    global _worker
    _worker = _inherited


def _end_with_parent() -> None:
    """End this process when its parent is gone, even by SIGKILL: nobody else would end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


_worker: PairTokenizer | None = None


def _encode(chunk: list[PreferenceRow]) -> tuple[list[Encoded], ReadAs]:
    assert _worker is not None
    _worker.read_as = ReadAs()
    return _worker.encode(chunk), _worker.read_as

"""Rows to token ids in order, a chunk at a time; large sets on all the processor's cores.

Rendering a chat template is Python, which runs on one core, so that threads do not help: the work is spread over forked
processes. Few chunks are under way at a time, so that memory stays bounded whatever the size of the set.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from multiprocessing.pool import Pool

from bdpo_pl.data.pairs import PreferencePair, ReadAs
from bdpo_pl.data.rows import PreferenceRow, RowError
from bdpo_pl.data.tokenization import PairTokenizer

CHUNK = 512
"""Rows that are encoded at once."""
MIN_ROWS = 16 * CHUNK
"""Rows from which starting processes pays."""

Encoded = PreferencePair | RowError

# What a forked process encodes with: inherited, because a tokenizer takes long to pickle.
_inherited: PairTokenizer | None = None


def encoded(
    rows: Iterable[PreferenceRow], tokenizer: PairTokenizer, processes: int | None = None
) -> Iterator[tuple[PreferenceRow, Encoded]]:
    """Return each row with its token ids or why it has none, in order.

    Args:
        rows: read as they are needed.
        tokenizer: its `read_as` counts what was done.
        processes: how many to encode on; default: the cores that this process may use, at most 8.
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
    """Return how many processes may encode at once: the cores, shared with the other ranks of this machine."""
    if not sys.platform.startswith("linux") or multiprocessing.current_process().daemon:
        return 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks))


def _in_processes(
    rows: Iterator[PreferenceRow], tokenizer: PairTokenizer, processes: int
) -> Iterator[tuple[PreferenceRow, Encoded]]:
    global _inherited
    # Tried now, so that every process inherits what the first rows teach about the template.
    warm = list(islice(rows, CHUNK))
    yield from zip(warm, tokenizer.encode(warm), strict=True)
    before, _inherited = _inherited, tokenizer
    try:
        pool = multiprocessing.get_context("fork").Pool(processes, _start)
    finally:
        _inherited = before
    with pool:
        for chunk, results, read_as in _under_way(pool, _chunks(rows), 2 * processes):
            tokenizer.read_as.add(read_as)
            yield from zip(chunk, results, strict=True)


def _under_way(
    pool: Pool, chunks: Iterator[list[PreferenceRow]], limit: int
) -> Iterator[tuple[list[PreferenceRow], Sequence[Encoded], ReadAs]]:
    waiting = deque((chunk, pool.apply_async(_encode, (chunk,))) for chunk in islice(chunks, limit))
    while waiting:
        chunk, task = waiting.popleft()
        results, read_as = task.get()
        waiting.extend((more, pool.apply_async(_encode, (more,))) for more in islice(chunks, 1))
        yield chunk, results, read_as


def _chunks(rows: Iterator[PreferenceRow]) -> Iterator[list[PreferenceRow]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _start() -> None:
    """Let each process tokenise on one core: there are as many processes as cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _worker
    _worker = _inherited


_worker: PairTokenizer | None = None


def _encode(chunk: list[PreferenceRow]) -> tuple[list[Encoded], ReadAs]:
    assert _worker is not None
    _worker.read_as = ReadAs()
    return _worker.encode(chunk), _worker.read_as

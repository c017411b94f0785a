"""The scoring pass: one run of a frozen model over every pair, before training.

It computes the reference log-probabilities and the comprehension of both responses at once. Each pair is scored four
times (chosen and rejected, given the prompt and given the null prompt), in two documents, so that each prompt is read
once. Training then needs no reference model in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from rich.progress import TaskID
from torch import Tensor

from bdpo_pl.comprehension import normalised_hsic
from bdpo_pl.data.batches import pair_document
from bdpo_pl.data.packing import Document, RowLayout, lay_out, parts_of, renumbered
from bdpo_pl.data.table import PairTable
from bdpo_pl.errors import InputError
from bdpo_pl.forward.equivalence import evaluating
from bdpo_pl.forward.responses import response_logps
from bdpo_pl.models.causal_lm import CausalLM
from bdpo_pl.models.precision import device_of
from bdpo_pl.reporting.progress import Reporter, progress
from bdpo_pl.scoring.cache import ScoreCache
from bdpo_pl.scoring.machine import Machine
from bdpo_pl.scoring.scores import ScoreTable


@dataclass
class ScoringOptions:
    """Options of the scoring pass. Except for `comprehension`, no option changes a score by more than rounding.

    Args:
        batch_tokens: number of tokens in one forward pass; lower it if scoring runs out of memory. Default: 16,384 on a
            GPU; 2,048 on a CPU, where more is not faster.
        chunk_pairs: number of pairs scored between two writes to the cache, and so the most that an interruption loses.
        cache_dir: folder of the cache, shared by all nodes. Default: `$BDPO_PL_CACHE`, otherwise `~/.cache/bdpo_pl`.
        comprehension: score against the null prompt too. If false, the pass takes half the time, but there are no
            comprehension metrics and no balance weights.
    """

    batch_tokens: int | None = None
    chunk_pairs: int = 256
    cache_dir: str | None = None
    comprehension: bool = True


class _Place(NamedTuple):
    """The place of a sequence's log-probability in the table of scores."""

    column: str
    side: int
    position: int


@torch.no_grad()
def score_pairs(
    model: CausalLM,
    table: PairTable,
    indices: Sequence[int] | np.ndarray,
    *,
    layout: RowLayout = RowLayout.SPLIT,
    batch_tokens: int | None = None,
    pad_id: int = 0,
    comprehension: bool = True,
    hsic: bool = False,
    first: bool = False,
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_batch: Callable[[float], None] = lambda share: None,
    forwards: int = 0,
) -> ScoreTable:
    """Score the pairs at `indices` of `table` with `model`, in evaluation mode.

    Args:
        model: causal language model, on the device to score on.
        table: all pairs.
        indices: table indices of the pairs to score, in the order of the result.
        layout: layout of documents in rows. Any layout but `SPLIT` needs a model that allows it (`choose_layout`).
        batch_tokens: maximum number of tokens in one forward pass; a longer document gets a pass of its own. Default:
            as in `ScoringOptions`.
        pad_id: token id of the padding.
        comprehension: score against the null prompt as well.
        hsic: compute `normalised_hsic` as well.
        first: score the first n tokens of each response as well, where n is the length of the pair's shorter response.
        context: function that returns the context of a forward pass, for autocast.
        on_batch: function that is called after each forward pass with its share of all tokens.
        forwards: minimum number of forward passes, for ranks that must all run equally many.

    Raises:
        InputError: a log-probability is not finite. The message names the pair.
    """
    device = device_of(model)
    places, groups = _plan(table, indices, layout, batch_tokens or _default_batch_tokens(device), comprehension)
    # If every pass needs every rank, all ranks must run equally many. The results of repeated passes are not used.
    idle = max(0, forwards - len(groups))
    names = [
        "reference",
        *(["null"] if comprehension else []),
        *(["hsic"] if hsic else []),
        *(["first"] if first else []),
    ]
    shorter = torch.from_numpy(table.trained_lengths.min(axis=0)[np.asarray(indices)].astype(np.int64))
    columns = {name: np.full((2, len(indices)), np.nan, dtype=np.float32) for name in names}
    sizes = [sum(document.num_tokens for document in group) for group in groups]

    def store(numbers: list[int], logps: Tensor, kernels: list[Tensor]) -> None:
        kernel = iter(torch.stack(kernels).tolist() if kernels else [])
        values = logps.view(-1, len(numbers)).T.tolist()
        for number, parts in zip(numbers, values, strict=True):
            place = places[number]
            columns[place.column][place.side, place.position] = sum(parts)
            if first and place.column == "reference":
                columns["first"][place.side, place.position] = parts[0]
            if hsic and place.column == "reference":
                columns["hsic"][place.side, place.position] = next(kernel)

    # Results are read one batch late, so that a GPU computes the next batch while Python prepares the one after.
    pending: tuple[list[int], Tensor, list[Tensor]] | None = None
    with evaluating(model):
        for turn, group in enumerate(groups + [groups[-1]] * idle):
            numbers = [number for document in group for number, _ in document.responses]
            batch = lay_out(renumbered(group), layout, pad_id)
            spans = batch.spans.tolist()
            hidden: list[Tensor] = []
            if first:
                batch = parts_of(batch, shorter[[places[number].position for number in numbers]])
            with context():
                logps = response_logps(model, batch.to(device), hidden.append if hsic else None)
            kernels: list[Tensor] = []
            for number, (start, end, begin, last) in zip(numbers, spans, strict=True):
                if hsic and places[number].column == "reference":
                    states = hidden[0].flatten(0, 1)
                    kernels.append(normalised_hsic(states[start:end], states[begin:last]))
            if pending is not None:
                store(*pending)
            pending = numbers, logps, kernels
            if turn < len(groups):
                on_batch(sizes[turn] / sum(sizes))
        if pending is not None:
            store(*pending)
    for values in columns.values():
        if not np.isfinite(values).all():
            bad = int(indices[int(np.argwhere(~np.isfinite(values))[0, 1])])
            raise InputError(
                f"{table.places[bad]}: the model gives this pair a log-probability that is not finite; "
                "check the model's weights and dtype (float16 overflows: use bfloat16 or float32), or remove the row"
            )
    return ScoreTable(**columns)


def score_table(
    name: str,
    table: PairTable,
    model: Callable[[], CausalLM],
    cache: ScoreCache,
    options: ScoringOptions,
    *,
    layout: Callable[[], RowLayout] = lambda: RowLayout.SPLIT,
    pad_id: int = 0,
    hsic: bool = False,
    first: bool = False,
    machine: Machine | None = None,
) -> ScoreTable:
    """Read the scores of the whole `table` from the cache, and compute the missing ones with `model`.

    The ranks divide the chunks and exchange them through the cache, so the scores do not depend on the number of ranks.
    If no rank holds the whole model, the ranks run their forward passes together, each with its own chunk.

    Args:
        name: name of the table, for the progress bar.
        table: all pairs.
        model: function that returns the frozen model; called only if scores are missing.
        cache: cache of the table's scores.
        options: options of the scoring pass.
        layout: function that returns the model's layout; called only if scores are missing.
        pad_id: token id of the padding.
        hsic: compute `normalised_hsic` as well.
        first: score the first tokens of each response as well, as in `score_pairs`.
        machine: processes that share the work. Default: this process alone.

    Raises:
        InputError: a pair cannot be scored, or the chunks of another rank are missing.
    """
    machine = machine or Machine()
    chunks = [cache.load(chunk) for chunk in range(cache.num_chunks)]
    missing = _missing(chunks, machine)
    # All ranks must find the same chunks missing, so no rank writes before every rank has looked.
    machine.barrier()
    if missing:
        with progress("pairs", enabled=machine.rank == 0) as reporter:
            done = sum(len(scores) for scores in chunks if scores is not None)
            task = reporter.add_task(f"Scoring {name}", total=len(table), completed=done)

            def score(chunk: int, forwards: int, pairs: int) -> ScoreTable:
                return score_pairs(
                    model(),
                    table,
                    cache.indices(chunk),
                    layout=layout(),
                    batch_tokens=options.batch_tokens,
                    pad_id=pad_id,
                    comprehension=options.comprehension,
                    hsic=hsic,
                    first=first,
                    context=machine.context,
                    on_batch=partial(_advance, reporter, task, pairs),
                    forwards=forwards,
                )

            for start in range(0, len(missing), machine.world_size):
                turn = missing[start : start + machine.world_size]
                # The first rank reports its share of the passes as that of all, whose chunks differ in size and number.
                pairs = sum(len(cache.indices(chunk)) for chunk in turn)
                if machine.together:
                    # A rank without a chunk of its own repeats one of the others, because every pass needs every rank.
                    chunk = turn[min(machine.rank, len(turn) - 1)]
                    needed = passes_needed(table, cache.indices(chunk), layout(), options, machine)
                    found = scored_together(partial(score, chunk, pairs=pairs), needed, machine)
                elif machine.rank < len(turn):
                    found = score(turn[machine.rank], 0, pairs)
                else:
                    continue
                if machine.rank < len(turn):
                    cache.save(turn[machine.rank], found)
        machine.barrier()
        chunks = cache.load_late([scores or cache.load(chunk) for chunk, scores in enumerate(chunks)])
    complete = [scores for scores in chunks if scores is not None]
    if len(complete) < len(chunks):
        raise InputError(
            f"the score cache {cache.folder} lacks chunks that another process scored; "
            "set model.scoring.cache_dir to a folder that all nodes share"
        )
    return ScoreTable.concatenate(complete)


def _missing(chunks: list[ScoreTable | None], machine: Machine) -> list[int]:
    """Return the numbers of the chunks that any rank misses, the same on all ranks.

    They may differ from rank to rank: another job with the same key writes its chunks while this one looks.
    """
    lacking = torch.tensor([float(scores is None) for scores in chunks], device=machine.device)
    return machine.sum_over_ranks(lacking).nonzero().flatten().tolist()


def passes_needed(
    table: PairTable, indices: np.ndarray, layout: RowLayout, options: ScoringOptions, machine: Machine
) -> int:
    """Return the number of forward passes of the pairs at `indices`."""
    size = options.batch_tokens or _default_batch_tokens(machine.device)
    return len(_plan(table, indices, layout, size, options.comprehension)[1])


def scored_together(score: Callable[[int], ScoreTable], needed: int, machine: Machine) -> ScoreTable:
    """Score pairs on each rank, with equally many forward passes; if one rank fails, all raise an error.

    Args:
        score: function that scores this rank's pairs, given the minimum number of passes.
        needed: number of passes that this rank's pairs need.
        machine: ranks that all call this function.

    Raises:
        InputError: a pair of any rank cannot be scored.
    """
    forwards = int(machine.max_over_ranks(torch.tensor([needed], device=machine.device)).item())
    fault: InputError | None = None
    try:
        found = score(forwards)
    except InputError as error:
        fault = error
    faults = machine.sum_over_ranks(torch.tensor([float(fault is not None)], device=machine.device))
    if fault is not None:
        raise fault
    if faults.item():
        raise InputError("another process found a pair that cannot be scored; its message names it")
    return found


def _plan(
    table: PairTable, indices: Sequence[int] | np.ndarray, layout: RowLayout, batch_tokens: int, comprehension: bool
) -> tuple[list[_Place], list[list[Document]]]:
    """Return the place of each sequence's log-probability, and the documents of each forward pass."""
    places: list[_Place] = []
    documents: list[Document] = []
    for position, index in enumerate(indices):
        pair = table[int(index)]
        prompts = {"reference": pair.prompt_ids} | ({"null": table.null_prompt_of(int(index))} if comprehension else {})
        for column, prompt in prompts.items():
            documents.append(pair_document(pair, len(places), len(places) + 1, prompt))
            places += [_Place(column, side, position) for side in range(2)]
    if layout is RowLayout.SPLIT:
        documents = [part for document in documents for part in document.split()]
    # Similar lengths need less padding. The sort is stable, so the same pairs always share a batch.
    documents.sort(key=lambda document: document.num_tokens, reverse=True)
    return places, list(_groups(documents, batch_tokens, layout))


def _groups(documents: list[Document], batch_tokens: int, layout: RowLayout) -> Iterator[list[Document]]:
    """Yield groups of consecutive `documents` (longest first) of at most `batch_tokens` tokens."""
    group: list[Document] = []
    total = 0
    for document in documents:
        # In the split layout every row is padded to the longest one of the group; shared rows are filled.
        size = document.num_tokens if layout is not RowLayout.SPLIT or not group else group[0].num_tokens
        if group and total + size > batch_tokens:
            yield group
            group, total, size = [], 0, document.num_tokens
        group.append(document)
        total += size
    if group:
        yield group


def _default_batch_tokens(device: torch.device) -> int:
    return 2_048 if device.type == "cpu" else 16_384


def _advance(reporter: Reporter, task: TaskID, pairs: int, share: float) -> None:
    reporter.advance(task, share * pairs)

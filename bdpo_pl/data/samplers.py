"""Assignment of pairs to steps and ranks, with weights that always give the exact mean over the step's pairs.

Lightning divides every micro-batch's loss by the number of accumulated micro-batches and averages over ranks, even if a
step has fewer micro-batches or unequal ones. Therefore a pair's weight is accumulate · world_size / (pairs in the
step).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from bdpo_pl.errors import InputError

PairKey = tuple[int, float]
"""Index of a pair in its table, and weight of its loss."""

Step = list[np.ndarray]
"""Pair indices of each micro-batch of one optimiser step: of rank 0, 1, …, then of the next round of ranks."""

# Pairs whose sizes differ by less than 1/32 are interchangeable.
_SIZES_PER_OCTAVE = 32
# Number of batches among which similar sizes are grouped: enough for tight batches, few enough for mixed steps.
_POOL_BATCHES = 32


class StepSampler(Sampler[list[PairKey]]):
    """A sampler of micro-batches of (index, weight) for one rank.

    A rank without a pair gets one of weight zero, because all ranks must take part.

    Args:
        epoch: function that returns the epoch, called when a pass begins; each epoch has its own order. None keeps the
            table's order.
        seed: seed of the orders, the same on every rank.
        accumulate: number of micro-batches per optimiser step.
        rank: rank of this process.
        world_size: number of processes among which the data is divided.
    """

    def __init__(
        self,
        *,
        epoch: Callable[[], int] | None = None,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.epoch = epoch
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.skip = 0
        self.most: int | None = None

    def stop_after(self, limit: float) -> int:
        """End each pass where the Trainer does, so that a step cut there is a mean over its pairs.

        Args:
            limit: number of batches (int), or share of all batches (float).

        Returns:
            The number of batches in a pass.
        """
        self.most = min(len(self), limit if isinstance(limit, int) else int(limit * len(self)))
        return self.most

    def skip_batches(self, count: int) -> None:
        """Skip the first `count` batches of the next pass only: a resumed run has used them already."""
        self.skip = count

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of this rank's micro-batches in a whole epoch, the same in each epoch."""

    @abstractmethod
    def steps(self, rng: np.random.Generator | None) -> Iterator[Step]:
        """Yield the steps of an epoch in the order given by `rng`, the same on every rank."""

    def __iter__(self) -> Iterator[list[PairKey]]:
        skip, self.skip = self.skip, 0
        for number, batch in enumerate(self._batches()):
            if number >= skip:
                yield batch

    def _batches(self) -> Iterator[list[PairKey]]:
        rng = None if self.epoch is None else np.random.default_rng([self.seed, self.epoch()])
        left = len(self) if self.most is None else self.most
        for step in self.steps(rng):
            step = step[: left * self.world_size]
            left -= len(step) // self.world_size
            if not step:
                return
            weight = self.accumulate * self.world_size / sum(map(len, step))
            for batch in step[self.rank :: self.world_size]:
                yield [(int(i), weight) for i in batch] or [(int(step[0][0]), 0.0)]


class PairBatchSampler(StepSampler):
    """A sampler of micro-batches with a fixed number of pairs.

    A step takes the next `batch_size · world_size · accumulate` pairs of the epoch's order. The last step of an epoch
    may have fewer, which are then distributed evenly.

    Args:
        num_pairs: number of pairs in the table.
        batch_size: number of pairs in one micro-batch of one rank.
        kwargs: arguments of `StepSampler`.
    """

    def __init__(self, num_pairs: int, batch_size: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self.num_pairs = num_pairs
        self.batch_size = batch_size

    def __len__(self) -> int:
        window = self.batch_size * self.world_size * self.accumulate
        full, rest = divmod(self.num_pairs, window)
        return full * self.accumulate + math.ceil(rest / (self.batch_size * self.world_size))

    def steps(self, rng: np.random.Generator | None) -> Iterator[Step]:
        """Yield steps of consecutive pairs in the epoch's order."""
        order = np.arange(self.num_pairs) if rng is None else rng.permutation(self.num_pairs)
        window = self.batch_size * self.world_size * self.accumulate
        for start in range(0, self.num_pairs, window):
            step = order[start : start + window]
            rounds = math.ceil(len(step) / (self.batch_size * self.world_size))
            yield np.array_split(step, rounds * self.world_size)


class TokenBatchSampler(StepSampler):
    """A sampler of micro-batches with a bounded number of tokens, each of similar sizes.

    The sizes in each batch are drawn once, from the seed. The pairs of those sizes and the order of the batches are
    drawn again in each epoch. Batches are shuffled, yet their number is the same in every epoch: the length of the run
    and the learning-rate schedule depend on it.

    Args:
        sizes: (M,) number of tokens of each pair.
        max_tokens: maximum number of tokens in a micro-batch.
        kwargs: arguments of `StepSampler`.

    Raises:
        ValueError: a pair is larger than a batch.
    """

    def __init__(self, sizes: np.ndarray, max_tokens: int, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        if len(sizes) and sizes.max() > max_tokens:
            raise ValueError(f"pair {int(sizes.argmax())} has {int(sizes.max())} tokens, a batch {max_tokens}")
        classes = np.minimum(_rounded_up(sizes), max_tokens)
        order = np.arange(len(sizes))
        if self.epoch is not None:
            order = np.random.default_rng(self.seed).permutation(order)
        self._by_size = {int(size): np.flatnonzero(classes == size) for size in np.unique(classes)}
        self._batches_of_sizes = list(_fill(classes[order], max_tokens))

    def __len__(self) -> int:
        return math.ceil(len(self._batches_of_sizes) / self.world_size)

    def steps(self, rng: np.random.Generator | None) -> Iterator[Step]:
        """Yield steps of batches of the planned sizes, in the order given by `rng`."""
        shuffle = (lambda values: values) if rng is None else rng.permutation
        supply = {size: iter(shuffle(pairs)) for size, pairs in self._by_size.items()}
        number = len(self._batches_of_sizes)
        batches: Step = [np.empty(0, dtype=np.int64)] * number
        # Drawn in random order too, so that pairs of one size do not stay together in all epochs.
        for at in shuffle(np.arange(number)):
            batches[at] = np.array([next(supply[size]) for size in self._batches_of_sizes[at]])
        order = shuffle(np.arange(number))
        if rng is None and self.most is not None and self.most < len(self):
            # The longest pairs are in the first batches, and those that are left out shall be like those that are not.
            order = np.random.default_rng(self.seed).permutation(order)
        window = self.world_size * self.accumulate
        for start in range(0, number, window):
            step = [batches[at] for at in order[start : start + window]]
            yield step + [np.empty(0, dtype=np.int64)] * (-len(step) % self.world_size)


def check_budget(sizes: np.ndarray, max_tokens: int, places: Sequence[str], option: str) -> None:
    """Raise `InputError` that names the first pair with more than `max_tokens` tokens, and the `option` to increase."""
    over = np.flatnonzero(sizes > max_tokens)
    if len(over):
        raise InputError(
            f"{places[over[0]]}: the pair takes {sizes[over[0]]} tokens ({len(over)} pairs take more than "
            f"{option} = {max_tokens}); raise it to at least {sizes.max()}, or lower data.max_length"
        )


def _rounded_up(sizes: np.ndarray) -> np.ndarray:
    step = np.maximum(1, 2 ** np.floor(np.log2(np.maximum(sizes, 1))).astype(np.int64) // _SIZES_PER_OCTAVE)
    return -(-sizes.astype(np.int64) // step) * step


def _fill(sizes: np.ndarray, max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of sizes with sums of at most `max_tokens`, pool by pool of `sizes`.

    Pools descend and ascend in turn, so that a batch which goes on into the next pool has similar sizes too: rows of
    their own are padded to its longest.
    """
    pools = np.cumsum(sizes) // (max_tokens * _POOL_BATCHES)
    batch: list[int] = []
    total = 0
    for number, pool in enumerate(np.unique(pools)):
        for size in sorted(sizes[pools == pool].tolist(), reverse=number % 2 == 0):
            if total + size > max_tokens:
                yield batch
                batch, total = [], 0
            batch.append(size)
            total += size
    if batch:
        yield batch

"""Tokens and FLOPs per second, and the share of padding, since the last line of the log."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bdpo_pl.data.batches import PreferenceBatch
from bdpo_pl.training.flops import TrainingFlops

TIMED = ("train/tokens_per_second", "train/tflops", "train/mfu", "train/peak_memory_gb")
"""Names of the metrics that a clock or a machine determines: those of a resumed run are others."""


class Throughput:
    """A measurement of training without the time of validations.

    Args:
        clock: function that returns the time in seconds.

    Attributes:
        flops: FLOPs of the model; None: not known.
        peak: FLOPs a second that a device reaches at most; None: not known.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.flops: TrainingFlops | None = None
        self.peak: float | None = None
        self._clock = clock
        self._tokens = 0
        self._counts: Tensor | None = None
        self._start = 0.0
        self._paused = 0.0
        self._filled = self._slots = 0

    def start(self) -> None:
        """Begin a window of time."""
        self._start, self._tokens, self._counts = self._clock(), 0, None

    def add(self, batch: PreferenceBatch, counted: bool) -> None:
        """Count a batch, unless another process that reads the same one counts it."""
        if not counted:
            return
        self._tokens += batch.num_tokens
        self._filled += batch.num_tokens
        self._slots += batch.sequences.input_ids.numel()
        if self.flops is not None:
            found = self.flops.counts(batch)
            self._counts = found if self._counts is None else self._counts + found

    def pause(self) -> None:
        """Stop the clock."""
        self._paused = self._clock()

    def resume(self) -> None:
        """Restart the clock."""
        self._start += self._clock() - self._paused

    def joined(self, reduce: Callable[..., Tensor], device: torch.device) -> list[int]:
        """Return tokens and slots of the window over all ranks, by a strategy's `reduce`; all ranks call this."""
        counts = torch.tensor([self._filled, self._slots], dtype=torch.float64, device=device)
        return [int(count) for count in reduce(counts, reduce_op="sum").tolist()]

    def take_up(self, counts: list[int]) -> None:
        """Continue the window of padding from the result of `joined`, on one rank only."""
        self._filled, self._slots = counts

    def read(self, reduce: Callable[..., Tensor], device: torch.device, devices: int) -> dict[str, float]:
        """Return the metrics of the window that ends now, by name, and begin the next one; all ranks call this.

        - train/tokens_per_second: tokens without padding, of all devices.
        - train/padding_share: share of the positions in the rows that are padding, which the model computes in vain.
        - train/tflops: FLOPs a second that the model needs (`TrainingFlops`), in 10¹², of a device.
        - train/mfu: model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): the same over the device's peak.

        Args:
            reduce: a strategy's `reduce`.
            device: device of this process.
            devices: number of devices.
        """
        seconds = self._clock() - self._start
        done = 0.0
        if self.flops is not None and self._counts is not None:
            done = self.flops.total(self._tokens, self._counts)
        sums = torch.tensor(
            [self._tokens / seconds, done / seconds, self._filled, self._slots], dtype=torch.float64, device=device
        )
        tokens, flops, filled, slots = reduce(sums, reduce_op="sum").tolist()
        self.start()
        self._filled = self._slots = 0
        values = {"train/tokens_per_second": tokens}
        if slots:
            values["train/padding_share"] = 1.0 - filled / slots
        if flops:
            values["train/tflops"] = flops / devices / 1e12
            if self.peak is not None:
                values["train/mfu"] = flops / devices / self.peak
        return values

"""Limits of attacks in requests and minutes, and success as a function of the requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bdpo_pl.errors import InputError
from bdpo_pl.statistics import wilson


@dataclass
class BudgetOptions:
    """Limits of each attack on each model, beyond those of the attack's own options.

    Args:
        requests: maximum number of prompts that an attack sends to the attacked model; for GCG and genetic framings,
            of candidates whose loss is computed. Every attacked request gets an equal share.
        minutes: maximum duration of an attack; requests that were not attacked by then are left out and counted.

    Raises:
        InputError: a value is out of range.
    """

    requests: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise InputError(f"budget.requests must be at least 1, or null; got {self.requests}")
        if self.minutes is not None and not self.minutes > 0.0:
            raise InputError(f"budget.minutes must be above 0, or null; got {self.minutes}")


@dataclass(frozen=True)
class Budget:
    """The limits of one attack on one model, from its beginning.

    Attributes:
        share: maximum number of requests for each attacked request; None: no limit.
        ends: time at which the attack ends, by `clock`; None: no limit.
        clock: function that returns the time in seconds.
    """

    share: int | None = None
    ends: float | None = None
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def begin(cls, options: BudgetOptions, attacked: int, clock: Callable[[], float] = time.monotonic) -> Budget:
        """Begin the budget of an attack on `attacked` requests.

        Raises:
            InputError: there are fewer requests than attacked ones.
        """
        share = None if options.requests is None else options.requests // attacked
        if share == 0:
            raise InputError(
                f"budget.requests of {options.requests} is fewer than the {attacked} attacked requests; raise it, or "
                "lower attacks.max_prompts"
            )
        return cls(share, None if options.minutes is None else clock() + 60.0 * options.minutes, clock)

    def steps(self, most: int, each: int, name: str) -> int:
        """Return how many of `most` steps of `each` requests are within the share of one attacked request.

        Args:
            most: number of steps by the attack's own options.
            each: maximum number of requests of a step.
            name: name of the attack, for messages.

        Raises:
            InputError: the share does not suffice for one step.
        """
        if self.share is None:
            return most
        if self.share < each:
            raise InputError(
                f"budget.requests leaves {self.share} for each attacked request, and one step of {name} takes {each}; "
                f"raise it, lower attacks.max_prompts, or make the steps of {name} smaller"
            )
        return min(most, self.share // each)

    def over(self) -> bool:
        """Return true if the time is over."""
        return self.ends is not None and self.clock() >= self.ends


@dataclass(frozen=True)
class SuccessCurve:
    """Share of attacked requests that succeeded within a number of requests, by the attack's own judge.

    Attributes:
        requests: numbers of requests to the attacked model for one attacked request, ascending.
        success: share of attacked requests that succeeded within each.
        low: lower ends of the 95 % intervals, Wilson's.
        high: upper ends.
        count: number of attacked requests.
    """

    requests: list[int]
    success: list[float]
    low: list[float]
    high: list[float]
    count: int


def success_curve(found: Sequence[int | None], most: int) -> SuccessCurve:
    """Compute the curve of an attack.

    Args:
        found: number of requests until the first success, for each attacked request; None: no success.
        most: maximum number of requests that every attacked request could use.
    """
    at = sorted({1, most, *(number for number in found if number is not None)})
    counts = [sum(number is not None and number <= limit for number in found) for limit in at]
    ends = [wilson(count, len(found)) for count in counts]
    return SuccessCurve(
        at, [count / len(found) for count in counts], [low for low, _ in ends], [high for _, high in ends], len(found)
    )

"""What every judge takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """A request and a model's answer to it.

    Attributes:
        prompt: the request without its attack.
        response: what the model answered.
    """

    prompt: str
    response: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one exchange; None is what it does not tell.

    Attributes:
        refused: the answer refuses the request.
        unsafe: the answer gives what a harmful request asks for.
        score: between 0 and 1, how harmful, from judges that grade.
    """

    refused: bool | None = None
    unsafe: bool | None = None
    score: float | None = None

    @property
    def got_through(self) -> bool:
        """For a harmful request: whether the answer is unsafe or, by a judge of refusals alone, not refused.

        Raises:
            ValueError: the judge said nothing.
        """
        if self.unsafe is not None:
            return self.unsafe
        if self.refused is None:
            raise ValueError("a verdict that says nothing")
        return not self.refused


class Judge(ABC):
    """Tells what answers are.

    Attributes:
        name: short, as in reports and options.
    """

    name: str

    @abstractmethod
    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """A verdict on each exchange, in order.

        Raises:
            InputError: the judge cannot be reached or does not answer in its form, after retries.
        """

    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """What a report must say of the judge: its model or list of phrases (with its hash), and its limits.

        The same before and after judging: verdicts on record are known by it.
        """

    def notes(self) -> Mapping[str, int]:
        """What happened while judging and a report should count, as answers cut to the judge's length."""
        return {}

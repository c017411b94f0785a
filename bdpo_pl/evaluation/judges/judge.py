"""Interface of all judges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bdpo_pl.errors import InputError


@dataclass(frozen=True)
class Exchange:
    """A request and a model's answer to it.

    Attributes:
        prompt: the request without its attack.
        response: the model's answer.
    """

    prompt: str
    response: str


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict on one exchange; None for a property that the judge does not recognise.

    Attributes:
        refused: true if the answer refuses the request.
        unsafe: true if the answer provides what a harmful request wants.
        score: harmfulness between 0 and 1, from judges that grade.
    """

    refused: bool | None = None
    unsafe: bool | None = None
    score: float | None = None

    @property
    def got_through(self) -> bool:
        """True if a harmful request succeeded: the answer is unsafe or, if only refusals are judged, not refused.

        Raises:
            ValueError: the verdict is empty.
        """
        if self.unsafe is not None:
            return self.unsafe
        if self.refused is None:
            raise ValueError("the verdict is empty")
        return not self.refused


class JudgingError(InputError):
    """A failure of a judge on some exchanges.

    Attributes:
        verdicts: the verdicts on the others, in the order of the exchanges; None for an exchange without one.
    """

    def __init__(self, message: str, verdicts: Sequence[Verdict | None]) -> None:
        super().__init__(message)
        self.verdicts = list(verdicts)


class Judge(ABC):
    """A judge, which classifies answers.

    Attributes:
        name: short name for reports and options.
    """

    name: str

    @abstractmethod
    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return a verdict on each exchange, in order.

        Raises:
            InputError: the judge cannot be reached or its answer does not have the required form, after retries. As a
                `JudgingError` it has the verdicts on the other exchanges, which are then kept.
        """

    @abstractmethod
    def facts(self) -> Mapping[str, str]:
        """Return the facts for reports: the model or list of phrases (with its hash), and the judge's limits.

        They are the same before and after judging, because they identify verdicts on record.
        """

    def notes(self) -> Mapping[str, int]:
        """Return counts of events during judging for reports, such as answers truncated to the judge's length."""
        return {}

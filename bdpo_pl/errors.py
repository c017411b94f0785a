"""The error that tells a user what to mend."""


class InputError(ValueError):
    """A wrong option, file, row or model; the message names it and says what to do.

    Entry points print the message alone, with no traceback, and exit with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or a gradient stopped being finite; raised before the optimiser step, on every rank."""


class MachineError(RuntimeError):
    """Memory, disk or a process gave out; the message says what to free or to lower. Exit status 4."""


class StoppedError(BaseException):
    """A signal told the run to stop. Exit status: 128 + the signal's number.

    No `Exception`, so that code that tries one thing and falls back on another does not swallow it.

    Attributes:
        signal: The one that this process received, if it did.
        saved: The message says already what is saved, and how to go on from there.
    """

    def __init__(self, message: str, signal: int | None = None, *, saved: bool = False) -> None:
        super().__init__(message)
        self.signal = signal
        self.saved = saved


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or its type's name if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__

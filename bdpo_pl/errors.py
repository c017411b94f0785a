"""The error that tells a user what to mend."""


class InputError(ValueError):
    """A wrong option, file, row or model; the message names it and says what to do.

    Entry points print the message alone, with no traceback, and exit with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or a gradient stopped being finite; raised before the optimiser step, on every rank."""


class MachineError(RuntimeError):
    """Memory, disk or a process gave out; the message says what to free or to lower. Exit status 4."""


class StoppedError(RuntimeError):
    """The run was told to stop, and has saved its state.

    Attributes:
        signal: the one that this process received, if it did.
    """

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal

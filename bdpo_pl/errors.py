"""Errors whose message says what the user should fix, with their exit statuses."""

import dataclasses


class InputError(ValueError):
    """A wrong option, file, row or model; the message names it and says what to do.

    Entry points print only the message, without a traceback, and exit with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is not finite; raised before the optimiser step, on every rank."""


class MachineError(RuntimeError):
    """A lack of memory or disk space, or a failed process; the message says what to free or reduce. Exit status 4."""


class StoppedError(BaseException):
    """A signal to stop the run. Exit status: 128 + the signal's number.

    Not an `Exception`, so that code which catches errors to try an alternative does not suppress it.

    Attributes:
        signal: The signal that this process received, if any.
        saved: True if the message already says what is saved, and how to resume from there.
    """

    def __init__(self, message: str, signal: int | None = None, *, saved: bool = False) -> None:
        super().__init__(message)
        self.signal = signal
        self.saved = saved


def is_out_of_memory(error: BaseException) -> bool:
    """Return true if `error` says that memory ran out, of a GPU or of the machine."""
    # The CPU's allocator raises a plain RuntimeError, so its text decides.
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of the message of `error`, or its type's name if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def is_given(options: object, name: str) -> bool:
    """Return true if the option `name` of a dataclass of options, which has a default, is another one than that."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    return bool(getattr(options, name) != defaults[name])


def require_at_least(group: str, options: object, **least: int) -> None:
    """Raise `InputError` if a number of `options` is below its bound; None has no bound.

    Args:
        group: name of the options, for messages.
        options: the options.
        least: smallest value of each.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise InputError(f"{group}.{name} must be at least {bound}, got {value}")

"""The error that tells a user what to mend."""


class InputError(ValueError):
    """A wrong option, file, row or model; the message names it and says what to do.

    Entry points print the message alone, with no traceback, and exit with status 2.
    """


class NonFiniteError(RuntimeError):
    """A loss or a gradient stopped being finite; raised before the optimiser step, on every rank."""

"""Formatting of numbers as text, the same in reports, tables and logs."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

from bdpo_pl.statistics import Interval

_UNITS = ("B", "kB", "MB", "GB", "TB")


def whole(value: int) -> str:
    """Format a whole number with separators of thousands."""
    return f"{value:,}"


def plural(count: int, noun: str) -> str:
    """Return the form of `noun` that follows `count`."""
    return noun if count == 1 else f"{noun}s"


def grouped(value: float, decimals: int) -> str:
    """Format a number with separators of thousands and `decimals` decimals."""
    return f"{value:,.{decimals}f}".replace("-", "−")


def fixed(value: float, decimals: int) -> str:
    """Format a number with `decimals` decimals."""
    return f"{value:.{decimals}f}"


def general(value: float, digits: int = 6) -> str:
    """Format a number with `digits` significant digits, without trailing zeros."""
    return f"{value:.{digits}g}"


def percent(value: float, decimals: int = 1) -> str:
    """Format a share in percent."""
    return f"{value:.{decimals}%}"


@overload
def signed(value: float, decimals: int = 2) -> str: ...
@overload
def signed(value: float | None, decimals: int = 2) -> str | None: ...
def signed(value: float | None, decimals: int = 2) -> str | None:
    """Format a number with its sign; None stays None."""
    if value is None:
        return None
    # A value that rounds to zero must not become "−0.00".
    rounded = round(value, decimals)
    return f"{rounded:+.{decimals}f}".replace("-", "−") if rounded else f"{0.0:.{decimals}f}"


def signed_percent(value: float, decimals: int = 1) -> str:
    """Format a difference of shares in percent, with its sign."""
    return f"{signed(100 * value, decimals)}%"


def plus_minus(mean: float, high: float | None, decimals: int = 3) -> str:
    """Format a mean with half the width of its interval, if it has one."""
    text = signed(mean, decimals)
    return text if high is None else f"{text} ± {high - mean:.{decimals}f}"


def mean_text(mean: Interval) -> str:
    """Format a mean with half the width of its 95 % interval."""
    return plus_minus(mean.value, mean.high if mean.bounded else None)


def with_ends(form: Callable[[float], str], value: float, low: float, high: float) -> str:
    """Format a value with the ends of its interval, each by `form`."""
    return f"{form(value)} ({form(low)} to {form(high)})"


def share(value: float, low: float, high: float) -> str:
    """Format a rate in percent with the ends of its interval."""
    return f"{fixed(100 * value, 1)} % ({fixed(100 * low, 1)} to {fixed(100 * high, 1)})"


def rate(interval: Interval) -> str:
    """Format a rate in percent with its interval, if it has one."""
    if not interval.bounded:
        return f"{fixed(100 * interval.value, 1)} %"
    return share(interval.value, interval.low, interval.high)


def points(interval: Interval) -> str:
    """Format a difference of rates in percentage points, with its interval."""
    return with_ends(lambda value: signed(100 * value, 1), interval.value, interval.low, interval.high)


def number(interval: Interval) -> str:
    """Format a number with its interval, if it has one."""
    if not interval.bounded:
        return fixed(interval.value, 3)
    return with_ends(lambda value: signed(value, 3), interval.value, interval.low, interval.high)


def ratio(value: float) -> str:
    """Format a ratio of two quantities with a suitable number of digits."""
    if value >= 1e6:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value: float) -> str:
    """Format a duration in usual units: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Format a number of bytes in decimal units, as disks are sold."""
    for unit in _UNITS:
        if num_bytes < 1000 or unit == _UNITS[-1]:
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"

"""Figures as people read them: sizes, durations, counts, shares and dollars. Pure."""

from __future__ import annotations

from typing import Final

SIZE_UNITS: Final = ("bytes", "kB", "MB", "GB", "TB", "PB")
SECONDS_PER_MINUTE: Final = 60
SECONDS_PER_HOUR: Final = 3600
MICROS_PER_SECOND: Final = 1_000_000


def size(count: float) -> str:
    """Return bytes with three digits: "0 bytes", "999 bytes", "1.23 kB", "45.6 MB"."""
    for unit in SIZE_UNITS:
        shown = f"{count:.0f}" if unit == "bytes" else _three_digits(count)
        if float(shown) < 1000 or unit == SIZE_UNITS[-1]:
            return "1 byte" if unit == "bytes" and shown == "1" else f"{shown} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes any number")


def duration(seconds: float) -> str:
    """Return a duration: "250 µs", "12.3 ms", "4.56 s", "1 min 05 s", "2 h 03 min"."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.001:
        return f"{_three_digits(seconds * MICROS_PER_SECOND)} µs"
    if seconds < 0.9995:
        return f"{_three_digits(seconds * 1000)} ms"
    if seconds < 59.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < SECONDS_PER_HOUR:
        return f"{whole // SECONDS_PER_MINUTE} min {whole % SECONDS_PER_MINUTE:02} s"
    minutes = round(seconds / SECONDS_PER_MINUTE)
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def count(number: int, noun: str = "", plural: str = "") -> str:
    """Return a number with commas, and its noun: "1 task", "2,000 tasks"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}" if noun else f"{number:,}"


def share(value: float) -> str:
    """Return a share of 1 as a percentage. Only all of it is "100 %", and only nothing of it is "0 %"."""
    percent = value * 100
    if 99.5 <= percent < 100:
        return f"{min(percent, 99.9):.1f} %"
    return f"{percent:.1f} %" if 0 < percent < 10 else f"{percent:.0f} %"


def rate(per_second: float) -> str:
    """Return a rate of events: "0.25/s", "12.3/s", "4,560/s"."""
    return f"{_three_digits(per_second) if per_second < 1000 else format(round(per_second), ',')}/s"


def dollars(amount: float) -> str:
    """Return dollars to the cent, below one dollar to a hundredth of a cent where that is not 0."""
    if amount >= 1:
        return f"${amount:,.2f}"
    shown = f"{amount:.4f}"
    return f"${shown.removesuffix('00')}"


def _three_digits(number: float) -> str:
    if number >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"

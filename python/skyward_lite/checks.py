"""Checks of the public classes' parameters: each raises an error that names the parameter and its admitted values."""

from __future__ import annotations

import operator
import reprlib

from . import credentials

MAX_SECONDS = 366 * 24 * 3600.0
"""Largest bound in seconds: about a year."""
MAX_CONCURRENCY = 4_096
"""Largest number of tasks at once on a node: each is a thread or a process there."""
MAX_NODES = 10_000
"""Largest number of nodes of a pool: each has a connection, and a thread while it starts."""


def whole(owner: str, name: str, value: object, least: int, most: int, otherwise: str = "") -> int:
    """Return `value` as an int from `least` to `most`. Raise `TypeError` or `ValueError` that names the parameter.

    numpy's integers are whole numbers, True and 2.0 are not. `otherwise` names another value that the parameter takes.
    """
    also = otherwise and f", or {otherwise}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{owner}({name}={shown(value)}): a whole number{also}")
    if number < least:
        raise ValueError(f"{owner}({name}={shown(number)}): at least {least:,}{also}")
    if number > most:
        raise ValueError(f"{owner}({name}={shown(number)}): at most {most:,}{also}")
    return number


def number(owner: str, name: str, value: object, most: float, unit: str, *, least: float = 0.0) -> float:
    """Return `value` as a float above 0, from `least` to `most`. Raise `TypeError` or `ValueError` as `whole` does."""
    try:
        if isinstance(value, bool | str | bytes | bytearray):
            raise TypeError
        real = float(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{owner}({name}={shown(value)}): a number of {unit}") from None
    except OverflowError:
        real = float("inf")
    if not (0 < real <= most and real >= least):
        lower = f"at least {least:,g}" if least else "more than 0"
        raise ValueError(f"{owner}({name}={shown(value)}): {lower} and at most {most:,g} {unit}")
    return real


def seconds(owner: str, name: str, value: object, *, least: float = 0.0, most: float = MAX_SECONDS) -> float:
    """Return `value` as a number of seconds. Raise `TypeError` or `ValueError` as `number` does."""
    return number(owner, name, value, most, "seconds", least=least)


def switch(owner: str, name: str, value: object) -> bool:
    """Return `value` if it is True or False. Raise `TypeError` otherwise: the text "no" would count as true."""
    # numpy's booleans, which comparisons of arrays return, are as good.
    if isinstance(value, bool) or (type(value).__name__ in ("bool", "bool_") and type(value).__module__ == "numpy"):
        return bool(value)
    raise TypeError(f"{owner}({name}={shown(value)}): True or False")


def shown(value: object) -> str:
    """Return a short repr for an error's text, whatever `value` is, without credentials."""
    try:
        # Mask first and shorten then: credentials are found in a whole URL only.
        return reprlib.repr(credentials.mask(value) if isinstance(value, str) else value)
    except Exception:  # an int of more digits than Python converts, say
        return f"<{type(value).__name__}>"

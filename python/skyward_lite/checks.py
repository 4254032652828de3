"""Checks of parameters: each error names the parameter, its value, what it takes, and what was probably meant."""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Iterable, Mapping

from . import credentials

# What typing.TYPE_CHECKING is for type checkers, without the import of typing.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NoReturn

MAX_SECONDS = 366 * 24 * 3600.0
"""Largest bound in seconds: about a year."""
MAX_CONCURRENCY = 4_096
"""Largest number of tasks at once on a node: each is a thread or a process there."""
MAX_NODES = 10_000
"""Largest number of nodes of a pool: each has a connection, and a thread while it starts."""
MAX_SHOWN_DIGITS = 12
"""Digits of the longest number in a text that an error repeats as a number."""


class _Repr(reprlib.Repr):
    """Short reprs without credentials."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 60
        self.maxother = 80

    def repr_str(self, text: str, level: int) -> str:
        # Mask first and shorten then: credentials are found in a whole URL only.
        return super().repr_str(credentials.mask(text), level)

    def repr_instance(self, value: object, level: int) -> str:
        """Return the value's own repr, masked and shortened; its class if it has none."""
        try:
            own = credentials.mask(repr(value))
        except Exception:
            return f"<{type(value).__name__}>"
        keep = (self.maxother - 3) // 2
        return own if len(own) <= self.maxother else f"{own[:keep]}...{own[-keep:]}"


_REPR = _Repr()


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
        meant = _number_in(value)
        write = f": write {_bare(name)}={meant:.0f}" if meant is not None and meant == meant // 1 else ""
        raise TypeError(
            f"{owner}({name}={shown(value)}): a whole number{also and f'{also},'} is needed, not {_kind(value)}{write}"
        )
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
        meant = _number_in(value)
        write = "" if meant is None else f": write {_bare(name)}={meant:g}"
        raise TypeError(
            f"{owner}({name}={shown(value)}): a number of {unit} is needed, not {_kind(value)}{write}"
        ) from None
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


def text(owner: str, name: str, value: object, example: str) -> str:
    """Return `value` if it is a text that is not empty. Raise `TypeError` or `ValueError` with an example of one."""
    if not isinstance(value, str):
        raise TypeError(f"{owner}({name}={shown(value)}): a text is needed, not {_kind(value)}, as in {name}={example}")
    if not value.strip():
        raise ValueError(f"{owner}({name}={shown(value)}): the text is empty; write {name}={example}, say")
    return str(value)


def texts(owner: str, name: str, value: object, example: str, *, paths: bool = False) -> tuple[str, ...]:
    """Return `value`, a list of texts, as a tuple. Raise `TypeError` with an example of such a list.

    A single text is refused, because its letters would be taken one by one. With `paths`, `os.PathLike` values count as
    texts.
    """
    if isinstance(value, str) or (paths and isinstance(value, os.PathLike)):
        one = shown(str(value))
        raise TypeError(f"{owner}({name}={one}): a list is needed: write {name}=[{one}]")
    if not isinstance(value, Iterable) or isinstance(value, Mapping | bytes | bytearray):
        raise TypeError(f"{owner}({name}={shown(value)}): a list is needed, not {_kind(value)}, as in {name}={example}")
    items = [os.fspath(item) if paths and isinstance(item, os.PathLike) else item for item in value]
    for item in items:
        if not isinstance(item, str):
            raise TypeError(f"{owner}({name}=[{shown(item)}]): a list of texts is needed, as in {name}={example}")
    return tuple(map(os.path.expanduser, items) if paths else items)


def path(owner: str, name: str, value: object, example: str) -> str:
    """Return `value`, a path, as a text with `~` expanded. Raise `TypeError` or `ValueError` as `text` does."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    return os.path.expanduser(text(owner, name, plain, example))


def pairs(owner: str, name: str, value: object, example: str) -> dict[str, object]:
    """Return `value`, a mapping whose keys are texts, as a dict. Raise `TypeError` with an example of one."""
    if not isinstance(value, Mapping):
        # The value is not shown: values of environment variables may be secret.
        raise TypeError(f"{owner}({name}=...): a dict is needed, not {_kind(value)}, as in {name}={example}")
    for key in value:
        if not isinstance(key, str):
            raise TypeError(f"{owner}({name}={{{shown(key)}: ...}}): names are texts, as in {name}={example}")
    return dict(value)


def function(owner: str, name: str, value: object, example: str) -> None:
    """Raise `TypeError` with an example if `value` cannot be called."""
    if not callable(value):
        raise TypeError(f"{owner}({name}={shown(value)}): a function is needed, not {_kind(value)}, as in {example}")


def callee(method: str, value: object) -> None:
    """Raise `TypeError` if the first argument of `pool.submit` or `pool.map` cannot be called."""
    if not callable(value):
        arguments = "f, 1" if method == "submit" else "f, [1, 2]"
        raise TypeError(
            f"{method}({shown(value)}, ...): the first argument is the function that the workers call, without its "
            f"arguments: write pool.{method}({arguments}), not pool.{method}(f(1))"
        )


def iterables(method: str, values: Iterable[object]) -> None:
    """Raise `TypeError` if a value over which `pool.map` is to run the function has no parts."""
    for value in values:
        if not hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
            raise TypeError(
                f"{method}(f, {shown(value)}): what follows the function is a list or another iterable, not "
                f"{_kind(value)}: write pool.{method}(f, [{shown(value)}])"
            )


def wrong(owner: str, name: str, value: object, needed: str, example: str) -> NoReturn:
    """Raise `TypeError`: `value` is not `needed`. For a class, or a function that makes one, the remedy is to call it.

    `example` is a call that returns a right value.
    """
    if isinstance(value, type) or (callable(value) and hasattr(value, "__name__")):
        # The example's own call, where it is one of this class, has the parameters that make sense.
        made = f"sky.{value.__name__}"
        call = example if example.startswith(f"{made}(") else f"{made}(...)"
        if not getattr(value, "__module__", "").startswith("skyward_lite"):
            call = example
        raise TypeError(f"{owner}({name}={shown(value)}): {needed}, which is made by a call: write {name}={call}")
    raise TypeError(f"{owner}({name}={shown(value)}): {needed}, such as {example}")


def shown(value: object) -> str:
    """Return a short repr for an error's text, whatever `value` is, without credentials."""
    try:
        if isinstance(value, type) and value.__module__.startswith("skyward_lite"):
            return f"sky.{value.__name__}"
        return _REPR.repr(value)
    except Exception:  # an int of more digits than Python converts, say
        return f"<{type(value).__name__}>"


def _bare(name: str) -> str:
    """Return a parameter's name as it is written in a call: "concurrency" of "'lab1', concurrency"."""
    return name.rpartition(" ")[2]


def _kind(value: object) -> str:
    """Return what `value` is, with the article: "a str", "an int", "None"."""
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _number_in(value: object) -> float | None:
    """Return the number that was probably meant: 60 for "60", 2 for 2.0, 120 for a timedelta of 2 min; else None."""
    if isinstance(value, bool):
        return None
    total_seconds = getattr(value, "total_seconds", None)
    try:
        if callable(total_seconds):
            return float(total_seconds())
        if isinstance(value, str | bytes) and len(value) > MAX_SHOWN_DIGITS:
            return None
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < 10**MAX_SHOWN_DIGITS else None

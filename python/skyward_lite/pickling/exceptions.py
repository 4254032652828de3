"""Exceptions to bytes and back, with where they were raised."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from ..errors import RemoteError, RemoteTraceback
from . import payload, stand_ins, tracebacks

MAX_END_CHARACTERS: Final = 16 * 1024
"""Of a longer text or traceback, so many characters travel of its beginning, and as many of its end."""


class Place(NamedTuple):
    """Where an exception was raised: on which node; in which call of its batch; and that call, as it is written.

    `call` is empty if the call could not be rebuilt. `hint` is advice that is not in the exception's own message.
    """

    node: str
    position: int | None
    call: str
    hint: str = ""


def dump(encoder: payload.Encoder, error: BaseException, skip: int, place: Place) -> payload.Encoded:
    """Pickle an exception with its traceback, without the outermost `skip` frames, which are ours. Never raises.

    If the exception cannot be pickled, or not be rebuilt (joblib #270), a `RemoteError` that names it is sent instead.
    """
    text = "(its traceback cannot be shown)"
    try:
        trace = error.__traceback__
        for _ in range(skip):
            trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
        if not place.hint:
            place = place._replace(hint=stand_ins.missing_module_hint(error) or "")
        text = _shortened(tracebacks.written(error, trace, bool(place.call)))
        # Not by assignment, which a frozen dataclass refuses.
        BaseException.with_traceback(error, None)
        pickled, buffers = encoder.dumps((error, text, tuple(place)))
        if not isinstance(payload.loads(pickled, buffers)[0], BaseException):
            raise TypeError("unpickles as something that is no exception")
    except BaseException as reason:
        name = f"{type(error).__module__}.{type(error).__qualname__}"
        message = f"{name}: {_text(error)} (a {type(reason).__name__} prevents sending it: {_text(reason)})"
        # It consists of text alone, so it can be pickled; and the pool takes it whatever the user's limit is.
        return pickle.dumps((RemoteError(message), text, tuple(place)), 5), None
    return pickled, buffers


def _text(error: BaseException) -> str:
    try:
        return _shortened(str(error))
    except BaseException as reason:
        return f"(its text cannot be shown: {type(reason).__name__})"


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * MAX_END_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:MAX_END_CHARACTERS]}\n… {left_out:,} characters left out …\n{text[-MAX_END_CHARACTERS:]}"


def load(pickled: bytes | memoryview, buffers: Sequence[Any] | None, first: int | None) -> BaseException:
    """Rebuild an exception; its remote traceback is its `__cause__`, and a note tells where it was raised.

    `first` is the place of its batch's first call among the calls that were submitted together, None for a call alone.
    """
    try:
        error, text, place = payload.loads(pickled, buffers)
    except Exception as reason:
        name = type(reason).__name__
        return RemoteError(f"the task raised an exception that cannot be rebuilt here: {name}: {reason}")
    node, position, call, hint = place
    task = None if first is None or position is None else first + position
    where = f"node {node}" + ("" if task is None else f", task {task}")
    note = f"{where}: {call}" if call else f"{where}: the call could not be rebuilt there, and nothing of it has run"
    cause = RemoteTraceback(tracebacks.completed(text), node, task, call)
    object.__setattr__(error, "__cause__", cause)
    # An exception may refuse to have attributes.
    with contextlib.suppress(Exception):
        error.add_note(f"{note}. {hint[0].upper()}{hint[1:]}" if hint else note)
    return error  # type: ignore[no-any-return]

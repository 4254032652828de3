"""Callables, values and exceptions to bytes and back."""

from __future__ import annotations

import dataclasses
import pickle
import threading

import numpy as np
import pytest
from skyward_lite import PayloadTooLargeError, RemoteError, RemoteTraceback
from skyward_lite.pickling import exceptions, payload


def test_values_round_trip(encoder):
    """Values arrive equal, lambdas and closures included."""
    k = 3
    pickled, buffers = encoder.dumps((lambda x: x + k, {"a": [1, None]}))
    function, value = payload.loads(pickled, buffers)
    assert function(4) == 7
    assert value == {"a": [1, None]}
    assert buffers is None


def test_large_arrays_travel_beside_the_pickle(encoder):
    """From 16 KiB on an array's memory is not copied into the pickle."""
    small, large = np.arange(100), np.arange(10_000)
    pickled, buffers = encoder.dumps([small, large])
    assert len(pickled) < 2000
    assert [b.nbytes for b in buffers] == [large.nbytes]
    one, two = payload.loads(pickled, buffers)
    assert (one == small).all()
    assert (two == large).all()


def test_non_contiguous_arrays_round_trip(encoder):
    """Slices and arrays in Fortran order arrive as they were."""
    array = np.arange(40_000).reshape(200, 200)
    for value in (array[::2, ::3], np.asfortranarray(array), array.T):
        assert (payload.loads(*encoder.dumps(value)) == value).all()


def test_more_buffers_than_a_message_has_parts(encoder):
    """Beyond 1,000 buffers of a message the others stay in the pickle."""
    arrays = [np.full(2048, i) for i in range(50)]
    encoder.limit = 1 << 30
    many = arrays * 21
    many = [a.copy() for a in many]
    pickled, buffers = encoder.dumps(many)
    assert len(buffers) == payload.MAX_BUFFERS
    assert all((a == b).all() for a, b in zip(payload.loads(pickled, buffers), many, strict=True))


def test_encoder_holds_nothing_between_values(encoder):
    """An encoder that is used again does not refer to an earlier value."""
    shared = ["x" * 100]
    first, _ = encoder.dumps(shared)
    second, _ = encoder.dumps(shared)
    assert first == second
    assert pickle.loads(second) == shared


def test_encoder_is_reset_after_an_error(encoder):
    """After an error the encoder is as new."""
    with pytest.raises(TypeError):
        encoder.dumps([np.arange(10_000), threading.Lock()])
    pickled, buffers = encoder.dumps(1)
    assert (payload.loads(pickled, buffers), buffers) == (1, None)


def test_too_large_payloads_are_named(encoder):
    """A payload that is too large is an error with size, limit and remedy, for pickles and for buffers."""
    for value in (b"x" * (1 << 20), np.zeros(1 << 20, np.uint8)):
        with pytest.raises(PayloadTooLargeError, match=r"1,048,\d\d\d bytes.*limit of 1,048,576.*max_payload"):
            encoder.dumps(value)


class Unpicklable(Exception):
    """Cannot be pickled."""

    def __reduce__(self):
        raise TypeError("no way")


class NeedsTwo(Exception):
    """Pickles, but cannot be rebuilt: joblib #270."""

    def __init__(self, one, two):
        super().__init__(one)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def travelled(encoder: payload.Encoder, error: BaseException) -> BaseException:
    place = exceptions.Place("lab1", 1, "f(3)")
    return exceptions.load(*exceptions.dump(encoder, error, 0, place), first=10)


def test_exceptions_carry_their_traceback(encoder):
    """An exception arrives with type, arguments, the traceback's text, and which call of which node it was."""
    error = travelled(encoder, raised(KeyError("k")))
    assert type(error) is KeyError
    assert error.args == ("k",)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in raised" in str(error.__cause__)
    assert "KeyError: 'k'" in str(error.__cause__)
    assert error.__notes__ == ["node lab1, task 11: f(3)"]


@pytest.mark.parametrize("error", [Unpicklable("u"), NeedsTwo("n", 2)])
def test_exceptions_that_cannot_be_rebuilt_get_a_surrogate(encoder, error):
    """The surrogate of an exception has the original's type, text and traceback."""
    got = travelled(encoder, raised(error))
    assert type(got) is RemoteError
    assert f"{type(error).__name__}: {error}" in str(got)
    assert type(error).__name__ in str(got.__cause__)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    n: int

    def __reduce__(self):
        return Frozen, (self.n,)


def test_exceptions_that_are_frozen_dataclasses(encoder):
    """An exception that refuses attributes, as a frozen dataclass does, arrives as itself."""
    got = travelled(encoder, Frozen(3))
    assert type(got) is Frozen
    assert got.n == 3
    assert isinstance(got.__cause__, RemoteTraceback)


class Hopeless(Exception):
    """Neither pickles nor prints."""

    def __reduce__(self):
        raise SystemExit

    def __str__(self):
        raise LookupError


def test_exceptions_whose_methods_all_raise(encoder):
    """An exception whose methods all raise still arrives as an error."""
    got = travelled(encoder, raised(Hopeless()))
    assert type(got) is RemoteError
    assert "Hopeless" in str(got)


def test_exceptions_with_a_long_text_are_shortened(encoder):
    """An exception over the limit is replaced by its text's beginning and end."""
    got = travelled(encoder, raised(ValueError("x" * (2 << 20))))
    assert type(got) is RemoteError
    assert "ValueError: xxx" in str(got)
    assert "left out" in str(got)
    assert len(str(got)) < 1 << 17


def test_reentrant_pickling(encoder):
    """An argument whose pickling pickles another object does not disturb its own pickle."""

    class Inner:
        def __reduce__(self):
            return (bytes, (encoder.dumps(["inner"])[0],))

    pickled, buffers = encoder.dumps(["before", Inner(), "after"])
    before, inner, after = payload.loads(pickled, buffers)
    assert (before, after) == ("before", "after")
    assert pickle.loads(inner) == ["inner"]

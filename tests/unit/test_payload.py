"""Callables, values and exceptions to bytes and back."""

from __future__ import annotations

import dataclasses
import functools
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
from skyward_lite import PayloadTooLargeError, RemoteError, RemoteTraceback
from skyward_lite.pickling import batches, exceptions, payload
from skyward_lite.pickling.handles import Handles
from skyward_lite.pickling.pickler import Shared


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


# ------------------------------------------------------------------------------------------------ large values apart


def texts(word: str) -> list[str]:
    """Return a list whose pickle is larger than 64 KiB."""
    return [f"{word} {i}" for i in range(8_000)]


def sent(encoder: payload.Encoder, *args, **kwargs):
    """Return the call as it arrives, and the contents of the buffers that travel beside its pickle."""
    pickled, buffers = batches.dump_call(encoder, (max, args, kwargs))
    function, *arrived = payload.loads(pickled, buffers)
    assert function is max
    return arrived, list(map(bytes, buffers or ()))


class Held:
    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize("make", [texts, lambda word: {word: texts(word)}, lambda word: Held(texts(word))])
def test_large_arguments_have_the_same_bytes_in_every_call(encoder, make):
    """A large argument is one buffer beside the pickle, equal for equal content whatever the other arguments are."""
    value = make("a")
    _, (stream,) = sent(encoder, value)
    array = np.arange(10_000)
    for args, kwargs in [((1, value), {}), ((array, [value]), {"key": value}), ((Held(value), value, "text"), {})]:
        assert stream in sent(encoder, *args, **kwargs)[1]
    assert sent(encoder, make("b"))[1] != [stream]


def test_arguments_share_what_they_share_at_home(encoder):
    """An object that large and small arguments have in common is one object at the far end, too."""
    large, small = texts("a"), ["small"]
    large.append(small)
    other = {"large": large, "texts": texts("b")}
    (args, kwargs), _ = sent(encoder, small, other, large, [small], again=large)
    assert args[1]["large"] is args[2] is kwargs["again"]
    assert args[0] is args[2][-1] is args[3][0]
    assert (args, kwargs) == ((small, other, large, [small]), {"again": large})


def test_flat_arguments_depend_on_nothing(encoder):
    """Each list, tuple or dictionary of numbers and texts has the same bytes in every call, also beside others."""
    flat = [texts("a"), dict.fromkeys(texts("b"), 1.5), tuple(range(30_000))]
    alone = [sent(encoder, value)[1] for value in flat]
    (args, _), streams = sent(encoder, [flat[1]], *flat, texts("c"), [[], flat[0]])
    assert all(stream in streams for (stream,) in alone)
    assert args == ([flat[1]], *flat, texts("c"), [[], flat[0]])
    assert args[0][0] is args[2]
    assert args[5][1] is args[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.append(1),
        lambda values: values.pop(),
        lambda values: values.__setitem__(5, True),
        lambda values: values.__setitem__(5, [1]),
        lambda values: values.sort(key=str),
        lambda values: values.__setitem__(slice(None), texts("b")),
    ],
)
def test_changed_flat_arguments_are_sent_as_they_are(encoder, change):
    """A container that a call of `Parallel` has sent before is sent anew if it has changed in the least."""
    values, shared = list(range(30_000)), Shared()
    for _ in range(3):
        for _ in range(3):
            ((_, args, _),) = payload.loads(*batches.dump(encoder, [(max, (values, 1), {})], shared))
            assert list(map(repr, args[0])) == list(map(repr, values))
        change(values)


def test_several_large_arguments_settle_on_an_order(encoder):
    """A large argument that calls share has the same bytes in all from the second on, next to others that change."""
    shared = Held(texts("shared"))
    calls = [sent(encoder, Held(texts(f"own {i}" * (i + 1))), shared)[1] for i in range(4)]
    assert len(set.intersection(*map(set, calls[1:]))) == 1


@pytest.mark.parametrize("text", [b"\xff" * 100_000, "é\ud800" * 50_000], ids=["bytes", "str"])
def test_large_texts_travel_beside_the_pickle(encoder, text):
    """A large text is a buffer as it is, without a copy if it is a `bytes`, and a text of its own at the far end."""
    pickled, buffers = batches.dump_call(encoder, (max, (text, text, 1), {}))
    assert len(pickled) < 1_000
    assert len(buffers) == 1
    assert isinstance(text, str) or buffers[0].obj is text
    _, args, _ = payload.loads(pickled, buffers)
    assert args == (text, text, 1)
    assert type(args[0]) is type(text)


def test_small_calls_are_one_pickle(encoder):
    """A call without large arguments is a plain pickle."""
    call = max, ("text", [1, 2], {"k": np.arange(10)}), {}
    pickled, buffers = batches.dump_call(encoder, call)
    assert buffers is None
    assert pickled == encoder.dumps(call)[0]


def test_batches_have_equal_large_arguments_once(encoder):
    """The calls of a batch that have equal large arguments share a stream, and each rebuilds objects of its own."""
    shared = texts("shared")
    calls = [(max, (shared, i), {"own": [texts("own")] if i == 2 else None}) for i in range(4)]
    pickled, buffers = batches.dump(encoder, calls)
    assert len(buffers) == 2
    arrived = list(payload.loads(pickled, buffers))
    assert arrived == calls
    assert len({id(args[0]) for _, args, _ in arrived}) == 4


def test_tuples_that_many_others_have_are_not_gone_through_again_and_again(encoder):
    """A tuple that leads to another one in 2 to the power of 60 ways is pickled in a moment, in batches, too."""
    inner: tuple = (0,)
    value = inner
    for _ in range(60):
        value = value, value
    calls = [(max, (value, i), {}) for i in range(2)]
    for encoded in (batches.dump(encoder, calls, Shared()), batches.dump(encoder, calls[:1], Shared())):
        for _, (arrived, _), _ in payload.loads(*encoded):
            while type(arrived[0]) is tuple:
                assert arrived[0] is arrived[1]
                arrived = arrived[0]
            assert arrived == inner


def test_large_arguments_fail_as_others_do(encoder):
    """A large argument that cannot be pickled, or is over the limit, raises what a small one raises."""
    with pytest.raises(TypeError, match="lock"):
        sent(encoder, [*texts("a"), threading.Lock()])
    with pytest.raises(PayloadTooLargeError, match="limit of 1,048,576"):
        sent(encoder, list(range(1_000_000)))
    assert sent(encoder, 1)[0] == [(1,), {}]


def test_large_functions_are_pickled_once(encoder):
    """A function with large captured variables is, in all batches of a call, what it was in the first one."""
    array, values = np.zeros(10_000), texts("a")

    def get():
        return array[0], values[-1]

    shared = Shared()
    first = batches.dump(encoder, [(get, (), {})], shared)
    array[0], values[-1] = 1, "changed"
    second = batches.dump(encoder, [(get, (), {}), (get, (), {})], shared)
    assert [b.obj for b in first[1]] == [b.obj for b in second[1]]
    (get_first, _, _), (get_second, _, _) = payload.loads(*second)
    assert get_first is get_second
    assert get_first() == (0, "a 7999")
    del get
    assert not shared.all


def test_batches_that_are_drawn_together_look_once_at_an_array():
    """Batches that wait when an array is first looked at share its handle until the last is sent; later ones do not."""
    arrays = [np.zeros(20_000)]
    first, second, third, fourth = ([(abs, (arrays[0],), {"x": arrays[0]})] for _ in range(4))
    waiting, made = [[(abs, (1,), {})], second], []

    def make(view):
        made.append(view.nbytes)
        return object()

    def send(batch):
        handles.begin(batch)
        found = handles.find(pickle.PickleBuffer(arrays[0]).raw())
        handles.end(batch)
        return found

    handles = Handles(make, lambda: waiting)
    handle = send(first)
    waiting[:] = [fourth]
    assert send(second) is handle
    assert made == [160_000]
    other = send(third)
    waiting.clear()
    assert send(fourth) is other is not handle
    assert made == [160_000] * 2
    assert isinstance(send(first), memoryview), "no other batch waits that has the array"
    gone = weakref.ref(arrays.pop())
    del first, second, third, fourth
    assert gone() is None


def test_flat_arguments_that_calls_share_are_pickled_twice(encoder):
    """However many containers of their own calls have beside one that they share, it is pickled twice and then kept."""
    common, shared, streams = texts("common"), Shared(), []
    for i in range(12):
        own = [f"own {i} {j}" for j in range(8_000)] if i % 2 else None
        _, buffers = batches.dump(encoder, [(max, (common, [i], {"i": i}, own), {})], shared)
        streams += [view.obj for view in buffers if view.obj == pickle.dumps(common, 5)]
    assert len(streams) == 12
    assert len(set(map(id, streams))) == 2


@pytest.mark.parametrize("calls", [1, 3])
def test_large_functions_of_single_tasks_are_not_kept(encoder, calls):
    """If every task brings a large function of its own, nothing keeps what these have captured once they are sent."""
    common, shared, arrays = [1], Shared(), []
    for _ in range(5):
        own = [np.zeros(10_000) for _ in range(calls)]
        arrays += map(weakref.ref, own)
        batches.dump(encoder, [(functools.partial(lambda x: x, array), (), {}) for array in own], shared)
        batches.dump(encoder, [((lambda x: lambda *_: x)(array), (common,), {}) for array in own], shared)
        del own
        gc.collect()
    assert not any(array() is not None for array in arrays)


class LookedUpOnly(dict):
    """Functions that other threads add to, so that nobody may go through them."""

    def __iter__(self):
        raise AssertionError

    items = keys = values = __iter__


def test_functions_of_other_threads_do_not_matter(encoder):
    """While a thread pickles a large argument, others may remember functions for the same call of Parallel."""
    shared = Shared()
    shared.all, shared.functions = LookedUpOnly(), LookedUpOnly()
    for _ in range(2):
        pickled, buffers = batches.dump(encoder, [(lambda: 0, (texts("a"),), {})], shared)
        assert payload.loads(pickled, buffers)[0][1] == (texts("a"),)


def test_only_what_cannot_change_gets_a_handle():
    """From its second time on a large buffer is its handle, if nothing can write to its memory."""
    of_bytes = np.frombuffer(bytes(160_000))
    of_view = np.frombuffer(memoryview(bytes(160_008))[8:])
    small = np.frombuffer(bytes(100_000))
    writable = np.zeros(20_000)
    window = writable[:]
    # Its view can still be written to, and it can itself be made writable again.
    own = writable.copy()
    window_of_own = own[:]
    own.flags.writeable = window.flags.writeable = False
    of_bytearray = np.frombuffer(memoryview(bytearray(160_000)).toreadonly())
    made = []

    def make(view):
        made.append(view.nbytes)
        return object()

    handles = Handles(make)
    buffers = of_bytes, of_bytes[10:], of_view, small, own, window_of_own, writable, window, of_bytearray
    found = [[handles.find(pickle.PickleBuffer(each).raw()) for each in buffers] for _ in range(3)]
    assert [[type(each) is object for each in row] for row in found] == [
        [False] * 9,
        *[[True] * 3 + [False] * 6] * 2,
    ]
    assert found[1][:3] == found[2][:3]
    assert made == [160_000, 159_920, 160_000]


def test_handles_keep_few_buffers_that_are_sent_once(encoder):
    """Arrays of a `bytes` that each go with one task are not kept, though the next one may have their address."""
    shared = Shared()
    shared.handles = Handles(memoryview)
    arrays = []
    for _ in range(40):
        array = np.frombuffer(bytes(200_000))
        arrays.append(weakref.ref(array))
        batches.dump(encoder, [(max, (array,), {})], shared)
        del array
    assert sum(each() is not None for each in arrays) <= 10


class Counted(list):
    looks = 0

    def __iter__(self):
        self.looks += 1
        return super().__iter__()


def test_handles_look_once_at_the_batches_that_wait(encoder):
    """However many arrays a batch has, the arguments of those that wait are gone through once."""
    common = np.zeros(20_000)
    waiting = [Counted([(max, (common, np.zeros(20_000)), {})]) for _ in range(3)]
    shared = Shared()
    shared.handles = Handles(memoryview, lambda: waiting)
    batch = [(max, (np.zeros(20_000), np.zeros(20_000)), {}), (max, (common[:],), {})]
    shared.handles.begin(batch)
    encoder.limit = 1 << 30
    _, buffers = batches.dump(encoder, batch, shared)
    shared.handles.end(batch)
    # What the fake handle is a view of tells which of them got one.
    assert [buffer.nbytes for buffer in buffers] == [160_000] * 3
    assert [each.looks for each in waiting] == [1] * 3
    for each in waiting:
        shared.handles.begin(each)
        found = shared.handles.find(pickle.PickleBuffer(common).raw())
        assert found is buffers[-1]
        shared.handles.end(each)
    assert shared.handles.find(pickle.PickleBuffer(common).raw()) is not buffers[-1]

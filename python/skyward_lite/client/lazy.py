"""`@sky.compute`: functions whose calls wait until an operator says where they run.

    slow(3) > pool         a Future
    slow(3) >> pool        its result
    slow(3) @ pool         its results on every ready node, as a list
    (a & b) >> pool        several calls at once, as a tuple; so does gather(a, b) >> pool

An operator that binds tighter than `&` wants the parentheses. Each operator runs the calls anew, with their arguments
as they are then.
"""

# Not compute.py: a submodule hides the function of the same name in the package as soon as something imports it.
from __future__ import annotations

import abc
import functools
import operator
import reprlib
import sys
import threading
import types
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Concatenate, Generic, Never, NoReturn, ParamSpec, Self, TypeVar, TypeVarTuple, overload

from ..errors import NodeLostError
from ..pickling import payload
from ..pickling.pickler import travels_by_name
from .nodes import NodeState
from .pool import ComputePool
from .tasks import Tasks

P = ParamSpec("P")
Q = ParamSpec("Q")
S = TypeVar("S")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")
U = TypeVar("U")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
Ts = TypeVarTuple("Ts")


def compute(fn: Callable[P, T]) -> ComputeFunction[P, T]:
    """Decorate a function so that calling it gives a lazy call; `fn.local(...)` calls it here and now.

    Methods may be decorated too; `self` is sent like any argument.
    """
    return ComputeFunction(fn)


class ComputeFunction(Generic[P, T]):
    """A function under `@sky.compute`. `local` is the function itself."""

    __name__: str
    __qualname__: str
    local: Callable[P, T]

    def __init__(self, fn: Callable[P, T]) -> None:
        if isinstance(fn, (staticmethod, classmethod)) or not callable(fn):
            raise TypeError(f"@sky.compute takes a function, not {fn!r}: @staticmethod and @classmethod go above it")
        self.__name__ = self.__qualname__ = type(fn).__name__  # of what has no name, as functools.partial
        # Not what else the function's __dict__ has: it could replace our own attributes.
        functools.update_wrapper(self, fn, updated=())
        self.local = fn
        if isinstance(fn, types.FunctionType) and "<" not in fn.__qualname__ and not _is_found(fn):
            # Its name will lead to this object. So that pickles can still name it, instead of holding its code and its
            # module's globals, it gets the name under which it will be found.
            fn.__qualname__ += ".local"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> LazyCall[T]:
        return LazyCall(self, args, kwargs)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
        self: ComputeFunction[Concatenate[S, Q], T], instance: S, owner: type | None = None
    ) -> ComputeFunction[Q, T]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        bound = ComputeFunction(types.MethodType(self.local, instance))
        bound.__qualname__ = self.__qualname__
        return bound

    def __repr__(self) -> str:
        return f"<compute function {self.__module__}.{self.__qualname__}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        if travels_by_name(self) and _is_found(self):
            return self.__qualname__
        return super().__reduce_ex__(protocol)


class Lazy(abc.ABC, Generic[R_co]):
    """Calls that have not run: what the operators take on their left."""

    __slots__ = ()

    def __gt__(self, pool: ComputePool) -> Future[R_co]:
        """Run it on the pool; its future. Raises at once what pickling it raises, and nothing is sent then."""
        _check(self, ">", pool)
        return self._start(pool, self._encode(pool), None)

    def __rshift__(self, pool: ComputePool) -> R_co:
        """Run it on the pool; its result. If the wait is interrupted, what has not started is cancelled."""
        _check(self, ">>", pool)
        return _result(self > pool)

    def __matmul__(self, pool: ComputePool) -> list[R_co]:
        """Run it on each node that is ready; the results in the order of `pool.nodes()`.

        The first error in that order is raised, and what has not started on other nodes is cancelled; so it is
        `NodeLostError` if a node goes away. A group runs as a whole on each node.
        """
        _check(self, "@", pool)
        encoded = self._encode(pool)
        ready = [number for number, node in enumerate(pool.nodes()) if node.state == NodeState.READY]
        if not ready:
            raise NodeLostError(f"{self!r} @ pool: no node is ready")
        return list(_result(_Together([self._start(pool, encoded, number) for number in ready])))

    def __rand__(self, other: Never) -> NoReturn:
        raise _not_lazy(other, self)

    def __bool__(self) -> NoReturn:
        raise TypeError(f"{self!r} has not run, so it is neither true nor false: write `({self._shown()} >> pool)`")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{self!r} has not run, and only its result can be sent: write `{self._shown()} >> pool` first; "
            "inside a task, or for submit and map, use the function's `.local`"
        )

    def __repr__(self) -> str:
        return f"<lazy {self._shown()}>"

    @abc.abstractmethod
    def _shown(self) -> str:
        """Give it as one would write it."""

    @abc.abstractmethod
    def _encode(self, pool: ComputePool) -> list[payload.Encoded]:
        """Pickle it: once, for however many nodes."""

    @abc.abstractmethod
    def _start(self, pool: ComputePool, encoded: list[payload.Encoded], node: int | None) -> Future[R_co]:
        """Send it, to one node or to whichever is free."""


class LazyCall(Lazy[T_co]):
    """A call of a compute function that has not run."""

    __slots__ = ("_args", "_function", "_kwargs")

    def __init__(self, function: ComputeFunction[..., T_co], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._args = args
        self._kwargs = kwargs

    @overload
    def __and__(self, other: LazyCall[U]) -> LazyGroup[T_co, U]: ...
    @overload
    def __and__(self, other: LazyGroup[*Ts]) -> LazyGroup[T_co, *Ts]: ...
    def __and__(self, other: object) -> Any:
        """Give the group of both."""
        return LazyGroup(self, *_members(self, other))

    def _shown(self) -> str:
        args = [reprlib.repr(arg) for arg in self._args]
        args += [f"{key}={reprlib.repr(arg)}" for key, arg in self._kwargs.items()]
        return f"{self._function.__name__}({', '.join(args)})"

    def _encode(self, pool: ComputePool) -> list[payload.Encoded]:
        return [Tasks.of(pool).encode_call(self._function.local, self._args, self._kwargs)]

    def _start(self, pool: ComputePool, encoded: list[payload.Encoded], node: int | None) -> Future[T_co]:
        return Tasks.of(pool).submit(*encoded[0], node)


class LazyGroup(Lazy[tuple[*Ts]], Generic[*Ts]):
    """Calls that run at once. Their results are a tuple in the order of the calls.

    As in `Executor.map` the first error in that order is raised, as soon as it is reached; then the calls that have
    not started are cancelled, and what runs goes on to its end, unseen.
    """

    __slots__ = ("_calls",)

    def __init__(self, *calls: LazyCall[Any]) -> None:
        self._calls = calls

    @overload
    def __and__(self, other: LazyCall[U]) -> LazyGroup[*Ts, U]: ...
    @overload
    def __and__(self, other: LazyGroup[*tuple[Any, ...]]) -> LazyGroup[*tuple[Any, ...]]: ...
    def __and__(self, other: object) -> Any:
        """Give the group with further members."""
        return LazyGroup(*self._calls, *_members(self, other))

    def _shown(self) -> str:
        if len(self._calls) > 4:
            return f"gather({self._calls[0]._shown()}, … {len(self._calls)} calls)"
        return f"gather({', '.join(call._shown() for call in self._calls)})"

    def _encode(self, pool: ComputePool) -> list[payload.Encoded]:
        encode = Tasks.of(pool).encode_call
        return [encode(call._function.local, call._args, call._kwargs) for call in self._calls]

    def _start(self, pool: ComputePool, encoded: list[payload.Encoded], node: int | None) -> Future[tuple[*Ts]]:
        submit = Tasks.of(pool).submit
        return _Together([submit(pickled, buffers, node) for pickled, buffers in encoded])


class _Together(Future[Any]):
    """Several futures as one: the tuple of their values, or the first error in their order."""

    def __init__(self, members: Sequence[Future[Any]]) -> None:
        super().__init__()
        self._members = members
        self._good = 0
        """How many, from the first on, have a value."""
        self._over = False
        self._turn = threading.Lock()
        self._look()
        for member in members:
            member.add_done_callback(self._look)

    def _look(self, _: object = None) -> None:
        members = self._members
        with self._turn:
            while self._good < len(members) and members[self._good].done() and not _failed(members[self._good]):
                self._good += 1
            if self._over or (self._good < len(members) and not members[self._good].done()):
                return
            self._end()
        # Without the lock: callbacks may do anything.
        if self._good == len(members):
            self.set_result(tuple(member.result() for member in members))
            return
        # First, so that whoever gets the error knows that nothing more will start.
        for member in members[self._good + 1 :]:
            member.cancel()
        bad = members[self._good]
        if bad.cancelled():
            self._say_cancelled()
        else:
            self.set_exception(bad.exception())

    def _end(self) -> None:
        """Be the one who settles. The members' callbacks lead here: let go of them, or all live on as a cycle."""
        self._over = True
        self._members = ()

    def _say_cancelled(self) -> None:
        super().cancel()
        self.set_running_or_notify_cancel()

    def cancel(self) -> bool:
        """Cancel what has not started; true if that was some of it, for then there will be no tuple."""
        members = self._members
        stopped = [member.cancel() for member in members]
        with self._turn:
            mine = any(stopped) and not self._over
            if mine:
                self._end()
        if mine:
            self._say_cancelled()
        return self.cancelled()


def _failed(done: Future[Any]) -> bool:
    return done.cancelled() or done.exception() is not None


def _result(future: Future[R]) -> R:
    """Wait for a future that nobody else has."""
    try:
        return future.result()
    except BaseException:
        # Ctrl-C too: what has not started must not start when nobody waits for it.
        future.cancel()
        raise
    finally:
        # The error's traceback leads to this frame, and from here to the error: no cycle.
        del future


def _check(lazy: Lazy[Any], symbol: str, pool: object) -> None:
    if not isinstance(pool, ComputePool):
        raise TypeError(
            f"{lazy!r} {symbol} {reprlib.repr(pool)}: on the right goes a pool, "
            f"as in `with sky.pool() as pool: {lazy._shown()} {symbol} pool`"
        )


def _members(lazy: Lazy[Any], other: object) -> tuple[LazyCall[Any], ...]:
    if isinstance(other, LazyCall):
        return (other,)
    if isinstance(other, LazyGroup):
        return other._calls
    raise _not_lazy(lazy, other)


def _not_lazy(left: object, right: object) -> TypeError:
    return TypeError(
        f"{reprlib.repr(left)} & {reprlib.repr(right)}: both sides must be calls that have not run. "
        "`>>` and `@` bind tighter than `&`: write `(a & b) >> pool`, or `gather(a, b) >> pool`"
    )


def _is_found(fn: Any) -> bool:
    """Whether its module has it under its qualified name, which is how pickle looks for it."""
    try:
        return operator.attrgetter(fn.__qualname__)(sys.modules[fn.__module__]) is fn
    except (AttributeError, KeyError):
        return False


@overload
def gather(a: LazyCall[T1], /) -> LazyGroup[T1]: ...
@overload
def gather(a: LazyCall[T1], b: LazyCall[T2], /) -> LazyGroup[T1, T2]: ...
@overload
def gather(a: LazyCall[T1], b: LazyCall[T2], c: LazyCall[T3], /) -> LazyGroup[T1, T2, T3]: ...
@overload
def gather(a: LazyCall[T1], b: LazyCall[T2], c: LazyCall[T3], d: LazyCall[T4], /) -> LazyGroup[T1, T2, T3, T4]: ...
@overload
def gather(
    a: LazyCall[T1], b: LazyCall[T2], c: LazyCall[T3], d: LazyCall[T4], e: LazyCall[T5], /
) -> LazyGroup[T1, T2, T3, T4, T5]: ...
@overload
def gather(*calls: LazyCall[T]) -> LazyGroup[*tuple[T, ...]]: ...
def gather(*calls: LazyCall[Any]) -> LazyGroup[*tuple[Any, ...]]:
    """Give the group of these calls, which run at once: `gather(*[slow(i) for i in range(10)]) >> pool` is a tuple.

    `gather(a, b)` is `a & b`. Of more than five calls of different types the tuple's types are not known.
    """
    for call in calls:
        if not isinstance(call, LazyCall):
            raise TypeError(f"gather takes calls of compute functions that have not run, not {reprlib.repr(call)}")
    return LazyGroup(*calls)

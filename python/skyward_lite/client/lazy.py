"""`@sky.compute`: functions whose calls wait until an operator says where they run.

    slow(3) > pool         a Future
    slow(3) >> pool        its result
    slow(3) @ pool         its results on every ready node, as a list
    (a & b) >> pool        several calls at once, as a tuple; so does gather(a, b) >> pool

The operators `>>` and `@` bind tighter than `&`, so a group needs the parentheses. Each operator runs the calls anew,
with their arguments as they are then.
"""

# Not compute.py: a submodule hides the function of the same name in the package as soon as something imports it.
from __future__ import annotations

import abc
import functools
import operator
import reprlib
import sys
import types
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Concatenate, Generic, Never, NoReturn, ParamSpec, Self, TypeVar, TypeVarTuple, overload

from ..errors import NodeLostError
from ..pickling.modules import travels_by_name
from .node_state import NodeState
from .pool import ComputePool
from .tasks import EncodedCall, Tasks
from .together import Together

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
    """Return a function whose calls are lazy: an operator says where they run. `fn.local(...)` calls it here and now.

    Methods may be decorated too; `self` is sent like any argument.

    Parameters
    ----------
    fn : callable
        The function. `@staticmethod` and `@classmethod` go above this decorator.

    Returns
    -------
    ComputeFunction

    Examples
    --------
    >>> @sky.compute
    ... def double(x):
    ...     return 2 * x
    >>> with sky.pool() as pool:
    ...     (double(3) & double(4)) >> pool
    (6, 8)
    """
    return ComputeFunction(fn)


class ComputeFunction(Generic[P, T]):
    """A function under `@sky.compute`. `local` is the function itself.

    Parameters
    ----------
    fn : callable
        The function.
    """

    __name__: str
    __qualname__: str
    local: Callable[P, T]

    def __init__(self, fn: Callable[P, T]) -> None:
        if isinstance(fn, (staticmethod, classmethod)) or not callable(fn):
            raise TypeError(f"@sky.compute takes a function, not {fn!r}: @staticmethod and @classmethod go above it")
        self.__name__ = self.__qualname__ = type(fn).__name__  # for a callable without a name, as functools.partial
        # Not the function's __dict__: its entries could replace our own attributes.
        functools.update_wrapper(self, fn, updated=())
        self.local = fn
        if isinstance(fn, types.FunctionType) and "<" not in fn.__qualname__ and not _is_found(fn):
            # The function's name will lead to this object. With the name under which the function will be found,
            # pickles can still name it, instead of holding its code and its module's globals.
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
    """Calls that have not run: the left side of the operators."""

    __slots__ = ()

    def __gt__(self, pool: ComputePool) -> Future[R_co]:
        """Run it on the pool, and return its future. An error of pickling is raised at once; then nothing is sent."""
        _check(self, ">", pool)
        return self._start(pool, self._encode(pool), None)

    def __rshift__(self, pool: ComputePool) -> R_co:
        """Run it on the pool, and return its result. If the wait is interrupted, calls that wait never run."""
        __tracebackhide__ = True
        _check(self, ">>", pool)
        return _result(self > pool)

    def __matmul__(self, pool: ComputePool) -> list[R_co]:
        """Run it on each node that is ready, and return the results in the order of `pool.nodes()`.

        The first error in that order is raised, `NodeLostError` if a node went away, and calls that have not started on
        other nodes are cancelled. A group runs as a whole on each node.
        """
        _check(self, "@", pool)
        encoded = self._encode(pool)
        ready = [number for number, node in enumerate(pool.nodes()) if node.state == NodeState.READY]
        if not ready:
            raise NodeLostError(f"{self!r} @ pool: no node is ready")
        return list(_result(Together([self._start(pool, encoded, number) for number in ready])))

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
        """Return the text that a user would write for it."""

    @abc.abstractmethod
    def _encode(self, pool: ComputePool) -> list[EncodedCall]:
        """Return its calls as they are sent: pickled once, for however many nodes."""

    @abc.abstractmethod
    def _start(self, pool: ComputePool, encoded: list[EncodedCall], node: int | None) -> Future[R_co]:
        """Send its calls, to the node of that number or to whichever is free, and return their future."""


class LazyCall(Lazy[T_co]):
    """A call of a compute function that has not run. Calling the function makes it.

    Parameters
    ----------
    function : ComputeFunction
        The function.
    args : tuple
        Its arguments.
    kwargs : dict
        Its arguments by name.
    """

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
        """Return the group of both."""
        return LazyGroup(self, *_members(self, other))

    def _shown(self) -> str:
        args = [reprlib.repr(arg) for arg in self._args]
        args += [f"{key}={reprlib.repr(arg)}" for key, arg in self._kwargs.items()]
        return f"{self._function.__name__}({', '.join(args)})"

    def _encode(self, pool: ComputePool) -> list[EncodedCall]:
        return [Tasks.of(pool).encode_call(self._function.local, self._args, self._kwargs)]

    def _start(self, pool: ComputePool, encoded: list[EncodedCall], node: int | None) -> Future[T_co]:
        return Tasks.of(pool).submit(*encoded[0], node)


class LazyGroup(Lazy[tuple[*Ts]], Generic[*Ts]):
    """Calls that run at once. Their results are a tuple in the order of the calls.

    As in `Executor.map` the first error in that order is raised, as soon as it is reached; then the calls that have
    not started are cancelled, and calls that are running go on to their ends, which nobody sees.

    Parameters
    ----------
    *calls : LazyCall
        The calls.
    """

    __slots__ = ("_calls",)

    def __init__(self, *calls: LazyCall[Any]) -> None:
        self._calls = calls

    @overload
    def __and__(self, other: LazyCall[U]) -> LazyGroup[*Ts, U]: ...
    @overload
    def __and__(self, other: LazyGroup[*tuple[Any, ...]]) -> LazyGroup[*tuple[Any, ...]]: ...
    def __and__(self, other: object) -> Any:
        """Return the group with further members."""
        return LazyGroup(*self._calls, *_members(self, other))

    def _shown(self) -> str:
        if len(self._calls) > 4:
            return f"gather({self._calls[0]._shown()}, … {len(self._calls)} calls)"
        return f"gather({', '.join(call._shown() for call in self._calls)})"

    def _encode(self, pool: ComputePool) -> list[EncodedCall]:
        tasks = Tasks.of(pool)
        generation = tasks.begin_call(sparing=True)
        return [tasks.encode_call(call._function.local, call._args, call._kwargs, generation) for call in self._calls]

    def _start(self, pool: ComputePool, encoded: list[EncodedCall], node: int | None) -> Future[tuple[*Ts]]:
        submit = Tasks.of(pool).submit
        return Together([submit(*call, node) for call in encoded])


def _result(future: Future[R]) -> R:
    """Return the result of a future that nobody else has."""
    __tracebackhide__ = True
    try:
        return future.result()
    except BaseException:
        # After Ctrl-C, too, nobody waits for the calls any more: those that have not started must not start.
        future.cancel()
        raise
    finally:
        # The error's traceback refers to this frame. Without the future, this frame does not refer back to the error.
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
    """Return whether its module has it under its qualified name, by which pickle would look for it."""
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
    """Return the group of these calls, which run at once: `gather(*[slow(i) for i in range(10)]) >> pool` is a tuple.

    `gather(a, b)` is `a & b`. For more than five calls of different types, type checkers do not know the tuple's types.

    Parameters
    ----------
    *calls : LazyCall
        The calls.

    Returns
    -------
    LazyGroup
    """
    for call in calls:
        if not isinstance(call, LazyCall):
            raise TypeError(f"gather takes calls of compute functions that have not run, not {reprlib.repr(call)}")
    return LazyGroup(*calls)

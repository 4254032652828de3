"""cloudpickle's pickler, with corrections for objects that it would send wrongly (reducers.py), and with shortcuts for
functions and classes that would otherwise be pickled once for each task."""

from __future__ import annotations

import functools
import io
import types
from collections.abc import Callable
from typing import Any, ClassVar, Final

import cloudpickle
from cloudpickle.cloudpickle import _dynamic_class_reduce

from . import alone, arrays, classes, modules, reducers, script
from .flat import Flats
from .handles import Calls, Handles
from .parts import PLAIN_VALUES
from .reducers import Parts, Reducer, is_by_value
from .route import Route

Functions = dict[int, tuple[Callable[..., Any], Any]]
"""Functions of one call of `Parallel`, by their `id`: the function, which is kept so that no other gets its `id`, and
what `reducer_override` returns for it; None for the usual way."""

MAX_REDUCERS: Final = 4096
"""Types whose reducer is remembered. A program with more types makes classes as it goes."""

_BEFORE_CLASS: Final = (*PLAIN_VALUES, types.ModuleType, types.BuiltinFunctionType)
"""Types of the globals that a method gets before its class is complete: none of them can have an instance of it."""


class Shared:
    """What the calls of one `Parallel` share: its functions and classes are pickled once.

    The joblib backend keeps it while the results of the call may come, for it keeps the classes alive that they name.
    """

    def __init__(self) -> None:
        self.functions: Functions = {}
        """Functions that go by name, or can be pickled alone."""
        self.all: Functions = {}
        """These, and functions that can be pickled apart only from arguments with which they share nothing."""
        self.definitions = classes.Definitions()
        self.question = alone.Question()
        self.flats = Flats()
        self.handles: Handles | None = None
        """Set with the call's first batch, where there is a core to make handles."""
        self.waiting: Callable[[], list[Calls]] = list
        """Returns the batches that joblib has drawn from its input and not begun; set by the owner."""


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles values that go over `route`."""

    shared: Shared | None = None
    """Set by the owner before each `dump` whose definitions others share; made here when it is first needed."""
    known: Functions | None = None
    """Functions that were pickled before, and how; set by the owner before each `dump`."""
    known_reducers: ClassVar[dict[Route, dict[type, Reducer | None]]] = {}

    def __init__(self, file: io.BytesIO, route: Route, **options: Any) -> None:
        super().__init__(file, protocol=5, **options)
        self.route = route
        self.home = route.to_client
        self.bare: dict[int, Any] = {}
        """Methods that are pickled without their state, which comes with the state of their class; cleared by the owner
        after each `dump`."""
        self.reducers = self.known_reducers.setdefault(route, {})

    def reducer_override(self, obj: Any) -> Any:
        if self.known is not None:
            known = self.known.get(id(obj))
            if known is not None and known[1] is not None:
                return known[1]
        # Not isinstance, which believes an object's own `__class__`.
        kind = type(obj)
        try:
            reducer = self.reducers[kind]
        except KeyError:
            if len(self.reducers) >= MAX_REDUCERS:
                self.reducers.clear()
            reducer = self.reducers[kind] = reducers.reducer(kind, self.route, self)
        if kind is types.FunctionType and id(obj) in self.bare:
            return self.bare[id(obj)]
        # cloudpickle's own `reducer_override` is for classes and functions only, and their reducers call it.
        return NotImplemented if reducer is None else reducer(self, obj)

    def usual(self, obj: Any) -> Any:
        """Return how cloudpickle pickles a class or a function; by value if the workers cannot import its module."""
        if modules.by_value(obj):
            return _dynamic_class_reduce(obj) if isinstance(obj, type) else self._dynamic_function_reduce(obj)
        return super().reducer_override(obj)

    def goes_by_name(self, thing: Any) -> bool:
        """Return whether no code has to be sent for a function, a class or a cached function.

        The far end imports it by its name, or has it because it has sent it before.
        """
        if isinstance(thing, type):
            known = thing in reducers.BUILTIN or (self.home and classes.from_home(thing) is not None)
            return known or not is_by_value(self.usual(thing))
        if type(thing) is types.FunctionType:
            return thing in reducers.EVERYWHERE or not is_by_value(self.usual(thing))
        return modules.has_name(thing)

    def without_gaps(self, array: Any) -> Any:
        """Return a copy of an array without the gaps between its elements."""
        return arrays.without_gaps(array)

    def is_alone(self, thing: Any) -> bool:
        """Return whether a function, a class or a cached function can be pickled apart from its call (alone.py)."""
        return self._sharing().question.ask(thing, self.goes_by_name)

    def _sharing(self) -> Shared:
        if self.shared is None:
            self.shared = Shared()
        return self.shared

    def by_value(self, thing: Any, take: Parts) -> Any:
        """Return how a class or a cached function is pickled that the far end cannot import. `take` takes it apart."""
        known = classes.from_home(thing) if self.home else None
        if known is not None:
            return classes.rebuild, (*known, None, False)
        if not self.home and not self.is_alone(thing):
            # It shares something with the rest of the pickle, and so is part of it.
            make, state, setter = take(self, thing)
            functions, rest = self._bare_methods(thing)
            arguments = classes.identify(thing), functions, *make
            return classes.fresh, arguments, (setter, state, rest), None, None, classes.set_fresh
        definition = self._sharing().definitions.define(thing, take, functools.partial(_pickled, self.route))
        return classes.rebuild, (*definition, not self.home)

    def _bare_methods(self, thing: Any) -> tuple[list[Any], list[Any]]:
        """Return the methods of a class without their state, and the state of each.

        The globals of a method may have instances of its class. For example, an instance in a set needs its class's
        `__hash__` as soon as it is rebuilt. So the class gets its methods before their globals are rebuilt.
        """
        methods: list[Any] = []
        states: list[Any] = []
        for name, value in vars(thing).items() if isinstance(thing, type) else ():
            reduced = reducers.reduce_function(self, value) if type(value) is types.FunctionType else NotImplemented
            if is_by_value(reduced):
                make, arguments, state, _, _, setter = reduced
                self.bare[id(value)] = make, arguments
                own = state[1] if setter is script.set_function else state
                known = own[1].get("__globals__", {}) if isinstance(own[1], dict) else {}
                methods.append((name, value, {k: v for k, v in known.items() if type(v) in _BEFORE_CLASS}))
                states.append((setter, value, state))
        return methods, states


class _DefinitionPickler(Pickler):
    """Writes the definition of one class. The other classes in it stand there by their ids."""

    def __init__(self, file: io.BytesIO, route: Route, thing: Any) -> None:
        super().__init__(file, route)
        self.thing = thing
        self.references: classes.References = {}
        """The other classes, by id."""

    def by_value(self, thing: Any, take: Parts) -> Any:
        if self.home and classes.from_home(thing) is not None:
            return super().by_value(thing, take)
        ident = classes.identify(thing)
        if thing is not self.thing:
            self.references[ident] = thing, take
            return classes.member, (ident,)
        make, state, setter = take(self, thing)
        return classes.skeleton, (ident, *make), state, None, None, setter


def _pickled(route: Route, thing: Any, take: Parts) -> tuple[bytes, classes.References]:
    """Return the pickle of a class's definition, and the other classes in it."""
    file = io.BytesIO()
    pickler = _DefinitionPickler(file, route, thing)
    pickler.dump(thing)
    return file.getvalue(), pickler.references

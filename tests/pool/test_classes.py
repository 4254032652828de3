"""Classes, enumerations and cached functions that travel by value keep their identity and their meaning."""

from __future__ import annotations

import abc
import copy
import dataclasses
import datetime
import enum
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar

import pyarrow as pa
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.pickling import payload
from skyward_lite.pickling.route import Route

T = TypeVar("T")

TO_WORKERS = Route(shares_files=False, to_client=False)


@pytest.fixture(scope="module", params=["thread", "process"])
def pool(request):
    """A pool of one node as joblib's backend, with each executor."""
    with sky.pool(worker=sky.Worker(concurrency=4, executor=request.param)) as pool:
        yield pool


@pytest.fixture
def shared_pool():
    """Tells the check for left processes that the pools of this file outlive its tests."""


pytestmark = pytest.mark.usefixtures("shared_pool")


def there_and_back(value):
    """Return a value that was pickled and rebuilt twice, as for the way to a worker and back."""
    encoder = payload.Encoder(1 << 30, TO_WORKERS)
    home = payload.Encoder(1 << 30)
    return payload.loads(*home.dumps(payload.loads(*encoder.dumps(value))))


# ------------------------------------------------------------------------------------------------ identity


def test_result_does_not_reset_class_attributes_at_the_client(pool):
    """A counter in the client's class counts on while results of that class arrive."""

    class Counted:
        count = 0

        def run(self, i):
            return self

    for number, got in enumerate(
        Parallel(n_jobs=-1, batch_size=1, return_as="generator")(delayed(Counted().run)(i) for i in range(50))
    ):
        assert type(got) is Counted
        Counted.count += 1
        assert Counted.count == number + 1


def test_result_does_not_reset_globals_of_methods_at_the_client(pool):
    """A global in which a method of the client's class counts is not reset by results of that class."""
    space: dict[str, Any] = {"__name__": "nowhere", "total": 0}
    code = "class Model:\n    def add(self):\n        global total\n        total += 1\n        return total\n"
    exec(code, space)
    model = space["Model"]()
    futures = [pool.submit(lambda m: m, model) for _ in range(20)]
    for number, future in enumerate(futures):
        got = future.result(20)
        assert type(got) is space["Model"]
        assert got.add() == number + 1


def test_class_attribute_set_by_a_task_stays_in_its_worker(pool):
    """A model that tasks load once for a class is loaded once in each worker process, whatever arrives meanwhile."""

    class Model:
        net: Any = None
        loading = None

        def predict(self, i):
            import threading

            if Model.net is None:
                Model.net = os.getpid(), threading.get_ident()
            assert Model.net is not None
            return os.getpid(), Model.net

    got = Parallel(n_jobs=-1, batch_size=1)(delayed(Model().predict)(i) for i in range(200))
    got += [pool.submit(Model().predict, i).result(20) for i in range(8)]
    for pid in {pid for pid, _ in got}:
        loaded = [net for each, net in got if each == pid]
        # Threads that begin at the same time may each load the model; afterwards it stays.
        assert len(set(loaded)) <= 4
        assert len(set(loaded[8:])) == 1 or len(loaded) <= 8
    assert Model.net is None


def test_class_does_not_change_under_a_running_task(shared_thread_pool):
    """A class attribute that a task reads stays the same while other tasks of the same class arrive."""

    class Model:
        net: Any = None

        def first(self):
            import time

            Model.net = "loaded"
            arrived, go = time.__dict__.setdefault("_skyward_test_gate", (threading.Event(), threading.Event()))
            arrived.set()
            assert go.wait(20)
            return Model.net

        def second(self):
            import time

            arrived, go = time.__dict__.setdefault("_skyward_test_gate", (threading.Event(), threading.Event()))
            assert arrived.wait(20)
            return Model.net

        def last(self):
            import time

            time.__dict__.pop("_skyward_test_gate")[1].set()

    first = shared_thread_pool.submit(Model().first)
    assert [shared_thread_pool.submit(Model().second).result(20) for _ in range(5)] == ["loaded"] * 5
    shared_thread_pool.submit(Model().last).result(20)
    assert first.result(20) == "loaded"


@pytest.fixture(scope="module")
def shared_thread_pool():
    """A pool of one process with four threads."""
    with sky.pool(worker=sky.Worker(concurrency=4), plugins=[]) as pool:
        yield pool


def test_class_changed_at_the_client_is_a_new_class_at_the_worker(pool):
    """After the client changes a class, tasks see the change, and not what a task set on the old class."""

    class Model:
        factor = 2

        def run(self, x):
            seen = getattr(type(self), "seen", 0)
            type(self).seen = seen + 1
            return x * self.factor

    assert pool.submit(Model().run, 1).result(20) == 2
    Model.factor = 3
    assert pool.submit(Model().run, 1).result(20) == 3
    Model.run = lambda self, x: getattr(type(self), "seen", "fresh")
    assert pool.submit(Model().run, 1).result(20) == "fresh"


def test_change_of_a_base_class_or_referenced_class_counts(pool):
    """A changed base class, or a class that a method names, makes a class new at the worker."""

    class Base:
        number = 1

    class Other:
        number = 1

    class Derived(Base):
        def run(self):
            return self.number, Other.number

    assert pool.submit(Derived().run).result(20) == (1, 1)
    Base.number = 2
    assert pool.submit(Derived().run).result(20) == (2, 1)
    Other.number = 2
    assert pool.submit(Derived().run).result(20) == (2, 2)


def test_init_subclass_and_metaclass_registries_do_not_grow(pool):
    """Neither `__init_subclass__` nor a metaclass runs again at the client; the worker has what the client has."""

    class Registry(type):
        made: list[str] = []  # noqa: RUF012

        def __new__(cls, name, bases, space, **options):
            cls.made.append(name)
            return super().__new__(cls, name, bases, space)

    class Base:
        known: dict[str, type] = {}  # noqa: RUF012

        def __init_subclass__(cls, key, **options):
            Base.known[key] = cls

    class One(Base, key="one"):
        pass

    class Made(metaclass=Registry):
        pass

    instance, known, made = pool.submit(lambda: (One(), Base.known, Made())).result(20)
    assert type(instance) is One
    assert known == {"one": One} == Base.known
    assert type(made) is Made
    assert Registry.made == ["Made"]


def test_class_made_by_a_task_is_one_class_at_the_client(pool):
    """Results of a class that a task made are of one class at the client, and workers know it as theirs when they get
    it back.
    """

    def make():
        class Local:
            def __init__(self, x):
                self.x = x

        return Local, [Local(1), Local(2)]

    local, (one, two) = pool.submit(make).result(20)
    assert type(one) is type(two) is local
    same, back = pool.submit(lambda cls, instance: (isinstance(instance, cls), instance), local, one).result(20)
    assert same
    assert type(back) is local
    assert back.x == 1


def test_classes_that_refer_to_each_other(pool):
    """Classes arrive that refer to each other by methods, bases and attributes, with an abstract base and `super()`."""

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def go(self):
            return "base"

    class Concrete(Abstract):
        def go(self):
            return super().go(), Peer.__name__, Peer.concrete.__class__ is Concrete

        def __setstate__(self, state):
            self.__dict__.update(state, rebuilt=True)

    class Peer:
        concrete: Any = None

        def other(self):
            return Concrete().go()

    Peer.concrete = Concrete()
    Peer.concrete.x = 1
    assert pool.submit(Peer().other).result(20) == ("base", "Peer", True)
    assert pool.submit(lambda: (Peer.concrete.x, Peer.concrete.rebuilt)).result(20) == (1, True)
    assert pool.submit(lambda: Concrete).result(20) is Concrete


def test_class_is_rebuilt_once_by_concurrent_tasks(shared_thread_pool):
    """Tasks that bring the same new class at the same time see one class."""

    class Model:
        pass

    def identity(model):
        import gc

        gc.collect(0)
        return id(type(model))

    futures = [shared_thread_pool.submit(identity, Model()) for _ in range(40)]
    assert len({future.result(20) for future in futures}) == 1


def test_pickled_class_is_the_same_bytes_each_time():
    """A class has the same pickle with each task, or it would be another class with each task."""

    class Other:
        pass

    class Model:
        """Some text."""

        table = {"a": [1, 2], "b": Other}  # noqa: RUF012
        names = frozenset({"x", "y", "z"})

        def run(self, x: int, *, y: str = "y") -> Other:
            return [Other for _ in self.names if x in {1, 2, 3}]

    def digest():
        encoder = payload.Encoder(1 << 30, TO_WORKERS)
        return encoder.dumps(Model())[0]

    first = digest()
    # Pickling an instance leaves attributes on its class.
    copy.copy(Model())
    Model().run(1)
    assert there_and_back(Model) is Model
    assert digest() == first


def test_class_cache_is_bounded():
    """A program that makes a class for each task does not fill its workers' memory."""
    from skyward_lite.pickling import classes

    recent = classes.RecentlyUsed()
    for number in range(3 * classes.MAX_REMEMBERED):
        recent.remember(number, number)
        assert recent.find(0) == 0
    assert len(recent) == classes.MAX_REMEMBERED
    assert recent.find(1) is None


# ------------------------------------------------------------------------------------------------ kinds of classes


def kinds():
    class Box(Generic[T]):
        def __init__(self, value: T) -> None:
            self.value = value

        def __eq__(self, other):
            return type(self) is type(other) and self.value == other.value

    class Point(NamedTuple):
        x: int
        y: int = 2

    class Record(TypedDict):
        a: int

    @dataclasses.dataclass(slots=True)
    class Slotted:
        x: int
        y: list = dataclasses.field(default_factory=list)

    @dataclasses.dataclass(frozen=True, slots=True)
    class Frozen:
        x: int = 1

    @dataclasses.dataclass(frozen=True, order=True)
    class Ordered:
        x: int = 1

    class Slots:
        __slots__ = ("__hidden", "shown")

        def __init__(self):
            self.__hidden, self.shown = 1, 2

        def __eq__(self, other):
            return type(self) is type(other) and (self.__hidden, self.shown) == (other.__hidden, other.shown)

    class SubSlots(Slots):
        def __init__(self):
            super().__init__()
            self.more = 3

    class OneSlot:
        __slots__ = "only"

        def __init__(self):
            self.only = 1

        def __eq__(self, other):
            return type(self) is type(other) and self.only == other.only

    class Cached:
        @functools.cached_property
        def value(self):
            return [1]

        def __eq__(self, other):
            return type(self) is type(other) and self.value == other.value

    return [Box(1), Point(1), Record(a=1), Slotted(1), Frozen(), Ordered(), Slots(), SubSlots(), OneSlot(), Cached()]


@pytest.mark.parametrize("instance", kinds(), ids=lambda instance: type(instance).__name__)
def test_instances_round_trip(pool, instance):
    """An instance that a task only looked at comes back equal and of the same class."""
    got = pool.submit(lambda value: (value, type(value).__name__), instance).result(20)
    assert got == (instance, type(instance).__name__)
    assert type(got[0]) is type(instance)


def test_slots_work_at_the_worker(pool):
    """An instance with `__slots__` refuses other attributes at the worker, and returns those that it has."""

    @dataclasses.dataclass(slots=True)
    class Slotted:
        x: int

    def change(slotted):
        slotted.x += 1
        with pytest.raises(AttributeError):
            slotted.z = 1
        return slotted, hasattr(slotted, "__dict__")

    assert pool.submit(change, Slotted(1)).result(20) == (Slotted(2), False)


def test_dataclass_fields_work_at_the_worker(pool):
    """`dataclasses.fields`, `replace` and a subclass work in a task."""

    @dataclasses.dataclass
    class Base:
        x: int
        y: int = dataclasses.field(default=2, kw_only=True)

    def use():
        @dataclasses.dataclass
        class Derived(Base):
            z: int = 3

        missing = [field.default is dataclasses.MISSING for field in dataclasses.fields(Base)]
        return missing, dataclasses.replace(Base(1), y=5), dataclasses.asdict(Derived(1))

    assert pool.submit(use).result(20) == ([True, False], Base(1, y=5), {"x": 1, "y": 2, "z": 3})


def test_abstract_class_registrations_travel(pool):
    """Classes registered with an abstract class count as its subclasses at the worker, and the abstract class stays
    abstract.
    """

    class Shape(abc.ABC):
        @abc.abstractmethod
        def area(self): ...

    class Square:
        pass

    Shape.register(Square)

    def use():
        with pytest.raises(TypeError, match="abstract"):
            Shape()
        return issubclass(Square, Shape)

    assert pool.submit(use).result(20)


# ------------------------------------------------------------------------------------------------ enumerations


def enumerations():
    class Plain(enum.Enum):
        A = 1
        B = [1, 2]  # noqa: RUF012
        C = A

    class Planet(enum.Enum):
        def __init__(self, mass, radius):
            self.mass, self.radius = mass, radius

        EARTH = (1, 2)
        MARS = (3, 4)
        TERRA = (1, 2)  # noqa: PIE796

    class Coded(enum.Enum):
        def __new__(cls, code, label):
            made = object.__new__(cls)
            made._value_, made.label = code, label
            return made

        YES = (1, "yes")
        NO = (0, "no")

    class Small(int, enum.Enum):
        def __new__(cls, code, label):
            made = int.__new__(cls, code)
            made._value_, made.label = code, label
            return made

        ONE = (1, "one")
        TWO = (2, "two")

    class Text(enum.StrEnum):
        A = enum.auto()
        B = "b"

    class Number(enum.IntEnum):
        RED = 1
        ROT = 1
        GREEN = 2

    class Flags(enum.Flag):
        R = 4
        W = 2
        X = 1
        RWX = 7

    class IntFlags(enum.IntFlag):
        A = 1
        B = 2
        AB = 3
        NONE = 0

    class Odd(enum.Enum):
        THING = object()
        CALL = functools.partial(int, "3")

        def called(self):
            return self.value()

        @classmethod
        def _missing_(cls, value):
            return cls.CALL

    return [Plain, Planet, Coded, Small, Text, Number, Flags, IntFlags, Odd]


def facts(kind):
    """Return all that can be read from an enumeration."""
    return {
        "names": list(kind.__members__),
        "canonical": [member.name for member in kind],
        "own names": [member.name for member in kind.__members__.values()],
        "values": [member.value for member in kind.__members__.values()] if kind.__name__ != "Odd" else None,
        "attributes": [
            {k: v for k, v in vars(m).items() if k in ("mass", "radius", "label")} for m in kind.__members__.values()
        ],
        "repr": [repr(member) for member in kind] if kind.__name__ != "Odd" else None,
        "str": [str(member) for member in kind],
        "qualname": kind.__qualname__,
    }


@pytest.mark.parametrize("kind", enumerations(), ids=lambda kind: kind.__name__)
def test_enumerations_at_the_worker(pool, kind):
    """Members, aliases, composites, values and attributes arrive; members that come back are the client's own."""
    there, members, by_name = pool.submit(
        lambda: (facts(kind), list(kind.__members__.values()), [kind[name] for name in kind.__members__])
    ).result(20)
    assert there == facts(kind)
    assert all(got is own for got, own in zip(members, kind.__members__.values(), strict=True))
    assert members == by_name


def test_enumeration_lookups_and_flags_at_the_worker(pool):
    """Look-ups by value, `_missing_`, composites without a name and unknown bits work at the worker."""
    _, _, coded, small, text, number, flags, int_flags, odd = enumerations()

    def use():
        return [
            coded(0) is coded.NO,
            small(2) is small.TWO and small.TWO + 1 == 3,
            text("b") is text.B and text.B.upper() == "B",
            number(1) is number.ROT,
            (flags.R | flags.W).value == 6 and flags.R in flags.RWX and flags(7) is flags.RWX,
            (~int_flags.A & int_flags.AB) is int_flags.B and (int_flags.A | 8).value == 9,
            odd("unknown") is odd.CALL and odd.CALL.called() == 3,
        ]

    assert pool.submit(use).result(20) == [True] * 7
    both = flags.R | flags.W
    assert pool.submit(lambda value: (value, value is (flags.R | flags.W)), both).result(20) == (both, True)


# ------------------------------------------------------------------------------------------------ functions, streams


@functools.cache
def _fibonacci(n):
    return n if n < 2 else _fibonacci(n - 1) + _fibonacci(n - 2)


def test_lru_cache_is_kept_in_a_worker(shared_thread_pool):
    """A cached function, also one that calls itself, keeps its cache in a worker, and comes back as the
    client's own.
    """

    @functools.lru_cache(maxsize=100, typed=True)
    def fibonacci(n):
        return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

    def use():
        return fibonacci(30), fibonacci.cache_info().misses, fibonacci.cache_parameters()

    for _ in range(3):
        assert shared_thread_pool.submit(use).result(20) == (832040, 31, {"maxsize": 100, "typed": True})
    assert shared_thread_pool.submit(lambda: fibonacci).result(20) is fibonacci
    assert fibonacci.cache_info().misses == 0
    # A function that its module has travels by its name.
    assert b"rebuild" not in payload.Encoder(1 << 30).dumps(_fibonacci)[0]


def test_singledispatch_functions_travel(pool):
    """Functions of `singledispatch` arrive with their registrations, also for a script's class, and for themselves."""

    class Mine:
        pass

    @functools.singledispatch
    def text(value):
        return f"other {value}"

    @text.register(list)
    def _(value):
        return [text(each) for each in value]

    text.register(Mine, lambda value: "mine")

    class Methods:
        @functools.singledispatchmethod
        def show(self, value):
            return "other"

        @show.register
        def _(self, value: int):
            return "int"

    assert pool.submit(text, [1, [Mine()]]).result(20) == ["other 1", ["mine"]]
    assert pool.submit(lambda: (Methods().show(1), Methods().show("1"))).result(20) == ("int", "other")


@pytest.mark.parametrize("name", ["stdout", "stderr", "__stdout__", "__stderr__"])
def test_standard_streams_in_a_task_are_the_workers(pool, name):
    """`sys.stdout` as a global, an argument or an attribute is the worker's, whatever replaced it at the client."""
    stream = getattr(sys, name)

    class Log:
        out = stream

        def same(self):
            return self.out is getattr(sys, name) and stream is self.out

    assert pool.submit(Log().same).result(20)
    assert pool.submit(lambda given: given is getattr(sys, name), stream).result(20)


def test_replaced_standard_stream_is_the_workers(pool):
    """A reference to a standard stream that was replaced since, as in notebooks and under redirections, is the worker's
    stream.
    """
    stream = _Named()
    assert stream is not sys.stdout
    assert pool.submit(lambda given: given is sys.stdout, stream).result(20)


class _Named:
    """A stream of another class with standard output's name."""

    name = "<stdout>"

    def write(self, text):
        return len(text)

    def flush(self):
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: pa.array(range(100_000)),
        lambda: pa.chunked_array([range(50_000), range(50_000)]),
        lambda: pa.record_batch({"x": range(100_000), "s": [str(i) for i in range(100_000)]}),
        lambda: pa.table({"x": range(100_000), "s": [str(i) for i in range(100_000)]}),
        lambda: pa.array(["a", "b"] * 50_000).dictionary_encode(),
    ],
    ids=["array", "chunked", "batch", "table", "dictionary"],
)
@pytest.mark.parametrize("part", [slice(10, 20), slice(0, 0), slice(None)])
def test_arrow_slices_travel_without_their_table(pool, make, part):
    """A slice of ten rows of Arrow data travels without the rest, and equals what was sent."""
    whole = make()
    data = whole.slice(part.start or 0, (part.stop if part.stop is not None else len(whole)) - (part.start or 0))
    pickled, buffers = payload.Encoder(1 << 30).dumps(data)
    if len(data) < 100:
        assert payload.size(pickled, buffers) < 20_000
    got = pool.submit(lambda value: value, data).result(20)
    assert type(got) is type(data)
    assert got.equals(data)


# ------------------------------------------------------------------------------------------------ the script


def check_script(text: str, directory: Path, executor: str) -> None:
    """Run a script with the executor and a directory as its arguments, and check that it printed its last line."""
    script = directory / "script.py"
    script.write_text(text)
    command = [sys.executable, str(script), executor, str(directory / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "all is well\n"


SCRIPT = """
from __future__ import annotations
import dataclasses, io, os, pickle, sys, tempfile, typing
import joblib
from joblib import Parallel, delayed
import skyward_lite as sky

UserId = typing.NewType("UserId", int)
FACTOR = 10


class Other:
    pass


@dataclasses.dataclass
class Cut:
    size: int
    user: UserId = UserId(0)
    other: Other | None = None

    class Inner:
        pass


def flush(x: int) -> Cut:
    # The worker's own `__main__` has this name, too.
    return Cut(x * FACTOR)


def main(x):
    return Cut(x)


def helper(x):
    return x + 1


def by_name():
    import __main__

    assert __main__.Cut is Cut
    assert __main__.helper(1) == 2
    assert __main__.FACTOR == 10
    try:
        __main__.run_slots
    except AttributeError as error:
        assert "run_slots" in str(error)
    else:
        raise AssertionError("the worker's own name is in the script's module")
    assert type(pickle.loads(pickle.dumps(Cut(1)))) is Cut
    assert type(pickle.loads(pickle.dumps(Cut.Inner()))) is Cut.Inner
    assert pickle.loads(pickle.dumps(helper))(2) == 3
    assert pickle.loads(pickle.dumps(UserId)) is UserId
    file = io.BytesIO()
    joblib.dump([Cut(2)], file)
    file.seek(0)
    assert joblib.load(file) == [Cut(2)]
    assert joblib.hash(Cut(2)) == joblib.hash(Cut(2))
    hints = typing.get_type_hints(Cut)
    assert hints["user"] is UserId and hints["other"] == typing.Optional[Other], hints
    assert typing.get_type_hints(flush) == {"x": int, "return": Cut}
    return Cut(3), UserId


if __name__ == "__main__":
    executor, directory = sys.argv[1:]
    memory = joblib.Memory(directory, verbose=0)
    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)) as pool:
        for _ in range(2):
            for function in (flush, main):
                cached = memory.cache(function)
                got = Parallel(n_jobs=2)(delayed(cached)(i) for i in range(4))
                assert got == [function(i) for i in range(4)], got
        for _ in range(3):
            cut, user = pool.submit(by_name).result()
            assert type(cut) is Cut and user is UserId
    assert len(list(memory.store_backend.get_items())) == 8
    print("all is well")
"""


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_main_of_a_script_is_found_by_name_in_tasks(tmp_path, executor):
    """Code that pickles or looks up by name in the script's `__main__` finds the script's names, and never the
    worker's.
    """
    check_script(SCRIPT, tmp_path, executor)


PIPELINE = """
import sys
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.datasets import load_iris
import skyward_lite as sky


class Cut(TransformerMixin, BaseEstimator):
    def __init__(self, columns=2):
        self.columns = columns

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return X[:, : self.columns]


if __name__ == "__main__":
    executor, directory = sys.argv[1:]
    X, y = load_iris(return_X_y=True)

    def search(n_jobs):
        pipeline = Pipeline([("cut", Cut()), ("fit", LogisticRegression())], memory=directory)
        grid = {"cut__columns": [1, 2, 3], "fit__C": [0.1, 1.0]}
        return GridSearchCV(pipeline, grid, n_jobs=n_jobs, cv=3, error_score="raise").fit(X, y)

    serial = search(1).cv_results_["mean_test_score"]
    with sky.pool(worker=sky.Worker(concurrency=2, executor=executor)):
        assert (search(-1).cv_results_["mean_test_score"] == serial).all()
    print("all is well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_sklearn_pipeline_with_memory_and_a_step_of_the_script(tmp_path, executor):
    """scikit-learn's cached transformers can pickle a class of the script by its name."""
    check_script(PIPELINE, tmp_path, executor)


# ------------------------------------------------------------------------------------------------ what belongs together

TOGETHER = """
import multiprocessing, operator, pickle, sys, time
import joblib
from joblib import Parallel, delayed
import numpy as np
import skyward_lite as sky

NET = None
RNG = np.random.RandomState(0)
CONF = {"alpha": 1}
NONE = object()
SCALE = 1


class Color:
    def __init__(self, name):
        self.name = name


Color.RED = Color("red")


class Model:
    def fit(self, x):
        global NET
        NET = x
        return self.predict(x)

    def predict(self, x):
        return NET, CONF["alpha"]

    def draw(self):
        return RNG.randint(1 << 30)


class Failure(Exception):
    seen = []

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


def fail():
    raise Failure(3, "text")


class Option:
    def __init__(self, value=NONE):
        self.value = value


class Base:
    registry = []
    version = 0

    def __init_subclass__(cls):
        Base.registry.append(cls.__name__)
        cls.version += 1


class One(Base):
    def conf(self):
        return CONF["alpha"], self.name()

    def name(self):
        return [each for each in Base.registry if each == type(self).__name__]


class Two(One):
    pass


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x == other.x

    def __hash__(self):
        return operator.index(self.x)

    def known(self):
        return self in POINTS, NAMES.get(self)


POINTS = {Point(0)}
NAMES = {Point(0): "zero"}


class Checked:
    def __init_subclass__(cls):
        if not hasattr(cls, "run"):
            raise ValueError("a class without run")


class Runs(Checked):
    def run(self):
        return 1


class Scaled:
    def value(self):
        return SCALE


def init(x):
    global NET
    NET = x
    CONF["alpha"] = x
    RNG.seed(x)


def task(x):
    init(x)
    return Model().predict(x), Model().draw()


def red(color):
    return color is Color.RED


def default(option):
    return option.value is NONE


def counts(reader):
    init(7)
    return reader()


def read():
    return NET


def helper(x):
    return x + 1


def by_name(i):
    time.sleep(0.005)
    return pickle.loads(pickle.dumps(helper))(i), joblib.hash(helper) is not None


def spawned(i):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(helper, [i])


if __name__ == "__main__":
    executor, _ = sys.argv[1:]
    seeds = [np.random.RandomState(i).randint(1 << 30) for i in range(6)]
    with sky.pool(worker=sky.Worker(concurrency=4, executor=executor)) as pool:
        for batch_size in (1, 3, "auto"):
            run = Parallel(n_jobs=-1, batch_size=batch_size)
            assert run(delayed(task)(i) for i in range(6)) == [((i, i), seeds[i]) for i in range(6)]
            assert run(delayed(Model().fit)(i) for i in range(6)) == [(i, 1) for i in range(6)]
            assert run(delayed(red)(c) for c in (Color.RED, Color("red"))) == [True, False]
            assert run(delayed(default)(o) for o in (Option(), Option(1))) == [True, False]
            assert run(delayed(counts)(read) for _ in range(3)) == [7] * 3
            assert run(delayed(by_name)(i) for i in range(40)) == [(i + 1, True) for i in range(40)]
        assert pool.submit(task, 3).result() == ((3, 3), seeds[3])
        assert pool.submit(red, Color.RED).result()
        hooked = pool.submit(lambda: (Base.registry, One.version, Two.version, Runs().run())).result()
        assert hooked == (["One", "Two"], 1, 2, 1), hooked
        assert pool.submit(lambda: (One().conf(), Two().conf())).result() == ((1, ["One"]), (1, ["Two"]))
        assert pool.submit(lambda x: (x.conf(), Base.registry), Two()).result() == ((1, ["Two"]), ["One", "Two"])
        assert pool.submit(Two().conf).result() == (1, ["Two"])
        assert pool.submit(lambda: (Point(0).known(), Point(1).known())).result() == ((True, "zero"), (False, None))
        assert pool.submit(Point(0).known).result() == (True, "zero")
        for _ in range(2):
            error = pool.submit(fail).exception()
            assert type(error) is Failure and error.code == 3 and error.args == (3, "text"), error
        for SCALE in (1, 2, 1):
            assert pool.submit(lambda m: pickle.loads(pickle.dumps(m)).value(), Scaled()).result() == SCALE
        assert pool.submit(spawned, 1).result(40) == [2]
        kinds = [type(f"Kind{i}", (), {}) for i in range(1500)]
        assert pool.submit(lambda them: [k() for k in them], kinds).result()[-1].__class__ is kinds[-1]
    assert (NET, CONF, SCALE) == (None, {"alpha": 1}, 1)
    print("all is well")
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_objects_shared_by_a_script_are_shared_within_a_task(tmp_path, executor):
    """Globals, generators and objects that functions, classes and arguments have in common are one object within a
    task.
    """
    check_script(TOGETHER, tmp_path, executor)


def test_enumerations_of_dates_tuples_and_dataclasses(pool):
    """Members of enumerations whose data type is a date, a tuple or a dataclass are made by that type."""

    class Day(datetime.date, enum.Enum):
        FIRST = 2020, 1, 2

    class Span(datetime.timedelta, enum.Enum):
        SHORT = 1

    class Pair(tuple, enum.Enum):
        A = (1, 2)

    def use():
        known = [(member, member.value) for kind in (Day, Span, Pair) for member in kind]
        return known, Day.FIRST.isoformat(), Span.SHORT.days, Pair.A[1]

    assert pool.submit(use).result(20) == use()


def test_arrow_slices_of_extension_and_union_types(pool):
    """Slices of Arrow's extension types and unions are pickled by pyarrow and keep their types."""
    data = pa.array([bytes([i] * 16) for i in range(100)], pa.uuid()) if hasattr(pa, "uuid") else pa.array([1])
    part = data.slice(3, 5)
    got = pool.submit(lambda value: value, part).result(20)
    assert got.type == part.type
    assert got.equals(part)


def test_class_versions_are_bounded_in_a_worker(pool):
    """Of a class that changes from call to call, a worker keeps two versions."""

    class Model:
        text = ""

        def length(self):
            import gc

            gc.collect()
            return sum(
                len(c.text) for c in gc.get_objects() if type(c) is type and c.__qualname__ == Model.__qualname__
            )

    for number in range(8):
        Model.text = str(number) * 1000
        length = pool.submit(Model().length).result(20)
    assert length <= 2 * 2000

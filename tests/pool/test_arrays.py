"""Memory maps, and arrays of numpy's and users' subclasses, as arguments and results."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import warnings

import numpy as np
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from lab import Lab
from skyward_lite.client.tasks import Tasks
from skyward_lite.pickling import arrays, payload
from skyward_lite.pickling.route import Route

HERE = Route(shares_files=True, to_client=False)
ELSEWHERE = Route(shares_files=False, to_client=False)
BACK = Route(shares_files=False, to_client=True)


def journey(value, route=HERE):
    """Pickle and unpickle: what arrives, the bytes of the pickle, and those beside it."""
    pickled, buffers = payload.Encoder(1 << 30, route).dumps(value)
    return payload.loads(pickled, buffers), len(pickled), payload.size(pickled, buffers) - len(pickled)


@pytest.fixture
def mapped(tmp_path):
    """A writable map of 400 × 100 numbers, each its own."""
    array = np.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=(400, 100))
    array[:] = np.arange(40_000).reshape(400, 100)
    return array


@pytest.fixture(scope="module", params=["thread", "process"])
def workers(request):
    """How a node runs its tasks."""
    return sky.Worker(concurrency=2, executor=request.param)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """A pool of one host that counts as another machine."""
    lab = Lab(tmp_path_factory.mktemp("far"))
    host = lab.host()
    try:
        provider = sky.SSH(host.name, config=lab.config, python=sys.executable)
        with sky.pool(provider, worker=sky.Worker(concurrency=2), plugins=[sky.plugins.joblib()]) as pool:
            yield pool
    finally:
        lab.close()


def test_tasks_write_into_a_mapped_output(workers, tmp_path):
    """joblib's documented pattern: each task writes its row of a map, and the file has them all."""

    def fill(data, output, i):
        output[i] = data[i].sum()

    data = np.memmap(tmp_path / "in", dtype="f8", mode="w+", shape=(20, 1000))
    data[:] = np.arange(20_000).reshape(20, 1000)
    output = np.memmap(tmp_path / "out", dtype="f8", mode="w+", shape=20)
    with sky.pool(worker=workers):
        Parallel(n_jobs=-1)(delayed(fill)(data, output, i) for i in range(20))
    expected = np.arange(20_000).reshape(20, 1000).sum(1)
    assert (output == expected).all()
    assert (np.fromfile(tmp_path / "out") == expected).all()


def test_tasks_write_into_views_of_a_map(workers, mapped):
    """A row, a column as a plain array, a reversed view: each is a part of the same file."""

    def add(view, number):
        view += number

    expected = np.array(mapped)
    with sky.pool(worker=workers, plugins=[]) as pool:
        for i in range(10):
            for of in (lambda a, i=i: a[i], lambda a, i=i: np.asarray(a)[50:, i], lambda a, i=i: a[20 + i, ::-3]):
                pool.submit(add, of(mapped), i).result(30)
                add(of(expected), i)
    assert (mapped == expected).all()


def test_a_read_only_map_is_not_sent(workers, tmp_path):
    """Twenty tasks with a map of 40 MB: each takes less than 2,000 bytes, and reads the right values."""
    np.arange(5_000_000.0).tofile(tmp_path / "big")
    big = np.memmap(tmp_path / "big", mode="r", dtype="f8")
    with sky.pool(worker=workers) as pool:
        assert payload.size(*Tasks.of(pool).encode(np.sum, (big,), {})) < 2_000
        read = Parallel(n_jobs=-1)(delayed(lambda a, i: (a[i * 1000], a.flags.writeable))(big, i) for i in range(20))
    assert read == [(i * 1000.0, False) for i in range(20)]


def test_a_result_that_is_mapped_comes_by_name(workers, tmp_path):
    """What a task maps and returns is the same file at the client."""

    def make(path):
        import numpy as np

        made = np.memmap(path, mode="w+", dtype="i4", shape=(100, 100))
        made[:] = 7
        return made[10:]

    with sky.pool(worker=workers, plugins=[]) as pool:
        made = pool.submit(make, str(tmp_path / "made")).result(30)
    assert isinstance(made, np.memmap)
    made[0, 0] = 8
    assert np.fromfile(tmp_path / "made", "i4")[1000] == 8


def test_a_result_whose_file_is_gone_comes_as_its_data(workers):
    """A task maps a file in a temporary directory that it deletes."""

    def make():
        import tempfile

        import numpy as np

        with tempfile.TemporaryDirectory() as directory:
            made = np.memmap(f"{directory}/made", mode="w+", dtype="i4", shape=5000)
            made[:] = 7
        return made

    with sky.pool(worker=workers, plugins=[]) as pool:
        assert (pool.submit(make).result(30) == np.full(5000, 7)).all()


def test_a_writable_map_is_refused_elsewhere(far, mapped):
    """On a host that does not share files the call raises the file, the reason and the remedy."""
    told = r"data' with mode='w\+'.* do not share files .* would be lost.* return the values .* mode='r'"
    for view in (mapped, mapped[3:], np.asarray(mapped)[:, 2]):
        with pytest.raises(pickle.PicklingError, match=told):
            far.submit(np.sum, view)
    with pytest.raises(pickle.PicklingError, match=told):
        Parallel(n_jobs=-1)(delayed(np.sum)(mapped) for _ in range(2))


def test_a_read_only_map_travels_elsewhere_as_its_data(far, mapped, tmp_path):
    """The values arrive beside the pickle and cannot be written to, as at the client."""
    mapped.flush()
    read = np.memmap(tmp_path / "data", dtype="f8", mode="r", shape=(400, 100))
    assert len(far._tasks.encode(np.sum, (read,), {})[0]) < 2_000

    def use(array):
        return float(array.sum()), array.flags.writeable

    assert far.submit(use, read).result(30) == (float(read.sum()), False)


def test_a_map_that_a_task_returns_from_elsewhere_is_its_data(far):
    """The client gets the values, not the name of a file that it cannot see."""

    def make():
        import tempfile

        import numpy as np

        with tempfile.NamedTemporaryFile() as file:
            made = np.memmap(file.name, mode="w+", dtype="f8", shape=3000)
            made[:] = 3
            return made

    assert (far.submit(make).result(30) == np.full(3000, 3.0)).all()


def views(array):
    """Views of all kinds: slices, orders, signs of strides, other types, fewer and more dimensions."""
    return {
        "whole": array,
        "rows": array[7:300],
        "columns": array[:, 3:90:7],
        "transposed": array.T,
        "reversed": array[::-1, ::-2],
        "one": array[5, 6:7],
        "other type": array.view("u4"),
        "plain": np.asarray(array)[9],
        "more dimensions": array[:, None, :],
        "broadcast": np.broadcast_to(np.asarray(array)[3], (4, 100)),
        "recarray": array.view([("a", "f8"), ("b", "f8")]).view(np.recarray),
    }


@pytest.mark.parametrize("name", sorted(views(np.zeros((400, 100)))))
def test_views_of_a_map_arrive_as_they_were(mapped, name):
    """Values, type, shape, strides and the right to write; twice on the way, too."""
    view = views(mapped)[name]
    once, pickled, beside = journey(view)
    twice, _, _ = journey(once)
    for there in (once, twice):
        assert type(there) is type(view)
        assert (there == view).all()
        assert (there.shape, there.strides, there.dtype) == (view.shape, view.strides, view.dtype)
        assert there.flags.writeable == view.flags.writeable
    assert pickled < 5_000
    assert beside == 0
    mapped[:] = 5
    assert (once == view).all()
    assert (twice == view).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_map_with_an_offset_keeps_it(tmp_path, order):
    """A header before the numbers, more than a page and no whole number of pages of it."""
    (tmp_path / "file").write_bytes(bytes(5003))
    array = np.memmap(tmp_path / "file", dtype="i2", mode="r+", offset=5003, shape=(60, 70), order=order)
    array[:] = np.arange(4200).reshape(60, 70)
    for view in (array, array[3:, 5:]):
        there, _, _ = journey(view)
        assert (there == view).all()
        assert there.strides == view.strides
        there += 1
        assert (there == view).all()


def test_a_copy_on_write_map_carries_what_was_written(tmp_path):
    """By name while it is as its file; once the client has written to it, as its data."""
    np.zeros(500_000).tofile(tmp_path / "file")
    array = np.memmap(tmp_path / "file", dtype="f8", mode="c")
    there, _, beside = journey(array)
    assert beside == 0
    there[0] = 1
    assert array[0] == 0
    array[300_000] = 5
    there, _, beside = journey(array)
    assert beside == array.nbytes
    assert (there == array).all()
    small = array[299_999:300_002]
    assert (journey(small)[0] == small).all()


@pytest.mark.parametrize("place", [0, 77_777, 499_999])
def test_one_number_that_was_written_is_found(tmp_path, monkeypatch, place):
    """Of a copy-on-write map that has been read; the look at it goes by parts."""
    monkeypatch.setattr(arrays, "MAX_PAGEMAP_ENTRIES", 10)
    np.arange(500_000.0).tofile(tmp_path / "file")
    array = np.memmap(tmp_path / "file", dtype="f8", mode="c")
    total = array.sum()
    assert journey(array)[2] == 0
    array[place] += 1
    there, _, beside = journey(array)
    assert beside == array.nbytes
    assert there.sum() == total + 1
    # The page of the number, and no other.
    rest = array[100_000:400_000]
    assert journey(rest)[2] == 0


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_a_map_whose_name_leads_nowhere(tmp_path, change):
    """Its file was deleted, or another one took the name: a writable map is refused, a readable one is sent."""
    path = tmp_path / "file"
    np.arange(5000.0).tofile(path)
    writable = np.memmap(path, dtype="f8", mode="r+")
    readable = np.memmap(path, dtype="f8", mode="r")
    assert journey(writable)[2] == journey(readable)[2] == 0
    path.unlink()
    if change == "replace":
        np.zeros(5000).tofile(path)
    with pytest.raises(pickle.PicklingError, match=r"file' with mode='r\+'.*deleted or replaced.*would be lost"):
        journey(writable)
    assert (journey(readable)[0] == np.arange(5000.0)).all()


def test_a_map_of_a_nameless_file():
    """A temporary file without a name is like one that was deleted."""
    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, dtype="f8", mode="w+", shape=3000)
        with pytest.raises(pickle.PicklingError, match="a file without a name"):
            journey(array)
        assert (journey(array, BACK)[0] == array).all()


def test_a_renamed_file_is_found(tmp_path, mapped):
    """The map goes by the name that its file has now."""
    os.rename(tmp_path / "data", tmp_path / "moved")
    there, _, _ = journey(mapped)
    there[0, 0] = 99
    assert mapped[0, 0] == 99


def test_a_file_that_has_shrunk_is_named(tmp_path, mapped):
    """The far end maps nothing past the end, and does not make the file longer."""
    os.truncate(tmp_path / "data", 1000)
    with pytest.raises(ValueError, match=r"data cannot be mapped up to byte 320,000"):
        journey(mapped)
    assert os.path.getsize(tmp_path / "data") == 1000


class Measured(np.ndarray):
    """A user's array with an attribute, as numpy's manual has it."""

    def __new__(cls, values, unit=None):
        made = np.asarray(values).view(cls)
        made.unit = unit
        return made

    def __array_finalize__(self, obj):
        self.unit = getattr(obj, "unit", "none")


class Strict(np.ndarray):
    """A subclass that knows only itself and `None`."""

    def __array_finalize__(self, obj):
        if obj is not None:
            self.unit = obj.unit


class Slotted(np.ndarray):
    """A subclass without a `__dict__`."""

    __slots__ = ("unit",)


class Own(np.ndarray):
    """A subclass that says itself how it is pickled."""

    def __reduce__(self):
        return Own.of, (len(self),)

    @staticmethod
    def of(length):
        return np.full(length, 3.0).view(Own)


def slotted(length):
    """Make one with its slot filled."""
    made = np.arange(float(length)).view(Slotted)
    made.unit = "K"
    return made


def as_matrix(array):
    """Make what numpy advises against."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(array)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "make",
    [
        as_matrix,
        lambda a: Measured(a, "mm"),
        lambda a: np.ma.array(a, mask=a > 5, fill_value=-1, hard_mask=True),
        np.ma.asarray,
        lambda a: np.ma.array(a).view([("x", "f8")]),
        lambda a: np.char.array(a.astype("S8")),
        lambda a: np.rec.fromarrays([a, a + 1], names="x,y"),
        lambda a: a.astype([("x", "f4"), ("y", "i8", 2)]),
    ],
    ids=["matrix", "attribute", "masked", "unmasked", "masked records", "chararray", "recarray", "structured"],
)
def test_subclasses_arrive_as_they_were(make, order, rows):
    """Type, values, order, attributes and the right to write; large ones beside the pickle."""
    array = make(np.asarray(np.arange(rows * 70.0).reshape(rows, 70), order="C"))
    if order == "F":
        array = array.copy(order="F")
    there, pickled, beside = journey(array)
    assert type(there) is type(array)
    assert there.dtype == array.dtype
    assert np.array_equal(np.asarray(there), np.asarray(array))
    assert there.flags.f_contiguous == array.flags.f_contiguous
    assert there.flags.writeable
    if rows > 3:
        assert pickled < 2_000
        assert beside >= array.nbytes
    if isinstance(array, np.ma.MaskedArray):
        assert np.array_equal(np.ma.getmaskarray(there), np.ma.getmaskarray(array))
        assert (there.mask is np.ma.nomask) == (array.mask is np.ma.nomask)
        assert (there.hardmask, there.fill_value) == (array.hardmask, array.fill_value)
    if isinstance(array, Measured):
        assert there.unit == "mm"


class Copying(np.ndarray):
    """A subclass that takes over all attributes of what it is made from."""

    def __array_finalize__(self, obj):
        self.__dict__.update(getattr(obj, "__dict__", {}))


class SlottedMap(np.memmap):
    """A map whose class has slots and a `__dict__`."""

    __slots__ = ("unit",)


MADE_FROM_A_MAP = {
    "masked": lambda a: np.ma.masked_array(a, mask=np.asarray(a) > 500),
    "unmasked": np.ma.asarray,
    "masked slice": lambda a: np.ma.masked_array(a, mask=np.asarray(a) > 500)[3:9, ::2],
    "masked product": lambda a: np.ma.masked_array(a, mask=np.asarray(a) > 500) * 2,
    "masked copy": lambda a: np.ma.masked_array(a, mask=np.asarray(a) > 500, copy=True),
    "copying": lambda a: a.view(Copying),
    "copying slice": lambda a: a.view(Copying)[3:, 5],
    "copying sum": lambda a: a.view(Copying) + 1,
    "copy": lambda a: a.copy(),
    "slots": lambda a: a.view(SlottedMap),
}


@pytest.mark.parametrize("route", [HERE, ELSEWHERE], ids=["here", "elsewhere"])
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
@pytest.mark.parametrize("name", MADE_FROM_A_MAP)
def test_what_is_made_from_a_map_arrives(mapped, name, mode, route):
    """Also where it has copied the map's attributes, of which one cannot be pickled; twice on the way, too."""
    mapped.flush()
    array = MADE_FROM_A_MAP[name](np.memmap(mapped.filename, dtype="f8", mode=mode, shape=mapped.shape))
    if route is ELSEWHERE and mode == "r+":
        # A writable map is refused there; a task's result is its data.
        route = BACK
    once, _, _ = journey(array, route)
    for there in (once, journey(once, route)[0]):
        assert type(there) is type(array)
        assert np.array_equal(np.asarray(there), np.asarray(array))
        if isinstance(array, np.ma.MaskedArray):
            assert np.array_equal(np.ma.getmaskarray(there), np.ma.getmaskarray(array))
            assert there.sum() == array.sum()
            assert (there[1:] + 1).sum() == (array[1:] + 1).sum()


@pytest.mark.parametrize("name", ["masked", "masked slice", "copying"])
def test_a_task_writes_through_what_is_made_from_a_map(mapped, name):
    """It goes by name, as the map itself."""
    array = MADE_FROM_A_MAP[name](mapped)
    there, _, _ = journey(array)
    there[0] = 77
    assert (np.asarray(array)[0] == 77).all()


def test_masked_maps_go_to_the_workers_and_back(workers, mapped):
    """What a task masks of a map arrives as what the client masks of it."""

    def double(array):
        return array * 2, array

    masked = np.ma.masked_array(mapped, mask=np.asarray(mapped) > 500)
    with sky.pool(worker=workers, plugins=[]) as pool:
        doubled, same = pool.submit(double, masked).result(30)
    assert (doubled.sum(), same.sum()) == (2 * masked.sum(), masked.sum())
    assert np.array_equal(same.mask, masked.mask)


def test_slots_of_a_subclass_arrive():
    """Attributes need no `__dict__`."""
    assert journey(slotted(5))[0].unit == "K"


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (60, 70)])
@pytest.mark.parametrize("dtype", ["f8", "M8[s]", "S3", "?", "S0", [("x", "i2"), ("y", "f8")]], ids=str)
def test_subclasses_of_any_type_and_shape_arrive(shape, dtype):
    """Also one that cannot be made as a view of a plain array."""
    array = np.ndarray.__new__(Strict, shape, dtype)
    np.asarray(array)[...] = np.zeros(shape, dtype)
    array.unit = "K"
    there, _, _ = journey(array)
    assert type(there) is Strict
    assert there.unit == "K"
    assert (there.shape, there.dtype) == (array.shape, array.dtype)
    assert np.asarray(there).tobytes() == np.asarray(array).tobytes()


def test_a_subclass_that_pickles_itself_is_left_alone():
    """Its own `__reduce__` says what arrives."""
    assert (journey(np.zeros(4000).view(Own))[0] == 3).all()


def test_an_array_of_objects_may_hold_itself():
    """Objects are numpy's to pickle, in subclasses too."""
    array = np.empty(2, object).view(Measured)
    array[0] = array
    there, _, _ = journey(array)
    assert there[0] is there


def test_subclasses_survive_the_workers(workers):
    """A masked array and a user's array go there and come back."""
    masked = np.ma.masked_greater(np.arange(30_000.0), 5)
    measured = Measured(np.arange(30_000.0), "mm")
    with sky.pool(worker=workers, plugins=[]) as pool:
        there, back = pool.submit(lambda a, b: ((a.sum(), b.unit), (a, b)), masked, measured).result(30)
    assert there == (15.0, "mm")
    assert (back[0] == masked).all()
    assert back[0].mask.sum() == masked.mask.sum()
    assert back[1].unit == "mm"


@pytest.mark.parametrize("route", [HERE, ELSEWHERE, BACK])
def test_an_empty_map_travels(tmp_path, route):
    """Nothing can be lost of it."""
    array = np.memmap(tmp_path / "empty", dtype="f8", mode="w+", shape=(0, 3))
    assert journey(array, route)[0].shape == (0, 3)

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
    """Pickle and unpickle. Return the value that arrives, the bytes of the pickle, and the buffers beside it."""
    pickled, buffers = payload.Encoder(1 << 30, route).dumps(value)
    return payload.loads(pickled, buffers), len(pickled), payload.size(pickled, buffers) - len(pickled)


@pytest.fixture
def mapped(tmp_path):
    """A writable map of 400 × 100 different numbers."""
    array = np.memmap(tmp_path / "data", dtype="f8", mode="w+", shape=(400, 100))
    array[:] = np.arange(40_000).reshape(400, 100)
    return array


@pytest.fixture(scope="module", params=["thread", "process"])
def workers(request):
    """The settings of the workers, with each executor."""
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


def test_memmap_output_is_written_by_tasks(workers, tmp_path):
    """Each task writes its row of a memory map, as joblib's documentation shows, and the file has all rows."""

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


def test_memmap_views_are_written_by_tasks(workers, mapped):
    """Tasks write into a row, a column as a plain array and a reversed view of a map, and the file has their values."""

    def add(view, number):
        view += number

    expected = np.array(mapped)
    with sky.pool(worker=workers, plugins=[]) as pool:
        for i in range(10):
            for of in (lambda a, i=i: a[i], lambda a, i=i: np.asarray(a)[50:, i], lambda a, i=i: a[20 + i, ::-3]):
                pool.submit(add, of(mapped), i).result(30)
                add(of(expected), i)
    assert (mapped == expected).all()


def test_read_only_memmap_is_not_sent(workers, tmp_path):
    """Twenty tasks with a read-only map of 40 MB take less than 2,000 bytes each, and read the right values."""
    np.arange(5_000_000.0).tofile(tmp_path / "big")
    big = np.memmap(tmp_path / "big", mode="r", dtype="f8")
    with sky.pool(worker=workers) as pool:
        assert payload.size(*Tasks.of(pool).encode(0, np.sum, (big,), {})) < 2_000
        read = Parallel(n_jobs=-1)(delayed(lambda a, i: (a[i * 1000], a.flags.writeable))(big, i) for i in range(20))
    assert read == [(i * 1000.0, False) for i in range(20)]


def test_memmap_result_is_the_same_file(workers, tmp_path):
    """A map that a task returns is a map of the same file at the client."""

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


def test_memmap_result_of_a_deleted_file_comes_as_data(workers):
    """A task that returns a map of a file in a temporary directory, which it deletes, returns the data."""

    def make():
        import tempfile

        import numpy as np

        with tempfile.TemporaryDirectory() as directory:
            made = np.memmap(f"{directory}/made", mode="w+", dtype="i4", shape=5000)
            made[:] = 7
        return made

    with sky.pool(worker=workers, plugins=[]) as pool:
        assert (pool.submit(make).result(30) == np.full(5000, 7)).all()


def test_writable_memmap_is_refused_on_a_host_without_shared_files(far, mapped):
    """On a host that does not share files, a writable map makes the call raise the file, the reason and the remedy."""
    told = r"data' with mode='w\+'.* do not share files .* would be lost.* return the values .* mode='r'"
    for view in (mapped, mapped[3:], np.asarray(mapped)[:, 2]):
        with pytest.raises(pickle.PicklingError, match=told):
            far.submit(np.sum, view)
    with pytest.raises(pickle.PicklingError, match=told):
        Parallel(n_jobs=-1)(delayed(np.sum)(mapped) for _ in range(2))


def test_read_only_memmap_travels_as_data_to_a_host_without_shared_files(far, mapped, tmp_path):
    """The values of a read-only map arrive beside the pickle on a host that does not share files, and are not
    writable.
    """
    mapped.flush()
    read = np.memmap(tmp_path / "data", dtype="f8", mode="r", shape=(400, 100))
    assert len(far._tasks.encode(0, np.sum, (read,), {})[0]) < 2_000

    def use(array):
        return float(array.sum()), array.flags.writeable

    assert far.submit(use, read).result(30) == (float(read.sum()), False)


def test_memmap_result_from_a_host_without_shared_files_is_data(far):
    """The client gets a returned map's values, not the name of a file that it cannot see."""

    def make():
        import tempfile

        import numpy as np

        with tempfile.NamedTemporaryFile() as file:
            made = np.memmap(file.name, mode="w+", dtype="f8", shape=3000)
            made[:] = 3
            return made

    assert (far.submit(make).result(30) == np.full(3000, 3.0)).all()


def views(array):
    """Return views of all kinds: slices, orders, signs of strides, other types, fewer and more dimensions."""
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
def test_memmap_views_keep_type_shape_and_strides(mapped, name):
    """Views of a map keep values, type, shape, strides and the right to write, also after two trips."""
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
def test_memmap_with_an_offset(tmp_path, order):
    """A map after a header of more than a page, and of no whole number of pages, keeps its offset."""
    (tmp_path / "file").write_bytes(bytes(5003))
    array = np.memmap(tmp_path / "file", dtype="i2", mode="r+", offset=5003, shape=(60, 70), order=order)
    array[:] = np.arange(4200).reshape(60, 70)
    for view in (array, array[3:, 5:]):
        there, _, _ = journey(view)
        assert (there == view).all()
        assert there.strides == view.strides
        there += 1
        assert (there == view).all()


def test_copy_on_write_memmap_carries_what_was_written(tmp_path):
    """A copy-on-write map goes by name while it equals its file, and as data once the client has written to it."""
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
def test_single_write_to_a_copy_on_write_memmap_is_found(tmp_path, monkeypatch, place):
    """One number written to a copy-on-write map that has been read is found, although the map is compared in parts."""
    monkeypatch.setattr(arrays, "MAX_PAGEMAP_ENTRIES", 10)
    np.arange(500_000.0).tofile(tmp_path / "file")
    array = np.memmap(tmp_path / "file", dtype="f8", mode="c")
    total = array.sum()
    assert journey(array)[2] == 0
    array[place] += 1
    there, _, beside = journey(array)
    assert beside == array.nbytes
    assert there.sum() == total + 1
    # Only the number's page was written.
    rest = array[100_000:400_000]
    assert journey(rest)[2] == 0


@pytest.mark.parametrize("change", ["delete", "replace"])
def test_memmap_of_a_deleted_or_replaced_file(tmp_path, change):
    """If a map's file was deleted or replaced, a writable map is refused and a readable one is sent as data."""
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


def test_memmap_of_a_file_without_a_name():
    """A map of a temporary file without a name is treated as one of a deleted file."""
    with tempfile.TemporaryFile() as file:
        array = np.memmap(file, dtype="f8", mode="w+", shape=3000)
        with pytest.raises(pickle.PicklingError, match="a file without a name"):
            journey(array)
        assert (journey(array, BACK)[0] == array).all()


def test_memmap_of_a_renamed_file(tmp_path, mapped):
    """A map goes by the name that its file has now."""
    os.rename(tmp_path / "data", tmp_path / "moved")
    there, _, _ = journey(mapped)
    there[0, 0] = 99
    assert mapped[0, 0] == 99


def test_memmap_of_a_truncated_file_is_an_error(tmp_path, mapped):
    """If a map's file has become shorter, the worker raises an error with its name, and does not make the file
    longer.
    """
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
    """A subclass with its own `__reduce__`."""

    def __reduce__(self):
        return Own.of, (len(self),)

    @staticmethod
    def of(length):
        return np.full(length, 3.0).view(Own)


def slotted(length):
    """Return a slotted array whose slot is filled."""
    made = np.arange(float(length)).view(Slotted)
    made.unit = "K"
    return made


def as_matrix(array):
    """Return a `numpy.matrix`, against which numpy advises."""
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
def test_array_subclasses_keep_type_order_and_attributes(make, order, rows):
    """Arrays of subclasses keep type, values, order, attributes and the right to write; large ones travel beside the
    pickle.
    """
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
    """A subclass that takes over all attributes of the array from which it is made."""

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
def test_arrays_derived_from_a_memmap(mapped, name, mode, route):
    """An array that was made from a map arrives, also with a copied attribute that cannot be pickled, and after two
    trips.
    """
    mapped.flush()
    array = MADE_FROM_A_MAP[name](np.memmap(mapped.filename, dtype="f8", mode=mode, shape=mapped.shape))
    if route is ELSEWHERE and mode == "r+":
        # A writable map is refused on the other machine; a task's result is sent as data.
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
def test_task_writes_through_an_array_derived_from_a_memmap(mapped, name):
    """An array that shares a map's memory goes by the file's name, so a task writes into the file."""
    array = MADE_FROM_A_MAP[name](mapped)
    there, _, _ = journey(array)
    there[0] = 77
    assert (np.asarray(array)[0] == 77).all()


def test_masked_memmaps(workers, mapped):
    """A masked array over a map has the same values and mask, whether the task or the client masked it."""

    def double(array):
        return array * 2, array

    masked = np.ma.masked_array(mapped, mask=np.asarray(mapped) > 500)
    with sky.pool(worker=workers, plugins=[]) as pool:
        doubled, same = pool.submit(double, masked).result(30)
    assert (doubled.sum(), same.sum()) == (2 * masked.sum(), masked.sum())
    assert np.array_equal(same.mask, masked.mask)


def test_array_subclass_with_slots():
    """Attributes of an array's subclass arrive that are in `__slots__`."""
    assert journey(slotted(5))[0].unit == "K"


@pytest.mark.parametrize("shape", [(), (0, 3), (3,), (60, 70)])
@pytest.mark.parametrize("dtype", ["f8", "M8[s]", "S3", "?", "S0", [("x", "i2"), ("y", "f8")]], ids=str)
def test_array_subclasses_of_any_dtype_and_shape(shape, dtype):
    """Arrays of subclasses arrive with any dtype and shape, also those that no view of a plain array can make."""
    array = np.ndarray.__new__(Strict, shape, dtype)
    np.asarray(array)[...] = np.zeros(shape, dtype)
    array.unit = "K"
    there, _, _ = journey(array)
    assert type(there) is Strict
    assert there.unit == "K"
    assert (there.shape, there.dtype) == (array.shape, array.dtype)
    assert np.asarray(there).tobytes() == np.asarray(array).tobytes()


def test_array_subclass_with_its_own_reduce():
    """The `__reduce__` of an array's subclass decides what arrives."""
    assert (journey(np.zeros(4000).view(Own))[0] == 3).all()


def test_object_array_that_contains_itself():
    """Arrays of objects, of subclasses too, are pickled by numpy, so one may contain itself."""
    array = np.empty(2, object).view(Measured)
    array[0] = array
    there, _, _ = journey(array)
    assert there[0] is there


def test_array_subclasses_round_trip_through_workers(workers):
    """A masked array and an array of a user's class go to a worker and come back the same."""
    masked = np.ma.masked_greater(np.arange(30_000.0), 5)
    measured = Measured(np.arange(30_000.0), "mm")
    with sky.pool(worker=workers, plugins=[]) as pool:
        there, back = pool.submit(lambda a, b: ((a.sum(), b.unit), (a, b)), masked, measured).result(30)
    assert there == (15.0, "mm")
    assert (back[0] == masked).all()
    assert back[0].mask.sum() == masked.mask.sum()
    assert back[1].unit == "mm"


@pytest.mark.parametrize("route", [HERE, ELSEWHERE, BACK])
def test_empty_memmap(tmp_path, route):
    """An empty map travels as data."""
    array = np.memmap(tmp_path / "empty", dtype="f8", mode="w+", shape=(0, 3))
    assert journey(array, route)[0].shape == (0, 3)

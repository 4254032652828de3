"""Checks of parameters: they are made where the user wrote them, and the error names the parameter."""

import math

import numpy as np
import pytest
import skyward_lite as sky

HUGE = 10**5000
"""More digits than Python prints."""
huge, minus_huge = pytest.param(HUGE, id="huge"), pytest.param(-HUGE, id="-huge")


def map_with(**parameters):
    pool = sky.pool()
    return pool.map(abs, [1], **parameters)


COUNTS = [
    (sky.Worker, "concurrency"),
    (sky.Worker, "max_payload"),
    (sky.Local, "nodes"),
    (sky.pool, "nodes"),
    (sky.pool, "vcpus"),
    (sky.AWS, "disk_gb"),
    (lambda **given: sky.Host("lab", **given), "concurrency"),
]
RETRIES = (sky.Worker, "retries")
SIZES = [(map_with, "chunksize"), (map_with, "buffersize")]


@pytest.mark.parametrize("value", [True, 2.5, 2.0, "2", b"2", math.nan, [2]])
@pytest.mark.parametrize(("make", "name"), [*COUNTS, RETRIES, *SIZES])
def test_whole_numbers_are_whole_numbers(make, name, value):
    """A whole number may not be a truth value or a float, although either would work by accident."""
    with pytest.raises(TypeError, match=f"{name}=.*: a whole number"):
        make(**{name: value})


@pytest.mark.parametrize("value", [2**60, 2**63, 2**64, huge])
@pytest.mark.parametrize(("make", "name"), [*COUNTS, RETRIES])
def test_numbers_have_an_upper_bound(make, name, value):
    """A number far too large is refused at once, and not by a node minutes later."""
    with pytest.raises(ValueError, match=f"{name}=.*: at most [0-9,]+"):
        make(**{name: value})


@pytest.mark.parametrize("value", [0, -1, minus_huge])
@pytest.mark.parametrize(("make", "name"), [*COUNTS, *SIZES])
def test_numbers_have_a_lower_bound(make, name, value):
    """A number below the least useful one is refused."""
    with pytest.raises(ValueError, match=f"{name}=.*: at least 1"):
        make(**{name: value})


SECONDS = [
    (sky.Worker, "task_timeout"),
    (sky.pool, "lease"),
    (sky.pool, "connect_timeout"),
    (sky.pool, "start_timeout"),
    (sky.AWS, "ttl"),
    (sky.AWS, "orphan_timeout"),
    (sky.AWS, "boot_timeout"),
    (sky.AWS, "max_hourly_cost"),
    (sky.pool, "memory_gb"),
    (sky.Worker, "cache_gb"),
]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, -math.inf, 1e300, huge])
@pytest.mark.parametrize(("make", "name"), SECONDS)
def test_durations_and_sizes_have_bounds(make, name, value):
    """A duration or size must be finite, above zero and below a bound."""
    with pytest.raises(ValueError, match=f"{name}=.*(more than 0|at least 1) and at most"):
        make(**{name: value})


@pytest.mark.parametrize("value", ["1", True, [1], 1j])
@pytest.mark.parametrize(("make", "name"), SECONDS)
def test_durations_and_sizes_are_numbers(make, name, value):
    """A text or a truth value is no duration or size."""
    with pytest.raises(TypeError, match=f"{name}=.*: a number of"):
        make(**{name: value})


@pytest.mark.parametrize("value", ["no", "yes", "", 0, 1, None, [], object()])
@pytest.mark.parametrize(
    ("make", "name"),
    [(lambda **given: sky.SSH("lab", **given), "accept_new"), (sky.pool, "strict_env"), (sky.pool, "ship_modules")],
)
def test_switches_are_true_or_false(make, name, value):
    """A switch must be a truth value, as `accept_new="no"` would otherwise mean yes."""
    with pytest.raises(TypeError, match=f"{name}=.*: True or False"):
        make(**{name: value})


def test_numpy_numbers_are_numbers():
    """numpy's numbers are taken as the numbers that they are."""
    worker = sky.Worker(concurrency=np.int64(3), task_timeout=np.float32(2.5))
    assert (type(worker.concurrency), worker.concurrency) == (int, 3)
    assert worker.task_timeout == 2.5
    assert sky.SSH("lab", accept_new=np.True_).accept_new is True
    assert sky.pool(nodes=(np.int8(1), np.int32(2))).nodes_wanted == 2


@pytest.mark.slow
def test_the_largest_concurrency_works():
    """A node works with the largest concurrency that the check admits."""
    with sky.pool(worker=sky.Worker(concurrency=4_096, max_payload=1 << 40), plugins=[]) as pool:
        assert pool.slots() == 4_096
        assert list(pool.map(abs, range(-5, 0), timeout=50)) == [5, 4, 3, 2, 1]

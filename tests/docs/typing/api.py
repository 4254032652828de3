"""What type checkers see of the public API. Never run: `make lint` checks it.

A line with `type: ignore` is a mistake that must be found: mypy's `warn_unused_ignores` fails if it is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, assert_type

import skyward_lite as sky
from skyward_lite import (
    ComputePool,
    compute,
    errors,
    gather,
    plugins,
    pool,
)


def f(x: int, y: str = "") -> float:
    return x / len(y)


@sky.compute
def slow(x: int) -> str:
    return str(x)


@compute
def pair(a: bytes, *, flag: bool = False) -> tuple[bytes, bool]:
    return a, flag


class Model:
    @sky.compute
    def fit(self, rows: list[float]) -> float:
        return sum(rows)

    @staticmethod
    @sky.compute
    def zero() -> None: ...


# Constructors.
assert_type(sky.Worker(), sky.Worker)
sky.Worker(concurrency=10, executor="process", retries=0, max_payload=1 << 30)
sky.Worker(concurrency=None, executor="thread")
sky.Worker(executor="fiber")  # type: ignore[arg-type]
sky.Worker(slots=1)  # type: ignore[call-arg]
assert_type(sky.Image(pip=["numpy"], env={"A": "b"}), sky.Image)
sky.Image(pip=("numpy",))
sky.Image(env=["A=b"])  # type: ignore[arg-type]
assert_type(sky.Local(), sky.Local)
assert_type(sky.AWS("eu-west-1", instance_type=["c7i.large"], allocation="spot", tags={"team": "lab"}), sky.AWS)
sky.AWS(allocation="cheap")  # type: ignore[arg-type]
sky.Local(nodes=2)
sky.SSH("me@lab1", sky.Host("lab2", concurrency=2), python=Path("/opt/python"))
sky.SSH(["me@lab1", sky.Host("lab2")])
sky.SSH(1)  # type: ignore[arg-type]
sky.pool(nodes=[2, 10])
sky.pool(nodes="2")  # type: ignore[arg-type]
sky.pool(n_jobs=2)  # type: ignore[call-arg]
sky.Local("two")  # type: ignore[arg-type]

# Plugins.
assert_type(plugins.joblib(), sky.Plugin)
assert_type(sky.plugins.joblib(version="1.5.0"), sky.Plugin)


@contextlib.contextmanager
def around(p: sky.ComputePool) -> Iterator[None]:
    yield


def transform(image: sky.Image) -> sky.Image:
    return image.with_pip("joblib")


sky.Plugin("mine", preload=["numpy"], transform=transform, around_client=around)
sky.Plugin("mine", transform=around)  # type: ignore[arg-type]

# Pools.
assert_type(sky.pool(), ComputePool)
assert_type(pool(sky.Local(), 2, worker=sky.Worker(), image=sky.Image(), plugins=[]), ComputePool)
sky.pool(provider=sky.Local(), nodes=(1, 10), lease=3600, connect_timeout=5, start_timeout=60.0)
sky.pool(nodes="all")  # type: ignore[arg-type]
sky.pool(provider="local")  # type: ignore[arg-type]
sky.pool(plugins=["joblib"])  # type: ignore[list-item]


def tasks(p: ComputePool) -> None:
    with sky.pool() as entered:
        assert_type(entered, ComputePool)
    executor: Executor = p
    assert_type(p.submit(f, 1, y="a"), Future[float])
    assert_type(p.submit(f, 1).result(10), float)
    p.submit(f, "1")  # type: ignore[arg-type]
    p.submit(f, 1, z=2)  # type: ignore[call-arg]
    assert_type(p.map(f, [1, 2], ["a", "b"], timeout=1.5, chunksize=2, buffersize=None), Iterator[float])
    p.map(f, [1], chunksize="2")  # type: ignore[arg-type]
    assert_type(p.slots(), int)
    assert_type(p.shutdown(wait=False, cancel_futures=True), None)
    for node in p.nodes():
        assert_type(node, sky.Node)
        assert_type((node.name, node.state, node.reason, node.slots), tuple[str, str, str, int])
        assert_type(node.rtt, float | None)


def calls(p: ComputePool) -> None:
    decorated: sky.ComputeFunction[[int], str] = slow
    assert_type(slow(3), sky.LazyCall[str])
    assert_type(slow.local(3), str)
    assert_type(slow(3) > p, Future[str])
    assert_type(slow(3) >> p, str)
    assert_type(slow(3) @ p, list[str])
    assert_type(pair(b"", flag=True) >> p, tuple[bytes, bool])
    slow("3")  # type: ignore[arg-type]
    slow.local("3")  # type: ignore[arg-type]
    pair(b"", True)  # type: ignore[call-arg]
    sky.compute(3)  # type: ignore[arg-type]
    assert_type(p.submit(slow.local, 3), Future[str])

    # Methods.
    assert_type(Model().fit([1.0]) >> p, float)
    assert_type(Model().fit.local([1.0]), float)
    assert_type(Model.fit(Model(), [1.0]) >> p, float)
    assert_type(Model.zero() @ p, list[None])
    Model().fit("rows")  # type: ignore[arg-type]

    # Groups.
    a, b, c = slow(1), pair(b""), Model().fit([])
    assert_type(a & b, sky.LazyGroup[str, tuple[bytes, bool]])
    assert_type((a & b) >> p, tuple[str, tuple[bytes, bool]])
    assert_type((a & b) > p, Future[tuple[str, tuple[bytes, bool]]])
    assert_type((a & b) @ p, list[tuple[str, tuple[bytes, bool]]])
    assert_type((a & b & c) >> p, tuple[str, tuple[bytes, bool], float])
    assert_type((a & (b & c)) >> p, tuple[str, tuple[bytes, bool], float])
    assert_type(((a & a) & (b & c)) >> p, tuple[Any, ...])
    assert_type(gather(a) >> p, tuple[str])
    assert_type(gather(a, c) >> p, tuple[str, float])
    assert_type(gather(a, c, a, c, a) >> p, tuple[str, float, str, float, str])
    assert_type(gather(a, a, a, a, a, a) >> p, tuple[str, ...])
    assert_type(gather(*[slow(i) for i in range(9)]) >> p, tuple[str, ...])
    assert_type(gather(*[slow(i) for i in range(9)]) > p, Future[tuple[str, ...]])
    one, two = gather(a, c) >> p
    assert_type(one, str)
    assert_type(two, float)

    # What does not mean what it looks like.
    _ = slow(3) > 5  # type: ignore[operator]
    _ = a & b >> p  # type: ignore[operator]
    _ = a >> p & b  # type: ignore[operator]
    _ = a & 3  # type: ignore[operator]
    _ = a >> b  # type: ignore[operator]
    gather(a, 3)  # type: ignore[call-overload]
    a.local  # type: ignore[attr-defined]


def caught() -> None:
    try:
        tasks(sky.pool())
    except (sky.NodeStartError, sky.NodeLostError, sky.WorkerCrashedError, sky.RemoteError) as error:
        base: errors.SkywardError = error
    except sky.PoolClosedError as error:
        runtime: RuntimeError = error
    except sky.PayloadTooLargeError as error:
        value: ValueError = error
    except sky.SkywardError as error:
        traceback = error.__cause__
        if isinstance(traceback, sky.RemoteTraceback):
            assert_type(traceback.text, str)
            assert_type(traceback.task, int | None)


assert_type(sky.__version__, str)
sky.no_such_name  # type: ignore[attr-defined]

status = sky.pool().status()
assert_type(status, sky.Status)
assert_type(status.cost, sky.Cost | None)
assert_type(status.nodes, list[sky.Node])

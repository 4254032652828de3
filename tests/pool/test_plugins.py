"""Plugins' hooks on the nodes: `around_worker` and `decorate`."""

from __future__ import annotations

import contextlib
import operator
import os
import time

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed


def noting(name, path, fails=False):
    """Return a plugin that writes to a file when its hooks are entered and left."""

    def note(text):
        with open(path, "a") as file:
            file.write(f"{text}{name} ")

    @contextlib.contextmanager
    def around(info):
        note("+")
        assert isinstance(info, sky.WorkerInfo)
        assert (info.node, info.pid, info.slots) == ("local-0", os.getpid(), 1)
        if fails:
            raise OSError(f"{name} cannot")
        try:
            yield
        finally:
            note("-")

    def decorate(fn):
        def call(*args, **kwargs):
            note("(")
            try:
                return fn(*args, **kwargs)
            finally:
                note(")")

        return call

    return sky.Plugin(name, around_worker=around, decorate=decorate)


@pytest.mark.parametrize("executor", ["thread", "process"])
def test_worker_hooks_compose_in_order_and_unwind_in_reverse(tmp_path, executor):
    """The first plugin of the list is the outermost, around the process and around each task."""
    log = tmp_path / "log"
    worker = sky.Worker(concurrency=1, executor=executor)
    with sky.pool(worker=worker, plugins=[noting("a", log), sky.plugins.joblib(), noting("b", log)]) as pool:
        assert pool.submit(operator.neg, 1).result(20) == -1
        assert Parallel(n_jobs=2)(delayed(operator.neg)(i) for i in [2]) == [-2]
        with pytest.raises(ZeroDivisionError):
            pool.submit(operator.truediv, 1, 0).result(20)
    assert log.read_text().split() == ["+a", "+b", *["(a", "(b", ")b", ")a"] * 3, "-b", "-a"]


def test_worker_hooks_are_unwound_when_another_raises(tmp_path):
    """If a worker hook raises, the hooks that were entered are left, and the node does not start and says why."""
    log = tmp_path / "log"
    plugins = [noting("a", log), noting("b", log, fails=True), noting("c", log)]
    with (
        pytest.raises(sky.NodeStartError, match="OSError: b cannot"),
        sky.pool(worker=sky.Worker(concurrency=1), plugins=plugins),
    ):
        pass
    entered = log.read_text().split()
    assert set(zip(*[iter(entered)] * 3, strict=True)) == {("+a", "+b", "-a")}


@pytest.mark.slow
def test_worker_hook_that_does_not_return_is_ended(tmp_path):
    """Leaving the pool is bounded whatever a hook does."""

    @contextlib.contextmanager
    def around(info):
        yield
        time.sleep(300)

    with sky.pool(plugins=[sky.Plugin("slow", around_worker=around)]) as pool:
        assert pool.submit(operator.neg, 1).result(20) == -1


def test_hooks_that_are_too_large_are_refused():
    """Hooks that are too large for the hello are refused with the plugin and the remedy."""
    data = bytes(100_000)
    plugin = sky.Plugin("fat", decorate=lambda fn: fn if data else None)
    with pytest.raises(ValueError, match=r"fat.*on the node"), sky.pool(plugins=[plugin]):
        pass


def test_hooks_that_cannot_be_pickled_are_refused():
    """Hooks that cannot be pickled are refused before anything is started."""
    import threading

    lock = threading.Lock()
    plugin = sky.Plugin("locked", decorate=lambda fn: fn if lock else None)
    with pytest.raises(TypeError, match="pickle"), sky.pool(plugins=[plugin]):
        pass


def test_transform_must_return_an_image():
    """A plugin whose `transform` returns no image is named."""
    with (
        pytest.raises(TypeError, match=r"'forgetful': its transform gave None: return the sky\.Image"),
        sky.pool(plugins=[sky.Plugin("forgetful", transform=lambda image: None)]),
    ):
        pass


def test_preload_that_fails_is_named(tmp_path, monkeypatch):
    """A preloaded module that raises fails the start with its name, and a missing one is no error."""
    (tmp_path / "failing.py").write_text("raise LookupError('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with sky.pool(plugins=[sky.Plugin("missing", preload=["no_such_module"])]) as pool:
        assert pool.submit(abs, -1).result(20) == 1
    with pytest.raises(Exception, match="licence") as caught, sky.pool(plugins=[sky.Plugin("x", preload=["failing"])]):
        pass
    texts = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert "failing" in "\n".join(texts)

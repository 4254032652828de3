"""`backend="skyward"` works, or says what to do, whatever was imported first and wherever it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import skyward_lite as sky
from joblib import Parallel, delayed, parallel_config

USE = {
    "Parallel": "joblib.Parallel(backend='skyward')(joblib.delayed(abs)(i) for i in range(3))",
    "parallel_config": "joblib.parallel_config('skyward').__enter__()",
}
ORDERS = {
    "joblib first": "import joblib, skyward_lite as sky",
    "joblib last": "import skyward_lite as sky; import joblib",
    "joblib after a pool was made": "import skyward_lite as sky; pool = sky.pool(); import joblib",
    "joblib after a search for it": "import skyward_lite as sky\nfrom importlib.util import find_spec\n"
    "find_spec('joblib'); import joblib",
    "joblib from a thread": "import skyward_lite as sky, threading\n"
    "thread = threading.Thread(target=__import__, args=('joblib',)); thread.start(); thread.join(); import joblib",
    "after the block": "import skyward_lite as sky\nwith sky.pool(): pass\nimport joblib",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_explained_whatever_was_imported_first(order):
    """Without an open pool the error names the remedy, and the import system is as it was."""
    lines = [
        ORDERS[order],
        "import sys",
        "assert not any('skyward' in str(finder) for finder in sys.meta_path), sys.meta_path",
        "assert 'exec_module' not in vars(joblib.parallel.__spec__.loader)",
        *(f"try: {use}\nexcept sky.PoolClosedError as error: print(error)" for use in USE.values()),
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr == ""
    assert done.stdout.count("inside `with sky.pool(...):`, or after `pool.start()`") == len(USE)


def test_importing_the_package_does_not_import_joblib():
    """A program that never imports joblib does not pay for it."""
    code = "import skyward_lite, sys; sys.exit('joblib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def named(_: int = 0) -> list[int]:
    return Parallel(backend="skyward")(delayed(abs)(i) for i in range(-2, 0))


def test_the_name_in_threads_tasks_and_children():
    """Threads beside the block use its pool, tasks run their calls one by one, and forked children are refused."""
    with sky.pool(worker=sky.Worker(concurrency=1)) as pool:
        assert pool.submit(named).result(20) == [2, 1]
        values = []
        thread = threading.Thread(target=lambda: values.append(named()))
        thread.start()
        thread.join()
        assert values == [[2, 1]]
        assert Parallel(n_jobs=2)(delayed(named)(i) for i in range(2)) == [[2, 1]] * 2
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                named()
            except sky.PoolClosedError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writer)
        with open(reader) as said:
            assert "forked from the one that opened the pool: open a pool of its own" in said.read()
        for wrong in ("skyward_lite", "sky"):
            with pytest.raises(ValueError, match="'skyward'"):
                Parallel(backend=wrong)
            with pytest.raises(ValueError, match="'skyward'"):
                parallel_config(wrong)


def test_input_without_delayed_is_explained():
    """An input that is no call, or a function that `delayed` was not asked to call, is answered with what to write."""
    with sky.pool(worker=sky.Worker(concurrency=1)):
        for wrong in (abs(-1), delayed(abs), None, (abs, (1,)), "abc"):
            with pytest.raises(TypeError, match=r"Parallel takes calls, .*delayed\(f\)\(x\)"):
                Parallel(n_jobs=2)([delayed(abs)(1), wrong])

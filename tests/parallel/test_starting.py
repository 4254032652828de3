"""Pools without a block: one that was never entered is warned of when joblib runs tasks elsewhere; those opened by
start() may be closed in any order.
"""

from __future__ import annotations

import os
import subprocess
import sys

import joblib.parallel
import pytest
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.client import innermost, unentered

PROGRAM = """
IMPORTS
import warnings
joblib = __import__("joblib.parallel").parallel
original = joblib.LokyBackend

def told(**parameters):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = joblib.Parallel(**parameters)(joblib.delayed(abs)(-i) for i in range(3))
    assert values == [0, 1, 2]
    return [(warning.filename, str(warning.message)) for warning in caught]

assert told(n_jobs=1) == told(n_jobs=2, backend="threading") == told(n_jobs=2, backend="loky") == []
with joblib.parallel_config("loky"):
    assert told(n_jobs=2) == []
assert joblib.BACKENDS["loky"] is not original
((file, text),) = told(n_jobs=2)
assert file == __file__, file
assert f"(LokyBackend), because the pool that was made at {__file__}:{LINE} has not been started" in text, text
assert text.endswith("Use it as `with sky.pool(...) as pool:`, or call pool.start(), as in a notebook")
assert joblib.BACKENDS["loky"] is original
assert told(n_jobs=2) == []
"""
MADE = "import skyward_lite as sky\npool = sky.pool()"
ORDERS = {
    "joblib first": (f"import joblib\n{MADE}", 4),
    "joblib last": (f"{MADE}\nimport joblib", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_a_pool_that_was_not_entered_is_warned_of_once(tmp_path, order):
    """The first call of Parallel that runs on joblib's default backend gives one warning, at its own line, with the
    pool's line and the remedy, whatever the order of imports; backends that the program names give none.
    """
    imports, line = ORDERS[order]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("IMPORTS", imports).replace("{LINE}", str(line)))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr


USES = [lambda pool: pool.start().close(), lambda pool: pool.close(), lambda pool: pool.shutdown()]


@pytest.mark.parametrize("use", USES)
def test_joblibs_registry_is_as_before_once_a_pool_is_entered_or_closed(use):
    """The default backend's factory is joblib's own again when the last pool was entered or closed."""
    unentered.forget()
    original = joblib.parallel.BACKENDS["loky"]
    first, second = sky.pool(), sky.pool()
    assert joblib.parallel.BACKENDS["loky"] is not original
    use(first)
    assert joblib.parallel.BACKENDS["loky"] is not original
    use(second)
    assert joblib.parallel.BACKENDS["loky"] is original


def backend() -> str:
    return type(Parallel(n_jobs=2)._backend).__name__


def test_pools_that_were_started_may_be_closed_in_any_order(caplog):
    """With two pools open, calls go to the one that was started last; once both are closed, in whatever order, joblib
    is as before. start() and close() may be repeated, and a block may close a pool that was started.
    """
    before = backend()
    first, second = sky.pool().start(), sky.pool().start()
    assert "start() opened another pool earlier" in caplog.text
    assert first.start() is first
    first.close()
    first.close()
    assert Parallel(n_jobs=-1)(delayed(abs)(-i) for i in range(3)) == [0, 1, 2]
    assert backend() == "SkywardBackend"
    second.close()
    assert backend() == before
    with pytest.raises(sky.PoolClosedError, match="make a new one"):
        first.start()
    with sky.pool().start() as third:
        assert third.submit(abs, -1).result(20) == 1
    assert backend() == before
    sky.pool().close()


def test_progress_needs_an_open_pool_and_a_number(monkeypatch):
    """sky.progress() without an open pool, or with a total that is no number of tasks, says what to do; a forked child
    may leave the block.
    """
    # The pools that tests of other files share are open all the time.
    monkeypatch.setattr(innermost, "_entered", [])
    with pytest.raises(sky.PoolClosedError, match=r"sky\.progress\(\) needs an open pool: use it inside `with sky\."):
        sky.progress().__enter__()
    with pytest.raises((TypeError, ValueError), match=r"progress\(total='5'\)"):
        sky.progress(total="5")
    with sky.pool(plugins=[]) as pool:
        block = sky.progress(total=3)
        with block:
            with pytest.raises(RuntimeError, match="entered already"):
                block.__enter__()
            child = os.fork()
            if not child:
                block.__exit__(None, None, None)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            assert list(pool.map(abs, range(3))) == [0, 1, 2]

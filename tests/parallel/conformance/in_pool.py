"""Run a script as `__main__` inside a pool, as joblib's tests run scripts: `python in_pool.py (-c CODE | FILE)`."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from typing import Any

CONCURRENCY = 4


def check_subprocess_call(cmd: list[str], **kwargs: Any) -> None:
    """Run a command of joblib's tests, `[python, ...]`, with this script before the one that it runs."""
    # Not at the module's head: the script itself needs no pytest.
    from joblib.testing import check_subprocess_call as joblibs

    if kwargs.get("timeout") is not None:
        kwargs["timeout"] += 10  # the pool's start
    joblibs([cmd[0], __file__, *cmd[1:]], **kwargs)


def main(arguments: list[str]) -> None:
    """Open a pool and run what the arguments say."""
    import skyward_lite as sky

    with tempfile.TemporaryDirectory() as directory:
        file = arguments[0]
        if file == "-c":
            file = os.path.join(directory, "script.py")
            with open(file, "w") as script:
                script.write(arguments[1])
        worker = sky.Worker(concurrency=CONCURRENCY, executor=os.environ.get("SKYWARD_CONFORMANCE_EXECUTOR", "thread"))
        with sky.pool(worker=worker):
            runpy.run_path(file, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

"""In a notebook, what workers print appears below the cell that made the call.

The test group has ipykernel 6, which by itself takes the cell that started the printing thread. The tests pass with
version 7 as well, which takes the cell that ran last.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("ipykernel")

OPEN = """
import asyncio, sys, threading, time
import skyward_lite as sky
from joblib import Parallel, delayed
pool = sky.pool(worker=sky.Worker(concurrency=1, executor="EXECUTOR"))
pool.__enter__()
"""
ON_A_THREAD = """
thread = threading.Thread(target=pool.submit, args=(print, "on a thread"))
thread.start()
"""
PROGRESS = """
def work():
    sys.stderr.write("\\r10%")
    time.sleep(1.5)
    sys.stderr.write("\\r100%\\n")
pool.submit(work)
"""
CELLS = {
    "": OPEN,
    "submitted\n": "pool.submit(print, 'submitted')",
    "called 1\n": "Parallel(n_jobs=-1)(delayed(print)(f'called {i}') for i in range(2))",
    "on a thread\n": ON_A_THREAD,
    "awaited\n": "await asyncio.wrap_future(pool.submit(print, 'awaited'))",
    "100%\n": PROGRESS,
    "left\n": "pool.__exit__(None, None, None); print('left')",
}
"""What is awaited before the next cell runs, and the cell."""

KERNEL = """
import json, sys
from jupyter_client.manager import start_new_kernel

cells = json.load(sys.stdin)
manager, client = start_new_kernel(kernel_name="python3")
outputs = {}
for awaited, code in cells.items():
    cell, idle = client.execute(code), False
    outputs[cell] = ""
    while not idle or awaited not in "".join(outputs.values()):
        message = client.get_iopub_msg(timeout=20)
        of, content = message["parent_header"].get("msg_id"), message["content"]
        if message["msg_type"] in ("stream", "error"):
            outputs[of] = outputs.get(of, "") + content.get("text", str(content))
        idle = idle or (of == cell and content.get("execution_state") == "idle")
client.stop_channels()
manager.shutdown_kernel(now=True)
json.dump(list(outputs.values()), sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_output_appears_below_the_cell_that_made_the_call(executor):
    """Output of submitted, Parallel, threaded and awaited calls, and a progress bar, appears below the cell that made
    the call.
    """
    cells = {awaited: code.replace("EXECUTOR", executor) for awaited, code in CELLS.items()}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], input=json.dumps(cells), capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "",
        "[local-0] submitted\n",
        "[local-0] called 0\n[local-0] called 1\n",
        "[local-0] on a thread\n",
        "[local-0] awaited\n",
        f"\r[local-0] 10%\r{' ' * 13}\r[local-0] 100%\n",
        "left\n",
    ]

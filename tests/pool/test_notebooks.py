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


NOTEBOOK = """
import json, sys
import nbformat
from nbclient import NotebookClient

cells = [nbformat.v4.new_code_cell(code) for code in json.load(sys.stdin)]
notebook = nbformat.v4.new_notebook(cells=cells)
NotebookClient(notebook, timeout=40, kernel_name="python3", allow_errors=True).execute()
json.dump([cell.outputs for cell in notebook.cells], sys.stdout)
"""

SLOW = """
import sys, time
import skyward_lite as sky
from joblib import Parallel, delayed
from skyward_lite.providers.local import LocalMachine

class SlowMachine(LocalMachine):
    def open(self, core):
        self.doing = "downloading numpy"
        time.sleep(1.5)
        return super().open(core)

class Slow(sky.Local):
    def start(self, wanted, machines):
        machines.append(SlowMachine("slow", wanted.connect_timeout))

pool = sky.pool(Slow(), worker=sky.Worker(concurrency=2))
print(Parallel(n_jobs=2)(delayed(abs)(-i) for i in range(3)))
"""
INTERRUPT = """
import os, pathlib, signal, tempfile, threading
started = pathlib.Path(tempfile.mkdtemp(), "started")

def interrupt():
    while not started.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

def sleep_long(path):
    path.touch()
    time.sleep(60)

threading.Thread(target=interrupt).start()
Parallel(n_jobs=-1)(delayed(sleep_long)(started) for _ in range(4))
"""
STORY = [
    SLOW,
    "pool.start(); print(pool.slots())",
    "pool.start() is pool",
    "print(Parallel(n_jobs=-1)(delayed(abs)(-i) for i in range(5)))",
    INTERRUPT,
    "print(Parallel(n_jobs=-1)(delayed(abs)(-i) for i in range(5)))",
    "display(pool)",
    "with sky.progress(total=4):\n    print(list(pool.map(abs, range(4))))",
    "pool.close(); pool.close()",
    "pool.start()",
    "print(type(Parallel(n_jobs=2)._backend).__name__)",
    "pool = sky.pool(worker=sky.Worker(concurrency=2), progress=True).start()",
    "Parallel(n_jobs=-1)(delayed(abs)(-i) for i in range(5)); None",
    "[pool.submit(abs, i).result() for i in range(3)]",
    "pool.close()",
]


def texts(outputs):
    """Return what a cell shows as text, whatever its kind."""
    return [
        "".join(output.get("text") or output.get("data", {}).get("text/plain") or output.get("ename") or "")
        for output in outputs
    ]


@pytest.mark.slow
def test_a_pool_is_opened_used_and_closed_over_cells():
    """A notebook opens a pool with start(), sees it start in one display, survives an interrupted cell, and closes it;
    a pool that was made and not started is warned of.
    """
    pytest.importorskip("nbclient")
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        input=json.dumps(STORY),
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    made, started, again, used, interrupted, used_again, shown, block, closed, closed_start, after = results[:11]
    assert "call pool.start(), as in a notebook" in texts(made)[0]
    assert texts(made)[1] == "[0, 1, 2]\n"
    # One display, updated until the node was ready.
    kinds = [output["output_type"] for output in started]
    assert sorted(kinds) == ["display_data", "stream"]
    (display,) = [output for output in started if output["output_type"] == "display_data"]
    assert display["data"]["text/plain"].startswith("1 node ready with 2 slots after ")
    assert "<pre" in "".join(display["data"]["text/html"])
    assert texts(again) == ["True"]
    assert texts(used) == texts(used_again) == ["[0, 1, 2, 3, 4]\n"]
    assert texts(interrupted) == ["KeyboardInterrupt"]
    assert texts(shown)
    # The tasks of the interrupted cell may end only now, and count.
    assert any(" done in " in text for text in texts(block))
    assert "[0, 1, 2, 3]\n" in texts(block)
    assert closed == []
    assert texts(closed_start) == ["PoolClosedError"]
    assert texts(after) == ["LokyBackend\n"]
    # With progress=True, the tasks of each cell are shown below it.
    _, called, submitted, _ = results[11:]
    (text,) = texts(called)
    assert text.startswith("5 tasks done in ")
    assert [text.partition(" done")[0] for text in texts(submitted)] in (
        ["3 tasks", "[0, 1, 2]"],
        ["[0, 1, 2]", "3 tasks"],
    )

"""Clients that are killed or interrupted leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from processes import client_with_a_grandchild, eventually, ours


def test_killed_client_leaves_no_process(tmp_path):
    """After kill -9 of the client, the agent, workers and grandchildren end at once."""
    process, agent, grandchild = client_with_a_grandchild(tmp_path, lease=60)
    with process:
        process.kill()
        process.wait()
    assert eventually(lambda: not {agent, grandchild} & set(ours()), 5), ours()


def test_ctrl_c_during_parallel_leaves_the_block(tmp_path):
    """SIGINT during a `Parallel` call raises KeyboardInterrupt; the program exits within seconds and leaves nothing."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import time, skyward_lite as sky\n"
        "from joblib import Parallel, delayed\n"
        "with sky.pool(worker=sky.Worker(concurrency=2)) as pool:\n"
        "    print(pool.nodes()[0].pid, flush=True)\n"
        "    Parallel(n_jobs=-1)(delayed(time.sleep)(300) for _ in range(10))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        agent = int(process.stdout.readline())
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(10) != 0
        assert "KeyboardInterrupt" in process.stderr.read()
    assert eventually(lambda: agent not in ours(), 5)

"""Clients beside a node that floods them, sends nonsense, or is silent."""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

MEMORY = 64 << 20
"""Bytes beyond its start that a client may use at most, whatever a node sends."""
LEAVE = 5.0
"""Seconds after which the block of a client must be left."""
ADDRESSES = 6 << 30
"""Bytes of address space that a client gets, so that one which grows without bound fails and nothing else."""

CLIENT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import fakes
import skyward_lite as sky
from joblib import Parallel, delayed

behaviour, args, seconds = json.loads(sys.argv[2])

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

def double(x):
    time.sleep(0.05)
    return 2 * x

with fakes.pool(behaviour, **args, options={"worker": sky.Worker(concurrency=2, retries=9)}) as pool:
    before = memory("VmRSS")
    count = int(seconds * 40)
    began = time.monotonic()
    values = Parallel(n_jobs=-1, batch_size=1)(delayed(double)(i) for i in range(count))
    took = time.monotonic() - began
    wrong = values != [2 * i for i in range(count)]
    node = pool.nodes()[-1]
    began = time.monotonic()
left = time.monotonic() - began
grown = memory("VmHWM") - before
print(json.dumps([wrong, took, left, grown, node.state, node.reason]))
"""

MESSAGE = (b"\0" * 12).hex()
"""The head of a message without parts."""
FULL = struct.pack("<BBHQQ16000x", 0, 0, 1, 0, 16000).hex()
"""A message with one part."""
FLOODS: dict[str, dict[str, object]] = {
    "hello": {"body": b"{}".hex()},
    "ready": {"task": 2},
    "heartbeat": {"body": (b"\0" * 16).hex()},
    "pulse": {"task": 1},
    "goodbye": {"body": b"bye".hex()},
    "acknowledge": {"body": (b"\0" * 1000).hex()},
    "cancel": {"task": 1},
    "recall": {"task": 1},
    "given_back": {"task": 1},
    "recall_refused": {"task": 1},
    "task": {"body": MESSAGE, "flags": 3},
    "result": {"body": MESSAGE, "flags": 3},
    "abort": {"task": 1},
    "output": {"task": 1},
    "drain": {"body": b"notice".hex()},
    "note": {"body": MESSAGE, "flags": 3},
    "note_answer": {"body": b"no".hex()},
    "attach": {"body": b"{}".hex()},
    "stripe_block": {"task": 1},
    "blocks_arrived": {"body": (b"\0" * 800).hex()},
}
"""A frame of each kind, which a node repeats."""
ROWS: dict[str, tuple[str, dict[str, object]]] = {
    **{f"floods of {kind}": ("floods", {"kind": kind, **one}) for kind, one in FLOODS.items()},
    **{f"floods of kind {kind}": ("floods", {"kind": kind}) for kind in (0, 18, 99, 255)},
    "floods of output, full": ("floods", {"kind": "output", "task": 1, "body": (b"x" * 16383 + b"\n").hex()}),
    "floods of results, full": ("floods", {"kind": "result", "flags": 3, "body": FULL}),
    "floods of notes, full": ("floods", {"kind": "note", "flags": 3, "body": FULL}),
    **{
        f"nonsense: {how}": ("babbles", {"how": how})
        for how in ("bytes", "blocks", "lz4", "frames", "opened", "unasked", "notes")
    },
    "silence": ("silent", {}),
    "one byte after the other": ("drips", {}),
}


def besiege(row: str, seconds: float) -> tuple[str, str]:
    """Let a client work beside one hostile node for so long: what happened, and what went wrong."""
    behaviour, args = ROWS[row]
    args = args if behaviour == "drips" else {**args, "seconds": seconds}
    wanted = json.dumps([behaviour, args, seconds])
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(Path(__file__).parent), wanted],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES)),
    )
    try:
        out, err = client.communicate(timeout=3 * seconds + 90)
    except subprocess.TimeoutExpired:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate()
        return "", "the client hangs"
    if client.returncode:
        return "", f"the client ended with {client.returncode}: {err[-300:]}"
    wrong, took, left, grown, state, reason = json.loads(out.splitlines()[-1])
    told = f"{grown / 2**20:7.1f} MiB, call {took:5.1f} s, left in {left:.1f} s, {state}: {reason[:60]}"
    faults = [
        *(["a wrong result"] if wrong else []),
        *([f"memory grew by {grown / 2**20:.0f} MiB"] if grown > MEMORY else []),
        *([f"the block was left in {left:.1f} s"] if left > LEAVE else []),
    ]
    return told, "; ".join(faults)


def hostile(seconds: float, rows: Iterable[str] = ROWS, tell: Callable[[str], object] = lambda line: None) -> list[str]:
    """Let clients work beside each hostile node, two at a time; what went wrong."""
    failures = []
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        for row, (told, wrong) in zip(rows, both.map(lambda row: besiege(row, seconds), rows), strict=True):
            tell(f"{row:28} {told}{'  ' if told and wrong else ''}{wrong}")
            if wrong:
                failures.append(f"{row}: {wrong}")
    return failures

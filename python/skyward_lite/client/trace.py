"""A run as a trace in the Chrome trace-event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Each node is a process and each of its slots a thread of it; one more process, the pool, has the counters. Format:
"Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Final

from .report.bars import rows_of
from .run import FAILED, OUTCOMES, Run

NANOS_PER_MICRO: Final = 1000
POOL: Final = 1
"""The number of the pool as a process of the trace; 0 is the idle process of an operating system there."""
MAX_COUNTS: Final = 5_000
"""Values of a counter. Of more changes, the number of running tasks is told at equal distances only."""


def render(run: Run) -> Iterator[str]:
    """Return the trace in parts, whose events are in the order of time."""
    rows = rows_of(run)
    zero = min((record.start for record in run.records), default=run.begin)
    zero = min(zero, run.begin)
    details = {
        "program": run.program,
        "provider": run.provider,
        "versions": run.versions,
        "start": run.zero + zero / 1e9,
        "records no longer kept": run.dropped,
    }
    yield f'{{"displayTimeUnit":"ms","otherData":{json.dumps(details)},"traceEvents":[\n'
    heads = [*_process(POOL, f"pool of {run.program}", 0)]
    events: list[tuple[int, int, str]] = []
    names = [json.dumps(name or "(unnamed)") for name in run.names]
    for node, node_rows in enumerate(rows):
        process = POOL + 1 + node
        known = run.status.nodes
        heads += _process(process, f"node {known[node].name}" if node < len(known) else f"node {node}", process)
        for slot, row in enumerate(node_rows):
            heads.append(_metadata(process, slot + 1, "thread_name", {"name": f"slot {slot}"}))
            heads.append(_metadata(process, slot + 1, "thread_sort_index", {"sort_index": slot}))
            for start, end, record in row:
                name = names[record.name] if record.name < len(names) else '"(unnamed)"'
                colour = ',"cname":"terrible"' if record.outcome in FAILED else ""
                text = (
                    f'{{"ph":"X","cat":"task","name":{name},"pid":{process},"tid":{slot + 1},'
                    f'"ts":{_micros(start - zero)},"dur":{_micros(end - start)}{colour},'
                    f'"args":{{"calls":{record.calls},"bytes sent":{record.sent},'
                    f'"bytes received":{record.received},"end":"{OUTCOMES.get(record.outcome, record.outcome)}"}}}}'
                )
                # Of bars that begin at the same time, the shorter one, which has no length then, comes first.
                events.append((start, end, text))
    for at, busy, there in _counts(run):
        arguments = f'{{"running":{busy},"free":{max(there - busy, 0)}}}'
        text = f'{{"ph":"C","name":"slots","pid":{POOL},"tid":0,"ts":{_micros(max(at - zero, 0))},"args":{arguments}}}'
        events.append((max(at, zero), 0, text))
    events.sort()
    yield ",\n".join(itertools.chain(heads, (text for _, _, text in events)))
    yield "\n]}\n"


def _micros(nanos: int) -> str:
    return f"{nanos // NANOS_PER_MICRO}.{nanos % NANOS_PER_MICRO:03}"


def _metadata(process: int, thread: int, kind: str, arguments: dict[str, object]) -> str:
    return json.dumps({"ph": "M", "name": kind, "pid": process, "tid": thread, "ts": 0, "args": arguments})


def _process(process: int, name: str, place: int) -> Iterator[str]:
    yield _metadata(process, 0, "process_name", {"name": name})
    yield _metadata(process, 0, "process_sort_index", {"sort_index": place})


def _counts(run: Run) -> Iterator[tuple[int, int, int]]:
    """Return (time, running tasks, slots that are there) at each change, or at `MAX_COUNTS` equal distances."""
    changes = [(record.start, 1, 0) for record in run.records] + [(record.end, -1, 0) for record in run.records]
    changes += [(ready.start, 0, ready.slots) for ready in run.ready] + [
        (ready.end, 0, -ready.slots) for ready in run.ready
    ]
    changes.sort()
    if not changes:
        return
    distance = (changes[-1][0] - changes[0][0]) // MAX_COUNTS if len(changes) > MAX_COUNTS else 0
    busy = there = 0
    last = None
    for number, (at, more, slots) in enumerate(changes):
        busy, there = busy + more, there + slots
        is_last_of_moment = number + 1 == len(changes) or changes[number + 1][0] > at
        if is_last_of_moment and (last is None or at - last >= distance or number + 1 == len(changes)):
            yield at, busy, there
            last = at

"""The timeline's bars as the page's script reads them: a few bytes for each."""

from __future__ import annotations

import base64
import math
from collections import Counter
from typing import Any, Final

from .. import records
from ..records import Bar, Record
from ..run import Run

MAX_TICKS: Final = 1 << 26
"""Ticks in the whole timeline: an hour's tick is 54 µs, far below a pixel at 1,000 times the page's width."""
MIN_TICK_NANOS: Final = 1_000
MAX_BARS: Final = 150_000
"""Bars in a page, of which each takes about 9 bytes. Where there are more, short bars of one function beside each
other are merged."""
MAX_BARS_WITH_SIZES: Final = 20_000
"""Bars up to which each also tells the bytes of its call and its result."""


def rows_of(run: Run) -> list[list[list[Bar]]]:
    """Return each node's rows of bars, one for each slot, in the order of the nodes' numbers."""
    slots = [node.slots for node in run.status.nodes]
    slots += [0] * (1 + max((record.node for record in run.records), default=-1) - len(slots))
    for ready in run.ready:
        slots[ready.node] = max(slots[ready.node], ready.slots)
    by_node: list[list[Record]] = [[] for _ in slots]
    for record in run.records:
        by_node[record.node].append(record)
    rows = [records.into_rows(group, most) for group, most in zip(by_node, slots, strict=True)]
    # A slot that ran nothing has a row, too: it is a gap from beginning to end.
    return [[*filled, *([] for _ in range(most - len(filled)))] for filled, most in zip(rows, slots, strict=True)]


def encode(run: Run, rows: list[list[list[Bar]]], begin: int, end: int) -> dict[str, Any]:
    """Return the timeline's data for the script: what it reads as JSON, with the bars in base64.

    Each bar is the numbers: ticks since the end of the bar before it, or since the beginning of the timeline; ticks
    that it lasts; its kind, (function × 16 + outcome) × 2, plus 1 if it stands for several calls. Then, if so, the
    numbers of tasks and of calls; and if `sizes`, the bytes of call and result. A number is its 7-bit digits, the
    lowest first, each but the last plus 128.
    """
    order = [name for name, _ in Counter(record.name for record in run.records).most_common()]
    place = {name: number for number, name in enumerate(order)}
    resolution = _resolution(rows)
    sizes = len(run.records) <= MAX_BARS_WITH_SIZES
    tick = max(MIN_TICK_NANOS, -(-(end - begin) // MAX_TICKS))
    packed = bytearray()
    append = packed.append
    counts = []
    for row in (row for node in rows for row in node):
        before = count = 0
        for group in records.merged(row, resolution) if resolution else records.alone(row):
            first, calls = group.first, group.calls
            start = max((group.start - begin) // tick, before)
            stop = max(-((begin - group.end) // tick), start)
            kind = (place[first.name] << 4 | first.outcome & 15) << 1 | (calls != 1)
            numbers: tuple[int, ...] = (start - before, stop - start, kind)
            if calls != 1:
                numbers += (group.tasks, calls)
            if sizes:
                numbers += (group.sent, group.received)
            for number in numbers:
                while number > 127:
                    append(number & 127 | 128)
                    number >>= 7
                append(number)
            before = stop
            count += 1
        counts.append(count)
    each = iter(counts)
    return {
        "names": [run.names[name] if name < len(run.names) and run.names[name] else "(unnamed)" for name in order],
        "tick": tick / records.NANOS_PER_SECOND,
        "length": (end - begin) / records.NANOS_PER_SECOND,
        "sizes": sizes,
        "rows": [[next(each) for _ in node] for node in rows],
        "bars": base64.b64encode(packed).decode(),
    }


def _resolution(rows: list[list[list[Bar]]]) -> float:
    """Return the distance of bars below which they have to be merged, so that a page can have them; 0 for none."""
    too_many = sum(len(row) for node in rows for row in node) - MAX_BARS
    if too_many <= 0:
        return 0
    finite = (d for node in rows for row in node for d in records.distances(row) if d != math.inf)
    nearest = sorted(finite)[:too_many]
    return nearest[-1] + 1 if nearest else 0

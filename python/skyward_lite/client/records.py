"""The core's records of ended tasks: decoded, put into one row for each slot, and counted. Pure.

A record is one attempt at a task: one call, or one batch of calls. Times are nanoseconds since the core was made.
"""

from __future__ import annotations

import heapq
import itertools
import math
import struct
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

RECORD: Final = struct.Struct("<QQQQIIIHBx")
"""One record as `Core.records` returns it: the fields of `Record`."""
NANOS_PER_SECOND: Final = 1_000_000_000


class Record(NamedTuple):
    """One attempt at a task that has ended. `outcome` is a code of the core: `_core.RETURNED` and so on."""

    start: int
    duration: int
    sent: int
    """Bytes of the call, before compression."""
    received: int
    """Bytes of the result, before compression."""
    calls: int
    name: int
    """The number of the function's name."""
    place: int
    """The slot that ran it, as the node counts: a worker's number << `_core.SLOT_BITS` | the slot in that worker."""
    node: int
    outcome: int

    @property
    def end(self) -> int:
        return self.start + self.duration


class Bar(NamedTuple):
    """A record in its row. A bar begins where the one before it has ended, or later: no two bars of a row overlap."""

    start: int
    end: int
    record: Record


def decode(packed: bytes) -> list[Record]:
    """Return records as the core packed them. Raise `ValueError` if there is a part of one."""
    if len(packed) % RECORD.size:
        raise ValueError(f"{len(packed)} bytes are no whole number of records of {RECORD.size} bytes")
    return list(itertools.starmap(Record, RECORD.iter_unpack(packed)))


def into_rows(records: Iterable[Record], slots: int) -> list[list[Bar]]:
    """Return the records of one node in at most `slots` rows, in the order of time; no two bars of a row overlap.

    What ran in one slot of one worker stays in one row as far as possible. A worker that takes another's place has
    other slots: they go into rows that are free. Times were taken at the client, so they may overlap by the time that
    an answer was on its way: such a bar begins when the one before it ends.
    """
    rows: list[list[Bar]] = []
    ends: list[int] = []
    places: list[int] = []
    """The end and the place of each row's last bar."""
    row_of: dict[int, int] = {}
    by_end: list[tuple[int, int]] = []
    """A heap of (end of a row's last bar, row). Entries of bars that are not the last ones any more are skipped."""
    most = max(slots, 1)
    for record in sorted(records):
        start, duration, place = record.start, record.duration, record.place
        row = row_of.get(place, -1)
        if row < 0 or places[row] != place:
            row = len(rows)
            if row < most:
                rows.append([])
                ends.append(start)
                places.append(place)
            else:
                while ends[by_end[0][1]] != by_end[0][0]:
                    heapq.heappop(by_end)
                row = by_end[0][1]
                places[row] = place
            row_of[place] = row
        begin = max(start, ends[row])
        ends[row] = end = max(begin, start + duration)
        rows[row].append(Bar(begin, end, record))
        heapq.heappush(by_end, (end, row))
    return rows


class Group(NamedTuple):
    """One bar, or several that follow each other closely and are shown as one. `first` is the first one's record."""

    start: int
    end: int
    first: Record
    tasks: int
    calls: int
    sent: int
    received: int


def alone(row: Iterable[Bar]) -> Iterator[Group]:
    """Return each bar of a row as a group of its own."""
    return (Group(start, end, record, 1, record.calls, record.sent, record.received) for start, end, record in row)


def merged(row: Iterable[Bar], resolution: float) -> Iterator[Group]:
    """Return a row's bars in groups: bars that `distances` says are nearer than the resolution are in one."""
    held: Group | None = None
    length = 0
    for group in alone(row):
        if held is not None:
            distance = _distance(held.end, length, held.first, group.start, group.end, group.first)
            if distance < resolution:
                sums = (mine + other for mine, other in zip(held[3:], group[3:], strict=True))
                held, length = Group(held.start, group.end, held.first, *sums), group.end - group.start
                continue
            yield held
        held, length = group, group.end - group.start
    if held is not None:
        yield held


def distances(row: Sequence[Bar]) -> Iterator[float]:
    """Return for each bar but the first how far it is from the one before it: the longest of the two and of the gap.

    Bars of different functions, or that ended differently, are infinitely far apart.
    """
    for before, bar in itertools.pairwise(row):
        yield _distance(before.end, before.end - before.start, before.record, bar.start, bar.end, bar.record)


def _distance(end: int, length: int, before: Record, start: int, stop: int, record: Record) -> float:
    if before.name != record.name or before.outcome != record.outcome:
        return math.inf
    return max(length, start - end, stop - start)


class Span(NamedTuple):
    """A value that held for some time: so many slots were busy, or there; so many bytes travelled per nanosecond."""

    start: int
    end: int
    value: float


def averages(spans: Iterable[Span], begin: int, end: int, count: int) -> list[float]:
    """Return the average of the sum of all spans, in each of `count` equal parts of the time from begin to end.

    Worked example: of the parts 0 to 10 and 10 to 20, the span (5, 20, 2.0) has 1.0 in the first, 2.0 in the second.
    """
    width = (end - begin) / count
    if width <= 0:
        return [0.0] * count
    partial = [0.0] * (count + 1)
    whole = [0.0] * (count + 1)
    """Changes of the value from one part to the next, by the spans that fill parts completely."""
    for start, stop, value in spans:
        first, last = (max(start, begin) - begin) / width, (min(stop, end) - begin) / width
        if last <= first:
            continue
        left, right = int(first), min(int(last), count)
        if left == right:
            partial[left] += value * (last - first)
        else:
            partial[left] += value * (left + 1 - first)
            partial[right] += value * (last - right)
            whole[left + 1] += value
            whole[right] -= value
    return [base + edge for base, edge in zip(itertools.accumulate(whole[:count]), partial, strict=False)]


def integral(spans: Iterable[Span], begin: int, end: int) -> float:
    """Return the sum of value × time of all spans, between begin and end."""
    return sum(value * max(0, min(stop, end) - max(start, begin)) for start, stop, value in spans)


def percentile(values: Sequence[tuple[float, int]], share: float) -> float:
    """Return the least of the values that is not less than this share of all; each counts as often as its weight says.

    `values` are sorted. The 50th percentile of 1 and 2 is 1.
    """
    wanted = share * sum(weight for _, weight in values)
    reached = 0
    for value, weight in values:
        reached += weight
        if reached >= wanted:
            return value
    return values[-1][0] if values else math.nan


class FunctionSummary(NamedTuple):
    """What the calls of one function took, in seconds per call. The time of a batch is shared out among its calls."""

    name: int
    calls: int
    failed: int
    mean: float
    median: float
    p99: float
    longest: float
    total: float


def by_function(records: Iterable[Record], failed: Collection[int]) -> list[FunctionSummary]:
    """Return a summary for each function, the one with the largest total first. `failed`: the outcomes that are."""
    groups: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.name].append(record)
    summaries = []
    for name, group in groups.items():
        # How long a task ran that ended its process is not known.
        timed = [record for record in group if record.duration and record.calls]
        times = sorted((record.duration / NANOS_PER_SECOND / record.calls, record.calls) for record in timed) or [
            (0.0, 1)
        ]
        calls = sum(record.calls for record in group)
        total = sum(record.duration for record in group) / NANOS_PER_SECOND
        summaries.append(
            FunctionSummary(
                name,
                calls,
                sum(record.outcome in failed for record in group),
                total / max(sum(record.calls for record in timed), 1),
                percentile(times, 0.5),
                percentile(times, 0.99),
                times[-1][0],
                total,
            )
        )
    return sorted(summaries, key=lambda summary: (-summary.total, summary.name))


def slowest(records: Iterable[Record], count: int) -> list[Record]:
    """Return the records with the longest durations, the longest first."""
    return heapq.nlargest(count, records, key=lambda record: record.duration)

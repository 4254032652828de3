"""The records of ended tasks: decoded, in rows, in groups, and counted."""

from __future__ import annotations

import base64
import itertools
import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import run
from skyward_lite import _core
from skyward_lite.client import records
from skyward_lite.client.records import RECORD, Bar, Record, Span
from skyward_lite.client.report import bars

times = st.integers(0, 200)
any_record = st.builds(
    Record,
    start=times,
    duration=times,
    sent=times,
    received=times,
    calls=st.integers(1, 9),
    name=st.integers(0, 2),
    place=st.integers(0, 6),
    node=st.just(0),
    outcome=st.sampled_from([_core.RETURNED, _core.RAISED]),
)
many = st.lists(any_record, max_size=40)


def record(start: int, duration: int, place: int = 0, calls: int = 1, name: int = 1) -> Record:
    return Record(start, duration, 0, 0, calls, name, place, 0, _core.RETURNED)


def places(rows: list[list[Bar]]) -> list[list[int]]:
    return [[bar.record.place for bar in row] for row in rows]


@given(many)
def test_records_come_back_as_they_were_packed(given_records):
    """48 bytes for each; a part of one is an error."""
    packed = b"".join(RECORD.pack(*each) for each in given_records)
    assert RECORD.size == 48
    assert records.decode(packed) == given_records
    with pytest.raises(ValueError, match="no whole number of records"):
        records.decode(packed + b"\0")


@given(many, st.integers(0, 8))
def test_each_record_is_in_one_row_and_no_two_bars_overlap(given_records, slots):
    """However workers were replaced, and however the times overlap, there are no more rows than slots."""
    rows = records.into_rows(given_records, slots)
    assert Counter(bar.record for row in rows for bar in row) == Counter(given_records)
    assert len(rows) <= max(slots, 1)
    for row in rows:
        assert all(bar.record.start <= bar.start <= bar.end >= bar.record.end for bar in row)
        assert all(before.end <= bar.start for before, bar in itertools.pairwise(row))


def test_a_slot_keeps_its_row_and_a_new_worker_takes_the_rows_of_one_that_died():
    """Slots 0 and 1 of worker 0 die at 20; those of worker 1 go on in their rows."""
    first = [record(0, 10, 0), record(1, 9, 1), record(10, 10, 1), record(11, 9, 0)]
    second = [record(21, 5, 256), record(22, 5, 257), record(30, 5, 257), record(31, 5, 256)]
    assert places(records.into_rows(first + second, 2)) == [[0, 0, 256, 256], [1, 1, 257, 257]]
    # With a free slot the new worker's tasks have a row of their own.
    assert places(records.into_rows([*first, second[0]], 3)) == [[0, 0], [1, 1], [256]]


@given(many, st.integers(1, 300))
def test_merged_bars_lose_no_task_no_call_and_no_byte(given_records, resolution):
    """Groups have the bars' sums; fewer distances than the resolution means fewer groups."""
    for row in records.into_rows(given_records, 3):
        groups = list(records.merged(row, resolution))
        for field in ("calls", "sent", "received"):
            total = sum(getattr(bar.record, field) for bar in row)
            assert sum(getattr(group, field) for group in groups) == total
        assert sum(group.tasks for group in groups) == len(row)
        near = sum(distance < resolution for distance in records.distances(row))
        assert len(groups) == len(row) - near
        assert list(records.merged(row, 0)) == list(records.alone(row))


@given(st.lists(st.builds(Span, times, times, st.integers(1, 5)), max_size=20), st.integers(1, 13))
def test_averages_have_the_integral(spans, count):
    """The averages over the parts of a time, times the parts' length, are the spans' integral over it."""
    spans = [Span(min(a, b), max(a, b), value) for a, b, value in spans]
    found = records.averages(spans, 20, 150, count)
    assert len(found) == count
    assert math.isclose(sum(found) * 130 / count, records.integral(spans, 20, 150), abs_tol=1e-6)
    assert all(-1e-9 <= value <= sum(span.value for span in spans) + 1e-9 for value in found)


def test_averages_of_the_worked_example():
    """The span (5, 20, 2.0) in the parts 0 to 10 and 10 to 20; and no time has no values but zeros."""
    assert records.averages([Span(5, 20, 2.0)], 0, 20, 2) == [1.0, 2.0]
    assert records.averages([Span(5, 20, 2.0)], 7, 7, 2) == [0.0, 0.0]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=12), st.floats(0.01, 1))
def test_percentiles_count_each_value_by_its_weight(values, share):
    """As if each value were written as often as its weight says."""
    values = sorted(values)
    written = [value for value, weight in values for _ in range(weight)]
    expected = next(value for number, value in enumerate(written, 1) if number >= share * len(written))
    assert records.percentile(values, share) == expected


def test_functions_are_summed_up_per_call():
    """A batch of 10 calls that took 20 s counts as 10 calls of 2 s; the function with most time comes first."""
    second = records.NANOS_PER_SECOND
    batch, call = record(0, 20 * second, calls=10), record(0, 12 * second)
    failed = record(0, 100 * second, name=2)._replace(outcome=_core.RAISED)
    crashed = record(0, 0, calls=5)._replace(outcome=_core.CRASHED)
    most, other = records.by_function([batch, call, failed, crashed], {_core.RAISED, _core.CRASHED})
    assert most == (2, 1, 1, 100.0, 100.0, 100.0, 100.0, 100.0)
    assert other == (1, 16, 1, 32 / 11, 2.0, 12.0, 12.0, 32.0)
    assert records.by_function([crashed], {_core.CRASHED}) == [(1, 5, 1, 0.0, 0.0, 0.0, 0.0, 0.0)]
    assert records.slowest([batch, call, failed], 2) == [failed, batch]


def unpacked(data: dict) -> Iterator[list[tuple[int, ...]]]:
    """Decode the timeline's data as the page's script does."""
    packed = iter(base64.b64decode(data["bars"]))

    def number() -> int:
        value = place = 0
        while (byte := next(packed)) > 127:
            value |= (byte & 127) << place
            place += 7
        return value | byte << place

    for count in (count for node in data["rows"] for count in node):
        row, tick = [], 0
        for _ in range(count):
            start = tick + number()
            tick = start + number()
            kind = number()
            several = (number(), number()) if kind & 1 else (1, 1)
            row.append((start, tick, kind >> 1, *several, *((number(), number()) if data["sizes"] else ())))
        yield row
    assert next(packed, None) is None


@pytest.mark.parametrize("most", [bars.MAX_BARS, 200, 5])
def test_the_timeline_has_every_task_in_as_many_bars_as_a_page_can_have(monkeypatch, most):
    """All tasks and calls are in it, at their times to a tick; where they are too many, short ones are merged, but
    never those of two functions, nor a failure with a task that returned.
    """
    monkeypatch.setattr(bars, "MAX_BARS", most)
    made = run(300, nodes=2, slots=2)
    rows = bars.rows_of(made)
    data = bars.encode(made, rows, 0, made.end)
    found = [bar for row in unpacked(data) for bar in row]
    assert sum(bar[3] for bar in found) == sum(bar[4] for bar in found) == 300
    assert sum(bar[5] for bar in found) == sum(each.sent for each in made.records)
    assert sum(bar[3] for bar in found if bar[2] & 15 == _core.RAISED) == 6
    assert len(found) <= max(most, 200)
    names = Counter(data["names"][bar[2] >> 4] for bar in found for _ in range(bar[3]))
    assert names == Counter(made.name_of(each) for each in made.records)
    if most == bars.MAX_BARS:
        first = found[0]
        assert abs(first[0] * data["tick"] - rows[0][0][0].start / 1e9) <= data["tick"]
        assert abs(first[1] * data["tick"] - rows[0][0][0].end / 1e9) <= data["tick"]

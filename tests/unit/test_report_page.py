"""What a pool shows of itself: figures, reprs, the report's page and the trace, of runs that never were."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
import pickle
import re
import stat
from collections import defaultdict
from concurrent.futures import CancelledError
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
import skyward_lite as sky
from runs import SECOND, node, run, status
from skyward_lite import _core
from skyward_lite.client import collecting, figures, trace, writing
from skyward_lite.client.failures import MAX_KEPT, Failures
from skyward_lite.client.nodes import NodeChange
from skyward_lite.client.report import bars, charts, page
from skyward_lite.providers import Cost


class Tags(HTMLParser):
    """The elements of a page, and that each is closed in its turn."""

    OPEN_ENDED: ClassVar = {"meta", "br", "link", "img", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_figures_have_three_digits_and_a_unit():
    """Sizes, durations, shares, rates and dollars, at the borders between two units."""
    sizes = [0, 1, 999, 1000, 1234, 12_345, 999_499, 999_600, 45_600_000, 10**18]
    assert [figures.size(each) for each in sizes] == [
        *("0 bytes", "1 byte", "999 bytes", "1.00 kB", "1.23 kB", "12.3 kB", "999 kB", "1.00 MB", "45.6 MB", "1000 PB")
    ]
    seconds = [0, 25e-6, 0.0123, 0.9994, 0.9996, 4.56, 59.94, 59.96, 65, 3599.6, 7384, 360_000]
    assert [figures.duration(each) for each in seconds] == [
        *("0 s", "25.0 µs", "12.3 ms", "999 ms", "1.00 s", "4.56 s", "59.9 s", "1 min 00 s", "1 min 05 s"),
        *("1 h 00 min", "2 h 03 min", "100 h 00 min"),
    ]
    assert [figures.share(each) for each in (0, 0.004, 0.5, 0.996, 0.99999, 1)] == [
        *("0 %", "0.4 %", "50 %", "99.6 %", "99.9 %", "100 %")
    ]
    assert [figures.dollars(each) for each in (0, 0.0123, 0.36, 1234.5)] == ["$0.00", "$0.0123", "$0.36", "$1,234.50"]
    assert [figures.count(each, "task") for each in (0, 1, 2000)] == ["0 tasks", "1 task", "2,000 tasks"]
    assert [figures.rate(each) for each in (0.25, 12.34, 4560)] == ["0.25/s", "12.3/s", "4,560/s"]


def test_marks_of_an_axis_are_round_and_few():
    """At most as many as asked for, at steps that people count in."""
    steps = [charts.time_step(seconds, 10) for seconds in (0.004, 0.7, 9, 14, 70, 3000, 40_000, 10**7)]
    assert steps == [0.0005, 0.1, 1, 2, 10, 300, 7200, 1_036_800]
    assert [charts.clock(*each) for each in ((0.2, 0.1), (5, 1), (90, 30), (7200, 3600))] == [
        *("0.2 s", "5 s", "1:30", "2:00:00")
    ]


def test_status_is_a_few_lines_and_a_small_table():
    """Nodes, tasks, data and cost in at most 16 lines; those that are not ready first; all of it escaped in HTML."""
    lost = node("gpu", state="lost", reason="connection <refused>\nmore", slots=0, rtt=None)
    busy = node("lab1", running=6, queued=2000, done=133, failed=4, rerun=1, cached_bytes=12_000_000, bytes_sent=10**6)
    found = status([busy, lost], payload_sent=4 * 10**6, cost=Cost(0.36, 0.0123), seconds=75)
    tasks = "6 running, 2,000 queued, 133 done, 4 failed, 1 re-run"
    assert repr(found).splitlines() == [
        f"<Status: 2 nodes (1 ready, 1 lost), 8 slots, {tasks}, started 1 min 15 s ago",
        f"  lab1  ready  8 slots  {tasks}  400 µs round trip  12.0 MB cached",
        "  gpu   lost   0 slots  0 running, 0 done: connection <refused> …",
        "  sent 4.00 MB (1.00 MB on the wire), received 0 bytes (0 bytes on the wire)",
        "  cost $0.0123 so far, $0.36 per hour>",
    ]
    assert repr(lost) == ("<Node gpu: lost (connection <refused> …), 0 slots, 0 running, 0 done>")
    many = status([*(node(f"h{number}") for number in range(30)), lost])
    assert len(repr(many).splitlines()) <= 16
    assert "  gpu  " in repr(many)
    assert "and 19 more nodes: 19 ready" in repr(many)
    html = found._repr_html_()
    assert "connection &lt;refused&gt; …" in html
    assert [tag for tag, _ in Tags(html).found].count("tr") == 3
    assert "&lt;refused" in lost._repr_html_()
    closed = status([node(state="closed")], slots=0, done=5, seconds=0.5)
    assert repr(closed).startswith("<Status: 1 node closed, 0 slots, 0 running, 5 done, ran for 500 ms")
    pool = sky.pool(nodes=2)
    assert repr(pool) == ("<ComputePool: Local(), 2 nodes, not started: use it in a with statement, or call start()>")
    assert pool._repr_html_() == f"<code>{escape(repr(pool))}</code>"
    assert repr(status([])) == "<Status: no nodes, 0 slots, 0 running, 0 done>"
    assert pickle.loads(pickle.dumps(found)) == found != dataclasses.replace(found, done=1)


def test_a_page_loads_nothing_and_shows_names_as_text():
    """Names with HTML, also one that ends a script, are text; a policy forbids all that is not in the page itself."""
    evil = "<img src=x onerror=alert(1)>"
    made = dataclasses.replace(run(200), program=evil, provider=evil, versions=evil)
    text = page.render(made)
    tags = Tags(text)
    names = [tag for tag, _ in tags.found]
    assert names.count("script") == 2
    assert names.count("style") == 1
    assert not {"img", "link", "iframe", "b", "depth"} & set(names)
    assert not any(
        key in {"src", "href", "style"} or key.startswith("on") for _, attributes in tags.found for key in attributes
    )
    policy = next(attributes["content"] for tag, attributes in tags.found if "http-equiv" in attributes) or ""
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "https://" not in text
    assert "no such &lt;depth&gt;: 2" in text
    assert "&lt;/script&gt;&lt;b&gt;&amp;" in text


def test_a_page_has_the_sums_of_its_run():
    """Utilisation, efficiency and speed-up of two slots that were busy for 6 of 10 and 8 of 20 seconds, a node that
    came later, and one that was lost.
    """
    made = run(0)
    first, second = (dataclasses.replace(made.status.nodes[number], slots=1) for number in (0, 1))
    times = [(0, 2 * SECOND, 6 * SECOND), (1, 12 * SECOND, 8 * SECOND)]
    template = run(1).records[0]
    records = [template._replace(node=n, start=start, duration=length) for n, start, length in times]
    changes = [NodeChange(0, "ready", 100.0, 1), NodeChange(1, "ready", 110.0, 1), NodeChange(0, "lost", 110.0, 1)]
    found = status([first, second])
    ready = collecting.ready_times(found, changes, 100.0, 0, 30 * SECOND)
    assert ready == [(0, 1, 0, 10 * SECOND), (1, 1, 10 * SECOND, 30 * SECOND)]
    # Of a node that no change was seen of, it is only known that it was there.
    assert collecting.ready_times(status([second]), [], 100.0, 5, 9) == [(0, 1, 5, 9)]
    made = dataclasses.replace(made, records=records, ready=ready, begin=0, end=30 * SECOND, status=found)
    timing = page.Timing(made, bars.rows_of(made))
    assert timing.working_seconds == 18
    assert timing.task_seconds == 14
    assert timing.utilisation == pytest.approx(14 / 18)
    assert timing.efficiency == pytest.approx(14 / 30)
    assert timing.speed_up == pytest.approx(14 / 18)


def test_pages_of_no_task_of_failures_only_and_of_dropped_records():
    """Each says in words what is missing; a run that goes on says so."""
    empty = page.render(dataclasses.replace(run(0), stage="open"))
    assert "No task has ended yet." in empty
    assert "No task failed." in empty
    assert "open; this page has the tasks that had ended" in empty
    made = run(3)
    lost = [record._replace(outcome=_core.NODE_LOST, duration=0) for record in made.records]
    text = page.render(dataclasses.replace(made, records=lost, dropped=2_000_000, names=[]))
    assert "The records of 2,000,000 earlier ones are no longer kept" in text
    assert "3 tasks that failed" in text
    assert "(unnamed)" in text


@pytest.mark.slow
def test_a_page_of_100_000_tasks_has_less_than_2_mb():
    """With three functions, failures, and 64 slots."""
    assert len(page.render(run(100_000, nodes=8, slots=8, seconds=0.01)).encode()) < 2_000_000


def test_a_trace_keeps_the_rules_of_its_format():
    """Metadata first; then all events in the order of time, in microseconds; each process and thread has a name; the
    complete events of a thread do not overlap; counters never go below zero.
    """
    made = run(300, nodes=3, seconds=0.1)
    jitter = [
        record._replace(start=record.start - 2_500_000 * (number % 2)) for number, record in enumerate(made.records)
    ]
    told = json.loads("".join(trace.render(dataclasses.replace(made, records=jitter))))
    events = told["traceEvents"]
    heads = [event for event in events if event["ph"] == "M"]
    assert events[: len(heads)] == heads
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    rest = events[len(heads) :]
    assert [event["ts"] for event in rest] == sorted(event["ts"] for event in rest)
    assert rest[0]["ts"] >= 0
    named = {(head["pid"], head["tid"]) for head in heads if head["name"] == "thread_name"}
    processes = {head["pid"]: head["args"]["name"] for head in heads if head["name"] == "process_name"}
    assert processes == {1: "pool of train.py", 2: "node lab0", 3: "node lab1", 4: "node lab2"}
    threads = defaultdict(list)
    for event in rest:
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in named
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert min(event["args"].values()) >= 0
    assert sum(map(len, threads.values())) == 300
    assert len(threads) <= 12
    for spans in threads.values():
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(spans))
    calls = [event for event in rest if event["ph"] == "X"]
    assert {event["name"] for event in calls} == set(made.names[1:])
    assert sum(event["args"]["end"] == "raised an exception" for event in calls) == 6
    assert sum(event["dur"] for event in calls) == pytest.approx(sum(r.duration for r in made.records) / 1000, rel=0.05)


def test_files_are_complete_or_as_they_were(tmp_path):
    """A file is replaced at once, with usual permissions, through symbolic links; if parts fail, it is as it was."""
    file = tmp_path / "run.html"
    writing.write(file, ["é", "\ud800"])
    assert file.read_bytes() == b"\xc3\xa9\\ud800"
    link = tmp_path / "link.html"
    link.symlink_to(file)
    writing.write(link, ["new"])
    assert link.is_symlink()
    assert file.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask

    def failing():
        yield "half"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        writing.write(file, failing())
    assert file.read_text() == "new"
    packed = tmp_path / "run.json.gz"
    writing.write(packed, ["{", "}"], compress=True)
    assert gzip.decompress(packed.read_bytes()) == b"{}"
    writing.write(Path("/dev/null"), ["gone"])
    assert Path("/dev/null").is_char_device()
    assert {each.name for each in tmp_path.iterdir()} == {"run.html", "link.html", "run.json.gz"}


def test_errors_of_files_name_the_file_that_was_asked_for(tmp_path):
    """No directory is made, and a directory is not replaced; what is no path is a `TypeError`."""
    for path, error in ((tmp_path / "no" / "run.html", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error, match=re.escape(f"'{path}'")) as caught:
            writing.write(path, ["text"])
        assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match=r"ComputePool.report\(\) missing"):
        sky.pool().report()
    for wrong in (7, "", b"run.html", None):
        with pytest.raises(TypeError, match=r"pool.report\(path="):
            writing.target("pool.report", wrong)


def test_failures_are_kept_as_text_whatever_an_error_is():
    """Type, text and the note on node and call; errors whose own methods fail, too; at most 1,000 of them."""

    class Odd(Exception):
        def __str__(self):
            raise KeyError

    failures = Failures()
    error = ValueError("no\nsuch\x1b[31m value")
    error.add_note("node lab1, task 3: f(3)")
    failures.add(error)
    odd = Odd()
    odd.__notes__ = 3
    failures.add(odd)
    failures.add(CancelledError())
    first, second = failures.latest
    assert (first.kind, first.message, first.where) == (
        "ValueError",
        "no\n  | such\\x1b[31m value",
        "node lab1, task 3: f(3)",
    )
    assert second.kind.endswith(".Odd")
    assert second.message == "(its text cannot be shown: KeyError)"
    for _ in range(MAX_KEPT):
        failures.add(error)
    assert (failures.count, len(failures.latest)) == (MAX_KEPT + 2, MAX_KEPT)

"""What is shown of nodes that start and of tasks that run, from given numbers."""

from __future__ import annotations

import dataclasses
import io
import sys
import time

import pytest
from skyward_lite.client import picture, startup, task_view
from skyward_lite.client.display import Display
from skyward_lite.client.node_state import Node
from skyward_lite.client.screen import cells, fit
from skyward_lite.client.task_view import Counts, TaskView


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(task_view, "time", clock)
    monkeypatch.setattr(startup, "time", clock)
    return clock


class Tasks:
    """The counts of a pool with these nodes."""

    def __init__(self, nodes: int = 1) -> None:
        self.submitted = self.done = self.failed = self.rerun = 0
        self.is_complete = False
        self.nodes = [Node(f"lab{number}", "ready", "", 4, None, None, 0.0) for number in range(nodes)]

    def __call__(self) -> Counts:
        return Counts(self.submitted, self.done, self.failed, self.rerun, self.is_complete, [*self.nodes])

    def node(self, number: int, **fields: object) -> None:
        self.nodes[number] = dataclasses.replace(self.nodes[number], **fields)


def shown(view: TaskView, height: int = 20) -> list[str]:
    view.sample()
    return [picture.text(row).strip() for row in view.rows(height)]


def test_tasks_are_counted_from_the_views_beginning(clock):
    """Calls that ended before the view began are not shown; those that end later are, with rate and bytes."""
    tasks = Tasks()
    tasks.submitted, tasks.done, tasks.failed = 1_000, 990, 7
    tasks.node(0, bytes_sent=5_000_000, done=990, failed=7)
    view = TaskView(tasks)
    tasks.submitted, tasks.done, tasks.failed = 1_100, 1_030, 8
    tasks.node(0, bytes_sent=6_200_000, bytes_received=1_500, running=4)
    clock.now += 10
    assert shown(view) == ["40 tasks done · 4.00/s", "4 running · 66 waiting · 1 failed · ↑ 1.20 MB ↓ 1.50 kB"]
    assert view.end() == "40 of 110 tasks done in 10.0 s (4.00/s), 1 failed · ↑ 1.20 MB ↓ 1.50 kB"


def test_the_time_that_is_left_needs_a_number_of_tasks(clock):
    """The time that is left is shown as soon as the number of tasks is given, or the input is read to its end."""
    tasks = Tasks()
    view, told = TaskView(tasks), TaskView(tasks, 200)
    tasks.submitted, tasks.done = 60, 20
    clock.now += 10
    assert shown(view)[0] == "20 tasks done · 2.00/s"
    assert shown(told)[0].endswith("20 of 200 tasks done · 2.00/s · 1:30 left")
    tasks.is_complete = True
    assert shown(view)[0].endswith("20 of 60 tasks done · 2.00/s · 0:20 left")
    tasks.submitted = tasks.done = 230
    assert shown(told)[0].startswith("━" * picture.BAR_CELLS + " 230 of 230 tasks done")


def test_the_rate_is_that_of_the_last_seconds(clock):
    """The rate follows the last 20 s once enough calls end in them, and otherwise is that of the whole time."""
    tasks = Tasks()
    view = TaskView(tasks)
    tasks.submitted = 100_000
    for _ in range(100):
        clock.now += 1
        tasks.done += 10
        view.sample()
    for _ in range(30):
        clock.now += 1
        tasks.done += 50
        view.sample()
    assert view.rate() == pytest.approx(50)
    clock.now += 1000
    tasks.done += 5
    view.sample()
    assert view.rate() == pytest.approx(2505 / 1130)


def test_each_node_has_a_row_or_is_counted(clock):
    """Up to 16 nodes have a row each; of more nodes, those that are not ready have one, and the others are counted."""
    tasks = Tasks(3)
    view = TaskView(tasks)
    tasks.submitted = 12
    tasks.node(0, running=3, done=2, failed=1)
    tasks.node(1, state="reconnecting")
    assert shown(view)[2:] == [
        "lab0  3 of 4 slots busy · 2 done · 1 failed",
        "lab1  reconnecting · 0 done",
        "lab2  0 of 4 slots busy · 0 done",
    ]
    assert len(shown(view, 3)) == 3
    tasks.nodes = [Node(f"lab{number}", "ready", "", 4, None, None, 0.0, running=2) for number in range(40)]
    tasks.node(7, state="lost")
    assert shown(view)[2:] == ["lab7  lost · 0 done", "39 nodes ready · 78 of 156 slots busy"]


class Machine:
    def __init__(self, doing: str) -> None:
        self.doing = doing


def test_nodes_that_start_have_rows_in_the_room_that_there_is(clock):
    """Each node has a row that says what it does and for how long; if there are too many, those that are not ready come
    first.
    """

    def node(number: int, state: str, reason: str = "") -> Node:
        return Node(f"lab{number}", state, reason, 4, None, None, clock.now)

    nodes = [node(0, "connecting"), node(1, "connecting"), node(2, "connecting")]
    machines = [Machine("connecting"), Machine("looking at the host"), Machine("")]
    start = startup.Startup(lambda: nodes, machines, 3)
    start.rows(24)
    clock.now += 5
    machines[1].doing = "downloading numpy 2.4.1 (16 MB)"
    start.rows(24)
    clock.now += 2
    nodes[2] = node(2, "ready")
    rows = [picture.text(row).lstrip(picture.SPINNER) for row in start.rows(24)]
    assert rows == [
        "Starting 3 nodes · 1 ready · 7 s",
        " lab0  connecting  7 s",
        " lab1  downloading numpy 2.4.1 (16 MB)  2 s",
        "✔ lab2  ready with 4 slots  7.0 s",
    ]
    nodes[0] = node(0, "lost", "cannot connect\nand more")
    assert [picture.text(row)[2:8] for row in start.rows(3)][1:] == ["lab1  ", "… and "]
    assert start.end() == "1 node ready with 4 slots after 7.0 s, 1 failed, 1 still starting"
    assert picture.text(start.rows(24)[1]) == "✘ lab0  cannot connect"


def test_rows_are_cut_at_the_width_and_keep_colours_only():
    """A row is cut at the terminal's width in cells, and of control sequences only colours stay."""
    assert fit("plain text", 5) == "plain"
    assert fit("\x1b[31mred\x1b[0m and \x1b[2Kmore\x07", 8) == "\x1b[31mred\x1b[0m and \x1b[0m"
    assert fit("\x1b[31mred and long", 7) == "\x1b[31mred and\x1b[0m"
    assert fit("計算計算", 5) == "計算"
    assert cells("計算 e\u0301 \x1b[1mx") == 8
    assert picture.text(picture.readable([("━─ · ↑ ✔", "")], io.TextIOWrapper(io.BytesIO(), "ascii"))) == "#- | ^ +"


def test_a_row_as_html_is_escaped():
    """Names of nodes and reasons cannot become markup."""
    page = picture.as_html([[("<b>", "bad"), ("a & b", "")], [("x", "dim")]])
    assert "<b>" not in page
    assert "&lt;b&gt;</span>a &amp; b\n" in page


def test_the_time_that_is_left_is_shown_as_a_clock_does():
    """The time that is left is shown in minutes and seconds, and in hours from one hour on."""
    assert [picture.clock(seconds) for seconds in (0.2, 65, 3_725)] == ["0:00", "1:05", "1:02:05"]


class Terminal(io.StringIO):
    """A stream whose `isatty` is true."""

    def isatty(self):
        return True


@pytest.mark.parametrize("wanted", [None, True, False])
def test_nodes_that_come_back_or_come_late_have_a_line(monkeypatch, wanted):
    """A node that is connected again, or ready long after the pool, has a line on a terminal; one that is ready just
    after the pool has none, nor has any with progress=False.
    """
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    display = Display(wanted)
    display.begin_start(startup.Startup(list, [], 1))
    display.end_start()
    now = time.time()
    for old, since in (("reconnecting", now), ("connecting", now + 1.0), ("connecting", now + 30.0)):
        display.node_changed(Node("lab1", "ready", "", 8, None, None, since), old)
    display.node_changed(Node("lab1", "lost", "gone", 8, None, None, now), "ready")
    lines = terminal.getvalue().splitlines()
    told = ["skyward_lite: lab1 is connected again with 8 slots", "skyward_lite: lab1 is ready with 8 slots"]
    assert lines == ([] if wanted is False else told)

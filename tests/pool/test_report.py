"""`pool.status()`, `pool.report()` and `pool.trace()` of a real run; the page is looked at in a real browser."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import skyward_lite as sky
from browser import Browser, program
from joblib import Parallel, delayed
from skyward_lite.client.node_state import Status

BLUE, ORANGE, EMPTY = [47, 111, 181, 255], [213, 94, 0, 255], [236, 239, 243, 255]
"""Colours of the first function's bars, of failures, and of a slot that waits."""

browser_needed = pytest.mark.skipif(program() is None, reason="no Chromium is installed: `make system` does, as root")


class Made(NamedTuple):
    """What a run has left: two tasks' pages and traces, and what the pool has told of itself."""

    page: Path
    early_page: Path
    events: list[dict[str, Any]]
    early: Status
    status: Status
    later: Status
    html: str


def work(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def fail(depth: int) -> None:
    raise ValueError(f"no such <depth>: {depth}")


def die() -> None:
    os._exit(3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run of 24 + 100 calls of `work`, two failures of `fail` and a crash, on two nodes with two slots each."""
    directory = tmp_path_factory.mktemp("report")
    with sky.pool(sky.Local(), 2, worker=sky.Worker(concurrency=2, executor="process")) as pool:
        Parallel(n_jobs=-1, batch_size=1)(delayed(work)(0.03 + number / 500) for number in range(24))
        list(pool.map(work, [0.001] * 100, chunksize=10))
        for future in [pool.submit(fail, depth) for depth in (3, 4)]:
            with pytest.raises(ValueError, match="no such"):
                future.result()
        early_page = pool.report(directory / "early.html")
        early = pool.status()
        with pytest.raises(sky.WorkerCrashedError):
            pool.submit(die).result()
    page = pool.report(str(directory / "run.html"))
    pool.trace(directory / "run.json")
    events = json.loads((directory / "run.json").read_text())["traceEvents"]
    return Made(page, early_page, events, early, pool.status(), pool.status(), pool._repr_html_())


def test_status_counts_calls_and_not_batches(made):
    """Also after the block. Calls that failed are among those that are done; bytes are counted on both sides."""
    early, status = made.early, made.status
    assert (early.done, early.failed) == (126, 2)
    assert (status.done, status.failed, status.rerun) == (127, 3, 0)
    assert (status.running, status.queued, status.pending) == (0, 0, 0)
    assert sum(node.done for node in status.nodes) == 127
    assert min(status.payload_sent, status.payload_received, status.bytes_sent, status.bytes_received) > 1000
    lines = repr(early).splitlines()
    assert lines[0].startswith("<Status: 2 nodes ready, 4 slots, 0 running, 126 done, 2 failed, started ")
    assert lines[1].startswith("  local-0  ready  2 slots  0 running, ")
    assert "127 done, 3 failed, ran for " in made.html
    assert status.seconds == pytest.approx(made.later.seconds, abs=0.1)


def test_a_trace_has_each_task_on_its_slot(made):
    """The time of each task is the one that it took; 24 tasks, ten batches, two failures and a crash on four slots."""
    tasks = [event for event in made.events if event["ph"] == "X"]
    assert len({(event["pid"], event["tid"]) for event in tasks}) == 4
    assert sum(event["args"]["calls"] for event in tasks) == 127
    ends = [event["args"]["end"] for event in tasks]
    assert sorted(set(ends)) == ["raised an exception", "returned", "worker process died"]
    assert len(ends) == 24 + 10 + 3
    longest = max(tasks, key=lambda event: event["dur"])
    assert longest["name"].endswith("work")
    assert longest["dur"] >= 76_000


def pixels(browser: Browser, points: list[tuple[float, float]]) -> list[list[int]]:
    """Return the colours of these points of the timeline's canvas."""
    return browser.run(
        "(() => { const context = document.getElementById('canvas').getContext('2d');"
        f"return {json.dumps(points)}.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data]); }})()"
    )


def table(browser: Browser, name: str) -> list[list[str]]:
    """Return the texts of a table's cells."""
    rows = f"[...document.querySelectorAll('#{name} tbody tr')]"
    return browser.run(f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))")


@pytest.mark.slow
@browser_needed
def test_a_report_in_a_browser(made):
    """The page loads nothing, and nothing in it goes wrong. Its numbers are the run's, each task has its bar at its
    time on its slot, the mouse and the keys tell of tasks, the wheel zooms, and failures show.
    """
    tasks = [event for event in made.events if event["ph"] == "X"]
    with Browser() as browser:
        browser.open(made.page)
        assert browser.run("document.getElementById('tile-calls').textContent") == "127"
        assert browser.run("document.getElementById('tile-slots').textContent") == "4"
        functions = {row[0].rpartition(".")[2]: row for row in table(browser, "functions")}
        assert {name: row[1:3] for name, row in functions.items()} == {
            "work": ["124", "0"],
            "fail": ["2", "2"],
            "die": ["1", "1"],
        }
        assert len(table(browser, "slowest")) == 20
        assert sorted(row[2] for row in table(browser, "failures")) == [
            *("raised an exception", "raised an exception", "worker process died")
        ]
        crashed = [row for row in table(browser, "errors") if row[0] == "WorkerCrashedError"]
        assert [row[2].partition(". ")[0] for row in crashed] == ["a call of test_report.die"]
        errors = {row[1]: row for row in table(browser, "errors") if row[0] == "ValueError"}
        assert set(errors) == {"no such <depth>: 3", "no such <depth>: 4"}
        assert "fail(3)" in errors["no such <depth>: 3"][2]
        assert [row[0] for row in table(browser, "nodes")] == ["local-0", "local-1"]

        box = browser.run("document.getElementById('timeline').getBoundingClientRect().toJSON()")
        canvas = browser.run("[canvas.width, canvas.height]")
        length = browser.run("JSON.parse(document.getElementById('data').textContent).length")
        left, right = canvas[0] * 64 / 1100, canvas[0] * 1088 / 1100

        def place(event: dict[str, Any], share: float = 0.5) -> tuple[float, float]:
            """Return where on the canvas so much of a task is over."""
            time = (event["ts"] + event["dur"] * share) / 1e6
            node, slot = event["pid"] - 2, event["tid"] - 1
            return left + time / length * (right - left), 4 + 20 * (node + 1) + 36 * node + 16 * slot + 7

        long = [event for event in tasks if event["args"]["end"] == "returned" and event["dur"] > 20_000]
        assert len(long) >= 24
        begun, half = (pixels(browser, [place(event, share) for event in long]) for share in (0.01, 0.5))
        wide = [event["dur"] / 1e6 / length * (right - left) > 4 for event in long]
        for first, second, is_wide in zip(begun, half, wide, strict=True):
            # A bar of less than a pixel is paler, and lies in one of two pixels.
            assert BLUE in (first, second) if is_wide else not {tuple(first), tuple(second)} <= {tuple(EMPTY)}
        # No node was there at the beginning.
        assert pixels(browser, [(left + 1, place(long[0])[1])]) == [[255, 255, 255, 255]]
        crash = next(event for event in tasks if event["args"]["end"] == "worker process died")
        x, y = place(crash)
        assert ORANGE in pixels(browser, [(x + by, y) for by in range(-2, 5)])

        x, y = place(long[0])
        browser.mouse("mouseMoved", box["left"] + 1 + x, box["top"] + 1 + y)
        text = browser.run("document.getElementById('hover').innerText")
        assert "work\n" in text
        assert f", slot {long[0]['tid'] - 1}, began after" in text
        before = browser.run("canvas.toDataURL()")
        browser.run("timeline.focus()")
        browser.mouse("mouseWheel", box["left"] + x, box["top"] + y, deltaX=0, deltaY=-300)
        browser.await_drawing()
        assert browser.run("canvas.toDataURL()") != before
        browser.key("n")
        spoken = browser.run("document.getElementById('spoken').textContent")
        assert spoken.startswith("Failure 1 of 3: ")
        assert "raised an exception" in spoken
        browser.key("0")
        browser.await_drawing()
        assert browser.requests == [made.page.as_uri()]
        # Reading so many pixels makes Chromium recommend another kind of canvas.
        assert [text for text in browser.problems if "willReadFrequently" not in text] == []
        assert browser.paper().startswith(b"%PDF")


@pytest.mark.slow
@browser_needed
def test_a_report_of_a_pool_that_is_open_and_in_the_dark(made):
    """It says that the pool is open, and is dark for those who want it so."""
    with Browser(dark=True) as browser:
        browser.open(made.early_page)
        assert "open; this page has" in browser.run("document.querySelector('header').textContent")
        assert browser.run("document.getElementById('tile-calls').textContent") == "126"
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        assert pixels(browser, [(4, 2)]) == [[20, 23, 27, 255]]
        assert browser.requests == [made.early_page.as_uri()]
        assert browser.problems == []

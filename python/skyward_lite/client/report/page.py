"""The report of a run as one page: its style, its script and its data are in it, and it loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from ... import _core
from .. import figures, records
from ..records import Bar, Span
from ..run import FAILED, OUTCOMES, USEFUL, Run
from . import bars, charts, tables
from .charts import Series

PARTS: Final = 240
"""Equal parts of the time, for each of which the charts show an average."""
RATE_UNITS: Final = ((1e9, " GB/s"), (1e6, " MB/s"), (1e3, " kB/s"), (1.0, " B/s"))
SECOND: Final = records.NANOS_PER_SECOND


class Timing:
    """What the records add up to: the times of a run, and how well its slots were used."""

    def __init__(self, run: Run, rows: list[list[list[Bar]]]) -> None:
        self.first = min((record.start for record in run.records), default=run.begin)
        self.last = max((record.end for record in run.records), default=run.end)
        self.begin = min(run.begin, self.first)
        self.end = max(run.end, self.last)
        self.there = [Span(ready.start, ready.end, ready.slots) for ready in run.ready]
        """The slots that were there."""
        # By the bars, which do not overlap: no more slots are busy than there are.
        self.busy = [Span(bar.start, bar.end, 1) for node in rows for row in node for bar in row]
        busy = sum(span.end - span.start for span in self.busy)
        useful = sum(record.duration for record in run.records if record.outcome in USEFUL)
        self.task_seconds = useful / SECOND
        self.working_seconds = (self.last - self.first) / SECOND
        """From the first task's start to the last one's end."""
        self.utilisation = _share(busy, records.integral(self.there, self.first, self.last))
        self.efficiency = _share(useful, records.integral(self.there, self.begin, self.end))
        self.speed_up = useful / max(self.last - self.first, 1)


def _share(part: float, whole: float) -> float | None:
    return min(part / whole, 1.0) if whole > 0 else None


def render(run: Run) -> str:
    """Return the page."""
    rows = bars.rows_of(run)
    timing = Timing(run, rows)
    data = bars.encode(run, rows, timing.begin, timing.end)
    data["nodes"] = _node_names(run, rows)
    data["outcomes"] = {code: words for code, words in OUTCOMES.items() if code != _core.RETURNED}
    data["failed"] = sorted(FAILED)
    data["ready"] = [
        [ready.node, (ready.start - timing.begin) / SECOND, (ready.end - timing.begin) / SECOND] for ready in run.ready
    ]
    here = Path(__file__).parent
    style = here.joinpath("page.css").read_text("utf-8")
    script = here.joinpath("page.js").read_text("utf-8")
    # A "<" in the data could end the element that holds it.
    encoded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    sections = (
        _head(run),
        _tiles(run, timing),
        _notes(run),
        _timeline(run),
        _charts(run, timing),
        _tables(run, rows, timing),
    )
    allowed = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.program)} – skyward_lite</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f'\n</main>\n<script type="application/json" id="data">{encoded}</script>\n<script>{script}</script>\n'
        "</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _node_names(run: Run, rows: Sequence[object]) -> list[str]:
    names = [node.name for node in run.status.nodes]
    return [names[number] if number < len(names) else f"node {number}" for number in range(len(rows))]


def _head(run: Run) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(run.zero + run.begin / SECOND))
    state = (
        "closed"
        if run.stage == "closed"
        else f"{run.stage}; this page has the tasks that had ended when it was written"
    )
    took = figures.duration((run.end - run.begin) / SECOND)
    return (
        f"<header><h1>{escape(run.program)}</h1><p>Began {began}, {took}, {state}.</p>"
        f'<p class="small">{escape(run.provider)} · {escape(run.versions)}</p></header>'
    )


def _tiles(run: Run, timing: Timing) -> str:
    status = run.status
    peak = max((sum(r.slots for r in run.ready if r.start <= each.start < r.end) for each in run.ready), default=0)
    done = [f"{status.failed:,} failed", f"{status.rerun:,} re-run"]
    done += [f"{status.running:,} running, {status.queued:,} queued"] if run.stage != "closed" else []
    working, tasks = figures.duration(timing.working_seconds), figures.duration(timing.task_seconds)
    sent, received = figures.size(status.bytes_sent), figures.size(status.bytes_received)
    nodes = figures.count(len(status.nodes), "node")
    reached = figures.count(sum(node.bytes_sent > 0 for node in status.nodes), "node")
    tiles = [
        ("calls", "Calls done", f"{status.done:,}", ", ".join(done)),
        ("working", "Working time", working, "from the first task’s start to the last one’s end"),
        ("slots", "Slots", f"{peak:,}", f"on {nodes}"),
        ("utilisation", "Utilisation", _percent(timing.utilisation), "of the slots’ working time a task ran"),
        ("efficiency", "Efficiency", _percent(timing.efficiency), "of the time that slots were there went into tasks"),
        ("speedup", "Speed-up", f"{timing.speed_up:,.1f} ×", f"{tasks} of tasks in the working time"),
        ("sent", "Sent", figures.size(status.payload_sent), f"{sent} on the wire, to {reached}"),
        ("received", "Received", figures.size(status.payload_received), f"{received} on the wire"),
    ]
    if status.cost is not None:
        note = f"{figures.dollars(status.cost.hourly)} per hour"
        if status.done:
            note += f", {figures.dollars(status.cost.total / status.done * 1000)} per 1,000 calls"
        tiles.append(("cost", "Cost", figures.dollars(status.cost.total), note))
    items = "".join(
        f'<div class="tile"><dt>{label}</dt><dd id="tile-{name}">{escape(value)}</dd>'
        f'<dd class="small">{escape(note)}</dd></div>'
        for name, label, value, note in tiles
    )
    columns = "four" if len(tiles) % 4 == 0 else "five"
    return f'<dl class="tiles {columns}">{items}</dl>'


def _percent(value: float | None) -> str:
    return "–" if value is None else figures.share(value)


def _notes(run: Run) -> str:
    if not run.dropped:
        return ""
    return (
        f'<p class="note" id="dropped">This page has the latest {figures.count(len(run.records), "task")}. The records '
        f"of {run.dropped:,} earlier ones are no longer kept: they are counted as done, failed and re-run, and are "
        "missing in everything else.</p>"
    )


def _timeline(run: Run) -> str:
    if not run.records:
        return '<section><h2>Timeline</h2><p id="no-tasks">No task has ended yet.</p></section>'
    return (
        '<section><h2>Timeline</h2><div class="bar"><ul class="legend" id="legend"></ul><span class="buttons">'
        '<button type="button" id="out" aria-label="Show more time" title="Show more time (-)">−</button>'
        '<button type="button" id="in" aria-label="Show less time" title="Show less time (+)">+</button>'
        '<button type="button" id="fit" title="Show all (0)">Show all</button></span></div>'
        '<div id="timeline" tabindex="0" role="group" aria-label="Timeline of every slot. Plus and minus zoom, arrow '
        'keys move, n goes to the next failure, 0 shows all. The tables below have the same tasks.">'
        '<canvas id="canvas" role="img" aria-label="What each slot of each node did"></canvas>'
        '<div id="space"></div></div>'
        '<p class="small noprint">Drag to move. Zoom with the wheel after a click into the timeline, or at any time '
        "with Ctrl and the wheel. Keys: + − ← → ↑ ↓, 0 shows all, n and p go from failure to failure.</p>"
        '<div id="hover" hidden></div><p id="spoken" role="status"></p></section>'
    )


def _charts(run: Run, timing: Timing) -> str:
    if not run.records:
        return ""
    begin, end = timing.begin, timing.end
    seconds = (end - begin) / SECOND
    part = max(seconds / PARTS, 1e-9)
    use = (
        Series("slots that run a task", "busy", records.averages(timing.busy, begin, end, PARTS)),
        Series("slots that are there", "there", records.averages(timing.there, begin, end, PARTS)),
    )
    sent, received = [0.0] * PARTS, [0.0] * PARTS
    for record in run.records:
        sent[min(int((record.start - begin) / SECOND / part), PARTS - 1)] += record.sent / part
        received[min(int((record.end - begin) / SECOND / part), PARTS - 1)] += record.received / part
    highest = max(*sent, *received)
    divisor, unit = next((each for each in RATE_UNITS if highest >= each[0]), RATE_UNITS[-1])
    moved = (
        Series("sent, counted when the task begins", "sent", [value / divisor for value in sent]),
        Series("received, counted when it has ended", "received", [value / divisor for value in received]),
    )
    return (
        f"<section><h2>Utilisation</h2>{charts.legend(use)}"
        f"{charts.chart('Slots that run a task, over time', use, seconds, '', 1)}</section>"
        f"<section><h2>Transfers</h2>{charts.legend(moved)}"
        f"{charts.chart('Data of calls and results before compression, over time', moved, seconds, unit, 0)}</section>"
    )


def _tables(run: Run, rows: list[list[list[Bar]]], timing: Timing) -> str:
    longest = set(records.slowest(run.records, tables.MAX_SLOWEST))
    slots = {
        bar.record: number for node in rows for number, row in enumerate(node) for bar in row if bar.record in longest
    }
    busy = []
    for number in range(len(run.status.nodes)):
        slot_times = [Span(ready.start, ready.end, ready.slots) for ready in run.ready if ready.node == number]
        there = records.integral(slot_times, timing.first, timing.last)
        ran = sum(bar.end - bar.start for row in rows[number] for bar in row) if number < len(rows) else 0
        busy.append(_share(ran, there) or 0.0)
    return (
        f"<section><h2>Functions</h2>{tables.functions(run)}</section>"
        f"<section><h2>Slowest tasks</h2>{tables.slowest(run, timing.begin, slots)}</section>"
        f"<section><h2>Failures</h2>{tables.failures(run, timing.begin)}</section>"
        f"<section><h2>Nodes</h2>{tables.nodes(run, busy)}</section>"
    )

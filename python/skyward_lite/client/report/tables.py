"""The page's tables: the slowest tasks, the functions, the failures and the nodes. All text is escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Final

from .. import figures, records
from ..records import Record
from ..run import FAILED, OUTCOMES, Run

MAX_SLOWEST: Final = 20
MAX_FUNCTIONS: Final = 50
MAX_ERRORS: Final = 50
MAX_FAILED_ATTEMPTS: Final = 100
MAX_NODES: Final = 1_000
SECOND: Final = records.NANOS_PER_SECOND


def table(name: str, caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """Return a table, of which the first `texts` columns are texts and the others figures. Cells are escaped here."""
    # A head that begins with "<" is above a column of texts, wherever it stands.
    is_text = [number < texts or head.startswith("<") for number, head in enumerate(heads)]
    kinds = [' class="t"' if text else "" for text in is_text]
    head = "".join(
        f'<th scope="col"{kind}>{escape(h.removeprefix("<"))}</th>' for h, kind in zip(heads, kinds, strict=True)
    )
    lines = []
    for row in rows:
        # The first cell says what the row is about, also to those who hear it read.
        first = f'<th scope="row"{kinds[0]}>{escape(row[0])}</th>'
        rest = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        lines.append(f"<tr>{first}{rest}</tr>")
    return (
        f'<p class="caption" id="{name}-caption">{escape(caption)}</p><div class="wide">'
        f'<table id="{name}" aria-labelledby="{name}-caption"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def slowest(run: Run, begin: int, slots: Mapping[Record, int]) -> str:
    """Return the table of the slowest tasks. `slots`: the row of each record within its node."""
    rows = [
        (
            run.name_of(record),
            run.node_of(record),
            figures.duration(record.duration / SECOND),
            figures.duration(max(0, record.start - begin) / SECOND),
            str(slots[record]) if record in slots else "",
            f"{record.calls:,}",
            figures.size(record.sent),
            figures.size(record.received),
            OUTCOMES.get(record.outcome, str(record.outcome)),
        )
        for record in records.slowest(run.records, MAX_SLOWEST)
    ]
    heads = ("Function", "Node", "Time", "Began after", "Slot", "Calls", "Sent", "Received", "<End")
    caption = (
        f"The {len(rows)} that took longest, of {figures.count(len(run.records), 'task')}; a batch of calls is one task"
    )
    return table("slowest", caption, heads, rows, texts=2)


def functions(run: Run) -> str:
    """Return the table of the functions."""
    summaries = records.by_function(run.records, FAILED)
    all_seconds = sum(summary.total for summary in summaries) or 1.0
    rows = [
        (
            (run.names[each.name] if each.name < len(run.names) else "") or "(unnamed)",
            f"{each.calls:,}",
            f"{each.failed:,}",
            figures.duration(each.mean),
            figures.duration(each.median),
            figures.duration(each.p99),
            figures.duration(each.longest),
            figures.duration(each.total),
            figures.share(each.total / all_seconds),
        )
        for each in summaries[:MAX_FUNCTIONS]
    ]
    caption = "Times are those of one call; the time of a batch is shared out among its calls"
    if len(summaries) > MAX_FUNCTIONS:
        caption += f". The {MAX_FUNCTIONS} that took most time, of {len(summaries):,}"
    heads = ("Function", "Calls", "Failed tasks", "Mean", "Median", "99 % within", "Longest", "Total", "Share")
    return table("functions", caption, heads, rows)


def failures(run: Run, begin: int) -> str:
    """Return the tables of what failed; a sentence if nothing did."""
    failed = sorted(record for record in run.records if record.outcome in FAILED)
    if not failed and not run.failed_calls:
        return '<p id="no-failures">No task failed.</p>'
    parts = []
    if run.failures:
        latest = {(each.kind, each.message): each for each in run.failures}
        counts = Counter((each.kind, each.message) for each in run.failures)
        rows = [
            (kind, message, latest[kind, message].where, f"{times:,}")
            for (kind, message), times in counts.most_common(MAX_ERRORS)
        ]
        caption = f"{figures.count(run.failed_calls, 'error')}, by type and text"
        if run.failed_calls > len(run.failures):
            caption += f", of the last {len(run.failures):,}"
        if len(counts) > MAX_ERRORS:
            caption += f": the {MAX_ERRORS} most frequent of {len(counts):,}"
        parts.append(table("errors", caption, ("Error", "Message", "Last seen at", "Times"), rows, texts=3))
    if failed:
        attempts = [
            (
                run.name_of(record),
                run.node_of(record),
                OUTCOMES[record.outcome],
                figures.duration(max(0, record.start - begin) / SECOND),
                # How long a task ran that ended its process is not known.
                figures.duration(record.duration / SECOND) if record.duration else "–",
                f"{record.calls:,}",
            )
            for record in failed[:MAX_FAILED_ATTEMPTS]
        ]
        caption = figures.count(len(failed), "task that failed", "tasks that failed")
        if len(failed) > MAX_FAILED_ATTEMPTS:
            caption += f": the first {MAX_FAILED_ATTEMPTS}"
        heads = ("Function", "Node", "What happened", "Began after", "Time", "Calls")
        parts.append(table("failures", caption, heads, attempts, texts=3))
    return "".join(parts)


def nodes(run: Run, busy: Sequence[float]) -> str:
    """Return the table of the nodes. `busy`: the share of each node's slots' time in which a task ran."""
    cells = [
        (
            node.name,
            node.state,
            node.reason,
            f"{node.slots:,}",
            figures.share(busy[number]) if number < len(busy) else "",
            f"{node.running:,}",
            f"{node.queued:,}",
            f"{node.done:,}",
            f"{node.failed:,}",
            f"{node.rerun:,}",
            figures.size(node.bytes_sent),
            figures.size(node.bytes_received),
            figures.size(node.cached_bytes),
            "" if node.rtt is None else figures.duration(node.rtt),
        )
        for number, node in enumerate(run.status.nodes[:MAX_NODES])
    ]
    heads = (
        *("Node", "State", "Reason", "Slots", "Busy", "Running", "Queued", "Done", "Failed", "Re-run", "Sent"),
        *("Received", "Cached", "Round trip"),
    )
    caption = "Sent and received are bytes on the wire; busy is the share of the slots’ working time"
    if len(run.status.nodes) > MAX_NODES:
        caption += f". The first {MAX_NODES:,} of {len(run.status.nodes):,}"
    return table("nodes", caption, heads, cells, texts=3)

"""Draw the chart of the README from what `data.py --json` has measured: `chart.py MEASURED.json CHART.svg [PAGE.md]`.

Bars are medians, with the figure beside each; each panel says whether longer or shorter is better. The picture has a
background of its own, so that it can be read on light and dark pages alike, and follows the reader's setting. The same
figures, with the extremes of their rounds, go into the page, between two comments that it has for them.
"""

from __future__ import annotations

import html
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

WIDTH = 860
LEFT = 150
"""Where bars begin, in the units of the picture."""
LONGEST = 560
"""The longest bar."""
ROW, GAP, HEAD, FOOT = 26, 46, 54, 40
"""Heights of a bar with its margin, of a panel's title, of the chart's title and of its last line."""

CONTESTANTS = {"Local(), 1 node": "skyward_lite", "loky": "loky", "dask": "dask.distributed", "ray": "ray"}
"""What `data.py` calls them, and what readers do."""

STYLE = """
  .page { fill: #ffffff; } text { font: 14px system-ui, sans-serif; fill: #1d2733; }
  .title { font-size: 17px; font-weight: 600; } .panel { font-weight: 600; } .small { font-size: 12px; fill: #526071; }
  .ours { fill: #2563b0; } .other { fill: #a8b4c2; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #16191d; } text { fill: #e4e9ef; } .small { fill: #a3b0bf; }
    .ours { fill: #6ea8f0; } .other { fill: #566373; }
  }
"""

Columns = dict[str, dict[str, list[float]]]
Panel = tuple[str, dict[str, float], Callable[[float], str]]


def medians(columns: Columns, what: str) -> dict[str, float]:
    """Return the median of a figure by the contestant's shown name."""
    there = {shown: columns.get(name, {}).get(what) for name, shown in CONTESTANTS.items()}
    return {shown: statistics.median(values) for shown, values in there.items() if values}


def seconds(value: float) -> str:
    """Return a time as text."""
    return f"{value:.2f} s"


def panels(measured: dict[str, dict[str, Columns]], sizes: dict[str, float]) -> list[Panel]:
    """Return the chart's panels: title, value of each contestant, and how a value is written."""
    columns = measured["columns"]
    rates = medians(columns["tiny"], "rate")
    size = f"{sizes['shared']:g} MB"
    return [
        ("Small tasks, one at a time: tasks per second (longer is better)", rates, lambda v: f"{v:,.0f}/s"),
        ("From nothing to the first results (shorter is better)", medians(columns["start"], "ready"), seconds),
        (f"100 tasks that share {size}, first call (shorter is better)", medians(columns["shared"], "first"), seconds),
        ("The same call once more (shorter is better)", medians(columns["shared"], "second"), seconds),
    ]


def table(columns: dict[str, Columns]) -> str:
    """Return the figures as a table: medians, and from the least to the most of the rounds."""
    rows = [
        ("tasks per second, `batch_size=1`", columns["tiny"], "rate", "{:,.0f}"),
        ("seconds to the first results", columns["start"], "ready", "{:.2f}"),
        ("100 tasks that share 50 MB, first call, s", columns["shared"], "first", "{:.2f}"),
        ("the same call once more, s", columns["shared"], "second", "{:.2f}"),
    ]
    lines = [f"| | {' | '.join(CONTESTANTS.values())} |", "|---" * (1 + len(CONTESTANTS)) + "|"]
    for title, measured, what, form in rows:
        cells = []
        for name in CONTESTANTS:
            values = measured.get(name, {}).get(what)
            shown = [form.format(f(values)) for f in (statistics.median, min, max)] if values else []
            cells.append("{} ({} to {})".format(*shown) if shown else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(shown: list[Panel]) -> str:
    """Return the picture."""
    y, parts = HEAD, []
    for title, values, text in shown:
        y += GAP - 20
        parts.append(f'<text class="panel" x="20" y="{y}">{html.escape(title)}</text>')
        y += 12
        most = max(values.values())
        for name, value in values.items():
            length = max(2.0, LONGEST * value / most)
            kind = "ours" if name == "skyward_lite" else "other"
            parts.append(f'<text x="{LEFT - 10}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>')
            parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{ROW - 6}" rx="3"/>')
            parts.append(f'<text x="{LEFT + length + 8:.1f}" y="{y + 15}">{html.escape(text(value))}</text>')
            y += ROW
    height = y + FOOT
    about = "One machine with two cores, two slots each, all of them behind joblib; medians of interleaved rounds."
    said = "; ".join(f"{title}: " + ", ".join(f"{n} {t(v)}" for n, v in values.items()) for title, values, t in shown)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">',
        f'<title id="t">skyward_lite beside loky, dask and ray</title><desc id="d">{html.escape(said)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="10"/>',
        '<text class="title" x="20" y="36">skyward_lite beside loky, dask and ray</text>',
    ]
    return "\n".join([*head, *parts, f'<text class="small" x="20" y="{height - 16}">{about}</text>', "</svg>", ""])


def main() -> None:
    """Draw it."""
    source, target, *pages = map(Path, sys.argv[1:])
    measured = json.loads(source.read_text())
    target.write_text(draw(panels(measured, measured["sizes"])))
    for page in pages:
        before, begin, rest = page.read_text().partition("<!-- chart -->\n")
        _, end, after = rest.partition("<!-- end of chart -->\n")
        if not end:
            sys.exit(f"{page} has no place for the figures")
        page.write_text(f"{before}{begin}\n{table(measured['columns'])}\n\n{end}{after}")


if __name__ == "__main__":
    main()

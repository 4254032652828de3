"""What a pool shows, before it is known where: rows of styled words, for a terminal and for a notebook."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

Word = tuple[str, str]
"""A text and its style, one of `STYLES`."""
Row = list[Word]

STYLES: Final = {
    "": "",
    "bold": "bold",
    "dim": "dim",
    "good": "green",
    "bad": "red",
    "busy": "cyan",
    "rest": "bright_black",
}
"""Style → the style as rich calls it."""
_CSS: Final = {
    "bold": "font-weight:bold",
    "dim": "opacity:.65",
    "good": "color:#1a7f37",
    "bad": "color:#cf222e",
    "busy": "color:#0a7ea4",
    "rest": "opacity:.25",
}
_ASCII: Final = str.maketrans(
    {
        "━": "#",
        "─": "-",
        "·": "|",
        "✔": "+",
        "✘": "x",
        "↑": "^",
        "↓": "v",
        "…": ".",
        **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),
    }
)
"""What takes the place of characters that an encoding without them lacks."""
SPINNER: Final = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
BAR_CELLS: Final = 24


def bar(share: float) -> Row:
    """Return a bar of which `share`, from 0 to 1, is full."""
    full = round(BAR_CELLS * min(1.0, max(0.0, share)))
    return [("━" * full, "good"), ("─" * (BAR_CELLS - full), "rest")]


def clock(seconds: float) -> str:
    """Return a time as 0:42 or 1:02:03."""
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def text(row: Row) -> str:
    """Return a row without its styles."""
    return "".join(word for word, _ in row).rstrip()


def plain(rows: Iterable[Row]) -> str:
    """Return rows as a text of several lines."""
    return "\n".join(map(text, rows))


def as_html(rows: Sequence[Row]) -> str:
    """Return rows as HTML. They keep their columns, and wrap nowhere."""
    # Not at the module's head: only notebooks need it.
    from html import escape

    lines = "\n".join("".join(_span(escape(word, quote=False), style) for word, style in row) for row in rows)
    return f'<pre style="margin:0;padding:0;line-height:1.35;background:none;font-family:monospace">{lines}</pre>'


def _span(word: str, style: str) -> str:
    css = _CSS.get(style)
    return f'<span style="{css}">{word}</span>' if css else word


def painter(out: Any) -> Callable[[Row], str] | None:
    """Return what makes a terminal's text, with colours, of a row; None if rich is not installed, or is of no use here.

    rich knows which colours the terminal has, and what `NO_COLOR` and its own variables ask for.
    """
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown", ""):
        return None
    try:
        from rich.color import ColorSystem
        from rich.console import Console
    except ImportError:
        return None
    console = Console(file=out, force_jupyter=False)
    # The styles have none but the 16 colours that every terminal with colours has.
    colours = ColorSystem.STANDARD if console.color_system else None
    styles = {name: console.get_style(style or "none") for name, style in STYLES.items()}
    if console.no_color:
        styles = {name: style.without_color for name, style in styles.items()}

    def paint(row: Row) -> str:
        return "".join(styles[style].render(word, color_system=colours) for word, style in readable(row, out))

    return paint


def readable(row: Row, out: Any) -> Row:
    """Return a row in characters that the stream has."""
    encoding = (getattr(out, "encoding", None) or "ascii").lower().replace("-", "")
    return row if encoding.startswith("utf") else [(word.translate(_ASCII), style) for word, style in row]

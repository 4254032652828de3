"""Charts over the time of a run, as SVG that takes its colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Final, NamedTuple

WIDTH, NARROW_WIDTH, HEIGHT = 1100, 480, 150
"""The size of a chart, on pages and on narrow screens, in units of its own: it is scaled to the width that there is."""
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 24
"""Margins in the same units. The timeline's script has its axis at the same place."""
TIME_STEPS: Final = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
"""Seconds between two marks of a time axis, from one second on."""


class Series(NamedTuple):
    """One line of a chart: a value for each of equal parts of the time. `style`: a class of the page's style."""

    label: str
    style: str
    values: Sequence[float]


def time_step(seconds: float, marks: int) -> float:
    """Return the time between two marks of an axis that is to have at most so many."""
    least = seconds / marks
    if least <= 1:
        return nice_above(least)
    return next((step for step in TIME_STEPS if step >= least), math.ceil(least / 86400) * 86400)


def nice_above(value: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not below the value."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= value * (1 - 1e-9))


def clock(seconds: float, step: float) -> str:
    """Return a mark of a time axis: "0.2 s", "5 s", "1:30", "2:00:00"."""
    if step < 1 or seconds < 60:
        digits = max(0, -math.floor(math.log10(step))) if step < 1 else 0
        return f"{seconds:.{digits}f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def chart(title: str, series: Sequence[Series], seconds: float, unit: str, top: float) -> str:
    """Return a chart whose first series is an area and whose others are lines. `top`: the least end of its scale.

    It is there twice, for pages and for narrow screens, of which the page's style shows one.
    """
    return "".join(
        f'<svg class="chart {name}" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{_drawing(series, seconds, unit, top, width)}</svg>"
        for name, width in (("broad", WIDTH), ("narrow", NARROW_WIDTH))
    )


def _drawing(series: Sequence[Series], seconds: float, unit: str, top: float, width: int) -> str:
    highest = max([top, *(max(each.values, default=0.0) for each in series)])
    step = nice_above(highest / 3)
    scale = step * math.ceil(highest / step * (1 - 1e-9)) or 1.0
    inner_width, inner_height = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def y(value: float) -> float:
        return TOP + inner_height * (1 - value / scale)

    parts = []
    for number in range(round(scale / step) + 1):
        level, label = y(number * step), escape(f"{number * step:,.10g}{unit}")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text class="mark" x="{LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">{label}</text>')
    between = time_step(seconds, width // 110)
    for number in range(math.floor(seconds / between * (1 + 1e-9)) + 1 if seconds > 0 else 0):
        x = LEFT + inner_width * number * between / seconds
        anchor = "start" if number == 0 else "end" if x > width - RIGHT - 20 else "middle"
        label = clock(number * between, between)
        parts.append(f'<text class="mark" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{label}</text>')
    parts += [_path(each, inner_width, y, is_area=number == 0) for number, each in enumerate(series)]
    return "".join(parts)


def _path(series: Series, width: float, y: Callable[[float], float], *, is_area: bool) -> str:
    values = series.values
    if not values:
        return ""
    part = width / len(values)
    points = [f"M{LEFT} {y(values[0]):.1f}"]
    for number, value in enumerate(values):
        # A step: the value holds for the whole of its part of the time.
        if number and value != values[number - 1]:
            points.append(f"V{y(value):.1f}")
        points.append(f"H{LEFT + part * (number + 1):.1f}")
    if is_area:
        points += [f"V{y(0):.1f}", f"H{LEFT}Z"]
    return f'<path class="{series.style}" d="{"".join(points)}"/>'


def legend(series: Sequence[Series]) -> str:
    """Return what each line of a chart is."""
    items = "".join(f'<li><span class="key {each.style}"></span>{escape(each.label)}</li>' for each in series)
    return f'<ul class="legend">{items}</ul>'

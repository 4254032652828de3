"""What the commands tell of a host: `Step` and `Report` are `check`'s, `CacheEntry` and `CleanReport` are `clean`'s.

What a host printed is passed through `_core.printable` before it is in a report: it does nothing on a terminal.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from .. import _core


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a report. "fail" means that a pool cannot use the host, "note" that it can all the same."""

    step: str
    status: Literal["ok", "note", "fail"]
    text: str
    fix: str = ""
    """What the user can do; may be empty."""
    figures: dict[str, float | str | None] = dataclasses.field(default_factory=dict)
    """The text's numbers, for programs. A name that ends in a unit has it."""


@dataclasses.dataclass
class Report:
    """What `check` found on a host, step by step. Only the thread that checks the host adds steps."""

    host: str
    steps: list[Step] = dataclasses.field(default_factory=list)
    verdict: str = "can be used"
    """What is said of a host on which no step failed."""

    @property
    def usable(self) -> bool:
        return all(step.status != "fail" for step in self.steps)

    def ok(self, step: str, text: str, **figures: float | str | None) -> None:
        self.steps.append(Step(step, "ok", _core.printable(text), figures=figures))

    def note(self, step: str, text: str, fix: str = "") -> None:
        self.steps.append(Step(step, "note", _core.printable(text), fix))

    def fail(self, step: str, text: str, fix: str) -> None:
        self.steps.append(Step(step, "fail", _core.printable(text), fix))

    def lines(self) -> str:
        """Return the report for people."""
        lines = [f"{self.host}: {self.verdict if self.usable else 'CANNOT be used'}"]
        for step in self.steps:
            sign = {"ok": "ok  ", "note": "note", "fail": "FAIL"}[step.status]
            lines.append(f"  {sign}  {step.step:<14}  {step.text}".replace("\n", f"\n{'':24}"))
            if step.fix:
                lines.append(f"{'':24}→ {step.fix}")
        return "\n".join(lines)

    def fields(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {"host": self.host, "usable": self.usable, "steps": [dataclasses.asdict(step) for step in self.steps]}


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """An environment in a host's cache directory, or a file that was sent there, and whether it is removed."""

    decision: str
    """As the script reports it: "gone" (removed, or to be removed), "kept", or "stuck" (it could not be removed)."""
    path: str
    size_kb: int
    unused_seconds: int

    @classmethod
    def parse(cls, decision: str, line: str) -> CacheEntry | None:
        """Read a line of the script's report; None if it has another form."""
        match = re.fullmatch(r"([0-9]{0,15}) (-?[0-9]{1,15}) (/.+)", line)
        return None if match is None else cls(decision, match[3], int(match[1] or 0), max(0, int(match[2])))

    def line(self, *, dry_run: bool) -> str:
        """Return the entry for people."""
        if self.decision == "kept":
            decided = "kept"
        elif self.decision == "stuck":
            decided = "could not be removed"
        else:
            decided = "would be removed" if dry_run else "removed"
        return f"{self.path}: {self.size_kb / 1024:,.1f} MB, used {_duration(self.unused_seconds)} ago: {decided}"


@dataclasses.dataclass(frozen=True)
class CleanReport:
    """What `clean` found on a host, and why it could not look at all of it."""

    host: str
    entries: tuple[CacheEntry, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is left that should be removed."""
        return not self.problems and all(entry.decision != "stuck" for entry in self.entries)


def _duration(seconds: int) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} seconds"

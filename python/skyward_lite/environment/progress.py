"""What pip and uv print while an environment is built, in plain words, as it comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from .. import _core, credentials

MAX_LINE_BYTES = 2000
"""A longer line of a host is not shown."""
MAX_SHOWN_BYTES = 300
MAX_PACKAGES = 8
"""Packages that one line names; the others are counted."""

_WHEEL = re.compile(r"([A-Za-z0-9_.]+?)-(\d[^-\s]*)(?:-\S+\.whl|\.tar\.gz|\.zip)(?: \(([^)]{1,20})\))?")
_UV_SIZED = re.compile(r"([A-Za-z0-9_.-]+)(?:==(\S+))? \(([^)]{1,20})\)$")
_UV_PYTHON = re.compile(r"cpython-(\d[\w.]*)-\S+(?: \(download\))?(?: \(([^)]{1,20})\))?$")
_PINNED = re.compile(r"([A-Za-z0-9_.\[\]-]+)==(\S+)")
_CHATTER = re.compile(
    r"(?:Using (?:CPython|Python) |Creating virtual environment |Activate with|Resolved \d|Prepared \d|Installed \d"
    r"|Downloaded |Built |Audited \d|Looking in |Requirement already )"
)
"""Begins lines that only tell what others tell better."""


class Progress:
    """Receives what a build prints, and tells of it: a line at most for each time that it is called.

    Standard error is read as it is; of standard output the lines `progress=...`, which build.sh writes.
    """

    def __init__(self, tell: Callable[[str], object], secrets: Collection[str] = ()) -> None:
        self._tell = tell
        self._secrets = frozenset(secrets)
        self._begun = [b"", b""]
        """The beginning of the last line of each stream, which has not ended yet."""

    def __call__(self, stdout: bytes, stderr: bytes) -> None:
        """Log the last thing that began, and the packages that were installed."""
        lines = [line[9:] for line in self._lines(0, stdout) if line.startswith(b"progress=")]
        lines += self._lines(1, stderr)
        installed: list[str] = []
        last = None
        for line in lines:
            # Masked before it is cut: half a URL would not be recognized as a URL.
            text = credentials.mask(line.decode(errors="backslashreplace").strip(), self._secrets)
            packages = installed_packages(text)
            installed += packages
            last = None if packages else plain(text) or last
        if installed:
            more = len(installed) - MAX_PACKAGES
            last = f"installed {', '.join(installed[:MAX_PACKAGES])}{f' and {more} more' if more > 0 else ''}"
        if last is not None:
            self._tell(_core.printable(last, MAX_SHOWN_BYTES, lines=False))

    def _lines(self, stream: int, data: bytes) -> list[bytes]:
        """Return the lines of a stream that have ended now."""
        *ended, begun = (self._begun[stream] + data).split(b"\n")
        # Of a line that is too long the beginning stays, so that its end is not taken for a line.
        self._begun[stream] = begun[: MAX_LINE_BYTES + 1]
        return [line for line in ended if len(line) <= MAX_LINE_BYTES]


def plain(text: str) -> str | None:
    """Return what a line of pip, of uv or of our script tells, in plain words; None for any other line."""
    verb, _, rest = text.partition(" ")
    if verb == "#":  # build.py's own, in plain words
        return rest
    if verb == "Collecting":
        return f"looking for {rest.partition(' (from')[0]}"
    if verb == "Building":
        name = rest.removeprefix("wheels for collected packages: ").removeprefix("wheel for ").partition(" (")[0]
        pinned = _PINNED.fullmatch(name)
        return f"building {_spaced(pinned) if pinned else name}"
    if verb == "Downloading" or text.startswith("Using cached "):
        return _downloading(rest.removeprefix("cached "))
    if text.startswith("Installing collected packages: "):
        return f"installing {text.count(',') + 1} packages" if "," in text else f"installing {text.split(': ', 1)[1]}"
    return None


def _downloading(rest: str) -> str | None:
    if python := _UV_PYTHON.match(rest):
        return f"downloading Python {python[1]}{f' ({python[2]})' if python[2] else ''}"
    if wheel := _WHEEL.match(rest.rpartition("/")[2] if "://" in rest else rest):
        return f"downloading {wheel[1].replace('_', '-')} {wheel[2]}{f' ({wheel[3]})' if wheel[3] else ''}"
    if sized := _UV_SIZED.match(rest):
        return f"downloading {sized[1]}{f' {sized[2]}' if sized[2] else ''} ({sized[3]})"
    return None


def installed_packages(text: str) -> list[str]:
    """Return the packages, with their versions, that a line of pip's or uv's reports as installed."""
    if text.startswith("Successfully installed "):
        return [" ".join(word.rsplit("-", 1)) for word in text.split(" ")[2:]]
    added = _PINNED.match(text.removeprefix("+ ")) if text.startswith("+ ") else None
    return [] if added is None else [_spaced(added)]


def _spaced(pinned: re.Match[str]) -> str:
    return f"{pinned[1]} {pinned[2]}"


def without(printed: str) -> str:
    """Return a text of several lines without those that only report progress, which leaves the reason of a failure."""
    lines = [line for line in printed.split("\n") if not _is_progress(line.strip(" |"))]
    return "\n".join(lines).removeprefix("  | ")


def _is_progress(line: str) -> bool:
    return bool(_CHATTER.match(line) or installed_packages(line) or plain(line))

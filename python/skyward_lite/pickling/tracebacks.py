"""Tracebacks of tasks as text: written on the node, completed at the client.

Functions of the program's script travel by value, and their file is at the client. So the node writes a mark in place
of each source line that it cannot have, and the client puts the line there. Frames of this package and of joblib are
left out at both ends: they say nothing about the task.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any, Final

import cloudpickle

MAX_SOURCE_BYTES: Final = 10 << 20
"""A larger file is not read for the source lines of a traceback."""
ARROW: Final = "--> "
"""What stands before the line of the user's own code at which a task failed, as wide as the blanks there."""

_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_MARKED: Final = r'^(?P<before>[ |+]*)  File "(?P<file>.*)", line (?P<line>\d+), in (?P<name>.*)\n[ |]*    \0(.*)\0$'
"""A frame with the mark: in it are the number of the last line, and the first and the last column."""
_FILE: Final = r'^(?P<before>[ |+]*)  File "(?P<file>.*)"(?=, line \d)'
_ENTRY: Final = r'^(?:  \| )?  (?:File "(?P<file>.*)"|Cell In\[\d+\]), line \d+, in .*\n(?:  \| )?    (?=\S)'
"""A frame with its source line; that of a group of exceptions stands behind a margin."""
_OF_OTHERS: Final = re.compile(r"[\\/](?:site-packages|dist-packages|lib[\\/]python\d[^\\/]*)[\\/]|^<(?!ipython|stdin)")
"""A file of an installed package or of Python itself, or code without a file."""


# ------------------------------------------------------------------------------------------------ on the node


def written(error: BaseException, trace: types.TracebackType | None, has_run: bool = True) -> str:
    """Return the traceback of a task's exception, with marks for the source lines that only the client has.

    If nothing but our own frames is there they stay, unless nothing of the task `has_run`: they rebuild calls then.
    """
    shown = traceback.TracebackException(type(error), error, trace, lookup_lines=False)
    rooms = _rooms()
    todo: list[tuple[Any, Any, Any]] = [(shown, error, trace)]
    while todo:
        of, raised, its_trace = todo.pop()
        if of is None or raised is None:
            continue
        frames = [(entry, frame) for entry, (frame, _) in zip(of.stack, traceback.walk_tb(its_trace), strict=False)]
        kept = [_marked(entry, frame) for entry, frame in frames if not entry.filename.startswith(rooms)]
        if kept or not has_run:
            of.stack = traceback.StackSummary.from_list(kept) if kept else None
        for cause in ("__cause__", "__context__"):
            other = getattr(raised, cause)
            todo.append((getattr(of, cause), other, getattr(other, "__traceback__", None)))
        inner = zip(getattr(of, "exceptions", None) or (), getattr(raised, "exceptions", ()), strict=False)
        todo += [(entry, each, each.__traceback__) for entry, each in inner]
    return "".join(shown.format())


def _rooms() -> tuple[str, ...]:
    """Return the directories of this package and of joblib."""
    joblib = getattr(sys.modules.get("joblib"), "__file__", None)
    return (_PACKAGE,) if joblib is None else (_PACKAGE, os.path.dirname(joblib) + os.sep)


def _marked(entry: traceback.FrameSummary, frame: types.FrameType) -> traceback.FrameSummary:
    """Return an entry of a traceback; with the mark, if its source may be another file on this node."""
    file, names = entry.filename, frame.f_globals
    # Functions that travel by value have globals without a loader.
    if ("__loader__" in names and names.get("__file__") == file) or (file.startswith("<") and entry.line):
        return entry
    mark = f"\0{entry.end_lineno} {entry.colno} {entry.end_colno}\0"
    return traceback.FrameSummary(file, entry.lineno, entry.name, lookup_line=False, line=mark)


# ------------------------------------------------------------------------------------------------ at the client


def completed(text: str) -> str:
    """Return a traceback that a node has written, with this process's source lines, and an arrow at the user's."""
    text = re.sub(_MARKED, _with_source, text, flags=re.MULTILINE)
    # The text may have been cut within a mark.
    text = re.sub(r"\n[ |]*\0[^\n]*|\0", "", text)
    last = None
    text = re.sub(_FILE, _as_cell, text, flags=re.MULTILINE)
    for entry in re.finditer(_ENTRY, text, flags=re.MULTILINE):
        if not _OF_OTHERS.search(entry["file"] or ""):
            last = entry
    return text if last is None else text[: last.end() - len(ARROW)] + ARROW + text[last.end() :]


def _with_source(found: re.Match[str]) -> str:
    before, number = found["before"], int(found["line"][:9])
    line = _source(found["file"], number)
    positions = [int(each) if each.isdecimal() and len(each) < 9 else None for each in found[5].split()]
    end_line, start, end = (*positions, None, None, None)[:3]
    entry = traceback.FrameSummary(
        found["file"],
        number,
        found["name"],
        lookup_line=False,
        line=line,
        end_lineno=end_line,
        colno=start,
        end_colno=end,
    )
    try:
        lines = traceback.StackSummary.from_list([entry]).format()
    except Exception:
        # The columns are a node's, and may be none of the line's.
        lines = [f'  File "{found["file"]}", line {number}, in {found["name"]}\n']
    return "\n".join(before + each for each in "".join(lines).rstrip("\n").split("\n"))


def _as_cell(found: re.Match[str]) -> str:
    """Return the beginning of a frame of a notebook's cell as IPython writes it: `Cell In[3]`."""
    try:
        # Another version of IPython may have no such method, and most programs have no IPython.
        named = sys.modules["IPython"].get_ipython().compile.format_code_name(found["file"])
    except (AttributeError, KeyError):
        return found[0]
    return found[0] if named is None else f"{found['before']}  {' '.join(named)}"


def _source(file: str, number: int) -> str:
    """Return a line of a file of this machine, or of a notebook's cell, with its end; empty if there is none."""
    if file not in linecache.cache:
        try:
            # Of a file only: a node could name a device or a pipe, which has no end.
            if not os.path.isfile(file) or os.path.getsize(file) > MAX_SOURCE_BYTES:
                return ""
        except (OSError, ValueError):
            return ""
    return linecache.getline(file, number)


def without_ours(trace: types.TracebackType | None, whole: bool = False) -> types.TracebackType | None:
    """Return a traceback without the frames of this package, of joblib, cloudpickle and `concurrent.futures`.

    Where no frame would be left it is returned as it is, or None if `whole`. The given traceback is not changed.
    """
    rooms = (*_rooms(), os.path.join(os.path.dirname(os.__file__), "concurrent", "futures") + os.sep)
    rooms += (os.path.dirname(cloudpickle.__file__) + os.sep,)
    kept = [each for each in _entries(trace) if not each.tb_frame.f_code.co_filename.startswith(rooms)]
    folded: types.TracebackType | None = None
    for each in reversed(kept):
        folded = types.TracebackType(folded, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return trace if folded is None and not whole else folded


def _entries(trace: types.TracebackType | None) -> Iterator[types.TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next

"""What a pool shows of its run, in files and in notebooks."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path

from ..providers import Provider
from .lifecycle import Stage
from .node_state import status_html
from .tasks import Tasks


class Reporting(Executor):
    """The methods of a pool that show its run. What writes the files is imported when it is first needed."""

    provider: Provider

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that shows how the run went so far, and return its path.

        The page has the timeline of every slot, utilisation and transfers over time, the functions, the slowest tasks,
        the failures, the nodes and what they cost. It may be written during the block and after it, and repeatedly.

        Parameters
        ----------
        path : str or os.PathLike
            The file, such as "run.html". It loads nothing from elsewhere. An older file is replaced when the new one is
            complete.

        Returns
        -------
        pathlib.Path
            `path`.

        Raises
        ------
        OSError
            The file cannot be written; its directory must exist.
        """
        from . import collecting, writing
        from .report import page

        target, run = writing.target("pool.report", path), collecting.collect(self, repr(self.provider))
        writing.write(target, [page.render(run)])
        return target

    def trace(self, path: str | os.PathLike[str]) -> Path:
        """Write a trace of the run so far for https://ui.perfetto.dev, and return its path.

        The trace is JSON in the Chrome trace-event format, with a process for each node, a thread for each slot, and
        an event for each task.

        Parameters
        ----------
        path : str or os.PathLike
            The file, such as "run.json"; compressed if its name ends in ".gz". An older file is replaced when the new
            one is complete.

        Returns
        -------
        pathlib.Path
            `path`.

        Raises
        ------
        OSError
            The file cannot be written; its directory must exist.
        """
        from . import collecting, trace, writing

        target, run = writing.target("pool.trace", path), collecting.collect(self, repr(self.provider))
        writing.write(target, trace.render(run), compress=target.name.endswith(".gz"))
        return target

    def _repr_html_(self) -> str:
        tasks = Tasks.of(self)
        if tasks.core.is_forked or tasks.completions.lifecycle.stage is Stage.NEW:
            from html import escape

            return f"<code>{escape(repr(self))}</code>"
        return status_html(tasks.nodes.status(), repr(self))


for _method in (Reporting.report, Reporting.trace):
    # Python's own errors about their arguments name the class that users know.
    _method.__qualname__ = f"ComputePool.{_method.__name__}"

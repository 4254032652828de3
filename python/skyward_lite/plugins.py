"""Plugins: frozen records of optional hooks, composed in list order and left in reverse.

The public face of two rooms: `Plugin` and `WorkerInfo` are the records of `hooks.py`, which both ends read; `joblib`
and `sklearn` make the plugins that come with the package, at the client only.
"""

from __future__ import annotations

from .client.joblib_plugin import joblib, sklearn
from .hooks import Plugin, WorkerInfo

__all__ = ["Plugin", "WorkerInfo", "joblib", "sklearn"]

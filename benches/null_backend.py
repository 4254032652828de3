"""The least that any backend with processes must do: pickle and unpickle each batch and its result, on one thread."""

from __future__ import annotations

import pickle
import queue
import threading
from typing import Any

from joblib import register_parallel_backend
from joblib.parallel import ParallelBackendBase


class NullBackend(ParallelBackendBase):
    """No process, no network: four passes of the C pickler and a queue."""

    supports_retrieve_callback = True

    def __init__(self, nesting_level: int | None = 0, inner_max_num_threads: int | None = None) -> None:
        super().__init__(nesting_level=nesting_level or 0, inner_max_num_threads=inner_max_num_threads)
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Give what was asked for: it bounds only how many batches are dispatched ahead."""
        return n_jobs or 1

    def start_call(self) -> None:
        """Start the one thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop_call(self) -> None:
        """End it."""
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            batch, callback = item
            result = pickle.loads(pickle.dumps(batch, 5))()
            callback(pickle.loads(pickle.dumps(result, 5)))

    def submit(self, func: Any, callback: Any = None) -> None:
        """Queue a batch."""
        self._queue.put((func, callback))

    apply_async = submit

    def retrieve_result_callback(self, out: Any) -> Any:
        """Give the result, which came as it is."""
        return out


register_parallel_backend("null", NullBackend)

"""Slices of Arrow data, without the rest of what they were cut from."""

from __future__ import annotations

import pickle
from typing import Any


def reduce(data: Any) -> Any:
    """Return how an array, a record batch or a table is pickled that shows only a part of its buffers.

    As Arrow's stream format, which cuts buffers to size; it travels beside the pickle.
    """
    import pyarrow as pa

    kinds = str(data.schema if isinstance(data, pa.Table | pa.RecordBatch) else data.type)
    if "extension<" in kinds or "union" in kinds:
        # Its own way knows what these are.
        return NotImplemented
    table = data
    if isinstance(data, pa.Array | pa.ChunkedArray):
        table = pa.table({"": data})
    elif isinstance(data, pa.RecordBatch):
        table = pa.Table.from_batches([data])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return rebuild, (_kind(pa, data), pickle.PickleBuffer(sink.getvalue()))


def _kind(pa: Any, data: Any) -> str:
    kinds = ("Array", "ChunkedArray", "RecordBatch", "Table")
    return next(kind for kind in kinds if isinstance(data, getattr(pa, kind)))


def rebuild(kind: str, stream: Any) -> Any:
    """Return the data."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.py_buffer(stream)).read_all()
    if kind == "Table":
        return table
    if kind == "RecordBatch":
        batches = table.to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    column = table.column(0)
    return column if kind == "ChunkedArray" else column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)

"""How Arrow data is pickled: pyarrow sends a slice with all of the data that it was cut from. Here it travels alone."""

from __future__ import annotations

import pickle
import sys
from typing import Any, Final

COMPLETE_SHARE: Final = 0.9
"""Arrow data that shows more than this share of its buffers travels with all of them."""


def reduce_arrow(data: Any) -> Any:
    """Return how an array, a record batch or a table of pyarrow is pickled.

    If it shows a part of its buffers only, it travels beside the pickle in Arrow's stream format, which cuts buffers to
    size.
    """
    if data.nbytes > COMPLETE_SHARE * data.get_total_buffer_size():
        return NotImplemented
    pa: Any = sys.modules["pyarrow"]

    kinds = str(data.schema if isinstance(data, pa.Table | pa.RecordBatch) else data.type)
    if "extension<" in kinds or "union" in kinds:
        # Arrow's stream format does not have all of these, so pyarrow pickles them in its own way.
        return NotImplemented
    table = data
    if isinstance(data, pa.Array | pa.ChunkedArray):
        table = pa.table({"": data})
    elif isinstance(data, pa.RecordBatch):
        table = pa.Table.from_batches([data])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return rebuild_arrow, (_kind(pa, data), pickle.PickleBuffer(sink.getvalue()))


def _kind(pa: Any, data: Any) -> str:
    kinds = ("Array", "ChunkedArray", "RecordBatch", "Table")
    return next(kind for kind in kinds if isinstance(data, getattr(pa, kind)))


def rebuild_arrow(kind: str, stream: Any) -> Any:
    """Return the array, record batch or table that a stream has."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.py_buffer(stream)).read_all()
    if kind == "Table":
        return table
    if kind == "RecordBatch":
        batches = table.to_batches()
        return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
    column = table.column(0)
    return column if kind == "ChunkedArray" else column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)

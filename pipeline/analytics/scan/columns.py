"""Column types of a scan's results: `stream_id` dictionary-encoded, all others as in the schema."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.analytics.scan.listing import Chunk

_STREAM_IDS = pa.dictionary(pa.int32(), pa.string())


def emitted(schema: pa.Schema) -> pa.Schema:
    """A schema with `stream_id` as dictionary."""
    position = schema.get_field_index("stream_id")
    return schema if position < 0 else schema.set(position, pa.field("stream_id", _STREAM_IDS))


def encoded(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch with the stream ids of `emitted`."""
    if batch.schema.equals(schema):
        return batch
    columns = [
        column.dictionary_encode() if field.name == "stream_id" and column.type != field.type else column
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def stream_id_column(field: pa.Field, chunks: Sequence[Chunk], counts: Sequence[int]) -> pa.Array:
    """The column `stream_id` of files that were read together."""
    ids = sorted({chunk.stream_id for chunk in chunks})
    place = {stream_id: index for index, stream_id in enumerate(ids)}
    indices = np.repeat(np.array([place[chunk.stream_id] for chunk in chunks], np.int32), counts)
    column = pa.DictionaryArray.from_arrays(indices, pa.array(ids, pa.string()))
    return column if field.type == _STREAM_IDS else column.dictionary_decode()


def column_of(field: pa.Field, table: pa.Table | None, rows: int, stream_id: str | None = None) -> pa.Array:
    if field.name == "stream_id" and stream_id is not None:
        if field.type == _STREAM_IDS:
            return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pa.array([stream_id]))
        return pa.repeat(stream_id, rows)
    if table is None or field.name not in table.column_names:
        return pa.nulls(rows, field.type)
    column = table[field.name]
    if column.type != field.type:
        column = column.cast(field.type)
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)  # the number of values in a dictionary's header is under no checksum
    return column

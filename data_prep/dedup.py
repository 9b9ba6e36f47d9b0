"""Exact duplicates: pure functions on Arrow columns, whose result does not depend on how rows were partitioned."""

import numpy as np
import pyarrow as pa


def duplicate_of(rows: pa.Table, key: str) -> pa.StructArray:
    """For each row, the row it duplicates: the lowest (source, row) with the same key.

    Args:
        rows: [N] with columns `source`, `row` and the key, in any order.
        key: name of a string or binary column; null keys duplicate nothing.

    Returns:
        [N] `{source, row}`, aligned with `rows`, null for survivors and null keys.
    """
    table = rows.select(["source", "row", key]).append_column("_position", pa.array(np.arange(rows.num_rows)))
    table = table.sort_by([("source", "ascending"), ("row", "ascending")]).combine_chunks()
    codes = pa.chunked_array(table[key].chunks, table.schema.field(key).type).combine_chunks().dictionary_encode()
    code = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    order = np.arange(len(code))
    first = np.empty(len(codes.dictionary) + 1, np.int64)
    first[code[::-1]] = order[::-1]  # the last write stays: the lowest position
    survivor = first[code] if len(code) else order
    is_survivor = (survivor == order) | (code < 0)

    back = np.empty_like(order)
    back[table["_position"].to_numpy()] = order  # from the rows as they came to their place in the sorted table
    chosen = pa.array(survivor[back])
    return pa.StructArray.from_arrays(
        [table["source"].take(chosen).combine_chunks(), table["row"].take(chosen).combine_chunks()],
        fields=[pa.field("source", pa.string()), pa.field("row", pa.int64())],
        mask=pa.array(is_survivor[back]),
    )

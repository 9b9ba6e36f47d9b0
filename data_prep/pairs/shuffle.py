"""`Corpus` for more rows than one machine can compare: the same queries over partitions that Ray Data's shuffle makes.

    corpus = ShuffledCorpus(order, staged)      # decides as Corpus does

A query needs all rows of the same key together, and no others. So every key goes to the partition of its hash, where
DuckDB runs the query. Only ids and keys are shuffled, at most 33 bytes a row and search. The driver holds what was
found: decisions, pairs of near-duplicates, of which it keeps the first in order, and one bit for each new row.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import ray

from data_prep.database import open_database
from data_prep.pairs.dedup import RESULTS, Bits, Corpus, Key, Searches, keyed_query, open_rows
from data_prep.pairs.rows import RowNumbering
from data_prep.shuffles import PARTITION, map_files, shuffle

PARTITION_ROWS = 4_000_000
"""Average number of rows of a partition; they take at most 132 MB."""
BATCH_ROWS = 1 << 18


class ShuffledCorpus(Corpus):
    """A corpus of Parquet files whose rows are compared by a cluster."""

    def _search(self, key: Key, table: str, searches: Searches) -> None:
        inputs = {"new": self._new, "published": self._published}
        files = {name: rows for name, rows in inputs.items() if isinstance(rows, ds.FileSystemDataset)}
        if not files:
            return
        partitions = -(-self._order.rows * len(searches) // PARTITION_ROWS)
        read = partial(read_keys, self._order, key, tuple(searches), partitions, ray.put(self._decided_bits()))
        rows = map_files(files, read, tasks=partitions)
        for found in shuffle(rows, partial(answer, tuple(searches.values()), table, self._memory), partitions):
            self._insert(f"{table} select * from batch", found)


def read_keys(
    order: RowNumbering,
    key: Key,
    expressions: Sequence[str],
    partitions: int,
    decided: "ray.ObjectRef[Bits]",
    name: str,
    rows: ds.Dataset,
) -> Iterator[pa.Table]:
    """Ids and keys of the undecided rows of some files, with the `partition` for the `search` of each expression."""
    new, published = (rows, None) if name == "new" else (None, rows)
    numbers = ", ".join(f"(hash({columns}) % {partitions})::bigint" for columns in expressions)
    with open_database("1GB", "", threads=1) as sql:
        sql.register("rows", open_rows(order, new, published, [key], ray.get(decided)))
        found = sql.sql(
            f"select *, unnest(range({len(expressions)}))::tinyint as search, unnest([{numbers}]) as {PARTITION} "
            f"from ({keyed_query(key)})"
        )
        reader = found.to_arrow_reader(BATCH_ROWS)
        yield reader.schema.empty_table()
        for batch in reader:
            yield pa.Table.from_batches([batch])


def answer(searches: Sequence[Sequence[str]], table: str, memory: str, rows: pa.Table) -> pa.Table:
    """The results of queries over `keyed`, the rows of their search in one partition."""
    found = [RESULTS[table].empty_table()]
    with tempfile.TemporaryDirectory(prefix="ovd-") as scratch, open_database(memory, scratch, threads=1) as sql:
        for number, queries in enumerate(searches):
            sql.register("keyed", rows.filter(pc.equal(rows["search"], number)))
            results = (sql.sql(query).to_arrow_table() for query in queries)
            found += [result.rename_columns(RESULTS[table].names).cast(RESULTS[table]) for result in results]
    return pa.concat_tables(found)

"""Deduplication over the whole corpus: repeated URLs and images, near-duplicates, boilerplate captions.

    corpus = Corpus(order, staged)
    corpus.reject_repeats("image_id", "duplicate_bytes")
    corpus.reject_near_duplicates(bits=4)
    corpus.decisions()                          # id, reason, detail, duplicate_of

DuckDB gets an id and a key of each row, one key at a time; its memory is bounded, the rest goes to disk. Results do not
depend on the partitions: of equal rows the first survives, and published rows come before all new ones. `shuffle.py`
answers the same queries with a cluster.
"""

import itertools
import math
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_prep.database import open_database, stream
from data_prep.pairs.rows import NEW, RowNumbering

HASH_BITS = 64
CLUSTER_ROWS = 20_000
"""Average number of images in a cluster."""
SAMPLE_ROWS, BATCH_ROWS, BLOCK_ROWS = 50_000, 8192, 1024
"""Embeddings from which the clusters are computed, and those processed at a time."""
SHARED_BANDS = range(2, 5)
LOOKUP_COST = 8.0
"""Time to look up a hash under a mask, relative to that of comparing two hashes."""
Ids = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]
"""One bit for each new row."""
Key = Literal["url", "image_id", "caption", "phash"]
Searches: TypeAlias = Mapping[str, Sequence[str]]
"""Queries over a table `keyed`, by an expression of its columns: rows that differ in it need not be together."""
DISTANCES = pa.schema({"first": pa.int64(), "second": pa.int64(), "distance": pa.float64()})
"""Pairs of similar rows, the earlier one first."""
DECISIONS = pa.schema(
    {"id": pa.int64(), "stage": pa.string(), "reason": pa.string(), "detail": pa.string(), "duplicate_of": pa.int64()}
)
RESULTS = {"decided": DECISIONS, "pairs": DISTANCES}
"""Tables of search results."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Corpus-wide filters and deduplication."""

    near_bits: int | None = 4
    """Images whose 64-bit perceptual hashes differ in at most this many bits are near-duplicates; None keeps them."""
    max_caption_uses: int | None = None
    """A caption of more rows is boilerplate; None keeps them."""
    semantic_model: str = ""
    """Folder or URI of a CLIP checkpoint that finds semantic duplicates; empty keeps them."""
    semantic_cosine: float = 0.95
    """Minimum cosine between the embeddings of semantic duplicates."""
    memory: str = "1GB"
    """Memory that the search may use before it uses the disk; on a cluster, in each task."""
    shuffle_rows: int = 20_000_000
    """With more rows, the cluster compares them in partitions, instead of the driver; the results are the same. The
    default is what 1 GB of `memory` suffices for."""


class Corpus:
    """The light columns of all rows of a corpus, and the decisions about new rows."""

    def __init__(
        self,
        order: RowNumbering,
        new: ds.Dataset | pa.Table,
        published: ds.Dataset | pa.Table | None = None,
        *,
        memory: str = "1GB",
        decided: pa.Table | None = None,
    ) -> None:
        """Open the rows, with `source`, `row` and the columns to search; `memory` bounds DuckDB's.

        If `new` has a column `reason`, only those of its rows where it is null are used, and of those only rows without
        an earlier decision (`decided`).
        """
        self._order, self._new, self._published, self._memory = order, new, published, memory
        self._scratch = tempfile.TemporaryDirectory(prefix="ovd-")
        self._sql = open_database(memory, self._scratch.name)
        self._sql.register("batch", DECISIONS.empty_table() if decided is None else decided)
        self._sql.execute("create table decided as select * from batch")
        self._sql.unregister("batch")

    def reject_repeats(
        self, key: Literal["url", "image_id"], reason: Literal["duplicate_url", "duplicate_bytes"]
    ) -> None:
        """Reject all but the first of the rows with the same key; null keys are ignored."""
        self._search(key, "decided", {KEYED[key]: [repeats(KEYED[key], reason, "null")]})

    def reject_boilerplate(self, max_uses: int) -> None:
        """Reject captions of more than `max_uses` rows: they say nothing about an image."""
        digest = KEYED["caption"]
        query = (
            "select id, 'filter', 'caption_boilerplate', format('used by {} rows', uses), null from keyed join ("
            f"  select {digest}, count(*) as uses from keyed group by all having count(*) > {max_uses}"
            f") using ({digest}) where id >= {NEW}"
        )
        self._search("caption", "decided", {digest: [query]})

    def reject_near_duplicates(self, bits: int) -> None:
        """Reject images whose `phash` differs in at most `bits` bits from that of an earlier, kept image.

        Every such pair is found, as `near_searches` says.
        """
        self._search("phash", "decided", {"phash": [repeats("phash", "near_duplicate", "'0 of 64 bits differ'")]})
        self._start_pairs()
        self._search("phash", "pairs", near_searches(bits, self._order.rows))
        detail = "format('{:.0f} of 64 bits differ', distance)"
        self._reject_pairs(f"select second, 'dedup', 'near_duplicate', {detail}, first from near")
        # Rows with the same hash share its fate: they duplicate its first row, or the row which that one duplicates.
        self._sql.execute(
            f"update decided set detail = {detail}, duplicate_of = near.first from near "
            "where reason = 'near_duplicate' and duplicate_of = near.second"
        )

    def reject_semantic_duplicates(self, cosine: float, published: ds.Dataset | pa.Table | None = None) -> None:
        """Reject images whose `embedding` (float16 bytes) has at least a cosine with that of an earlier, kept image.

        Images are compared within clusters, as in SemDeDup (arXiv 2303.09540), each in its two nearest. `published` has
        the columns `image_id` and `embedding`.
        """
        self._sql.register("rows", open_rows(self._order, self._new, None, ["embedding"], self._decided_bits()))
        self._sql.execute("create or replace table embedded as select * from rows where embedding is not null")
        if published is not None and self._published is not None:
            self._sql.register("rows", open_rows(self._order, None, self._published, ["image_id"]))
            self._sql.register("published_embeddings", published)
            self._sql.execute(
                "insert into embedded select id, known.embedding from rows join published_embeddings known "
                "using (image_id) where known.embedding is not null"
            )
        ((count,),) = self._sql.execute("select count(*) from embedded").fetchall()
        clusters = max(1, -(-int(count) // CLUSTER_ROWS))
        _, sample_ND = as_arrays(
            self._sql.sql(f"select * from embedded order by hash(id), id limit {SAMPLE_ROWS}").to_arrow_table()
        )
        centres_KD = kmeans(sample_ND, clusters)
        self._sql.execute("create or replace table assigned (cluster integer, id bigint, embedding blob)")
        for rows in self._stream("select * from embedded order by id"):
            id_N, unit_ND = as_arrays(rows)
            nearest_NC = np.argsort(-unit_ND @ centres_KD.T, axis=1)[:, :2]
            blobs = pa.array([row.tobytes() for row in unit_ND.astype("<f2")], pa.binary())
            for cluster_N in nearest_NC.T:
                batch = pa.table({"cluster": cluster_N, "id": id_N, "embedding": blobs})
                self._insert("assigned select cluster, id, embedding from batch", batch)
        self._start_pairs()
        # One sort, since a query for each cluster would read all embeddings each time.
        for members in runs_of_equal(self._stream("select * from assigned order by cluster, id"), "cluster"):
            found = near_pairs(*as_arrays(members), cosine)
            self._insert(f"pairs select * from batch where second >= {NEW}", found)
        self._reject_pairs(
            "select second, 'dedup', 'semantic_duplicate', format('cosine {:.3f}', 1 - distance), first from near"
        )

    def decisions(self) -> pa.Table:
        """All rejections so far: `DECISIONS`, ascending by `id`; backed by a file, not by memory."""
        with (
            tempfile.NamedTemporaryFile(dir=self._scratch.name, delete=False) as file,
            pa.ipc.new_file(file, DECISIONS) as writer,
        ):
            for batch in self._stream("select * from decided order by id", 1 << 16):
                writer.write_table(batch.cast(DECISIONS))
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()  # the mapping outlives the file's name

    def _search(self, key: Key, table: str, searches: Searches) -> None:
        """Insert the results of queries over `keyed`, undecided rows by key, into a table of `RESULTS`."""
        rows = open_rows(self._order, self._new, self._published, [key], self._decided_bits())
        load_keyed(self._sql, key, rows)
        for query in itertools.chain.from_iterable(searches.values()):
            self._sql.execute(f"insert into {table} {query}")
        self._sql.execute("drop table keyed")

    def _decided_bits(self) -> Bits:
        """Bits of the rows that are rejected so far."""
        bits = np.zeros(self._order.rows // 8 + 1, np.uint8)
        for batch in self._stream(f"select id - {NEW} as position from decided"):
            position = batch["position"].to_numpy()
            np.bitwise_or.at(bits, position >> 3, np.left_shift(1, position & 7).astype(np.uint8))
        return bits

    def _insert(self, query: str, batch: pa.Table) -> None:
        self._sql.register("batch", batch)
        self._sql.execute(f"insert into {query}")
        self._sql.unregister("batch")

    def _stream(self, query: str, rows: int | None = None) -> Iterator[pa.Table]:
        """The results of a query, some rows at a time; other queries may run meanwhile."""
        cursor = self._sql.cursor()
        for batch in cursor.sql(query).to_arrow_reader(rows or BATCH_ROWS):
            yield pa.Table.from_batches([batch])

    def _start_pairs(self) -> None:
        self._sql.execute("create or replace table pairs (first bigint, second bigint, distance double)")

    def _reject_pairs(self, query: str) -> None:
        """Reject by a query over `near`, the duplicates among the table `pairs`."""
        self._sql.execute("create or replace table near (first bigint, second bigint, distance double)")
        rows = self._stream("select distinct first, second, distance from pairs order by second, first, distance")
        pairs = (zip(*(column.to_pylist() for column in batch.columns), strict=True) for batch in rows)
        found = first_kept(itertools.chain.from_iterable(pairs))
        while chunk := list(itertools.islice(found, BATCH_ROWS)):
            columns = [pa.array(column) for column in zip(*chunk, strict=True)]
            self._insert("near select * from batch", pa.table(columns, schema=DISTANCES))
        self._sql.execute(f"insert into decided select * from ({query}) as found(id, a, b, c, d) where id >= {NEW}")


def open_rows(
    order: RowNumbering,
    new: ds.Dataset | pa.Table | None,
    published: ds.Dataset | pa.Table | None,
    columns: Sequence[str],
    decided: Bits | None = None,
) -> pa.RecordBatchReader:
    """`id` and columns of all rows, batch by batch, without new rows that have a reason or are decided."""
    schema = next(rows.schema for rows in (new, published) if rows is not None)
    schema = pa.schema([pa.field("id", pa.int64()), *(schema.field(name) for name in columns)])

    def numbered(batch: pa.RecordBatch, ids: Ids) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([pa.array(ids), *(batch[name] for name in columns)], schema=schema)

    def batches() -> Iterator[pa.RecordBatch]:
        if new is not None:
            status = [name for name in ("reason",) if name in new.schema.names]
            for batch in stream(new, ["source", "row", *status, *columns]):
                position = order.number(batch)
                keep = np.ones(len(position), bool)
                if decided is not None:
                    keep &= decided[position >> 3] >> (position & 7) & 1 == 0
                if status:
                    keep &= pc.is_null(batch["reason"]).to_numpy(zero_copy_only=False)
                yield numbered(batch, position + NEW).filter(pa.array(keep))
        if published is not None:
            for batch in stream(published, ["source", "row", *columns]):
                yield numbered(batch, order.number(batch))

    return pa.RecordBatchReader.from_batches(schema, batches())


KEYED: dict[Key, str] = {"url": "upper, lower", "image_id": "upper, lower", "caption": "upper, lower", "phash": "phash"}
"""Columns of `keyed` beside `id`: texts are compared by their MD5 digests, which take less space."""


def keyed_query(key: Key) -> str:
    """Ids and keys of the relation `rows`, without null keys."""
    columns = "phash" if key == "phash" else f"md5_number_upper({key}) as upper, md5_number_lower({key}) as lower"
    return f"select id, {columns} from rows where {key} is not null"


def load_keyed(sql: duckdb.DuckDBPyConnection, key: Key, rows: pa.RecordBatchReader) -> None:
    """Create the table `keyed`."""
    sql.register("rows", rows)
    sql.execute(f"create or replace table keyed as {keyed_query(key)}")
    sql.unregister("rows")


def repeats(columns: str, reason: str, detail: str) -> str:
    """The query for the new rows of which an earlier row has the same columns."""
    return (
        f"select id, 'dedup', '{reason}', {detail}, first from keyed join ("
        f"  select {columns}, min(id) as first from keyed group by all having count(*) > 1"
        f") using ({columns}) where id <> first and id >= {NEW}"
    )


def near_searches(bits: int, rows: int) -> Searches:
    """The queries for all pairs of `phash` that differ in at most `bits` bits, the later one new.

    Two such hashes are equal under at least one of `band_masks`; under each, equal ones are compared. The more rows,
    the more bits a mask has, so that the time is nearly proportional to the rows.
    """
    shared = min(SHARED_BANDS, key=lambda count: search_cost(bits, count, rows))
    searches: dict[str, list[str]] = {}
    earlier = ""
    for band, mask in band_masks(bits, shared):
        searches.setdefault(f"phash & {band}::ubigint", []).append(
            "select one.id, other.id, bit_count(xor(one.phash, other.phash)) as distance "
            f"from keyed one join keyed other on (one.phash & {mask}::ubigint) = (other.phash & {mask}::ubigint) "
            f"where one.id < other.id and other.id >= {NEW} and distance <= {bits}{earlier}"
        )
        earlier += f" and (xor(one.phash, other.phash) & {mask}::ubigint) <> 0"  # not found before
    return searches


def search_cost(bits: int, shared: int, rows: int) -> float:
    """The relative time to search with `shared` bands a mask: for each mask, to look up each row and to compare it."""
    bucket_rows: float = rows / 2.0 ** (HASH_BITS * shared / (bits + shared))
    return math.comb(bits + shared, shared) * (LOOKUP_COST + bucket_rows)


def band_masks(bits: int, shared: int = 2) -> list[tuple[int, int]]:
    """Bit masks; two hashes that differ in at most `bits` bits are equal under at least one of them.

    The hash is cut into `bits` + `shared` bands; the masks are all combinations of `shared` bands. Each comes with its
    first band, also as a mask.
    """
    edges = np.linspace(0, HASH_BITS, bits + shared + 1).astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    return [(chosen[0], sum(chosen)) for chosen in itertools.combinations(bands, shared)]


def as_arrays(rows: pa.Table) -> tuple[Ids, npt.NDArray[np.float32]]:
    """Ids [N] and unit embeddings [N, D] of rows with `id` and `embedding`."""
    flat = np.frombuffer(b"".join(rows["embedding"].to_pylist()), "<f2").astype(np.float32)
    return rows["id"].to_numpy(), flat.reshape(rows.num_rows, -1) if rows.num_rows else flat.reshape(0, 1)


def runs_of_equal(batches: Iterable[pa.Table], column: str) -> Iterator[pa.Table]:
    """The rows of each value of a column of integers by which a stream is sorted."""
    waiting: list[pa.Table] = []
    for rows in filter(len, batches):
        values = rows[column].to_numpy()
        edges = np.flatnonzero(np.diff(values)) + 1
        for start, stop in itertools.pairwise([0, *edges.tolist(), len(values)]):
            if waiting and waiting[-1][column][-1] != rows[column][start]:
                yield pa.concat_tables(waiting)
                waiting = []
            waiting.append(rows.slice(start, stop - start))
    if waiting:
        yield pa.concat_tables(waiting)


def kmeans(unit_ND: npt.NDArray[np.float32], clusters: int, *, rounds: int = 10) -> npt.NDArray[np.float32]:
    """[K, D] cluster centres of unit rows [N, D] by cosine, initialized with the first K rows; none without rows."""
    centres_KD = unit_ND[:clusters].copy()
    for _ in range(rounds if len(centres_KD) > 1 else 0):
        nearest_N = np.argmax(unit_ND @ centres_KD.T, axis=1)
        sums_KD = np.zeros_like(centres_KD)
        np.add.at(sums_KD, nearest_N, unit_ND)
        norms_K1 = np.linalg.norm(sums_KD, axis=1, keepdims=True)
        centres_KD = np.where(norms_K1 > 0, sums_KD / np.maximum(norms_K1, 1e-12), centres_KD)
    return centres_KD


def near_pairs(id_N: Ids, unit_ND: npt.NDArray[np.float32], cosine: float) -> pa.Table:
    """`DISTANCES` (1 - cosine) of all pairs of rows (ids ascending) with at least a cosine, block by block."""
    blocks = [DISTANCES.empty_table()]
    for start in range(0, len(id_N), BLOCK_ROWS):
        cosine_BN = unit_ND[start : start + BLOCK_ROWS] @ unit_ND[start:].T
        one, other = np.nonzero(np.triu(cosine_BN >= cosine, k=1))
        columns = [id_N[start + one], id_N[start + other], 1.0 - cosine_BN[one, other].astype(np.float64)]
        blocks.append(pa.table([pa.array(column) for column in columns], schema=DISTANCES))
    return pa.concat_tables(blocks)


def first_kept(pairs: Iterable[tuple[int, int, float]]) -> Iterator[tuple[int, int, float]]:
    """In ascending order, decide which rows are duplicates: a row duplicates the first kept row it pairs with.

    Takes pairs (first < second, distance), ascending by second and first. Yields each duplicate once as the second of
    a pair whose first is a kept row; its memory is 8 bytes a duplicate.
    """
    duplicates = array("q")  # ascending
    for first, second, distance in pairs:
        place = bisect_left(duplicates, first)
        if place < len(duplicates) and duplicates[place] == first:
            continue
        if not duplicates or duplicates[-1] != second:
            duplicates.append(second)
            yield first, second, distance

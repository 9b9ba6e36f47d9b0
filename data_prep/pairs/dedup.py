"""Deduplication over the whole corpus: repeated URLs and images, near-duplicates, boilerplate captions.

    corpus = Corpus(order, staged)
    corpus.reject_repeats("image_id", "duplicate_bytes")
    corpus.reject_near_duplicates(bits=4)
    corpus.decisions()                          # id, reason, detail, duplicate_of

DuckDB reads the light columns of all rows; its memory is bounded, the rest goes to disk. Results do not depend on the
partitions: of equal rows the first survives, and published rows come before all new ones.
"""

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from data_prep.pairs.rows import NEW, RowNumbering

HASH_BITS = 64
CLUSTER_ROWS = 20_000
"""Average number of images in a cluster."""
SAMPLE_ROWS, BATCH_ROWS, BLOCK_ROWS = 50_000, 8192, 1024
"""Embeddings from which the clusters are computed, and those processed at a time."""
Ids = npt.NDArray[np.int64]
DISTANCES = pa.schema({"first": pa.int64(), "second": pa.int64(), "distance": pa.float64()})
"""Pairs of similar rows, the earlier one first."""
DECISIONS = pa.schema(
    {"id": pa.int64(), "stage": pa.string(), "reason": pa.string(), "detail": pa.string(), "duplicate_of": pa.int64()}
)


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
    """Memory that the search may use before it uses the disk."""


class Corpus:
    """The light columns of all rows of a corpus, and the decisions about new rows."""

    def __init__(
        self,
        order: RowNumbering,
        new: ds.Dataset | pa.Table,
        published: ds.Dataset | pa.Table | None = None,
        *,
        memory: str = "1GB",
    ) -> None:
        """Open the rows, with `source`, `row` and the columns to search; `memory` bounds DuckDB's.

        If `new` has a column `reason`, only those of its rows where it is null are used.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="ovd-")
        self._sql = duckdb.connect(config={"memory_limit": memory, "temp_directory": self._scratch.name})
        bases = pa.table({"source": list(order.bases), "base": pa.array(order.bases.values(), pa.int64())})
        self._sql.register("bases", bases)
        self._sql.register("new_rows", new)
        good = "where reason is null" if "reason" in new.schema.names else ""
        query = f"select base + row + {NEW} as id, * from new_rows join bases using (source) {good}"
        if published is not None:
            shared = ", ".join(name for name in published.schema.names if name in new.schema.names)
            self._sql.register("published_rows", published)
            query = (
                f"{query} union all by name "
                f"select base + row as id, {shared} from published_rows join bases using (source)"
            )
        self._sql.execute(f"create view everything as {query}")
        self._sql.register("no_decisions", DECISIONS.empty_table())
        self._sql.execute("create table decided as select * from no_decisions")
        self._sql.execute("create view rows as select * from everything anti join decided using (id)")

    def reject_repeats(
        self, key: Literal["url", "image_id"], reason: Literal["duplicate_url", "duplicate_bytes"]
    ) -> None:
        """Reject all but the first of the rows with the same key; null keys are ignored."""
        self._reject(
            f"select id, 'dedup', '{reason}', null, first from rows join ("
            f"  select {key}, min(id) as first from rows where {key} is not null group by all having count(*) > 1"
            f") using ({key}) where id <> first"
        )

    def reject_boilerplate(self, max_uses: int) -> None:
        """Reject captions of more than `max_uses` rows: they say nothing about an image."""
        self._reject(
            "select id, 'filter', 'caption_boilerplate', format('used by {} rows', uses), null from rows join ("
            f"  select caption, count(*) as uses from rows group by caption having count(*) > {max_uses}"
            ") using (caption)"
        )

    def reject_near_duplicates(self, bits: int) -> None:
        """Reject images whose `phash` differs in at most `bits` bits from that of an earlier, kept image.

        Every such pair is found: of the hash's `bits` + 2 bands, at least two are equal in both.
        """
        self._sql.execute("create or replace temp table hashes as select phash, min(id) as id from rows group by phash")
        self._start_pairs()
        masks = band_masks(bits)
        for number, mask in enumerate(masks):
            not_found_before = "".join(
                f" and (xor(one.phash, other.phash) & {earlier}::ubigint) <> 0" for earlier in masks[:number]
            )
            self._sql.execute(
                "insert into pairs select one.id, other.id, bit_count(xor(one.phash, other.phash)) as distance "
                f"from hashes one join hashes other on (one.phash & {mask}::ubigint) = (other.phash & {mask}::ubigint) "
                f"where one.id < other.id and other.id >= {NEW} and distance <= {bits}{not_found_before}"
            )
        # Rows with the same hash share its fate: they duplicate its first row, or the row which that one duplicates.
        self._reject_pairs(
            "select rows.id, 'dedup', 'near_duplicate', format('{:.0f} of 64 bits differ', coalesce(distance, 0)), "
            "  coalesce(near.first, hashes.id) "
            "from rows join hashes using (phash) left join near on near.second = hashes.id "
            "where near.first is not null or rows.id <> hashes.id"
        )

    def reject_semantic_duplicates(self, cosine: float, published: ds.Dataset | pa.Table | None = None) -> None:
        """Reject images whose `embedding` (float16 bytes) has at least a cosine with that of an earlier, kept image.

        Images are compared within clusters, as in SemDeDup (arXiv 2303.09540), each in its two nearest. `published` has
        the columns `image_id` and `embedding`.
        """
        self._sql.execute(
            "create or replace table embedded as select id, embedding from rows "
            f"where id >= {NEW} and embedding is not null"
        )
        if published is not None:
            self._sql.register("published_embeddings", published)
            self._sql.execute(
                "insert into embedded select id, known.embedding from rows join published_embeddings known "
                f"using (image_id) where id < {NEW} and known.embedding is not null"
            )
        ((count,),) = self._sql.execute("select count(*) from embedded").fetchall()
        clusters = max(1, -(-int(count) // CLUSTER_ROWS))
        _, sample_ND = self._embeddings(f"select * from embedded order by hash(id), id limit {SAMPLE_ROWS}")
        centres_KD = kmeans(sample_ND, clusters)
        self._sql.execute("create or replace table assigned (cluster integer, id bigint, embedding blob)")
        for start in range(0, int(count), BATCH_ROWS):
            id_N, unit_ND = self._embeddings(f"select * from embedded order by id limit {BATCH_ROWS} offset {start}")
            nearest_NC = np.argsort(-unit_ND @ centres_KD.T, axis=1)[:, :2]
            blobs = pa.array([row.tobytes() for row in unit_ND.astype("<f2")], pa.binary())
            for cluster_N in nearest_NC.T:
                batch = pa.table({"cluster": cluster_N, "id": id_N, "embedding": blobs})
                self._insert("assigned select cluster, id, embedding from batch", batch)
        self._start_pairs()
        for cluster in range(clusters):
            members = self._embeddings(f"select id, embedding from assigned where cluster = {cluster} order by id")
            self._insert(f"pairs select * from batch where second >= {NEW}", near_pairs(*members, cosine))
        self._reject_pairs(
            "select second, 'dedup', 'semantic_duplicate', format('cosine {:.3f}', 1 - distance), first from near"
        )

    def _insert(self, query: str, batch: pa.Table) -> None:
        self._sql.register("batch", batch)
        self._sql.execute(f"insert into {query}")
        self._sql.unregister("batch")

    def _embeddings(self, query: str) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Ids [N] and unit embeddings [N, D] of a query's rows."""
        rows = self._sql.sql(query).to_arrow_table()
        flat = np.frombuffer(b"".join(rows["embedding"].to_pylist()), "<f2").astype(np.float32)
        return rows["id"].to_numpy(), flat.reshape(rows.num_rows, -1) if rows.num_rows else flat.reshape(0, 1)

    def _start_pairs(self) -> None:
        self._sql.execute("create or replace temp table pairs (first bigint, second bigint, distance double)")

    def _sorted_pairs(self) -> Iterator[tuple[int, int, float]]:
        """Rows of the table `pairs`, by the later row."""
        rows = self._sql.sql("select distinct first, second, distance from pairs order by second, first, distance")
        for batch in rows.to_arrow_reader(BATCH_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def decisions(self) -> pa.Table:
        """All rejections so far: `DECISIONS`, ascending by `id`."""
        return self._sql.sql("select * from decided order by id").to_arrow_table().cast(DECISIONS)

    def _reject_pairs(self, query: str) -> None:
        """Reject by a query over `near`, the duplicates among the table `pairs`."""
        self._sql.register("near", first_kept(self._sorted_pairs()))
        self._reject(query)
        self._sql.unregister("near")

    def _reject(self, query: str) -> None:
        self._sql.execute(f"insert into decided select * from ({query}) as found(id, a, b, c, d) where id >= {NEW}")


def band_masks(bits: int) -> list[int]:
    """Bit masks; two hashes that differ in at most `bits` bits are equal under at least one of them.

    The hash is cut into `bits` + 2 bands; the masks are all pairs of bands.
    """
    edges = np.linspace(0, HASH_BITS, bits + 3).astype(int).tolist()
    bands = [(1 << stop) - (1 << start) for start, stop in itertools.pairwise(edges)]
    return [one | other for one, other in itertools.combinations(bands, 2)]


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


def first_kept(pairs: Iterable[tuple[int, int, float]]) -> pa.Table:
    """In ascending order, decide which rows are duplicates: a row duplicates the first kept row it pairs with.

    Takes pairs (first < second, distance), ascending by second and first. Returns `DISTANCES` with each duplicate once
    as `second`, and a kept row as `first`.
    """
    duplicates: dict[int, tuple[int, float]] = {}
    for first, second, distance in pairs:
        if first not in duplicates and second not in duplicates:
            duplicates[second] = (first, distance)
    columns = [[row for row, _ in duplicates.values()], list(duplicates), [gap for _, gap in duplicates.values()]]
    return pa.table(columns, schema=DISTANCES)

"""Tables that grow: what is published, and the work that a run adds to it.

The first run publishes generation 0; every run that adds lists, or tries rejected rows again, publishes the next one.
Files never change: a new manifest lists the old ones and the new ones, and leaves out those that were written anew.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_prep import storage, tables
from data_prep.pairs import inputs
from data_prep.pairs.inputs import Part
from data_prep.pairs.order import RowNumbering
from data_prep.pairs.shards import LIGHT, WrittenPartition
from data_prep.tables import FileEntry
from ovd_models.errors import InputError

PRODUCER = "workflows/prepare_pairs.py"
URLS = pa.schema({"source": pa.string(), "row": pa.int64(), "url": pa.string()})
GROWING = ("pairs", "rejects", "scores")
"""Tables that get files from every partition."""
IMAGES = LIGHT.remove(LIGHT.get_field_index("reason"))
EMBEDDINGS = pa.schema({"image_id": pa.string(), inputs.EMBEDDING: pa.binary()})


@dataclass(frozen=True, kw_only=True)
class Published:
    """The tables of a name as they are."""

    storage: str
    name: str
    config_hash: str
    details: Mapping[str, Any]
    files: Mapping[str, Sequence[FileEntry]]
    """By table: `pairs`, `rejects`, `scores`."""

    @classmethod
    def find(cls, storage_uri: str, name: str) -> Self | None:
        """What is published under a name, or None; `pairs` is published last, so it tells."""
        pairs = tables.find_manifest(storage_uri, "pairs", name)
        if pairs is None:
            return None
        if "files" not in pairs.details:
            uri = tables.table_uri(storage_uri, "pairs", name)
            raise InputError(f"{uri}: made by a program that this one cannot go on from, expected a new --name")
        # Not from the manifests of those tables: they may be of a generation whose `pairs` were never published.
        others = tables.entries_from_json(pairs.details["files"])
        return cls(
            storage=storage_uri,
            name=name,
            config_hash=pairs.config_hash,
            details=pairs.details,
            files={"pairs": pairs.files, **others},
        )

    @property
    def sources(self) -> dict[str, int]:
        """Rows of each source, by digest."""
        return dict(self.details["sources"])

    @property
    def generation(self) -> int:
        """How often the tables grew."""
        return int(self.details["generation"])

    def rejected_for(self, reasons: Sequence[str]) -> int:
        """Rows that are rejected for one of the reasons."""
        counts: dict[str, int] = self.details["summary"]["rejected"]
        return sum(counts.get(reason, 0) for reason in reasons)

    def index_files(self) -> list[str]:
        """The Parquet files of `pairs`, relative to its folder."""
        return [entry.path for entry in self.files["pairs"] if entry.path.endswith(".parquet")]

    def urls(self) -> ds.Dataset:
        """`URLS` of all rows, kept or rejected."""
        rejects = [("rejects", entry.path) for entry in self.files["rejects"]]
        return self._open([("pairs", path) for path in self.index_files()] + rejects, URLS)

    def images(self) -> ds.Dataset:
        """`IMAGES` of the kept rows."""
        return self._open([("pairs", path) for path in self.index_files()], IMAGES)

    def embeddings(self) -> ds.Dataset:
        """`EMBEDDINGS` of the kept rows; null where none was found."""
        return self._open([("scores", entry.path) for entry in self.files["scores"]], EMBEDDINGS)

    def _open(self, files: Sequence[tuple[str, str]], schema: pa.Schema) -> ds.Dataset:
        uris = [storage.join(tables.table_uri(self.storage, table, self.name), path) for table, path in files]
        return tables.open_parquet(uris, schema)


def find_published(
    storage_uri: str, name: str, config_hash: str, *, lists: Iterable[str], add: bool, retry: Sequence[str]
) -> Published | None:
    """What is published under a name, if a run may go on from it.

    Args:
        storage_uri: where tables are.
        name: of the tables.
        config_hash: of the run.
        lists: digests of its lists.
        add: whether rows of other lists are to be added.
        retry: reasons whose rows are to be tried again.

    Raises:
        InputError: it is of another config, or of other lists and no rows are to be added; or there is nothing whose
            rows could be tried again.
    """
    for reason in retry:
        if reason not in {known for reasons in tables.REASONS.values() for known in reasons}:
            raise InputError(f"--retry {reason}: unknown reason, expected those of `rejects`, such as timeout")
    published = Published.find(storage_uri, name)
    uri = tables.table_uri(storage_uri, "pairs", name)
    if published is None:
        if retry:
            raise InputError(f"--retry: {uri} is not published yet, expected a finished crawl")
        return None
    if published.config_hash != config_hash:
        raise InputError(f"{uri}: made from another config, expected the same one, a new --name or an empty place")
    if not add and any(digest not in published.sources for digest in lists):
        raise InputError(f"{uri}: made from other lists, expected --add to add rows, or a new --name")
    return published


def publish(
    storage_uri: str,
    name: str,
    config_hash: str,
    *,
    summary: Mapping[str, Any],
    details: Mapping[str, Any],
    files: Mapping[str, Sequence[FileEntry]],
) -> None:
    """Write the manifests, that of `pairs` last: it tells that all are there, and all that a later run must know."""
    for table, entries in sorted(files.items(), key=lambda item: item[0] == "pairs"):
        told = {"summary": summary, **(details if table == "pairs" else {})}
        tables.publish(storage_uri, table, name, entries, producer=PRODUCER, config_hash=config_hash, details=told)


@dataclass(frozen=True, kw_only=True)
class CrawlPlan:
    """What a run has to do; saved, so that a run that was killed goes on with the same."""

    sources: dict[str, int]
    """Rows of each source, by digest: those published and the new ones."""
    columns: dict[str, str]
    """Types of further columns, by name."""
    partitions: dict[str, int]
    """Rows of each partition to do."""
    retried: dict[str, int] = field(default_factory=dict)
    """Rejected rows that are tried again, by their reason so far."""
    earlier_rejects: dict[str, str] = field(default_factory=dict)
    """The published file of `rejects` that a partition's new one takes the place of."""

    @functools.cached_property
    def order(self) -> RowNumbering:
        """The order of all rows."""
        return RowNumbering.of(self.sources)

    @property
    def rows(self) -> int:
        """Rows to do."""
        return sum(self.partitions.values())

    def first_id(self, partition: str, size: int) -> int:
        """The id that the first input row of a partition has or had, with partitions of `size` rows."""
        digest, _, number = partition.partition("-")
        return int(self.order.ids(digest, np.array([int(number) * size]))[0])

    def parts(self, partition: int, size: int, repeated: npt.NDArray[np.int64]) -> list[Part]:
        """All parts.

        Args:
            partition: rows of a partition.
            size: rows of a part.
            repeated: ids of rows that are left out, ascending.
        """
        parts = []
        for name, rows in self.partitions.items():
            first = self.first_id(name, partition)
            for start in range(0, rows, size):
                left_out: tuple[int, ...] = ()
                if name not in self.earlier_rejects:  # whose rows do not follow on each other, and were looked at
                    among = np.searchsorted(repeated, [first + start, first + start + size])
                    left_out = tuple((repeated[slice(*among)] - first - start).tolist())
                parts.append(Part(name, start // size, left_out))
        return parts

    def save(self, staging: str) -> Self:
        """Save and return it."""
        storage.write_bytes(storage.join(staging, "work.json"), json.dumps(asdict(self)).encode())
        return self

    @classmethod
    def load(cls, staging: str) -> Self | None:
        """The work of an earlier run, or None."""
        uri = storage.join(staging, "work.json")
        return cls(**json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def cut_rejects(
    published: Published, reasons: Sequence[str], staging: str, *, partition: int, part: int
) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Stage the rows that were rejected for one of the given reasons as the input of another try.

    Returns:
        Rows by partition, rows by reason, and the published file of rejects of each partition.
    """
    partitions: dict[str, int] = {}
    retried: Counter[str] = Counter()
    earlier: dict[str, str] = {}
    for entry in published.files["rejects"]:
        uri = storage.join(tables.table_uri(published.storage, "rejects", published.name), entry.path)
        rejects = tables.read_parquet(uri)
        rows = rejects.filter(pc.is_in(rejects["reason"], pa.array(list(reasons), pa.string())))
        if not rows.num_rows:
            continue
        retried.update(rows["reason"].to_pylist())
        told = ["stage", "reason", "detail", "http_status", "attempts", "duplicate_of"]
        rows = rows.drop_columns(told).rename_columns({"caption": "raw_caption"})
        name = inputs.partition_name(rows["source"][0].as_py(), rows["row"][0].as_py() // partition)
        inputs.write_rows(staging, name, rows, part)
        partitions[name], earlier[name] = rows.num_rows, entry.path
    return partitions, dict(retried), earlier


Cut = Callable[..., inputs.Source]
"""Cuts a list into partitions: `cut(staging=..., partition=..., part=...)`."""


def plan(
    lists: Sequence[Cut],
    published: Published | None,
    retry: Sequence[str],
    staging: str,
    *,
    partition: int,
    part: int,
    run: Callable[[Callable[..., inputs.Source], Sequence[tuple[Any, ...]]], list[inputs.Source]],
) -> CrawlPlan:
    """Cut new lists into partitions, in parallel, and take up the rejected rows that are to be tried again.

    Args:
        lists: the new ones.
        published: what is there.
        retry: reasons whose rows are tried again.
        staging: folder of the work.
        partition: rows of a partition.
        part: rows of a part.
        run: runs a function for each of some arguments, as `crawl.Crew.run` does.

    Raises:
        InputError: a list is malformed.
    """
    earlier_work = CrawlPlan.load(staging)
    if earlier_work is not None:
        return earlier_work
    sources = run(_cut, [(cut, staging, partition, part) for cut in lists])
    columns = dict(published.details["columns"]) if published else {}
    for source in sources:
        for name, kind in source.columns.items():
            if columns.setdefault(name, kind) != kind:
                raise InputError(f"list {source.digest}: column {name!r} holds {kind}, elsewhere {columns[name]}")
    partitions = {name: rows for source in sources for name, rows in source.partitions.items()}
    retried: dict[str, int] = {}
    earlier: dict[str, str] = {}
    if published is not None and retry:
        again, retried, earlier = cut_rejects(published, retry, staging, partition=partition, part=part)
        partitions |= again
    rows = {**(published.sources if published else {}), **{source.digest: source.rows for source in sources}}
    crawl_plan = CrawlPlan(
        sources=rows, columns=columns, partitions=partitions, retried=retried, earlier_rejects=earlier
    )
    return crawl_plan.save(staging)


def _cut(cut: Cut, staging: str, partition: int, part: int) -> inputs.Source:
    return cut(staging=staging, partition=partition, part=part)


@dataclass(frozen=True, kw_only=True)
class TableFiles:
    """What tables hold with what a run wrote."""

    kept: int
    rejected: dict[str, int]
    """Rows by reason."""
    files: dict[str, list[FileEntry]]
    """By table: `pairs`, `rejects`, `scores`."""


def combine_files(
    published: Published | None, crawl_plan: CrawlPlan, written: Sequence[WrittenPartition]
) -> TableFiles:
    """Published tables and what a run wrote, together."""
    kept, rejected = sum(part.kept for part in written), Counter[str]()
    for part in written:
        rejected.update(part.rejected)
    assert kept + rejected.total() == crawl_plan.rows, "every row is kept or rejected, once"
    files = {table: [entry for part in written for entry in part.files[table]] for table in GROWING}
    if published is not None:
        summary = published.details["summary"]
        kept += summary["kept"]
        rejected.update(summary["rejected"])
        rejected.subtract(crawl_plan.retried)
        replaced = {("rejects", path) for path in crawl_plan.earlier_rejects.values()}
        for table, entries in published.files.items():
            files[table][:0] = [entry for entry in entries if (table, entry.path) not in replaced]
    return TableFiles(
        kept=kept, rejected={reason: count for reason, count in sorted(rejected.items()) if count}, files=files
    )

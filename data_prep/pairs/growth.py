"""Tables that grow: what is published under a name, the work of the next run, and publishing both together.

The first run publishes generation 0. Every run that adds lists or retries rejected rows publishes the next one. Files
never change: a new manifest lists the old files and the new ones, except those that were replaced.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_prep import storage, tables
from data_prep.pairs import inputs
from data_prep.pairs.rows import EMBEDDING, LIGHT, STATUS, RowNumbering
from data_prep.pairs.shards import WrittenPartition
from data_prep.pairs.staging import Part, Staging, partition_name
from data_prep.pairs.text_lists import promote
from data_prep.parts import HERE, Pool, collect_parts
from data_prep.tables import FileEntry, TableName
from ovd_models.errors import InputError

SHARE_IN_WORK = 1 / 32
MIN_PART_ROWS = 8
URLS = pa.schema({"source": pa.string(), "row": pa.int64(), "url": pa.string()})
IMAGES = LIGHT.remove(LIGHT.get_field_index("reason"))
EMBEDDINGS = pa.schema({"image_id": pa.string(), EMBEDDING: pa.binary()})
NEW_NAME = "a new --name (of a training: --pairs)"
"""What helps where the tables of a name are others."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """The published tables of a name."""

    storage: str
    pairs: tables.Manifest
    """The manifest of `pairs`; its details tell about all tables."""

    @classmethod
    def find(cls, storage_uri: str, name: str) -> Self | None:
        """The tables of a name, or None; `pairs` is published last, so it decides.

        Raises:
            InputError: an incompatible version of this program published them.
        """
        pairs = tables.find_manifest(storage_uri, "pairs", name)
        if pairs is not None and "files" not in pairs.details:
            uri = tables.table_uri(storage_uri, "pairs", name)
            raise InputError(f"{uri}: made by another version of this program, expected another --name")
        return None if pairs is None else cls(storage=storage_uri, pairs=pairs)

    @property
    def files(self) -> dict[TableName, Sequence[FileEntry]]:
        """The files of `pairs`, `rejects` and `scores`.

        Not from the other tables' manifests: their generation may be one whose `pairs` were never published.
        """
        return {"pairs": self.pairs.files, **tables.entries_from_json(self.pairs.details["files"])}

    @property
    def sources(self) -> dict[str, int]:
        """Number of rows of each source, by digest."""
        return dict(self.pairs.details["sources"])

    @property
    def generation(self) -> int:
        """How many times the tables grew."""
        return int(self.pairs.details["generation"])

    @property
    def rejected(self) -> dict[str, int]:
        """Number of rejected rows by reason."""
        return dict(self.pairs.details["summary"]["rejected"])

    def index_files(self) -> list[str]:
        """The Parquet files of `pairs`, relative to its folder."""
        return [entry.path for entry in self.files["pairs"] if entry.path.endswith(".parquet")]

    def urls(self) -> ds.Dataset:
        """`URLS` of all rows, kept or rejected."""
        return tables.open_parquet(self._uris("pairs") + self._uris("rejects"), URLS)

    def images(self) -> ds.Dataset:
        """`IMAGES` of the kept rows."""
        return tables.open_parquet(self._uris("pairs"), IMAGES)

    def embeddings(self) -> ds.Dataset:
        """`EMBEDDINGS` of the kept rows; null if there is none."""
        return tables.open_parquet(self._uris("scores"), EMBEDDINGS)

    def _uris(self, table: TableName) -> list[str]:
        folder = tables.table_uri(self.storage, table, self.pairs.name)
        return [storage.join(folder, entry.path) for entry in self.files[table] if entry.path.endswith(".parquet")]


def find_published(
    storage_uri: str,
    name: str,
    config_hash: str,
    settings: Mapping[str, object],
    *,
    lists: Iterable[str],
    add: bool,
    retry: Sequence[str],
) -> Published | None:
    """The published tables of a name, if a run may continue them: by adding lists (digests) or by retrying reasons.

    A retry may fetch in another way, with more patience or from more networks.

    Raises:
        InputError: the tables have another config, or other lists without `add`; or there are none to retry.
    """
    for reason in retry:
        if reason not in {known for reasons in tables.REASONS.values() for known in reasons}:
            raise InputError(f"--retry {reason}: unknown reason, expected those of `rejects`, such as timeout")
        if reason in tables.REASONS["input"]:
            raise InputError(f"--retry {reason}: a sample of a shard stays as it is, expected another reason")
    published = Published.find(storage_uri, name)
    uri = tables.table_uri(storage_uri, "pairs", name)
    if published is None:
        if retry:
            raise InputError(f"--retry: {uri} is not published yet, expected a finished crawl")
        return None
    if published.pairs.config_hash != config_hash:
        changed = tables.changed_settings(published.pairs, settings)
        only_fetch = bool(changed) and all(each.startswith("fetch.") for each in changed)
        if not (retry and only_fetch):
            differs = f" (other {', '.join(changed)})" if changed else ""
            retrying = "--retry REASON to fetch such rejected rows so, " if only_fetch else ""
            expected = f"{retrying}the same one, {NEW_NAME} or an empty place"
            raise InputError(f"{uri}: made from another config{differs}, expected {expected}")
    if not add and any(digest not in published.sources for digest in lists):
        raise InputError(f"{uri}: made from other lists, expected --add to add rows, or {NEW_NAME}")
    return published


@dataclass(frozen=True, kw_only=True)
class CrawlPlan:
    """The work of a run; saved, so that a killed run continues with the same."""

    sources: dict[str, int]
    """Number of rows of each published or new source, by digest."""
    columns: dict[str, str]
    """Types of the lists' further columns, by name."""
    partitions: dict[str, int]
    """Number of rows to crawl in each partition."""
    retried: dict[str, int] = field(default_factory=dict)
    """Number of rows to retry, by the reason of their rejection."""
    earlier_rejects: dict[str, str] = field(default_factory=dict)
    """Published `rejects` files of retried partitions; each is replaced by the partition's new one."""
    part_rows: int = 0
    """Rows of a part."""

    @functools.cached_property
    def order(self) -> RowNumbering:
        """The order of all rows."""
        return RowNumbering.of(self.sources)

    @property
    def rows(self) -> int:
        """Number of rows to crawl."""
        return sum(self.partitions.values())

    def first_id(self, partition: str, partition_rows: int) -> int:
        """The id of the first input row of a partition."""
        digest, _, number = partition.partition("-")
        return int(self.order.ids(digest, np.array([int(number) * partition_rows]))[0])

    def parts(self, staging: Staging, repeated: npt.NDArray[np.int64]) -> list[Part]:
        """All parts; rows with the (ascending) ids `repeated` are skipped."""
        parts, size = [], staging.part_rows
        for name, rows in self.partitions.items():
            first = self.first_id(name, staging.partition_rows)
            for start in range(0, rows, size):
                skipped: tuple[int, ...] = ()
                if name not in self.earlier_rejects:  # retried rows are not consecutive, and their URLs were checked
                    among = np.searchsorted(repeated, [first + start, first + start + size])
                    skipped = tuple((repeated[slice(*among)] - first - start).tolist())
                parts.append(Part(name, start // size, skipped, min(size, rows - start) - len(skipped)))
        return parts

    def save(self, staging: Staging) -> None:
        """Write the plan to the staging folder."""
        storage.write_bytes(storage.join(staging.uri, "work.json"), json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, staging: Staging) -> Self | None:
        """The plan of a killed run, or None."""
        uri = storage.join(staging.uri, "work.json")
        return cls(**json.loads(storage.read_bytes(uri))) if storage.exists(uri) else None


def stage_rejects(
    published: Published, reasons: Sequence[str], staging: Staging
) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """Stage the rows that were rejected for one of the reasons as input rows.

    Returns:
        Number of rows by partition, number of rows by reason, and the published `rejects` file of each partition.
    """
    partitions: dict[str, int] = {}
    retried: Counter[str] = Counter()
    earlier: dict[str, str] = {}
    folder = tables.table_uri(published.storage, "rejects", published.pairs.name)
    entries = published.files["rejects"]
    files = tables.read_files([storage.join(folder, entry.path) for entry in entries])
    for entry, rejects in zip(entries, files, strict=True):
        rows = rejects.filter(pc.is_in(rejects["reason"], pa.array(list(reasons), pa.string())))
        if not rows.num_rows:
            continue
        retried.update(rows["reason"].to_pylist())
        rows = rows.drop_columns([*STATUS, "duplicate_of"]).rename_columns({"caption": "raw_caption"})
        name = partition_name(rows["source"][0].as_py(), rows["row"][0].as_py() // staging.partition_rows)
        staging.write_rows(name, rows)
        partitions[name], earlier[name] = rows.num_rows, entry.path
    return partitions, dict(retried), earlier


def _promote(first: str, second: str) -> str:
    """The type, by name, of a column that has two in different lists."""
    try:
        return str(promote(pa.type_for_alias(first), pa.type_for_alias(second))) if first != second else first
    except ValueError:  # lists and the like
        return "string"


def _cast_rows(uri: str, source: inputs.Source, kinds: Mapping[str, str], staging: Staging) -> None:
    """Change columns of staged rows to the type that they have elsewhere.

    Raises:
        InputError: a value has no such type.
    """
    for partition in source.partitions:
        rows = tables.read_parquet(staging.rows_uri(partition))
        for name, kind in kinds.items():
            if name not in rows.column_names:
                continue
            try:
                column = rows[name].cast(pa.type_for_alias(kind))
            except (ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                if kind != "string":
                    message = f"column {name!r} holds {source.columns[name]}, elsewhere {kind}"
                    raise InputError(f"{uri}: {message} ({' '.join(str(error).split())[:100]})") from error
                values = [None if value is None else json.dumps(value, default=str) for value in rows[name].to_pylist()]
                column = pa.array(values, pa.string())
            rows = rows.set_column(rows.schema.get_field_index(name), name, column)
        staging.write_rows(partition, rows)


def plan_crawl(
    lists: Sequence[str],
    columns: inputs.Columns,
    published: Published | None,
    retry: Sequence[str],
    staging: Staging,
    pool: Pool,
    *,
    parts_in_work: int = 1,
) -> CrawlPlan:
    """Cut new lists into partitions, in parallel, and stage the published rows rejected for the reasons to retry.

    A killed run repeats the parts in work, so `parts_in_work` hold at most a small share of the rows (`SHARE_IN_WORK`),
    unless a part would have less than `MIN_PART_ROWS`.

    Raises:
        InputError: a list is malformed.
    """
    saved = CrawlPlan.load(staging)
    if saved is not None:
        return saved
    cut = functools.partial(inputs.cut_file, columns=columns, staging=staging)
    new = collect_parts(lambda: cut, lists, pool if len(lists) > 1 else HERE, "pairs", "lists")
    if lists and not sum(source.rows for source in new):
        raise InputError(f"{lists[0]}: holds no rows, expected at least one")
    kinds = dict(published.pairs.details["columns"]) if published else {}
    fixed = set(kinds)
    for source in new:
        for name, kind in source.columns.items():
            kinds[name] = kinds[name] if name in fixed else _promote(kinds.get(name, kind), kind)
    for uri, source in zip(lists, new, strict=True):
        changed = {name: kinds[name] for name, kind in source.columns.items() if kinds[name] != kind}
        if changed:
            _cast_rows(uri, source, changed, staging)
    again, retried, earlier = stage_rejects(published, retry, staging) if published and retry else ({}, {}, {})
    partitions = {name: rows for source in new for name, rows in source.partitions.items()} | again
    share = int(SHARE_IN_WORK * sum(partitions.values()) / parts_in_work)
    plan = CrawlPlan(
        sources={**(published.sources if published else {}), **{source.digest: source.rows for source in new}},
        columns=kinds,
        partitions=partitions,
        retried=retried,
        earlier_rejects=earlier,
        part_rows=min(staging.part_rows, max(MIN_PART_ROWS, share)),
    )
    plan.save(staging)
    return plan


def combine_files(
    published: Published | None, plan: CrawlPlan, written: Sequence[WrittenPartition]
) -> dict[TableName, list[FileEntry]]:
    """The files of the next generation's `pairs`, `rejects` and `scores`: the published ones and what a run wrote."""
    replaced = {("rejects", path) for path in plan.earlier_rejects.values()}
    files: dict[TableName, list[FileEntry]] = {}
    for table in ("pairs", "rejects", "scores"):
        old = published.files[table] if published else ()
        files[table] = [entry for entry in old if (table, entry.path) not in replaced]
        files[table] += [entry for part in written for entry in part.files[table]]
    return files


def count_rejected(published: Published | None, plan: CrawlPlan, written: Sequence[WrittenPartition]) -> dict[str, int]:
    """The next generation's number of rejected rows by reason."""
    rejected = Counter[str]()
    for part in written:
        rejected.update(part.rejected)
    kept = sum(part.kept for part in written)
    assert kept + rejected.total() == plan.rows, "every row is kept or rejected, once"
    if published is not None:
        rejected.update(published.rejected)
        rejected.subtract(plan.retried)
    return {reason: count for reason, count in sorted(rejected.items()) if count}

"""The page of `pairs_report.py`: statistics and examples of the `pairs`, `rejects`, `concepts` and `groups` tables.

Tables are streamed, and example images are range reads, so memory stays bounded for any crawl.
"""

import contextlib
import functools
import operator
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_prep import storage, tables
from data_prep.pairs import shards
from workflows.reports import page

Row = dict[str, Any]
TABLES: tuple[tables.TableName, ...] = ("pairs", "rejects", "concepts", "groups")
DUCKDB_MEMORY = "1GB"
"""Memory limit of DuckDB; beyond it, DuckDB uses the disk."""
NUM_KEPT, NUM_REJECTED = 24, 4
"""Number of kept examples, and of rejected examples for each reason."""
NUM_LISTED, NUM_COMPARED, NUM_ILLUSTRATED, NUM_IMAGES = 60, 20, 12, 8
"""Number of concepts that are listed, compared, and shown with `NUM_IMAGES` images each."""
MAX_TEXT, MAX_URL = 300, 2000
"""Maximum characters of a displayed text and URL."""
COLOURS = {
    "kept": "#0b6e4f", "input": "#6b6b6b", "fetch": "#c8553d", "decode": "#d9972b", "filter": "#5b7db1",
    "dedup": "#8a6fae",
}  # fmt: skip


def write_pairs_report(storage_uri: str, name: str, samples: pa.Table | None = None) -> str:
    """Write `<storage>/reports/pairs-<name>.html` from the published tables; returns its URI.

    `samples` has rows of `shards.SAMPLES`: thumbnails of rejected rows, which no table stores.

    Raises:
        InputError: a table is missing.
    """
    with open_tables(storage_uri, name) as crawl:
        manifest = crawl.manifest("pairs")
        summary, progress = manifest.details["summary"], manifest.details["progress"]
        seconds, rows = progress[-1] if progress else (0, 0)
        values = {
            "summary": summary,
            "manifest": manifest,
            "storage": storage.absolute(storage_uri),
            "duration": timedelta(seconds=round(summary["seconds"])),
            "rows_per_second": seconds and rows / seconds,
            "throughput": seconds and plot_throughput(progress),
            "colours": COLOURS,
            "max_text": MAX_TEXT,
            **count_outcomes(crawl, summary["kept"]),
            **measure_images(crawl),
            "kept_rows": sample_kept_rows(crawl),
            "examples": sample_rejected_rows(crawl, samples),
            **summarise_concepts(crawl, summary["kept"]),
        }
    uri = storage.join(storage_uri, "reports", f"pairs-{name}.html")
    storage.write_bytes(uri, page.render_page("pairs", values).encode())
    return uri


# ----------------------------------------------------------------------------------------------- reading tables


@dataclass(frozen=True)
class CrawlTables:
    """The tables of one crawl, also as views of a DuckDB connection."""

    storage_uri: str
    name: str
    sql: duckdb.DuckDBPyConnection

    def query(self, query: str) -> list[Row]:
        """Run a query with a small result."""
        rows: list[Row] = self.sql.sql(query).to_arrow_table().to_pylist()
        return rows

    def manifest(self, table: tables.TableName) -> tables.Manifest:
        """Read the manifest of a table."""
        return tables.read_manifest(self.storage_uri, table, self.name)

    def uri(self, table: tables.TableName, path: str) -> str:
        """URI of a file of a table."""
        return storage.join(tables.table_uri(self.storage_uri, table, self.name), path)

    def dataset(self, table: tables.TableName) -> ds.Dataset:
        """Open a table for reading in batches."""
        uris = [self.uri(table, path) for path in tables.parquet_files(self.manifest(table))]
        return tables.open_parquet(uris, tables.SCHEMAS[table])

    def filtered(self, table: tables.TableName, condition: ds.Expression, columns: Sequence[str]) -> pa.Table:
        """The few rows that meet a condition; files whose statistics exclude it are not read."""
        return self.dataset(table).to_table(list(columns), filter=condition, fragment_readahead=1, batch_readahead=1)

    def rows_at(self, table: tables.TableName, positions: Sequence[int], columns: Sequence[str]) -> list[Row]:
        """The rows at ascending positions in the published order; other files are not read."""
        rows: list[Row] = []
        start = 0
        for entry in self.manifest(table).files:
            inside = [position - start for position in positions if start <= position < start + entry.rows]
            if inside:
                file = tables.open_parquet([self.uri(table, entry.path)], tables.SCHEMAS[table])
                rows += file.take(pa.array(inside), columns=list(columns), batch_readahead=1).to_pylist()
            start += entry.rows
        return rows

    def thumbnail(self, row: Row) -> str:
        """Data URI of the thumbnail of a row with `shard`, `offset` and `size`, read as one range."""
        content = storage.read_bytes(self.uri("pairs", row["shard"]), offset=row["offset"], size=row["size"])
        return page.data_uri(shards.thumbnail(content))


@contextlib.contextmanager
def open_tables(storage_uri: str, name: str) -> Iterator[CrawlTables]:
    """Open the four tables of a crawl.

    Raises:
        InputError: a table is missing.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ovd-") as scratch,
        duckdb.connect(config={"memory_limit": DUCKDB_MEMORY, "temp_directory": scratch}) as sql,
    ):
        crawl = CrawlTables(storage_uri, name, sql)
        for table in TABLES:
            sql.register(table, crawl.dataset(table))
        yield crawl


def evenly_spaced(start: int, stop: int, count: int) -> list[int]:
    """At most `count` different positions, evenly spaced in [start, stop)."""
    return [int(position) for position in np.linspace(start, stop - 1, min(count, stop - start))]


# -------------------------------------------------------------------------------------------- kept and rejected


def count_outcomes(crawl: CrawlTables, kept: int) -> Row:
    """Count rows by stage and reason, and unfetched rows by last HTTP status and number of requests."""
    rows = crawl.query(
        "select stage, reason, http_status, attempts, count(*) as rows from rejects group by all order by all"
    )
    stages, reasons = Counter({"kept": kept}), Counter[tuple[str, str]]()
    statuses, attempts = Counter[int | None](), Counter[int]()
    for row in rows:
        stages[row["stage"]] += row["rows"]
        reasons[row["stage"], row["reason"]] += row["rows"]
        if row["stage"] == "fetch":
            statuses[row["http_status"]] += row["rows"]
            attempts[row["attempts"] or 0] += row["rows"]
    return {
        "stages": {stage: stages[stage] for stage in COLOURS},
        "reasons": [
            (stage, reason, reasons[stage, reason])
            for stage in tables.REASONS
            for reason in sorted(tables.REASONS[stage], key=lambda reason: -reasons[stage, reason])
            if reasons[stage, reason]
        ],
        "statuses": statuses.most_common(),
        "attempts": sorted(attempts.items()),
    }


def sample_kept_rows(crawl: CrawlTables) -> list[Row]:
    """Kept rows, evenly spaced in the table, with thumbnails and concept names."""
    positions = evenly_spaced(0, crawl.manifest("pairs").rows, NUM_KEPT)
    columns = ["image_id", "url", "caption", "width", "height", "shard", "offset", "size"]
    rows = crawl.rows_at("pairs", positions, columns)
    # Filtered with Arrow: DuckDB would read several files of groups ahead, a gigabyte of image ids.
    condition = ds.field("image_id").isin(pa.array([row["image_id"] for row in rows], pa.string()))
    crawl.sql.register("sampled_groups", crawl.filtered("groups", condition, ["image_id", "concept_ids"]))
    named = crawl.query(
        "select image_id, list(distinct name order by name) as names"
        "  from (select image_id, unnest(concept_ids) as concept_id from sampled_groups)"
        "  join concepts using (concept_id) group by image_id",
    )
    names = {row["image_id"]: row["names"] for row in named}
    return [{**row, "picture": crawl.thumbnail(row), "concepts": names.get(row["image_id"], [])} for row in rows]


def sample_rejected_rows(crawl: CrawlTables, samples: pa.Table | None) -> dict[str, list[Row]]:
    """Rejected rows by reason, those with a thumbnail first; a duplicate comes with the kept row it duplicates."""
    crawl.sql.register("samples", shards.SAMPLES.empty_table() if samples is None else samples)
    rows = crawl.query(
        f"select reason, left(rejects.url, {MAX_URL}) as url, left(caption, {MAX_TEXT}) as caption, "
        f"left(detail, {MAX_TEXT}) as detail, duplicate_of, picture "
        "from rejects left join (select reason, url, any_value(picture) as picture from samples group by all) "
        "using (reason, url) "
        # With a single sort key DuckDB keeps only the first rows instead of sorting all of them.
        "qualify row_number() over (partition by reason order by {'none': picture is null, 'any': hash(source, row)}) "
        f"<= {NUM_REJECTED} order by reason, picture is null, hash(source, row)",
    )
    kept = read_originals(crawl, {tuple(row["duplicate_of"].values()) for row in rows if row["duplicate_of"]})
    examples: dict[str, list[Row]] = {}
    for row in rows:
        original = row["duplicate_of"] and kept.get(tuple(row["duplicate_of"].values()))
        row["original"] = original and {**original, "picture": crawl.thumbnail(original)}
        row["picture"] = row["picture"] and page.data_uri(row["picture"])
        examples.setdefault(row["reason"], []).append(row)
    return examples


def read_originals(crawl: CrawlTables, keys: set[tuple[str, int]]) -> dict[tuple[str, int], Row]:
    """The kept rows with the given (source, row), by that key."""
    if not keys:
        return {}
    conditions = ((ds.field("source") == source) & (ds.field("row") == row) for source, row in sorted(keys))
    columns = ["source", "row", "url", "caption", "shard", "offset", "size"]
    rows = crawl.filtered("pairs", functools.reduce(operator.or_, conditions), columns)
    return {(row["source"], row["row"]): row for row in rows.to_pylist()}


# ------------------------------------------------------------------------------------------ images and captions


def log2_bins(first: int, last: int, bins_per_doubling: int) -> page.Numbers:
    """Bin edges from 2^first to 2^last."""
    return np.asarray(2.0 ** np.linspace(first, last, (last - first) * bins_per_doubling + 1))


SIDES = log2_bins(3, 15, 4)
EDGES: dict[str, page.Numbers] = {
    "side": SIDES,
    "original_side": SIDES,
    "aspect": log2_bins(-4, 4, 8) * 2 ** (1 / 16),  # squares fall in the middle of a bin
    "bytes": log2_bins(7, 28, 4),
    "caption": np.arange(0.0, 305, 5),
}
"""Bin edges of the histograms; values outside are counted in the first or last bin."""


def measure_images(crawl: CrawlTables) -> Row:
    """Plot histograms of the kept images and captions, and sum the bytes of all images."""
    counts = {name: np.zeros(len(edges) - 1) for name, edges in EDGES.items()}
    sizes, total = np.zeros((len(SIDES) - 1, len(SIDES) - 1)), 0
    columns = ["width", "height", "original_width", "original_height", "size", "caption"]
    for batch in crawl.dataset("pairs").to_batches(columns=columns, batch_readahead=2):
        width, height, original_width, original_height, size = (batch[name].to_numpy() for name in columns[:-1])
        values = {
            "side": np.minimum(width, height),
            "original_side": np.minimum(original_width, original_height),
            "aspect": original_width / original_height,
            "bytes": size,
            "caption": pc.utf8_length(batch["caption"]).to_numpy(zero_copy_only=False),
        }
        for name, edges in EDGES.items():
            counts[name] += np.histogram(np.clip(values[name], edges[0], edges[-1]), edges)[0]
        clipped = [np.clip(side, SIDES[0], SIDES[-1]) for side in (original_width, original_height)]
        sizes += np.histogram2d(clipped[0], clipped[1], [SIDES, SIDES])[0]
        total += int(size.sum())
    if not total:
        return {"image_bytes": 0, "plots": {}}
    plot = page.plot_histogram
    plots = {
        "width and height, as found": page.plot_heatmap(sizes, SIDES, "width, pixels", "height, pixels"),
        "shorter side: as stored, and as found (line)": plot(
            counts["side"], SIDES, "pixels", outline=counts["original_side"]
        ),
        "aspect ratio, as found": plot(counts["aspect"], EDGES["aspect"], "width : height", scale="ratio"),
        "size of an image, as stored": plot(counts["bytes"], EDGES["bytes"], "bytes"),
        "length of a caption": plot(counts["caption"], EDGES["caption"], "characters", scale="linear"),
    }
    return {"image_bytes": total, "plots": plots}


def throughput(progress: Sequence[tuple[float, int]], max_points: int = 150) -> tuple[page.Numbers, page.Numbers]:
    """At most `max_points` times in seconds, and the rows per second between them, from (seconds, rows done so far)."""
    done = {0.0: 0.0, **dict(progress)}
    seconds, rows = np.array(list(done)), np.array(list(done.values()))
    times = seconds if len(seconds) <= max_points else np.linspace(0, seconds[-1], max_points)
    return times, np.diff(np.interp(times, seconds, rows)) / np.diff(times)


def plot_throughput(progress: Sequence[tuple[float, int]]) -> str:
    """Plot rows per second over time."""
    times, rates = throughput(progress)
    unit, seconds = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if times[-1] > 3 * size), ("s", 1))
    figure, axes = page.new_plot(f"time, {unit}", "rows/s", width=10.5)
    axes.stairs(rates, times / seconds, fill=True, color=page.GREEN, alpha=0.75)
    axes.set(xlim=(0, times[-1] / seconds), ylim=(0, None))
    return page.plot_data_uri(figure)


# ----------------------------------------------------------------------------------------------------- concepts


def summarise_concepts(crawl: CrawlTables, kept: int) -> Row:
    """Count concepts and images with concepts, and illustrate the most frequent concepts."""
    top = crawl.query(f"select * from concepts order by image_count desc, name limit {NUM_LISTED}")
    frequencies = crawl.query(
        "select image_count, count(*) as concepts from concepts group by all order by image_count desc"
    )
    # An image with n concepts has n rows in groups.
    with_concepts = crawl.query(
        "select len(concept_ids) as n, count(*) // n as images from groups group by n order by n"
    )
    covered = sum(row["images"] for row in with_concepts)
    per_image = np.bincount(
        [0, *(row["n"] for row in with_concepts)], [kept - covered, *(row["images"] for row in with_concepts)]
    )
    edges = np.arange(len(per_image) + 1) - 0.5
    illustrated = sorted(top[:NUM_ILLUSTRATED], key=lambda row: int(row["start"]))
    positions = [place for row in illustrated for place in evenly_spaced(row["start"], row["stop"], NUM_IMAGES)]
    pictures: dict[int, list[Row]] = {}
    for row in crawl.rows_at("groups", positions, ["concept_id", "caption", "shard", "offset", "size"]):
        pictures.setdefault(row["concept_id"], []).append({**row, "picture": crawl.thumbnail(row)})
    return {
        "num_concepts": sum(row["concepts"] for row in frequencies),
        "top": top,
        "frequency_plot": plot_frequencies(frequencies) if frequencies else None,
        "covered": covered,
        "per_image": covered and page.plot_histogram(per_image, edges, "concepts", scale="linear"),
        "cooccurrence": count_cooccurrence(crawl, top[:NUM_COMPARED]),
        "concept_pictures": [(row, pictures[row["concept_id"]]) for row in top[:NUM_ILLUSTRATED]],
    }


def count_cooccurrence(crawl: CrawlTables, concepts: Sequence[Row]) -> list[tuple[Row, list[tuple[Row, int, float]]]]:
    """For each concept and each other one: the number and share of its images that show the other one too."""
    if not concepts:
        return []
    ids = ", ".join(str(row["concept_id"]) for row in concepts)
    rows = crawl.query(
        "select one, other, count(*) as images from ("
        f"  select concept_id as one, unnest(concept_ids) as other from groups where concept_id in ({ids})"
        f") where other in ({ids}) group by all",
    )
    images = Counter({(row["one"], row["other"]): row["images"] for row in rows})
    found = []
    for one in concepts:
        shared = [images[one["concept_id"], other["concept_id"]] for other in concepts]
        shares = [count / one["image_count"] for count in shared]
        found.append((one, list(zip(concepts, shared, shares, strict=True))))
    return found


def plot_frequencies(frequencies: Sequence[Row]) -> str:
    """Plot the number of images of each concept, from frequent to rare."""
    ranks = np.cumsum([0, *(row["concepts"] for row in frequencies)])
    figure, axes = page.new_plot("concepts, the most frequent first", "images of the concept", width=10.5)
    axes.stairs([row["image_count"] for row in frequencies], ranks, baseline=None, color=page.GREEN, linewidth=2)
    axes.set(xlim=(0.8, ranks[-1] * 1.1))
    page.set_log_scale(axes, "x")
    page.set_log_scale(axes, "y")
    return page.plot_data_uri(figure)

"""Pairs report: what a crawl kept, what it rejected and why, and what the captions talk about, on one page.

pairs, rejects, concepts, groups --streamed--> counts, histograms, co-occurrence
   | range reads of the shards
   v
reports/pairs-<name>.html: one file that fetches nothing and runs no script

python workflows/pairs_report.py --storage runs --name mine
"""

import contextlib
import functools
import operator
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from workflows.common import cli
from workflows.reports import page
from workflows.reports.pairs_template import TEMPLATE

Row = dict[str, Any]
TABLES = ("pairs", "rejects", "concepts", "groups")
MEMORY = "1GB"
"""What DuckDB may take before it uses the disk."""
NUM_KEPT, NUM_REJECTED = 24, 4
"""Kept rows that are shown, and rejected ones of each reason."""
NUM_TOP, NUM_RELATED, NUM_SHOWN, NUM_EXAMPLES = 60, 20, 12, 8
"""Concepts that are listed, compared, and shown with so many pictures each."""
MOST_TEXT, MOST_URL = 300, 2000
"""Characters of a text and of a URL that are shown."""
COLOURS = {"kept": "#0b6e4f", "fetch": "#c8553d", "decode": "#d9972b", "filter": "#5b7db1", "dedup": "#8a6fae"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One report."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    name: str
    """Name of the tables."""


def smoke() -> Run:
    """The crawl of `prepare_pairs.py --config smoke`; for another one give its `--name`."""
    return Run(name="smoke")


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke}


def write(storage_uri: str, name: str, samples: pa.Table | None = None) -> str:
    """Write `<storage>/reports/pairs-<name>.html` from the published tables.

    Args:
        storage_uri: of the tables.
        name: of the tables.
        samples: `shards.SAMPLES`, pictures of rejected rows, which no table holds.

    Returns:
        The page's URI.

    Raises:
        InputError: a table is missing.
    """
    manifest = tables.read_manifest(storage_uri, "pairs", name)
    summary, progress = manifest.details["summary"], manifest.details["progress"]
    seconds, rows = progress[-1] if progress else (0, 0)
    with open_tables(storage_uri, name) as sql:
        values = {
            "summary": summary,
            "manifest": manifest,
            "storage": storage.absolute(storage_uri),
            "duration": timedelta(seconds=round(summary["seconds"])),
            "speed": seconds and rows / seconds,
            "throughput": seconds and plot_throughput(progress),
            "colours": COLOURS,
            "most_text": MOST_TEXT,
            **outcomes(sql, summary["kept"]),
            **measures(open_table(storage_uri, "pairs", name)),
            "pictures": kept_pictures(sql, storage_uri, name),
            "examples": rejected_examples(sql, storage_uri, name, samples),
            **concepts(sql, storage_uri, name, summary["kept"]),
        }
    uri = storage.join(storage_uri, "reports", f"pairs-{name}.html")
    storage.write_bytes(uri, page.render(TEMPLATE, values).encode())
    return uri


# ----------------------------------------------------------------------------------------------- reading tables


def open_table(storage_uri: str, table: str, name: str) -> ds.Dataset:
    """A published table, to be read in batches."""
    manifest = tables.read_manifest(storage_uri, table, name)
    filesystem, root = storage.resolve(tables.table_uri(storage_uri, table, name))
    paths = [f"{root}/{path}" for path in tables.parquet_files(manifest)]
    return ds.dataset(paths, schema=tables.SCHEMAS[table], format="parquet", filesystem=filesystem)


@contextlib.contextmanager
def open_tables(storage_uri: str, name: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """The four tables as views of DuckDB, whose memory is bounded."""
    with (
        tempfile.TemporaryDirectory(prefix="ovd-") as scratch,
        duckdb.connect(config={"memory_limit": MEMORY, "temp_directory": scratch}) as sql,
    ):
        for table in TABLES:
            sql.register(table, open_table(storage_uri, table, name))
        yield sql


def ask(sql: duckdb.DuckDBPyConnection, query: str) -> list[Row]:
    """The few rows that answer a question."""
    rows: list[Row] = sql.sql(query).to_arrow_table().to_pylist()
    return rows


def rows_at(storage_uri: str, table: str, name: str, positions: Sequence[int], columns: Sequence[str]) -> list[Row]:
    """Rows by their ascending positions in the published order; only the files that hold them are read."""
    manifest = tables.read_manifest(storage_uri, table, name)
    filesystem, root = storage.resolve(tables.table_uri(storage_uri, table, name))
    rows: list[Row] = []
    start = 0
    for entry in manifest.files:
        inside = [position - start for position in positions if start <= position < start + entry.rows]
        if inside:
            file = ds.dataset(f"{root}/{entry.path}", format="parquet", filesystem=filesystem)
            rows += file.take(pa.array(inside), columns=list(columns), batch_readahead=1).to_pylist()
        start += entry.rows
    return rows


def matching(storage_uri: str, table: str, name: str, wanted: ds.Expression, columns: Sequence[str]) -> pa.Table:
    """The few rows that a filter lets through; files whose statistics rule them out are not read."""
    dataset = open_table(storage_uri, table, name)
    return dataset.to_table(columns=list(columns), filter=wanted, fragment_readahead=1, batch_readahead=1)


def spread(start: int, stop: int, count: int) -> list[int]:
    """At most `count` different positions, spread evenly over a range."""
    return [int(position) for position in np.linspace(start, stop - 1, min(count, stop - start))]


def picture(storage_uri: str, name: str, row: Row) -> str:
    """The small picture of a row with `shard`, `offset` and `size`, by one range read."""
    uri = storage.join(tables.table_uri(storage_uri, "pairs", name), row["shard"])
    return page.data_uri(shards.thumbnail(storage.read_bytes(uri, offset=row["offset"], size=row["size"])))


# -------------------------------------------------------------------------------------------------- what is shown


def outcomes(sql: duckdb.DuckDBPyConnection, kept: int) -> Row:
    """Rejected rows by stage, by reason, and by the last HTTP status and the number of requests."""
    query = "select stage, reason, http_status, attempts, count(*) as rows from rejects group by all order by all"
    stages, reasons = Counter({"kept": kept}), Counter[tuple[str, str]]()
    statuses, attempts = Counter[int | None](), Counter[int]()
    for row in ask(sql, query):
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


def octaves(first: int, last: int, parts: int) -> page.Numbers:
    """Edges of bins, `parts` for each doubling, from 2^first to 2^last."""
    return np.asarray(2.0 ** np.linspace(first, last, (last - first) * parts + 1))


SIDES = octaves(3, 15, 4)
EDGES: dict[str, page.Numbers] = {
    "side": SIDES,
    "side_found": SIDES,
    "aspect": octaves(-4, 4, 8) * 2 ** (1 / 16),  # squares in the middle of a bin
    "bytes": octaves(7, 28, 4),
    "caption": np.arange(0.0, 305, 5),
}
"""Bins of the histograms; what lies outside counts in the last one."""


def measures(pairs: ds.Dataset) -> Row:
    """Histograms of the kept images and captions, and the bytes of all images."""
    counts = {name: np.zeros(len(edges) - 1) for name, edges in EDGES.items()}
    sizes, total = np.zeros((len(SIDES) - 1, len(SIDES) - 1)), 0
    columns = ["width", "height", "original_width", "original_height", "size", "caption"]
    for batch in pairs.to_batches(columns=columns, batch_readahead=2):
        width, height, found_width, found_height, size = (batch[name].to_numpy() for name in columns[:-1])
        values = {
            "side": np.minimum(width, height),
            "side_found": np.minimum(found_width, found_height),
            "aspect": found_width / found_height,
            "bytes": size,
            "caption": pc.utf8_length(batch["caption"]).to_numpy(zero_copy_only=False),
        }
        for name, edges in EDGES.items():
            counts[name] += np.histogram(np.clip(values[name], edges[0], edges[-1]), edges)[0]
        clipped = [np.clip(side, SIDES[0], SIDES[-1]) for side in (found_width, found_height)]
        sizes += np.histogram2d(clipped[0], clipped[1], [SIDES, SIDES])[0]
        total += int(size.sum())
    if not total:
        return {"image_bytes": 0, "plots": {}}
    plot = page.plot_histogram
    plots = {
        "width and height, as found": page.plot_grid(sizes, SIDES, "width, pixels", "height, pixels"),
        "shorter side: as stored, and as found (line)": plot(
            counts["side"], SIDES, "pixels", outline=counts["side_found"]
        ),
        "aspect ratio, as found": plot(counts["aspect"], EDGES["aspect"], "width : height", scale="ratio"),
        "size of an image, as stored": plot(counts["bytes"], EDGES["bytes"], "bytes"),
        "length of a caption": plot(counts["caption"], EDGES["caption"], "characters", scale="linear"),
    }
    return {"image_bytes": total, "plots": plots}


def kept_pictures(sql: duckdb.DuckDBPyConnection, storage_uri: str, name: str) -> list[Row]:
    """Some kept rows, spread evenly over the table, with their picture and the names of their concepts."""
    count = tables.read_manifest(storage_uri, "pairs", name).rows
    columns = ["image_id", "url", "caption", "width", "height", "shard", "offset", "size"]
    rows = rows_at(storage_uri, "pairs", name, spread(0, count, NUM_KEPT), columns)
    # DuckDB would read several files of groups ahead, a gigabyte of image ids.
    wanted = ds.field("image_id").isin(pa.array([row["image_id"] for row in rows], pa.string()))
    sql.register("shown", matching(storage_uri, "groups", name, wanted, ["image_id", "concept_ids"]))
    named = ask(
        sql,
        "select image_id, list(distinct name order by name) as names"
        "  from (select image_id, unnest(concept_ids) as concept_id from shown)"
        "  join concepts using (concept_id) group by image_id",
    )
    names = {row["image_id"]: row["names"] for row in named}
    return [
        {**row, "picture": picture(storage_uri, name, row), "concepts": names.get(row["image_id"], [])} for row in rows
    ]


def rejected_examples(
    sql: duckdb.DuckDBPyConnection, storage_uri: str, name: str, samples: pa.Table | None
) -> dict[str, list[Row]]:
    """Some rejected rows of each reason, those with a picture first; duplicates with the row that they duplicate."""
    sql.register("samples", shards.SAMPLES.empty_table() if samples is None else samples)
    rows = ask(
        sql,
        f"select reason, left(rejects.url, {MOST_URL}) as url, left(caption, {MOST_TEXT}) as caption, "
        f"left(detail, {MOST_TEXT}) as detail, duplicate_of, picture "
        "from rejects left join (select reason, url, any_value(picture) as picture from samples group by all) "
        "using (reason, url) "
        # One key, so that DuckDB keeps the first rows alone instead of sorting all.
        "qualify row_number() over (partition by reason order by {'none': picture is null, 'any': hash(source, row)}) "
        f"<= {NUM_REJECTED} order by reason, picture is null, hash(source, row)",
    )
    duplicated = {tuple(row["duplicate_of"].values()) for row in rows if row["duplicate_of"]}
    kept = kept_rows_of(storage_uri, name, duplicated)
    examples: dict[str, list[Row]] = {}
    for row in rows:
        survivor = row["duplicate_of"] and kept.get(tuple(row["duplicate_of"].values()))
        row["survivor"] = survivor and {**survivor, "picture": picture(storage_uri, name, survivor)}
        row["picture"] = row["picture"] and page.data_uri(row["picture"])
        examples.setdefault(row["reason"], []).append(row)
    return examples


def kept_rows_of(storage_uri: str, name: str, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], Row]:
    """Kept rows by source and row; the statistics of the files tell which ones to read."""
    if not wanted:
        return {}
    same = ((ds.field("source") == source) & (ds.field("row") == row) for source, row in sorted(wanted))
    columns = ["source", "row", "url", "caption", "shard", "offset", "size"]
    rows = matching(storage_uri, "pairs", name, functools.reduce(operator.or_, same), columns)
    return {(row["source"], row["row"]): row for row in rows.to_pylist()}


def concepts(sql: duckdb.DuckDBPyConnection, storage_uri: str, name: str, kept: int) -> Row:
    """The most frequent concepts with pictures, which of them occur together, and how many there are in all."""
    top = ask(sql, f"select * from concepts order by image_count desc, name limit {NUM_TOP}")
    tail = ask(sql, "select image_count, count(*) as concepts from concepts group by all order by image_count desc")
    # An image with n concepts has n rows in groups.
    named = ask(sql, "select len(concept_ids) as n, count(*) // n as images from groups group by n order by n")
    covered = sum(row["images"] for row in named)
    per_image = np.bincount([0, *(row["n"] for row in named)], [kept - covered, *(row["images"] for row in named)])
    edges = np.arange(len(per_image) + 1) - 0.5
    shown = sorted(top[:NUM_SHOWN], key=lambda row: int(row["start"]))
    positions = [place for row in shown for place in spread(row["start"], row["stop"], NUM_EXAMPLES)]
    columns = ["concept_id", "caption", "shard", "offset", "size"]
    pictures: dict[int, list[Row]] = {}
    for row in rows_at(storage_uri, "groups", name, positions, columns):
        pictures.setdefault(row["concept_id"], []).append({**row, "picture": picture(storage_uri, name, row)})
    return {
        "num_concepts": sum(row["concepts"] for row in tail),
        "top": top,
        "tail": plot_tail(tail) if tail else None,
        "covered": covered,
        "per_image": covered and page.plot_histogram(per_image, edges, "concepts", scale="linear"),
        "related": related(sql, top[:NUM_RELATED]),
        "concept_pictures": [(row, pictures[row["concept_id"]]) for row in top[:NUM_SHOWN]],
    }


def related(sql: duckdb.DuckDBPyConnection, top: Sequence[Row]) -> list[tuple[Row, list[tuple[Row, int, float]]]]:
    """Of the images of each concept, how many show each other one too: a number and a share."""
    if not top:
        return []
    ids = ", ".join(str(row["concept_id"]) for row in top)
    found = ask(
        sql,
        "select one, other, count(*) as images from ("
        f"  select concept_id as one, unnest(concept_ids) as other from groups where concept_id in ({ids})"
        f") where other in ({ids}) group by all",
    )
    images = Counter({(row["one"], row["other"]): row["images"] for row in found})

    def compared(one: Row, other: Row) -> tuple[Row, int, float]:
        both = images[one["concept_id"], other["concept_id"]]
        return other, both, both / one["image_count"]

    return [(one, [compared(one, other) for other in top]) for one in top]


# --------------------------------------------------------------------------------------------------------- plots


def speeds(progress: Sequence[tuple[float, int]], most: int = 150) -> tuple[page.Numbers, page.Numbers]:
    """At most `most` moments, in seconds, and the rows a second between them, from seconds and rows done so far."""
    done = {0.0: 0.0, **dict(progress)}
    seconds, rows = np.array(list(done)), np.array(list(done.values()))
    times = seconds if len(seconds) <= most else np.linspace(0, seconds[-1], most)
    return times, np.diff(np.interp(times, seconds, rows)) / np.diff(times)


def plot_throughput(progress: Sequence[tuple[float, int]]) -> str:
    """Rows a second over time."""
    times, rates = speeds(progress)
    unit, seconds = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if times[-1] > 3 * size), ("s", 1))
    figure, axes = page.new_plot(f"time, {unit}", "rows/s", width=10.5)
    axes.stairs(rates, times / seconds, fill=True, color=page.GREEN, alpha=0.75)
    axes.set(xlim=(0, times[-1] / seconds), ylim=(0, None))
    return page.plot_uri(figure)


def plot_tail(tail: Sequence[Row]) -> str:
    """Images of each concept, from the most frequent one on."""
    ranks = np.cumsum([0, *(row["concepts"] for row in tail)])
    figure, axes = page.new_plot("concepts, the most frequent first", "images of the concept", width=10.5)
    axes.stairs([row["image_count"] for row in tail], ranks, baseline=None, color=page.GREEN, linewidth=2)
    axes.set(xlim=(0.8, ranks[-1] * 1.1))
    page.scale_log(axes, "x")
    page.scale_log(axes, "y")
    return page.plot_uri(figure)


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    print(f"report: {write(run.storage, run.name)}")


if __name__ == "__main__":
    cli.execute(main)

import html.parser
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import storage, tables
from data_prep.concepts.groups import build_groups
from data_prep.pairs import shards
from data_prep.pictograms import website
from ovd_models.errors import InputError
from workflows.reports import page, pairs

CHROMIUM = Path("/usr/bin/chromium")
SOURCE = "0123456789abcdef"
HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> "\'>\u202e' + "x" * 2000
PER_FILE = 4
CAPTIONS = {  # with the concepts that they mention
    "a cat and a dog": ["cat", "dog"],
    "a cat": ["cat"],
    "a dog": ["dog"],
    "a cat, a dog and a star": ["cat", "dog", "star"],
    "nothing": [],
}


def jpeg(number: int, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def pairs_of(images: Sequence[bytes], captions: Sequence[str], shard: str, first: int) -> tuple[bytes, pa.Table]:
    keys = [f"{number:05d}" for number in range(len(images))]
    tar, offsets = shards.pack(zip(keys, images, captions, strict=True))
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    columns: dict[str, list[Any]] = {
        "image_id": [storage.sha256(image) for image in images],
        "source": [SOURCE] * len(images),
        "row": list(range(first, first + len(images))),
        "url": [f"https://a.example/{first + number}.jpg" for number in range(len(images))],
        "caption": list(captions),
        "raw_caption": list(captions),
        "shard": [shard] * len(images),
        "key": keys,
        "offset": offsets,
        "size": [len(image) for image in images],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "original_width": [width for width, _ in sizes],
        "original_height": [height for _, height in sizes],
        "phash": [0] * len(images),
    }
    return tar, pa.table(columns, schema=tables.SCHEMAS["pairs"])


def reject(row: int, stage: str, reason: str, **changes: Any) -> dict[str, Any]:
    defaults = {"source": SOURCE, "url": f"https://a.example/{row}.jpg", "caption": "a dog", "detail": "some detail"}
    return {**defaults, "row": row, "stage": stage, "reason": reason, **changes}


def publish(
    root: Path,
    images: Sequence[bytes],
    captions: Sequence[str],
    rejects: Sequence[dict[str, Any]],
    *,
    concepts: dict[str, list[str]] = CAPTIONS,
    progress: Sequence[tuple[float, int]] = (),
) -> str:
    """Tables as `prepare_pairs` writes them, with a few pairs a file; the storage's URI."""
    uri, name = str(root), "t"
    files: dict[str, list[tables.FileEntry]] = {table: [] for table in pairs.TABLES}
    index = [tables.SCHEMAS["pairs"].empty_table()]
    for first in range(0, len(images), PER_FILE):
        part = slice(first, first + PER_FILE)
        shard = f"shards/{first:05d}.tar"
        tar, rows_of_shard = pairs_of(images[part], captions[part], shard, first)
        files["pairs"].append(tables.write_file(uri, "pairs", name, shard, tar))
        files["pairs"].append(tables.write_part(uri, "pairs", name, f"index/{first:05d}.parquet", rows_of_shard))
        index.append(rows_of_shard)
    rejected = pa.Table.from_pylist(list(rejects), schema=tables.SCHEMAS["rejects"])
    if rejected.num_rows:
        files["rejects"].append(tables.write_part(uri, "rejects", name, "a.parquet", rejected))
    kept = pa.concat_tables(index)
    names = pa.array([concepts[caption] for caption in kept["caption"].to_pylist()], pa.list_(pa.string()))
    with build_groups(kept.append_column("names", names), min_images=1) as (found, groups):
        files["concepts"].append(tables.write_part(uri, "concepts", name, "a.parquet", found))
        files["groups"].append(tables.write_part(uri, "groups", name, "a.parquet", groups.read_all()))
    reasons: dict[str, int] = {}
    for row in rejects:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    rows = kept.num_rows + len(rejects)
    details = {
        "summary": {
            **{"input": rows, "kept": kept.num_rows, "rejected": reasons, "concepts": found.num_rows},
            **{"seconds": 7.5, "reused": False},
        },
        "generation": 2,
        "sources": {SOURCE: rows} if rows else {},
        "progress": list(progress),
    }
    for table in ("rejects", "concepts", "groups", "pairs"):
        tables.publish(uri, table, name, files[table], producer="test", config_hash="0" * 16, details=details)
    return uri


class Parsed(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.content = Path(path).read_text(encoding="utf-8")
        self.feed(self.content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += f" {data.strip()}"

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


REJECTS = [
    reject(10, "fetch", "http_status", http_status=404, attempts=1, detail="404 Not Found"),
    reject(11, "fetch", "http_status", http_status=503, attempts=3, detail="503 Busy"),
    reject(12, "fetch", "timeout", attempts=1),
    reject(13, "filter", "too_small", http_status=200, attempts=1, detail="8 x 8, at least 32"),
    reject(14, "dedup", "duplicate_bytes", duplicate_of={"source": SOURCE, "row": 3}, detail=None),
    reject(15, "dedup", "duplicate_url", duplicate_of={"source": SOURCE, "row": 12}, detail=None),
]


@pytest.fixture(scope="module")
def crawled(tmp_path_factory: pytest.TempPathFactory) -> str:
    images = [jpeg(number) for number in range(10)]
    progress = [(2.0, 4), (4.0, 16)]
    return publish(tmp_path_factory.mktemp("crawled"), images, [*CAPTIONS] * 2, REJECTS, progress=progress)


def test_a_report_shows_what_was_kept_and_why_rows_were_rejected(crawled: str) -> None:
    uri = pairs.write_pairs_report(crawled, "t")
    assert uri == f"{crawled}/reports/pairs-t.html"
    found = Parsed(uri)
    for wanted in ("16 rows of input", "10 kept: 62.5%", "6 rejected: 37.5%", "3 concepts", "4 rows/s", "1 source"):
        assert wanted in " ".join(found.text.split())
    assert all(row["reason"] in found.text for row in REJECTS)
    assert all(caption in found.text for caption in CAPTIONS)
    assert "script" not in found.tags
    assert found.tags.count("img") > 10
    assert all(value.startswith("data:") for value in found.values("src"))


def test_equal_tables_give_equal_pages(crawled: str) -> None:
    first = Path(pairs.write_pairs_report(crawled, "t")).read_bytes()
    assert Path(pairs.write_pairs_report(crawled, "t")).read_bytes() == first


def test_rejected_rows_are_counted_by_stage_reason_status_and_requests(crawled: str) -> None:
    with pairs.open_tables(crawled, "t") as crawl:
        found = pairs.count_outcomes(crawl, 10)
    assert found["stages"] == {"kept": 10, "input": 0, "fetch": 3, "decode": 0, "filter": 1, "dedup": 2}
    assert found["reasons"] == [
        ("fetch", "http_status", 2),
        ("fetch", "timeout", 1),
        ("filter", "too_small", 1),
        ("dedup", "duplicate_url", 1),
        ("dedup", "duplicate_bytes", 1),
    ]
    assert sorted(found["statuses"], key=str) == [(404, 1), (503, 1), (None, 1)]
    assert found["attempts"] == [(1, 2), (3, 1)]


def test_rejected_examples_have_thumbnails_and_originals(crawled: str) -> None:
    small = jpeg(1, (8, 8))
    sample = {"reason": "too_small", "url": "https://a.example/13.jpg", "raw_caption": "a dog", "detail": "small"}
    samples = pa.Table.from_pylist([{**sample, "picture": small}, {**sample, "picture": None}], schema=shards.SAMPLES)
    with pairs.open_tables(crawled, "t") as crawl:
        found = pairs.sample_rejected_rows(crawl, samples)
    assert found["too_small"][0]["picture"] == page.data_uri(small)
    assert found["timeout"][0]["picture"] is None
    [copied], [repeated] = found["duplicate_bytes"], found["duplicate_url"]
    assert copied["original"]["url"] == "https://a.example/3.jpg"
    assert copied["original"]["picture"] == page.data_uri(shards.thumbnail(jpeg(3)))
    assert repeated["original"] is None  # row 12 was rejected itself


def test_rejected_rows_with_a_thumbnail_come_first(tmp_path: Path) -> None:
    uri = publish(tmp_path, [], [], [reject(row, "filter", "blank") for row in range(30)])
    sample = {"reason": "blank", "url": "https://a.example/17.jpg", "raw_caption": "", "detail": "", "picture": b"x"}
    with pairs.open_tables(uri, "t") as crawl:
        samples = pa.Table.from_pylist([sample], schema=shards.SAMPLES)
        [(reason, rows)] = pairs.sample_rejected_rows(crawl, samples).items()
    assert (reason, len(rows)) == ("blank", pairs.NUM_REJECTED)
    assert [row["url"] for row in rows if row["picture"]] == ["https://a.example/17.jpg"] == [rows[0]["url"]]


def test_concepts_are_counted_alone_and_together(crawled: str) -> None:
    with pairs.open_tables(crawled, "t") as crawl:
        found = pairs.summarise_concepts(crawl, 10)
        rows = pairs.sample_kept_rows(crawl)
    assert [(row["name"], row["image_count"]) for row in found["top"]] == [("cat", 6), ("dog", 6), ("star", 2)]
    assert (found["num_concepts"], found["covered"]) == (3, 8)
    counts = {(one["name"], other["name"]): both for one, others in found["cooccurrence"] for other, both, _ in others}
    assert counts == {
        **{("cat", "cat"): 6, ("cat", "dog"): 4, ("cat", "star"): 2},
        **{("dog", "cat"): 4, ("dog", "dog"): 6, ("dog", "star"): 2},
        **{("star", "cat"): 2, ("star", "dog"): 2, ("star", "star"): 2},
    }
    assert {other["name"]: share for other, _, share in found["cooccurrence"][0][1]} == {
        "cat": 1,
        "dog": 2 / 3,
        "star": 1 / 3,
    }
    assert [len(pictures) for _, pictures in found["concept_pictures"]] == [6, 6, 2]
    assert [row["concepts"] for row in rows] == [*CAPTIONS.values()] * 2


def test_rows_are_found_by_position(crawled: str) -> None:
    everything = tables.read_table(crawled, "pairs", "t", ["row", "caption"]).to_pylist()
    with pairs.open_tables(crawled, "t") as crawl:
        for positions in ([], [0], [3, 4, 9], list(range(10))):
            found = crawl.rows_at("pairs", positions, ["row", "caption"])
            assert found == [everything[position] for position in positions]


def test_positions_are_evenly_spaced() -> None:
    assert pairs.evenly_spaced(0, 0, 5) == []
    assert pairs.evenly_spaced(7, 10, 5) == [7, 8, 9]
    assert pairs.evenly_spaced(0, 101, 5) == [0, 25, 50, 75, 100]
    assert len(set(pairs.evenly_spaced(0, 10**9 + 7, 24))) == 24


def test_throughput_is_measured_between_two_times() -> None:
    times, rates = pairs.throughput([(2.0, 4), (4.0, 16), (4.0, 24)])
    assert (times.tolist(), rates.tolist()) == ([0, 2, 4], [2, 10])
    times, rates = pairs.throughput([(float(second), 5 * second) for second in range(1, 10_001)], max_points=11)
    assert times.tolist() == list(range(0, 10_001, 1000))
    np.testing.assert_allclose(rates, 5)


@pytest.mark.parametrize(
    ("part", "whole", "said"), [(0, 0, "–"), (0, 9, "0.0%"), (1, 10**6, "<0.1%"), (1, 8, "12.5%"), (8, 8, "100.0%")]
)
def test_shares_are_percentages(part: int, whole: int, said: str) -> None:
    assert page.percentage(part, whole) == said


def test_empty_tables_have_a_report(tmp_path: Path) -> None:
    found = Parsed(pairs.write_pairs_report(publish(tmp_path, [], [], []), "t"))
    for wanted in ("0 rows of input", "No row was kept.", "No row was rejected.", "0 concepts", "0 sources"):
        assert wanted in " ".join(found.text.split())
    assert "img" not in found.tags


def test_a_crawl_without_pairs_and_one_without_rejects_have_a_report(tmp_path: Path) -> None:
    found = Parsed(pairs.write_pairs_report(publish(tmp_path / "none", [], [], REJECTS), "t"))
    assert "which was rejected too" in found.text
    found = Parsed(
        pairs.write_pairs_report(publish(tmp_path / "all", [jpeg(0)], ["nothing"], [], progress=[(0.0, 1)]), "t")
    )
    assert "1 kept: 100.0%" in " ".join(found.text.split())


def test_a_missing_table_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such table"):
        pairs.write_pairs_report(str(tmp_path), "absent")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = {"caption": HOSTILE, "detail": HOSTILE, "url": "javascript:alert(3)"}
    rejects = [
        reject(10, "fetch", "bad_url", **texts, attempts=1),
        reject(11, "fetch", "bad_url", **{**texts, "url": 'https://a.example/"><script>alert(4)</script>'}),
        reject(12, "fetch", "bad_url", **{**texts, "url": " JavaScript:alert(5)"}),
        reject(13, "fetch", "bad_url", **{**texts, "url": None, "caption": None}),
        reject(14, "dedup", "near_duplicate", **texts, duplicate_of={"source": SOURCE, "row": 0}),
    ]
    images = [jpeg(0, (300, 60)), jpeg(1, (40, 400))]
    concepts = {HOSTILE: ["<b>bold</b>", "y" * 500]}
    return publish(tmp_path_factory.mktemp("hostile"), images, [HOSTILE] * 2, rejects, concepts=concepts)


def test_hostile_text_is_escaped(hostile: str) -> None:
    found = Parsed(pairs.write_pairs_report(hostile, "t"))
    assert {"script", "b"} & set(found.tags) == {"b"}  # the headline's figures are bold
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert all(value.startswith(("https://a.example/", "#")) for value in found.values("href"))
    assert "javascript:alert(3)" in found.text
    assert "<script>alert(1)</script>" in found.text
    assert found.text.count("<b>bold</b>") >= 2
    assert "x" * 1000 not in found.content


def drawn(site: Path, root: Path) -> str:
    """The pictures of the pictogram site, with rejects of every reason."""
    images = [website.image_path(site, number).read_bytes() for number in range(180)]
    reasons = [(stage, reason) for stage, found in tables.REASONS.items() for reason in found]
    rejects = [
        reject(1000 + row, stage, reason, duplicate_of={"source": SOURCE, "row": row} if stage == "dedup" else None)
        for row, (stage, reason) in enumerate(reasons * 5)
    ]
    captions = [f"a {'long ' * (number % 9)}caption {number % 30}" for number in range(180)]
    names = {caption: sorted({f"concept {len(caption) % 11}", caption[-2:].strip()}) for caption in captions}
    return publish(root, images, captions, rejects, concepts=names, progress=[(5.0, 100), (9.0, 250)])


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is absent")
def test_the_reports_open_in_a_browser(small_site: Path, tmp_path: Path, hostile: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    root = drawn(small_site, tmp_path)
    sample = {
        "reason": "blank",
        "url": "https://a.example/1016.jpg",
        "raw_caption": "",
        "detail": "",
        "picture": jpeg(1),
    }
    pages = [pairs.write_pairs_report(root, "t", pa.Table.from_pylist([sample], schema=shards.SAMPLES))]
    pages.append(pairs.write_pairs_report(hostile, "t"))
    seen = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            for uri in pages:
                tab = browser.new_page(viewport={"width": 1200, "height": 900})
                problems: list[str] = []
                tab.on("console", lambda message, log=problems: log.append(message.text))
                tab.on("pageerror", lambda error, log=problems: log.append(str(error)))
                tab.on("dialog", lambda dialog, log=problems: log.append(dialog.message))
                tab.on("request", lambda request, log=problems: request.url[:4] == "http" and log.append(request.url))
                tab.goto(Path(uri).as_uri())
                broken = tab.eval_on_selector_all("img", "all => all.filter(one => !one.naturalWidth).length")
                wide = tab.evaluate("document.documentElement.scrollWidth")
                seen.append((problems, broken, wide, tab.locator("img").count(), tab.locator("h2").all_inner_texts()))
        finally:
            browser.close()
    titles = ["Why rows were rejected", "Throughput", "Images and captions", "Kept", "Rejected", "Concepts", "Sources"]
    assert [(problems, broken, wide) for problems, broken, wide, _, _ in seen] == [([], 0, 1200)] * 2
    assert [found for _, _, _, _, found in seen] == [titles] * 2
    assert seen[0][3] > 100

import io
import itertools
import math
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from PIL import Image
from reference_data import PHOTOS, needs

from data_prep import storage
from data_prep.pairs import dedup
from data_prep.pairs.decode import DecodeConfig, Decoded, decode_body
from data_prep.pairs.dedup import DECISIONS, Corpus, band_masks, first_kept, near_searches, runs_of_equal, search_cost
from data_prep.pairs.rows import LIGHT, NEW, RowNumbering

KEY = "image_id"
TYPES = dict(zip(LIGHT.names, LIGHT.types, strict=True))


def table(**columns: Sequence[object]) -> pa.Table:
    """Rows of source "s", numbered, unless given otherwise."""
    count = len(next(iter(columns.values())))
    rows = {"source": ["s"] * count, "row": list(range(count)), **columns}
    return pa.table({name: pa.array(values, TYPES[name]) for name, values in rows.items()})


def corpus(new: pa.Table | ds.Dataset, published: pa.Table | None = None) -> Corpus:
    return Corpus(RowNumbering.of({"a": 1000, "s": 100_000, "z": 1000}), new, published)


def fates(found: Corpus) -> dict[int, int | None]:
    """Row -> row that it duplicates, for sources that start at 1000: those of "s"."""
    return {
        row["id"] - NEW - 1000: None if row["duplicate_of"] is None else row["duplicate_of"] % NEW - 1000
        for row in found.decisions().to_pylist()
    }


def test_a_repeat_names_the_first_row_with_its_key() -> None:
    found = corpus(table(image_id=["a", "b", "a", None, "a", None]))
    found.reject_repeats("image_id", "duplicate_bytes")
    first = NEW + 1000
    assert found.decisions().to_pylist() == [
        {"id": first + 2, "stage": "dedup", "reason": "duplicate_bytes", "detail": None, "duplicate_of": first},
        {"id": first + 4, "stage": "dedup", "reason": "duplicate_bytes", "detail": None, "duplicate_of": first},
    ]


def test_ids_and_rows_correspond_over_all_sources() -> None:
    rows = {"c": 2, "a": 3, "empty": 0, "d": 4, "aa": 0, "zero": 0}
    order = RowNumbering.of(rows)
    assert order.bases == {"a": 0, "aa": 3, "c": 3, "d": 5, "empty": 9, "zero": 9}
    assert order == RowNumbering.of(dict(reversed(rows.items())))
    every = [(source, row) for source in sorted(rows) for row in range(rows[source])]
    ids = np.concatenate([order.ids(source, np.arange(rows[source])) for source in sorted(rows)])
    assert ids.tolist() == list(range(NEW, NEW + 9))
    for known in (ids, ids - NEW):  # new and published
        assert [(at["source"], at["row"]) for at in order.locate(pa.array(known)).to_pylist()] == every


def test_a_batch_is_numbered_without_going_through_all_sources() -> None:
    class Bases(dict[str, int]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("as many steps as there are sources, for each of as many batches")

        values = __iter__  # type: ignore[assignment]

    order = RowNumbering(Bases(a=0, b=10, c=30), 50)
    batch = pa.record_batch({"source": ["c", "a", "c"], "row": pa.array([1, 2, 3], pa.int64())})
    assert order.number(batch).tolist() == [31, 2, 33]
    assert order.number(batch.slice(0, 0)).tolist() == []


def test_no_id_is_no_row() -> None:
    order = RowNumbering.of({"a": 3, "b": 2})
    ids = pa.array([None, NEW + 3, None, 2], pa.int64())
    wanted = [None, {"source": "b", "row": 0}, None, {"source": "a", "row": 2}]
    assert order.locate(ids).to_pylist() == wanted
    assert order.locate(ids.slice(1)).to_pylist() == wanted[1:]
    assert order.locate(ids.slice(0, 1)).to_pylist() == [None]
    assert order.locate(ids.slice(0, 0)).to_pylist() == []
    assert RowNumbering.of({}).locate(ids.slice(0, 0)).to_pylist() == []


def test_published_rows_survive_all_new_ones() -> None:
    # "z" comes after "s" in the order, but is published
    published = table(source=["z", "z"], row=[7, 8], image_id=["x", "x"])
    found = corpus(table(image_id=["y", "x", "x", "y"]), published)
    found.reject_repeats("image_id", "duplicate_bytes")
    order = RowNumbering.of({"a": 1000, "s": 100_000, "z": 1000})
    places = order.locate(found.decisions()["duplicate_of"].combine_chunks()).to_pylist()
    assert fates(found).keys() == {1, 2, 3}
    assert places == [{"source": "z", "row": 7}, {"source": "z", "row": 7}, {"source": "s", "row": 0}]


def test_rows_that_were_rejected_before_are_no_first_kept() -> None:
    found = corpus(table(image_id=["x", "x", "x"], reason=["blank", None, None]))
    found.reject_repeats("image_id", "duplicate_bytes")
    assert fates(found) == {2: 1}


def test_what_one_question_decides_the_next_does_not_ask_about() -> None:
    found = corpus(table(image_id=["x", "y", "x"], caption=["same", "same", "other"], phash=[0, 0, 1]))
    found.reject_boilerplate(1)
    found.reject_repeats("image_id", "duplicate_bytes")
    found.reject_near_duplicates(4)
    rejections = [(row["stage"], row["reason"], row["detail"]) for row in found.decisions().to_pylist()]
    assert rejections == [("filter", "caption_boilerplate", "used by 2 rows")] * 2


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_repeats_in_nothing(rows: int) -> None:
    some = table(image_id=["x"] * rows, caption=["c"] * rows, phash=[1] * rows)
    for published in (None, some.slice(0, 0)):
        found = corpus(some, published)
        found.reject_boilerplate(1)
        found.reject_repeats("image_id", "duplicate_bytes")
        found.reject_near_duplicates(4)
        assert found.decisions().num_rows == 0
        assert found.decisions().schema.equals(DECISIONS)


def test_captions_that_too_many_rows_bear_are_boilerplate() -> None:
    captions = ["twice", "thrice", None, "thrice", "twice", "thrice", None, None, None]
    found = corpus(table(caption=captions), table(source=["a"] * 2, caption=["old", "thrice"]))
    found.reject_boilerplate(2)
    assert fates(found) == {1: None, 3: None, 5: None}
    assert set(found.decisions()["detail"].to_pylist()) == {"used by 4 rows"}  # published ones count, but stay


def in_pieces(rows: pa.Table, folder: Path, rng: np.random.Generator) -> ds.Dataset:
    """The same rows in a random order, cut at random into files and row groups."""
    rows = rows.take(pa.array(rng.permutation(rows.num_rows)))
    cuts = np.sort(rng.integers(0, rows.num_rows + 1, rng.integers(0, 5)))
    folder.mkdir()
    edges = [0, *cuts.tolist(), rows.num_rows]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        part = rows.slice(start, stop - start)
        pq.write_table(part, folder / f"{number}.parquet", row_group_size=int(rng.integers(1, 9)))
    return ds.dataset(folder, schema=rows.schema, format="parquet")


def slow_decisions(
    rows: pa.Table, published: pa.Table, order: RowNumbering, most: int, bits: int
) -> list[dict[str, object]]:
    """Boilerplate, repeated bytes and near-duplicates, row by row as one would say it."""
    old = [{**row, "id": order.bases[row["source"]] + row["row"]} for row in published.to_pylist()]
    new = [{**row, "id": order.bases[row["source"]] + row["row"] + NEW} for row in rows.to_pylist()]
    alive = sorted([*old, *(row for row in new if row["reason"] is None)], key=lambda row: row["id"])
    found: dict[int, tuple[str, str, str | None, int | None]] = {}
    uses = [row["caption"] for row in alive]
    for row in alive:
        if row["caption"] is not None and uses.count(row["caption"]) > most and row["id"] >= NEW:
            detail = f"used by {uses.count(row['caption'])} rows"
            found[row["id"]] = ("filter", "caption_boilerplate", detail, None)
    alive = [row for row in alive if row["id"] not in found]
    first: dict[str, int] = {}
    for row in alive:
        if row["image_id"] is not None and first.setdefault(row["image_id"], row["id"]) != row["id"] >= NEW:
            found[row["id"]] = ("dedup", "duplicate_bytes", None, first[row["image_id"]])
    kept: list[dict[str, int]] = []
    for row in alive:
        if row["id"] in found:
            continue
        near = [other for other in kept if (row["phash"] ^ other["phash"]).bit_count() <= bits]
        near = [other for other in near if other["phash"] == row["phash"]] or near  # matters among published ones alone
        if near and row["id"] >= NEW:
            distance = (row["phash"] ^ near[0]["phash"]).bit_count()
            found[row["id"]] = ("dedup", "near_duplicate", f"{distance} of 64 bits differ", near[0]["id"])
        else:
            kept.append(row)
    return [dict(zip(DECISIONS.names, (row, *found[row]), strict=True)) for row in sorted(found)]


@pytest.mark.parametrize("seed", range(15))
def test_decisions_are_those_of_a_slow_loop_however_rows_are_partitioned(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    sizes = {f"{name}{seed}": int(rng.integers(0, 40)) for name in "qcmx"}
    order = RowNumbering.of(sizes)
    every = [(source, row) for source, count in sizes.items() for row in range(count)]
    count = len(every)
    hashes = planted_hashes(rng, count, 6)
    columns = {
        "source": [source for source, _ in every],
        "row": [row for _, row in every],
        "image_id": [None if number > 55 else f"i{number}" for number in rng.integers(0, 60, count)],
        "phash": hashes,
        "caption": [None if number == 9 else f"c{number**2}" for number in rng.integers(0, 10, count)],
        "reason": [None if number else "blank" for number in rng.integers(0, 6, count)],
    }
    rows = table(**columns)
    is_old = rng.random(count) < 0.3
    new = rows.filter(pa.array(~is_old))
    published = rows.filter(pa.array(is_old & (rows["reason"].is_null().to_numpy()))).drop_columns(["reason"])
    most, bits = int(rng.integers(5, 30)), int(rng.integers(0, 5))
    wanted = slow_decisions(new, published, order, most, bits)
    for number in range(2):
        found = Corpus(order, in_pieces(new, tmp_path / f"{number}", rng), in_pieces(published, tmp_path / "p", rng))
        found.reject_boilerplate(most)
        found.reject_repeats("image_id", "duplicate_bytes")
        found.reject_near_duplicates(bits)
        assert found.decisions().to_pylist() == wanted
        (tmp_path / "p").rename(tmp_path / f"p{number}")


def planted_hashes(rng: np.random.Generator, count: int, flips: int) -> list[int]:
    """Random hashes of which many differ from an earlier one in 0 to `flips` bits, so that there are chains."""
    found: list[int] = []
    for _ in range(count):
        if found and rng.random() < 0.6:
            near = found[rng.integers(len(found))]
            for bit in rng.choice(64, rng.integers(0, flips + 1), replace=False).tolist():
                near ^= 1 << bit
            found.append(near)
        else:
            found.append(int(rng.integers(0, 1 << 64, dtype=np.uint64)))
    return found


@pytest.mark.parametrize(("bits", "shared"), [*((bits, 2) for bits in range(9)), (1, 3), (4, 3), (4, 4), (5, 3)])
def test_near_duplicates_are_those_of_a_greedy_loop(bits: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "SHARED_BANDS", [shared])
    hashes = planted_hashes(np.random.default_rng(bits), 600, bits + 2)
    found = corpus(table(phash=hashes))
    found.reject_near_duplicates(bits)
    kept: list[int] = []
    wanted: dict[int, int] = {}
    for row, value in enumerate(hashes):
        near = next((other for other in kept if (hashes[other] ^ value).bit_count() <= bits), None)
        if near is None:
            kept.append(row)
        else:
            wanted[row] = near
    assert len(wanted) > 50
    assert fates(found) == wanted


def test_the_end_of_a_chain_is_kept() -> None:
    found = corpus(table(phash=[0b0, 0b1111, 0b11111111, 0b111111111111]))  # each 4 bits from the next
    found.reject_near_duplicates(4)
    assert fates(found) == {1: 0, 3: 2}


def test_rows_of_one_hash_share_its_fate() -> None:
    found = corpus(table(phash=[5, 4, 5, 4, 2**64 - 1, None, None]))
    found.reject_near_duplicates(1)
    assert fates(found) == {1: 0, 2: 0, 3: 0}
    assert found.decisions()["detail"].to_pylist() == [f"{bits} of 64 bits differ" for bits in (1, 0, 1)]


def test_published_images_are_never_rejected_but_reject_others() -> None:
    published = table(source=["z", "z", "a"], row=[0, 1, 5], phash=[0, 1, 3])  # near each other, as it may be
    found = corpus(table(phash=[3, 2, 15, 2**64 - 1]), published)
    found.reject_near_duplicates(1)
    places = RowNumbering.of({"a": 1000, "s": 100_000, "z": 1000}).locate(
        found.decisions()["duplicate_of"].combine_chunks()
    )
    assert list(fates(found)) == [0, 1]
    assert places.to_pylist() == [{"source": "a", "row": 5}] * 2


@pytest.mark.parametrize("shared", [2, 3, 4])
def test_masks_leave_no_pair_out(shared: int) -> None:
    rng = np.random.default_rng(0)
    for bits in range(9):
        masks = band_masks(bits, shared)
        assert len(masks) == math.comb(bits + shared, shared)
        assert all(band & mask == band and mask & -mask == band & -band for band, mask in masks)
        for _ in range(100):
            changed = sum(1 << bit for bit in rng.choice(64, bits, replace=False).tolist())
            assert any(changed & mask == 0 for _, mask in masks)


def test_more_rows_are_compared_by_more_bits() -> None:
    first = near_searches(4, 10**6)
    assert [len(queries) for queries in first.values()] == [5, 4, 3, 2, 1]  # 6 bands, of which 2 are equal
    assert [len(queries) for queries in near_searches(4, 10**9).values()] == [15, 10, 6, 3, 1]  # 7 bands, 3
    assert search_cost(0, 2, 10**6) == 8 + 10**6 / 2**64
    assert search_cost(4, 4, 2**33) == 70 * (8 + 2)


def test_a_row_falls_to_the_first_kept_one() -> None:
    pairs = [(1, 3, 2.0), (1, 4, 3.0), (4, 5, 0.0), (2, 9, 4.0), (2, 9, 4.0), (3, 9, 1.0), (5, 9, 1.0)]
    assert list(first_kept(iter(pairs))) == [(1, 3, 2.0), (1, 4, 3.0), (2, 9, 4.0)]
    assert list(first_kept([])) == []


def test_little_memory_gives_the_same() -> None:
    rng = np.random.default_rng(0)
    rows = table(image_id=[f"image-{number:060d}" for number in rng.integers(0, 30_000, 50_000)])
    rows = rows.append_column("phash", pa.array(planted_hashes(rng, 50_000, 3), pa.uint64()))
    found = []
    for memory in ("1GB", "64MB"):
        one = Corpus(RowNumbering.of({"s": 50_000}), rows, memory=memory)
        one.reject_repeats("image_id", "duplicate_bytes")
        one.reject_near_duplicates(3)
        found.append(one.decisions())
    assert found[0].num_rows > 30_000
    assert found[0].equals(found[1])


def encoded(image: Image.Image, kind: str = "JPEG", quality: int = 95, scale: float = 1.0) -> bytes:
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, kind, quality=quality, compress_level=1)
    return buffer.getvalue()


@needs("data/coco_photos")
def test_planted_copies_of_photographs_are_found_and_nothing_else() -> None:
    photo_of, hashes, image_ids = [], [], []
    for photo, path in enumerate(sorted(PHOTOS.glob("images/*.jpg"))[:20]):
        image = Image.open(path).convert("RGB")
        contents = [
            path.read_bytes(), path.read_bytes(), encoded(image, quality=60), encoded(image, quality=30),
            encoded(image, scale=0.75), encoded(image, scale=1.5), encoded(image, "PNG"),
        ]  # fmt: skip
        for content in contents:
            decoded = decode_body(content, DecodeConfig(max_side=512))
            assert isinstance(decoded, Decoded)
            photo_of.append(photo)
            hashes.append(decoded.phash)
            image_ids.append(storage.sha256(decoded.content))
    order = np.random.default_rng(0).permutation(len(hashes)).tolist()
    shuffled = {"phash": [hashes[at] for at in order], "image_id": [image_ids[at] for at in order]}
    photo_of = [photo_of[at] for at in order]
    found = corpus(table(**shuffled))
    found.reject_repeats("image_id", "duplicate_bytes")
    found.reject_near_duplicates(dedup.CorpusConfig().near_bits or 0)
    rejected = fates(found)
    right = sum(photo_of[row] == photo_of[other] for row, other in rejected.items() if other is not None)
    copies = len(photo_of) - len(set(photo_of))
    print(f"recall {right / copies:.4f}, precision {right / len(rejected):.4f}")
    assert right / copies >= 0.95
    assert right / len(rejected) >= 0.99


def test_many_images_near_each_other_take_little_memory() -> None:
    bits = [1 << bit for bit in range(40)]
    hashes = [one | other for one, other in itertools.combinations(bits, 2)]  # all within 4 bits of each other
    found = corpus(table(phash=hashes))
    usual, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counting)
    tracemalloc.start()
    try:
        found.reject_near_duplicates(4)
        python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert found.decisions().num_rows == len(hashes) - 1
    assert counting.max_memory() + python < 16 << 20  # 0.3 million pairs as Python's numbers take 100 MB


def embeddings(unit_ND: Sequence[Sequence[float] | None], source: str = "s") -> pa.Table:
    """Rows of a source with these directions."""
    blobs = [None if row is None else (np.array(row) / np.linalg.norm(row)).astype("<f2").tobytes() for row in unit_ND]
    rows = {"source": [source] * len(blobs), "row": pa.array(range(len(blobs)), pa.int64())}
    return pa.table({**rows, "embedding": pa.array(blobs, pa.binary())})


def directions(*degrees: float) -> list[list[float]]:
    return [[float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))] for angle in degrees]


def test_images_of_like_meaning_fall_to_the_first_that_is_kept() -> None:
    found = corpus(embeddings([*directions(0, 10, 20, 40, 180), None, *directions(42)]))
    found.reject_semantic_duplicates(0.9)  # within 25.8 degrees
    assert fates(found) == {1: 0, 2: 0, 6: 3}
    assert found.decisions()["detail"].to_pylist() == ["cosine 0.985", "cosine 0.939", "cosine 0.999"]
    assert set(found.decisions()["reason"].to_pylist()) == {"semantic_duplicate"}


@pytest.mark.parametrize("rows", [embeddings([]), embeddings([None, None]), embeddings(directions(7))])
def test_without_embeddings_nothing_is_alike(rows: pa.Table) -> None:
    found = corpus(rows)
    found.reject_semantic_duplicates(0.9)
    assert found.decisions().num_rows == 0


def test_copies_are_found_over_many_clusters_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "CLUSTER_ROWS", 500)
    monkeypatch.setattr(dedup, "BATCH_ROWS", 700)
    unit_ND = np.random.default_rng(0).normal(size=(2000, 32))
    found = corpus(embeddings([*unit_ND.tolist(), *unit_ND.tolist()]))
    found.reject_semantic_duplicates(0.95)
    assert fates(found) == {row + 2000: row for row in range(2000)}


@pytest.mark.parametrize("sizes", [[], [6], [1, 2, 1, 2], [2, 4], [3, 0, 3]])
def test_runs_go_on_over_batches(sizes: list[int]) -> None:
    rows = pa.table({"cluster": [0, 0, 1, 3, 3, 3], "id": range(6)})
    ends = np.cumsum(sizes).tolist()
    batches = [rows.slice(stop - size, size) for stop, size in zip(ends, sizes, strict=True)]
    found = [run["id"].to_pylist() for run in runs_of_equal(batches, "cluster")]
    assert found == ([[0, 1], [2], [3, 4, 5]] if sizes else [])


def test_all_clusters_are_read_by_one_query(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self, sql: Any) -> None:
            self.sql_connection = sql

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sql_connection, name)

        def cursor(self) -> "Recorder":
            return Recorder(self.sql_connection.cursor())

        def sql(self, query: str) -> Any:
            queries.append(query)
            return self.sql_connection.sql(query)

    queries: list[str] = []
    monkeypatch.setattr(dedup, "CLUSTER_ROWS", 10)
    found = corpus(embeddings(np.random.default_rng(0).normal(size=(200, 8)).tolist()))
    monkeypatch.setattr(found, "_sql", Recorder(found._sql))
    found.reject_semantic_duplicates(0.95)
    assert sum("from assigned" in query for query in queries) == 1


def test_published_images_reject_those_of_like_meaning_even_if_they_are_alike_themselves() -> None:
    def named(rows: pa.Table, names: str) -> pa.Table:
        return rows.append_column("image_id", pa.array(list(names)))

    published = named(embeddings(directions(0, 20, 41), "a"), "xyz")
    found = corpus(named(embeddings(directions(40)), "w"), published.drop_columns(["embedding"]))
    known = published.drop_columns(["source", "row"]).slice(0, 2)  # what was published before is of unknown meaning
    found.reject_semantic_duplicates(0.9, known)
    assert found.decisions()["duplicate_of"].to_pylist() == [1]


def test_planted_copies_of_like_meaning_are_found_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "CLUSTER_ROWS", 250)
    rng = np.random.default_rng(0)

    def noised(unit_ND: np.ndarray, norm: float) -> np.ndarray:
        return unit_ND + norm * rng.normal(size=unit_ND.shape) / np.sqrt(unit_ND.shape[1])

    topics = rng.normal(size=(20, 64)) / 8
    images = noised(topics[rng.integers(0, 20, 1500)], 0.8)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    copied = rng.integers(0, 1500, 500)
    alike = rng.integers(0, 1500, 500)
    # Cosines of about 0.98 with what was copied, and of about 0.86 with what is alike.
    rows = np.concatenate([images, noised(images[copied], 0.2), noised(images[alike], 0.6)])
    image_of = np.concatenate([np.arange(1500), copied, np.arange(1500, 2000)])
    order = rng.permutation(len(rows))
    found = corpus(embeddings(rows[order].tolist()))
    found.reject_semantic_duplicates(0.95)
    of = image_of[order].tolist()
    rejected = fates(found)
    right = sum(of[row] == of[other] for row, other in rejected.items() if other is not None)
    print(f"recall {right / 500:.4f}, precision {right / len(rejected):.4f}")
    assert right / 500 >= 0.95
    assert right / len(rejected) >= 0.99
    assert not set(rejected) & set(rejected.values())


def test_decisions_stay_readable_without_their_corpus() -> None:
    found = corpus(table(image_id=["x", "x", "y"]))
    found.reject_repeats("image_id", "duplicate_bytes")
    first = found.decisions()
    assert found.decisions().equals(first)
    del found
    assert first["id"].to_pylist() == [NEW + 1001]


def test_earlier_decisions_count() -> None:
    rows = table(image_id=["x", "x", "x"])
    first = corpus(rows)
    first.reject_repeats("image_id", "duplicate_bytes")
    earlier = first.decisions().slice(0, 1)
    again = Corpus(RowNumbering.of({"a": 1000, "s": 100_000, "z": 1000}), rows, decided=earlier)
    assert again.decisions().equals(earlier)
    again.reject_repeats("image_id", "duplicate_bytes")
    assert fates(again) == {1: 0, 2: 0}

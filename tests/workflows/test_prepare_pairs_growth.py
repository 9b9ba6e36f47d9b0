"""Lists of many kinds, tables that grow, rows that are tried again, scores, other storage."""

import dataclasses
import io
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import object_storage
import pytest
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs.fetch import FetchConfig
from data_prep.pairs.inputs import Columns
from data_prep.pairs.scores import ScoreConfig
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.errors import InputError
from workflows import prepare_pairs
from workflows.configs import pairs as configs
from workflows.configs.pairs import Run
from workflows.prepare_pairs import prepare

CAPTIONS = ["a red fire hydrant", "two cats on a sofa", "a cat", "a man with an umbrella", "a dog and a cat", "a sofa"]


class Shop(ThreadingHTTPServer):
    """A web site of pictures `/0.jpg`, `/1.jpg` ...; those of `broken` answer 503."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.broken: set[int] = set()
        self.requests: Counter[str] = Counter()
        self.quality = 95

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    """Draws the picture of a number."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        shop = self.server
        assert isinstance(shop, Shop)
        shop.requests[self.path] += 1
        stem = self.path[1:].partition("?")[0].removesuffix(".jpg")
        status, body = (200, picture(int(stem), shop.quality)) if stem.isdigit() else (404, b"")
        if stem.isdigit() and int(stem) in shop.broken:
            status, body = 503, b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to the console."""


def picture(number: int, quality: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def shop() -> Iterator[Shop]:
    with Shop() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def crawl_of(shop: Shop, root: Path, numbers: range, name: str = "list.tsv") -> Run:
    """A run over a list of the shop's pictures."""
    lines = [f"{shop.url}/{number}.jpg\t{CAPTIONS[number % len(CAPTIONS)]}\n" for number in numbers]
    (root / name).write_text("url\tcaption\n" + "".join(lines))
    fetch = FetchConfig(allow_networks=("127.0.0.1/32",), deadline_seconds=5.0, max_attempts=1)
    return Run(name="t", storage=str(root / "out"), urls=str(root / name), fetch=fetch, rows_per_shard=4, crawlers=0)


def rows(run: Run, table: str) -> list[dict[str, object]]:
    return tables.read_table(run.storage, table, run.name).to_pylist()


def files(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(run.storage).rglob("*") if path.suffix in (".tar", ".parquet")}


@pytest.mark.ray
def test_rows_of_a_new_list_are_added_and_published_files_stay(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    first = crawl_of(shop, tmp_path, range(6))
    prepare(first)
    before = files(first)
    requests = Counter(shop.requests)
    more = crawl_of(shop, tmp_path, range(4, 11), "more.tsv")
    with pytest.raises(
        InputError, match=r"other lists, expected --add to add rows, or a new --name \(of a training: --pairs\)"
    ):
        prepare(more)
    summary = prepare(dataclasses.replace(more, add=True))
    assert (summary.input, summary.kept, summary.rejected) == (13, 11, {"duplicate_url": 2})
    assert {path: path.read_bytes() for path in before} == before
    assert shop.requests["/4.jpg"] == requests["/4.jpg"] == 1
    pairs = rows(more, "pairs")
    assert sorted(str(row["url"]) for row in pairs) == sorted(f"{shop.url}/{number}.jpg" for number in range(11))
    digest = storage.sha256((tmp_path / "list.tsv").read_bytes())[:16]
    assert [row["duplicate_of"] for row in rows(more, "rejects")] == [
        {"source": digest, "row": 4}, {"source": digest, "row": 5},
    ]  # fmt: skip
    concepts = {row["name"]: row["image_count"] for row in rows(more, "concepts")}
    assert concepts["cat"] == 6
    assert prepare(dataclasses.replace(more, add=True)).reused
    both = dataclasses.replace(more, urls=str(tmp_path / "*.tsv"))
    assert prepare(both).reused


@pytest.mark.ray
def test_an_added_image_that_is_published_already_is_the_duplicate(
    ray_cluster: None, shop: Shop, tmp_path: Path
) -> None:
    first = crawl_of(shop, tmp_path, range(3))
    prepare(first)
    (tmp_path / "aa.tsv").write_text(f"url\tcaption\n{shop.url}/1.jpg?again\ta cat\n")
    run = dataclasses.replace(first, urls=str(tmp_path / "aa.tsv"), add=True)
    assert prepare(run).rejected == {"duplicate_bytes": 1}
    (reject,) = rows(run, "rejects")
    digest = storage.sha256((tmp_path / "list.tsv").read_bytes())[:16]
    assert reject["duplicate_of"] == {"source": digest, "row": 1}


@pytest.mark.ray
def test_rejected_rows_alone_are_tried_again_on_request(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    shop.broken = {1, 5, 6}
    run = crawl_of(shop, tmp_path, range(10))
    (tmp_path / "list.tsv").write_text((tmp_path / "list.tsv").read_text() + f"{shop.url}/none.jpg\ta cat\n")
    summary = prepare(run)
    assert (summary.kept, summary.rejected) == (7, {"http_status": 4})
    before, requests = files(run), Counter(shop.requests)
    shop.broken = {6}
    again = prepare(dataclasses.replace(run, retry=("http_status",)))
    assert (again.input, again.kept, again.rejected) == (11, 9, {"http_status": 2})
    asked = shop.requests - requests
    assert sorted(path for path in asked if path != "/robots.txt") == ["/1.jpg", "/5.jpg", "/6.jpg", "/none.jpg"]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(str(row["url"]).rpartition("/")[2] for row in rows(run, "rejects")) == ["6.jpg", "none.jpg"]
    assert len({row["image_id"] for row in rows(run, "pairs")}) == 9
    shop.broken = set()
    patient = dataclasses.replace(run.fetch, deadline_seconds=run.fetch.deadline_seconds + 1)
    last = prepare(dataclasses.replace(run, retry=("http_status",), fetch=patient))  # a retry may fetch otherwise
    assert (last.kept, last.rejected) == (10, {"http_status": 1})
    root = tables.table_uri(run.storage, "pairs", run.name)
    for row in rows(run, "pairs"):
        image = storage.read_bytes(storage.join(root, str(row["shard"])), offset=row["offset"], size=row["size"])
        assert storage.sha256(image) == row["image_id"]


def test_what_cannot_be_tried_again_is_told(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("url\tcaption\nhttp://a/b\tc\n")
    run = Run(name="t", storage=str(tmp_path), urls=str(tmp_path / "list.tsv"))
    with pytest.raises(InputError, match=r"--retry: .*pairs/t is not published yet"):
        prepare(dataclasses.replace(run, retry=("timeout",)))
    with pytest.raises(InputError, match=r"--retry nonsense: unknown reason"):
        prepare(dataclasses.replace(run, retry=("nonsense",)))


@pytest.mark.ray
def test_many_lists_without_headers_are_one_input(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    for part in range(3):
        lines = [f"a cat {number}\t{shop.url}/{number}.jpg\n" for number in range(part * 3, part * 3 + 3)]
        (tmp_path / f"lists/{part}.tsv").write_text("".join(lines))
    run = crawl_of(shop, tmp_path, range(1))
    run = dataclasses.replace(run, urls=str(tmp_path / "lists"), columns=Columns(header=("caption", "url")))
    summary = prepare(run)
    assert (summary.input, summary.kept) == (9, 9)
    assert len({row["source"] for row in rows(run, "pairs")}) == 3
    (tmp_path / "lists/copy.tsv").write_bytes((tmp_path / "lists/0.tsv").read_bytes())
    with pytest.raises(InputError, match=r"copy\.tsv: holds the same as .*0\.tsv|0\.tsv: holds the same"):
        prepare(run)


@pytest.mark.ray
def test_without_a_vocabulary_concepts_are_nouns(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    run = dataclasses.replace(crawl_of(shop, tmp_path, range(6)), min_images=1)
    prepare(run)
    names = [row["name"] for row in rows(run, "concepts")]
    assert names == ["cat", "dog", "fire hydrant", "man", "sofa", "umbrella"]


@pytest.mark.ray
def test_shards_end_at_their_size_and_boilerplate_is_rejected(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    run = crawl_of(shop, tmp_path, range(12))
    corpus = dataclasses.replace(run.corpus, max_caption_uses=1)
    size = 20_000
    run = dataclasses.replace(run, rows_per_shard=12, max_shard_bytes=size, name="small")
    prepare(run)
    sizes = [path.stat().st_size for path in Path(run.storage, "pairs/small/shards").iterdir()]
    assert max(sizes) <= size < sum(sizes)
    assert len({row["shard"] for row in rows(run, "pairs")}) == len(sizes) > 2
    other = prepare(dataclasses.replace(run, corpus=corpus, name="plain"))
    assert (other.kept, other.rejected) == (0, {"caption_boilerplate": 12})


@pytest.mark.ray
def test_scores_are_a_table_and_low_ones_are_rejected(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    scores = ScoreConfig(scorers={"light": "example_scorer:Brightness"}, minimum={"light": 0.5})
    run = dataclasses.replace(crawl_of(shop, tmp_path, range(12)), scores=scores)
    summary = prepare(run)
    assert summary.rejected.keys() == {"low_score"}
    assert summary.kept + summary.rejected["low_score"] == 12
    table = {row["image_id"]: row["light"] for row in rows(run, "scores")}
    assert table.keys() == {row["image_id"] for row in rows(run, "pairs")}
    assert all(isinstance(value, float) and value >= 0.5 for value in table.values())
    assert not any(name.startswith("score_") for row in rows(run, "pairs") for name in row)


@pytest.mark.slow
@pytest.mark.ray
def test_added_images_of_like_meaning_fall_to_published_ones(ray_cluster: None, shop: Shop, tmp_path: Path) -> None:
    save_clip(Clip(ClipConfig()), tmp_path / "clip")
    first = crawl_of(shop, tmp_path, range(3))
    first = dataclasses.replace(first, corpus=dataclasses.replace(first.corpus, near_bits=None, semantic_cosine=0.999))
    first = dataclasses.replace(first, corpus=dataclasses.replace(first.corpus, semantic_model=str(tmp_path / "clip")))
    assert prepare(first).kept == 3
    known = {row["image_id"]: row["embedding"] for row in rows(first, "scores")}
    assert known.keys() == {row["image_id"] for row in rows(first, "pairs")}
    shop.quality = 94  # other bytes of the same pictures
    (tmp_path / "more.tsv").write_text(f"url\tcaption\n{shop.url}/7.jpg\ta cat\n{shop.url}/1.jpg?again\ta cat\n")
    more = dataclasses.replace(first, urls=str(tmp_path / "more.tsv"), add=True)
    summary = prepare(more)
    assert (summary.kept, summary.rejected) == (4, {"semantic_duplicate": 1})
    (reject,) = rows(more, "rejects")
    digest = storage.sha256((tmp_path / "list.tsv").read_bytes())[:16]
    assert reject["duplicate_of"] == {"source": digest, "row": 1}


def test_a_missing_model_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("url\tcaption\nhttp://a/b\tc\n")
    run = Run(name="t", storage=str(tmp_path / "out"), urls=str(tmp_path / "list.tsv"))
    with pytest.raises(InputError, match="no CLIP checkpoint"):
        prepare(dataclasses.replace(run, scores=ScoreConfig(scorers={"clip": str(tmp_path / "none")})))
    assert not (tmp_path / "out").exists()


def test_lists_and_tables_may_lie_in_object_storage(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crawl_of(shop, tmp_path, range(6))
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        storage.write_bytes("s3://bucket/lists/a.tsv", (tmp_path / "list.tsv").read_bytes())
        flags = ["--config", "web", "--name", "t", "--storage", "s3://bucket/ovd", "--urls", "s3://bucket/lists/*.tsv"]
        flags += ["--fetch.allow-networks", "127.0.0.1/32", "--rows-per-shard", "4"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, prepare_pairs.__file__, *flags],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert "6 of 6 rows kept" in done.stdout
        pairs = tables.read_table("s3://bucket/ovd", "pairs", "t").to_pylist()
        for row in pairs:
            shard = f"s3://bucket/ovd/pairs/t/{row['shard']}"
            image = storage.read_bytes(shard, offset=row["offset"], size=row["size"])
            assert storage.sha256(image) == row["image_id"]
        assert len(pairs) == 6
        assert not [key for key in object_storage.keys(variables) if "staging" in key or key.endswith(".tmp")]


def test_published_corpora_have_configs() -> None:
    assert {"cc3m", "coyo", "laion"} <= configs.CONFIGS.keys()
    assert configs.laion().columns == Columns(url="URL", caption="TEXT")
    assert configs.coyo().columns == Columns(caption="text")
    assert configs.cc3m().columns.header == ("caption", "url")

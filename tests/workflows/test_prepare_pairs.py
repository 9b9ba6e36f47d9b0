import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import storage, tables
from data_prep.pairs import shuffle
from data_prep.pairs.fetch import FetchConfig
from data_prep.parts import Pool
from data_prep.pictograms import webserver, website
from ovd_models.errors import InputError
from workflows import prepare_pairs
from workflows.common import cluster
from workflows.configs import pairs as configs
from workflows.configs.pairs import Run
from workflows.inputs.pairs import crawl_steps, crawler_pool, pictogram_site
from workflows.prepare_pairs import Summary, prepare, prepare_local

SCRIPT = Path(prepare_pairs.__file__)
TABLES = ("pairs", "rejects", "concepts", "groups")


def small_run(root: Path, urls: Path) -> Run:
    run = dataclasses.replace(configs.smoke(), name="t", storage=str(root), urls=str(urls))
    patient = dataclasses.replace(run.fetch, deadline_seconds=5.0)  # a busy machine is no dead host
    return dataclasses.replace(run, site_pictures=0, site_scenes=0, rows_per_shard=32, rows_per_part=16, fetch=patient)


def rows_of(root: str | Path, name: str = "t") -> dict[str, list[dict[str, Any]]]:
    return {table: tables.read_table(str(root), table, name).to_pylist() for table in TABLES}


@pytest.fixture(scope="module")
def served_site(small_site: Path) -> Iterator[str]:
    """A server of its own: that of the session may have ended by now."""
    with webserver.serve_site(small_site) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def crawled(
    ray_cluster: None, small_site: Path, served_site: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Run, Summary]]:
    run = small_run(tmp_path_factory.mktemp("crawled"), small_site / "urls.tsv")
    yield run, prepare(run)


def outcomes_of(found: dict[str, list[dict[str, Any]]]) -> dict[int, tuple[object, ...]]:
    """Stage, reason, survivor and caption of each row."""
    outcomes = {row["row"]: (None, None, None, row["caption"]) for row in found["pairs"]}
    for row in found["rejects"]:
        assert row["row"] not in outcomes
        survivor = row["duplicate_of"] and row["duplicate_of"]["row"]
        outcomes[row["row"]] = (row["stage"], row["reason"], survivor, None)
    return outcomes


def expected_of(site: Path) -> dict[int, tuple[object, ...]]:
    """The same as the site's faults imply."""
    rows = pq.read_table(site / "expected.parquet").to_pylist()
    return {row["row"]: (row["stage"], row["reason"], row["duplicate_of"], row["clean_caption"]) for row in rows}


@pytest.mark.ray
def test_kept_and_rejected_rows_are_what_the_faults_imply(crawled: tuple[Run, Summary], small_site: Path) -> None:
    run, summary = crawled
    expected = expected_of(small_site)
    assert outcomes_of(rows_of(run.storage)) == expected
    assert (summary.input, summary.kept, sum(summary.rejected.values())) == (len(expected), 180, len(expected) - 180)


@pytest.mark.slow
@pytest.mark.ray
def test_the_demos_whole_site_comes_out_as_its_faults_imply(ray_cluster: None, tmp_path: Path) -> None:
    with pictogram_site(dataclasses.replace(configs.pictograms(), storage=str(tmp_path))) as run:
        summary = prepare(run)
        site = Path(run.urls).parent
    assert outcomes_of(rows_of(tmp_path, "pictograms")) == expected_of(site)
    assert summary.kept == 16_000


@pytest.mark.ray
def test_a_crawl_inside_the_driver_gives_the_same_bytes_and_starts_no_ray(
    crawled: tuple[Run, Summary], tmp_path: Path
) -> None:
    run, summary = crawled
    program = (
        "import dataclasses, os, sys\n"
        "import ray\n"
        "from workflows import prepare_pairs\n"
        "from workflows.configs import pairs as configs\n"
        "run = dataclasses.replace(configs.smoke(), name='t', storage=sys.argv[1], urls=sys.argv[2])\n"
        "fetch = dataclasses.replace(run.fetch, deadline_seconds=5.0)\n"
        "run = dataclasses.replace(run, site_pictures=0, site_scenes=0, rows_per_shard=32, rows_per_part=16)\n"
        "os.cpu_count = lambda: 2\n"
        "found = prepare_pairs.prepare(dataclasses.replace(run, fetch=fetch))\n"
        "print(found.kept, ray.is_initialized())\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), run.urls]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"{summary.kept} False"
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,.]+) rows/s", found.stdout)]
    assert rates
    assert max(rates) < 10_000  # they tell of the whole crawl
    assert rows_of(tmp_path)["groups"] == rows_of(run.storage)["groups"]
    assert outcomes_of(rows_of(tmp_path)) == outcomes_of(rows_of(run.storage))
    assert pair_files(tmp_path) == pair_files(Path(run.storage))


@pytest.mark.ray
def test_a_crawl_inside_the_driver_of_a_job_that_has_a_ray_gives_the_same_bytes(
    crawled: tuple[Run, Summary], tmp_path: Path
) -> None:
    run, _ = crawled
    prepare(dataclasses.replace(run, storage=str(tmp_path), crawlers=0))
    assert pair_files(tmp_path) == pair_files(Path(run.storage))


@pytest.mark.ray
def test_every_pair_is_one_range_read_of_its_shard(crawled: tuple[Run, Summary], small_site: Path) -> None:
    run, _ = crawled
    root = tables.table_uri(run.storage, "pairs", run.name)
    for row in rows_of(run.storage)["pairs"]:
        image = storage.read_bytes(storage.join(root, row["shard"]), offset=row["offset"], size=row["size"])
        index = int(row["url"].rpartition("/")[2].removesuffix(".jpg"))
        if "/near/" not in row["url"]:
            assert image == website.image_path(small_site, index).read_bytes()
            assert row["width"] == row["original_width"] == (64 if index < 120 else 128)
        assert storage.sha256(image) == row["image_id"]
    with tarfile.open(next(Path(root).glob("shards/*-000000.tar"))) as tar:
        assert tar.getnames()[0].endswith(".jpg")


@pytest.mark.ray
def test_groups_are_the_images_whose_captions_name_a_concept(crawled: tuple[Run, Summary]) -> None:
    run, summary = crawled
    found = rows_of(run.storage)
    concepts, groups = found["concepts"], found["groups"]
    assert len(concepts) == summary.concepts > 40
    assert [concept["concept_id"] for concept in concepts] == list(range(len(concepts)))
    for concept in concepts:
        members = groups[concept["start"] : concept["stop"]]
        assert len(members) == concept["image_count"] >= 2
        assert {member["concept_id"] for member in members} == {concept["concept_id"]}
        images = [member["image_id"] for member in members]
        assert images == sorted(set(images))
        assert all(concept["name"] in member["caption"] for member in members)
        assert all(concept["concept_id"] in member["concept_ids"] for member in members)


@pytest.mark.ray
def test_published_tables_are_reused_and_never_overwritten(crawled: tuple[Run, Summary]) -> None:
    run, summary = crawled
    before = time.time()
    again = prepare(run)
    assert again == dataclasses.replace(summary, reused=True)
    assert not (Path(run.storage) / "staging/pairs/t").exists() or not any(
        (Path(run.storage) / "staging/pairs/t").iterdir()
    )
    assert all(path.stat().st_mtime < before for path in (Path(run.storage) / "pairs").rglob("*") if path.is_file())
    with pytest.raises(InputError, match=r"made from another config \(other min_images\), expected the same one"):
        prepare(dataclasses.replace(run, min_images=3))
    patient = dataclasses.replace(run.fetch, deadline_seconds=run.fetch.deadline_seconds + 1)
    with pytest.raises(InputError, match=r"other fetch\.deadline_seconds"):
        prepare(dataclasses.replace(run, fetch=patient))
    with pytest.raises(InputError, match=r"other fetch\.deadline_seconds, min_images"):
        prepare(dataclasses.replace(run, fetch=patient, min_images=3, retry=("timeout",)))


@pytest.mark.ray
def test_a_copied_storage_never_touches_the_first(crawled: tuple[Run, Summary], tmp_path: Path) -> None:
    run, summary = crawled
    shutil.copytree(Path(run.storage) / "pairs", tmp_path / "copy/pairs")
    staging = tables.read_manifest(run.storage, "pairs", "t").details["staging"]
    kept = Path(storage.join(run.storage, staging), "file")
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert prepare(dataclasses.replace(run, storage=str(tmp_path / "copy"))) == dataclasses.replace(
        summary, reused=True
    )
    assert kept.exists()
    assert prepare(run).reused and not kept.parent.exists()


@pytest.mark.ray
def test_rows_do_not_depend_on_partitions_or_on_the_kind_of_storage(
    crawled: tuple[Run, Summary], tmp_path: Path
) -> None:
    run, _ = crawled
    uri = tmp_path.as_uri()
    prepare(dataclasses.replace(run, storage=uri, rows_per_shard=90, rows_per_part=7, crawlers=2))
    one, other = rows_of(run.storage), rows_of(uri)
    for table in TABLES:
        for rows in (one[table], other[table]):
            for row in rows:
                for placed in ("shard", "offset", "key"):
                    row.pop(placed, None)
                if table == "rejects":
                    row.pop("detail")  # may tell how long something took
        assert one[table] == other[table]


@pytest.mark.slow
@pytest.mark.ray
def test_rows_compared_by_a_cluster_are_the_same(
    crawled: tuple[Run, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "PARTITION_ROWS", 100)
    run, _ = crawled
    prepare(dataclasses.replace(run, storage=str(tmp_path), corpus=dataclasses.replace(run.corpus, shuffle_rows=0)))
    assert outcomes_of(rows_of(tmp_path)) == outcomes_of(rows_of(run.storage))
    for table in ("pairs", "concepts", "groups"):
        assert rows_of(tmp_path)[table] == rows_of(run.storage)[table]


@pytest.mark.ray
def test_a_killed_run_continues_and_gives_the_same_bytes(
    crawled: tuple[Run, Summary], served_site: str, tmp_path: Path
) -> None:
    undisturbed, _ = crawled
    run = dataclasses.replace(undisturbed, storage=str(tmp_path))
    staged = kill_after_parts(run, 4)
    before = requests_of(served_site)
    prepare(run)
    after = requests_of(served_site)
    assert 4 <= len(staged) < 26
    done = [url.removeprefix(served_site) for url in staged_urls(staged)]
    assert len(done) >= 20
    assert [path for path in done if after.get(path) != before.get(path)] == []
    assert rows_of(run.storage)["groups"] == rows_of(undisturbed.storage)["groups"]
    assert len(pair_files(tmp_path)) >= 20
    assert pair_files(tmp_path) == pair_files(Path(undisturbed.storage))
    assert not any(tmp_path.rglob("*.tmp"))


def pair_files(root: Path) -> dict[str, bytes]:
    """The bytes of the table `pairs`, but the manifest's, which tells how long it took."""
    files = [path for path in (root / "pairs").rglob("*.*") if path.name != "manifest.json"]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def kill_after_parts(run: Run, count: int) -> dict[str, bytes]:
    """Start the run in a process of its own, kill it when it has staged `count` parts, and return the parts."""
    program = (
        "import dataclasses, sys\nfrom workflows import prepare_pairs\nfrom workflows.configs import pairs as configs\n"
        "run = configs.smoke()\n"
        "run = dataclasses.replace(run, name='t', storage=sys.argv[1], urls=sys.argv[2],\n"
        "    fetch=dataclasses.replace(run.fetch, deadline_seconds=5.0),\n"
        "    site_pictures=0, site_scenes=0, rows_per_shard=32, rows_per_part=16, parts_per_crawler=1)\n"
        "prepare_pairs.prepare(run)\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", program, run.storage, run.urls],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    folder = Path(run.storage) / "staging/pairs/t"
    while job.poll() is None and len(list(folder.glob("*/parts/*.parquet"))) < count:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(2)  # its workers may write a last part before they notice
    assert not (Path(run.storage) / "pairs").exists(), "the run was to be killed before it was done"
    return {path.name: path.read_bytes() for path in folder.glob("*/parts/*.parquet")}


def staged_urls(staged: dict[str, bytes]) -> list[str]:
    return [url for part in staged.values() for url in pq.read_table(pa.BufferReader(part))["url"].to_pylist() if url]


def requests_of(base_url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{base_url}/_requests") as response:
        counts: dict[str, int] = json.load(response)
    return counts


@pytest.mark.ray
def test_local_files_take_the_same_path(ray_cluster: None, small_site: Path, tmp_path: Path) -> None:
    images = [str(website.image_path(small_site, index)) for index in (0, 1)] + [str(tmp_path / "copy.jpg")]
    (tmp_path / "copy.jpg").write_bytes(Path(images[0]).read_bytes())
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    rows = pa.table(
        {
            "url": [*images, str(tmp_path / "broken.jpg")],
            "caption": ["a cat and two dogs", "cats", "a cat", "a cat"],
            "source_id": [7, 8, 9, 10],
        }
    )
    run = Run(name="t", storage=str(tmp_path / "out"), names=("cat", "dog"), rows_per_shard=10)
    summary = prepare_local(run, rows)
    found = rows_of(run.storage)
    assert (summary.kept, summary.rejected) == (2, {"duplicate_bytes": 1, "not_an_image": 1})
    assert [row["source_id"] for row in found["pairs"]] == [7, 8]
    assert [row["url"] for row in found["pairs"]] == images[:2]
    assert [(row["name"], row["image_count"]) for row in found["concepts"]] == [("cat", 2)]
    with pytest.raises(InputError, match=r"missing\.jpg: no such file \(row 1\)"):
        prepare_local(run, pa.table({"url": [images[0], "missing.jpg"], "caption": ["a", "b"]}))


def test_hosts_are_spared_by_all_crawlers_that_a_cluster_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_host(run: Run) -> tuple[Pool, int]:
        pool = crawler_pool(run)
        with crawl_steps(run, pool, are_files=False) as steps:
            return pool, steps.fetcher.args[0].per_host  # type: ignore[union-attr]

    empty = {"start_ray": lambda: None, "is_joined": lambda: True, "cores": lambda: 1, "most": lambda _: 12.0}
    for name, answer in empty.items():  # an autoscaling cluster before its first worker
        monkeypatch.setattr(cluster, name, answer)
    run = Run(name="t", fetch=FetchConfig(per_host=16))
    pool, requests = per_host(run)
    assert (pool.workers, pool.grows, pool.cpus) == (1, True, 1.5)
    assert requests == 16 // (12 / pool.cpus)
    assert per_host(dataclasses.replace(run, crawlers=4))[1] == 4
    assert per_host(dataclasses.replace(run, crawlers=0))[1] == 16


def test_a_job_leaves_the_list_of_another_one_with_the_same_files(
    small_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(*arguments: Any, **options: Any) -> Summary:
        monkeypatch.setattr(prepare_pairs, "_prepare", prepare_it)
        prepare_local(dataclasses.replace(run, name="other"), rows)
        return prepare_it(*arguments, **options)

    prepare_it = prepare_pairs._prepare
    monkeypatch.setattr(prepare_pairs, "_prepare", overtaken)
    rows = pa.table({"url": [str(website.image_path(small_site, 0))], "caption": ["a cat and two dogs"]})
    run = Run(name="t", storage=str(tmp_path), names=("cat", "dog"), crawlers=0)
    assert prepare_local(run, rows).kept == 1
    assert rows_of(tmp_path, "other")["pairs"] == rows_of(tmp_path)["pairs"]


@pytest.mark.ray
def test_a_list_of_nothing_but_rejects_gives_empty_tables(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("url\tcaption\nfile:///etc/passwd\ta cat\nfile:///etc/passwd\ta cat\n\ta cat\n")
    run = Run(name="t", storage=str(tmp_path), urls=str(tmp_path / "list.tsv"), names=("cat",), rows_per_shard=1)
    summary = prepare(run)
    assert (summary.kept, summary.rejected) == (0, {"bad_url": 2, "duplicate_url": 1})
    found = rows_of(tmp_path)
    assert [len(found[table]) for table in TABLES] == [0, 3, 0, 0]


def test_a_crawl_that_keeps_nothing_fails_and_says_what_helps(tmp_path: Path) -> None:
    (tmp_path / "list.tsv").write_text("url\tcaption\nhttp://127.0.0.1:9/a.jpg\ta cat\nhttp://10.0.0.1/b.jpg\ta dog\n")
    flags = ["--config", "web", "--urls", "list.tsv", "--storage", "store", "--crawlers", "0"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: no row was kept, 2 of 2 rejected for forbidden_address: private addresses are not fetched; "
        "`--retry forbidden_address --fetch.allow-networks 127.0.0.1/32` fetches those of a network"
    )
    assert "next:" not in done.stdout
    allowed = [*flags, "--fetch.allow-networks", "127.0.0.1/32"]
    again = subprocess.run([sys.executable, str(SCRIPT), *allowed], capture_output=True, text=True, cwd=tmp_path)
    assert "(other fetch.allow_networks), expected --retry REASON to fetch" in again.stderr
    retried = [sys.executable, str(SCRIPT), *allowed, "--retry", "forbidden_address"]
    done = subprocess.run(retried, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("error: no row was kept, 1 of 2 rejected for connect: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nonsense"], "error: --config nonsense: unknown, expected one of smoke, pictograms, web"),
        (["--config", "web", "--urls", "none.tsv"], "none.tsv: cannot be read, expected a URL list"),
        (["--config", "web", "--urls", "list.tsv"], "list.tsv: no column 'url', expected it among: link, caption"),
        (["--config", "web"], "--urls: missing, expected"),
        (["--config", "smoke", "--parts-per-crawler", "0"], "--parts-per-crawler 0: expected 1 or more"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "list.tsv").write_text("link\tcaption\na\tb\n")
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

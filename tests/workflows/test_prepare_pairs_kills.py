"""Kill the driver, a fetching actor or a node at random points: the same tables come out, little is fetched again."""

import json
import os
import random
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import killing
import pytest
from killing import MOST_REPEATED, children_named

from data_prep import tables
from data_prep.pictograms import webserver, website

pytestmark = pytest.mark.slow
TABLES = ("pairs", "rejects", "concepts", "groups")
PROGRAM = """
import dataclasses, sys
import ray
from killing import join_cluster_that_loses_a_node
from workflows import prepare_pairs
from workflows.configs import pairs as configs

urls, storage, node_dies_after, cpus = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
run = configs.pictograms()
fetch = dataclasses.replace(run.fetch, deadline_seconds=10.0)
run = dataclasses.replace(
    run, name="t", storage=storage, urls=urls, site_pictures=0, site_scenes=0, fetch=fetch,
    rows_per_shard=200, crawlers=1,
)
if cpus:
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
if node_dies_after:
    cluster = join_cluster_that_loses_a_node(storage, "staging/pairs/t/*/parts/*.parquet", node_dies_after)
    run = dataclasses.replace(run, crawlers=2)  # one on each
prepare_pairs.prepare(run)
print("prepared", flush=True)
"""


@dataclass(frozen=True)
class Undisturbed:
    site: Path
    root: Path
    requests: int


def start(urls: Path, root: Path, node_dies_after: float = 0.0, cpus: int = 0) -> subprocess.Popen[str]:
    return killing.start(PROGRAM, urls, root, node_dies_after, cpus)


def finish(job: subprocess.Popen[str]) -> str:
    return killing.finish(job, 600)


def requests_of(base_url: str) -> int:
    with urllib.request.urlopen(f"{base_url}/_requests") as response:
        return sum(json.load(response).values())


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the tables but the manifests, which tell how long it took, and `rejects`."""
    files = [path for table in TABLES if table != "rejects" for path in (root / table).rglob("*.*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.name != "manifest.json"}


def totals(root: Path) -> tuple[dict[str, object], object]:
    """What the manifest of `pairs` counts, and its files."""
    manifest = tables.read_manifest(str(root), "pairs", "t")
    return {**manifest.details["summary"], "seconds": 0}, manifest.files


def rejects(root: Path) -> list[dict[str, object]]:
    """Without what depends on the moment: a server that fails once does so on the first request only."""
    rows = tables.read_table(str(root), "rejects", "t").drop_columns(["detail", "attempts"])
    return rows.to_pylist()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    site, root = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("undisturbed")
    website.build_site(site, num_pictures=1450, num_scenes=500, rates={"hangs": 0.0, "disconnects": 0.0})
    with webserver.serve_site(site) as base_url:
        finish(start(site / "urls.tsv", root))
        requests = requests_of(base_url)
    return Undisturbed(site, root, requests)


def wait_for_parts(job: subprocess.Popen[str], root: Path) -> None:
    while job.poll() is None and not list(root.glob("staging/pairs/t/*/parts/*.parquet")):
        time.sleep(0.02)


@pytest.mark.parametrize("trial", range(20))
def test_a_kill_at_a_random_point_changes_nothing(undisturbed: Undisturbed, tmp_path: Path, trial: int) -> None:
    kind, delay = ("driver", "actor", "node")[trial % 3], random.Random(trial).uniform(0.05, 5.0)
    urls = undisturbed.site / "urls.tsv"
    with webserver.serve_site(undisturbed.site) as base_url:
        job = start(urls, tmp_path, delay if kind == "node" else 0.0)
        if kind == "node":
            assert "node removed" in finish(job)
        else:
            wait_for_parts(job, tmp_path)
            time.sleep(delay)
            if kind == "actor":
                for pid in children_named(job, "MapWorker"):
                    os.kill(pid, signal.SIGKILL)
                finish(job)
            else:
                os.kill(job.pid, signal.SIGKILL)
                job.communicate()
                time.sleep(2)  # its workers may write a last part before they notice
                finish(start(urls, tmp_path))
        refetched = requests_of(base_url) / undisturbed.requests - 1
    print(f"{kind} killed after {delay:.1f} s: {refetched:.2%} of the requests were made again")
    found, expected = contents(tmp_path), contents(undisturbed.root)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert totals(tmp_path) == totals(undisturbed.root)
    assert rejects(tmp_path) == rejects(undisturbed.root)
    assert refetched <= MOST_REPEATED
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_no_number_of_cpus_is_too_few(undisturbed: Undisturbed, tmp_path: Path, cpus: int) -> None:
    with webserver.serve_site(undisturbed.site):
        finish(start(undisturbed.site / "urls.tsv", tmp_path, cpus=cpus))
    assert contents(tmp_path) == contents(undisturbed.root)

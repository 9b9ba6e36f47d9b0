import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import tables
from data_prep.pictograms import webserver, website
from data_prep.progress import Progress


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_a_site_is_built_then_served(tmp_path: Path) -> None:
    expected = website.build_site(tmp_path, num_pictures=3, num_scenes=2)
    with webserver.serve_site(tmp_path) as base_url:
        lines = (tmp_path / "urls.tsv").read_text().splitlines()
        status, body = get(f"{base_url}/images/0.jpg")
    assert status == 200
    assert body == website.image_path(tmp_path, 0).read_bytes()
    assert lines[0] == "url\tcaption"
    assert len(lines) == 1 + expected.num_rows


def test_the_same_seed_gives_the_same_bytes_in_any_split(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    first = list(website.render_images(one, 0, 6, 4, 5))
    second = [*website.render_images(two, 0, 3, 4, 5), *website.render_images(two, 3, 6, 4, 5)]
    assert first == second
    for index in range(6):
        assert website.image_path(one, index).read_bytes() == website.image_path(two, index).read_bytes()


def test_images_rendered_in_child_processes_equal_those_rendered_here(tmp_path: Path) -> None:
    captions = website._render_elsewhere(Progress("web site", "images", 3), (tmp_path, 2, 5, 4, 5))
    assert captions == list(website.render_images(tmp_path / "here", 2, 5, 4, 5))
    assert website.image_path(tmp_path, 4).read_bytes() == website.image_path(tmp_path / "here", 4).read_bytes()


def test_every_good_image_is_kept_exactly_once(small_site: Path) -> None:
    expected = pq.read_table(small_site / "expected.parquet").to_pylist()
    assert sum(row["stage"] is None for row in expected) == 180
    assert [row["row"] for row in expected] == list(range(len(expected)))


def test_every_fault_occurs_and_names_a_reason_of_the_closed_list(small_site: Path) -> None:
    expected = pq.read_table(small_site / "expected.parquet").to_pylist()
    kinds = Counter(row["kind"] for row in expected)
    assert set(kinds) == {"images", *website.RATES}
    for row in expected:
        assert row["stage"] is None or row["reason"] in tables.REASONS[row["stage"]]


def test_duplicates_name_an_earlier_row(small_site: Path) -> None:
    expected = pq.read_table(small_site / "expected.parquet").to_pylist()
    duplicates = [row for row in expected if row["stage"] == "dedup"]
    assert {row["reason"] for row in duplicates} == {"duplicate_url", "duplicate_bytes", "near_duplicate"}
    for row in expected:
        assert (row["duplicate_of"] is not None) == (row["stage"] == "dedup")
    for row in duplicates:
        assert row["duplicate_of"] < row["row"]


def test_without_faults_every_row_is_good(tmp_path: Path) -> None:
    expected = website.build_site(tmp_path, num_pictures=2, num_scenes=0, rates=dict.fromkeys(website.RATES, 0.0))
    assert expected["kind"].to_pylist() == ["images", "images"]
    assert expected["stage"].null_count == 2
    with pytest.raises(ValueError, match="typo"):
        website.build_site(tmp_path, rates={"typo": 1.0})


def test_faults_are_played_over_http(small_site: Path) -> None:
    with webserver.serve_site(small_site) as base_url:
        assert get(f"{base_url}/missing/3.jpg")[0] == 404
        assert [get(f"{base_url}/flaky/4.jpg")[0] for _ in range(3)] == [500, 200, 200]
        assert get(f"{base_url}/redirects/5.jpg")[1] == website.image_path(small_site, 5).read_bytes()
        assert get(f"{base_url}/html/0.jpg")[1].startswith(b"<!DOCTYPE")
        assert get(f"{base_url}/images/999999.jpg")[0] == 404
        assert get(f"{base_url}/nonsense")[0] == 404
        counts = json.loads(get(f"{base_url}/_requests")[1])
    assert counts["/flaky/4.jpg"] == 3


def test_the_port_is_kept_from_one_serving_to_the_next(tmp_path: Path) -> None:
    website.build_site(tmp_path, num_pictures=1, num_scenes=0)
    with webserver.serve_site(tmp_path) as first:
        listed = (tmp_path / "urls.tsv").read_bytes()
    with webserver.serve_site(tmp_path) as second:
        assert second == first
        assert (tmp_path / "urls.tsv").read_bytes() == listed
        with webserver.serve_site(tmp_path) as third:  # taken, so another one
            assert third != second


def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    website.build_site(tmp_path, num_pictures=1, num_scenes=0)
    program = "import time\nfrom data_prep.pictograms.webserver import serve_site\n"
    program += f"with serve_site({str(tmp_path)!r}) as url:\n"
    program += "    print(url, flush=True)\n    time.sleep(60)\n"
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    base_url = parent.stdout.readline().strip()
    assert get(f"{base_url}/images/0.jpg")[0] == 200
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            get(f"{base_url}/images/0.jpg")
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent")


def test_a_folder_without_a_site_is_refused_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.pictograms.webserver", "--root", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "expected.parquet" in done.stderr

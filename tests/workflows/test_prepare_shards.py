"""WebDataset shards take the path of local files: the same rows come out, whatever wrote the shards."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import object_storage
import pyarrow as pa
import pytest
import webdataset
from formats import write_tar
from PIL import Image

from data_prep import storage, tables
from data_prep.pairs import files
from ovd_models.errors import InputError
from workflows import prepare_pairs
from workflows.configs.pairs import Run
from workflows.prepare_pairs import prepare, prepare_local

SCRIPT = Path(prepare_pairs.__file__)
TABLES = ("pairs", "rejects", "concepts", "groups")
CAPTIONS = ("a red <b>bus</b>", "two cats on a sofa", "a cat", "a dog and a sofa", "a dog")


def picture(seed: int, form: str = "JPEG", size: tuple[int, int] = (64, 48), quality: int = 95) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, form, quality=quality)
    return buffer.getvalue()


def samples() -> list[tuple[str, bytes, str | None]]:
    """Extension, content and caption: good ones of every format, and some for each stage that rejects."""
    good = [(("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG"))[number % 4] for number in range(12)]
    found: list[tuple[str, bytes, str | None]] = [
        (extension, picture(number, form), CAPTIONS[number % len(CAPTIONS)])
        for number, (extension, form) in enumerate(good)
    ]
    return [
        *found,
        ("jpg", picture(0), "a bus again"),  # duplicate_bytes
        ("jpg", picture(4, quality=90), "nearly a cat"),  # near_duplicate
        ("jpg", b"<html>", "a cat"),  # not_an_image
        ("png", picture(20, "PNG")[:200], "a cat"),  # truncated
        ("jpg", picture(21, size=(20, 20)), "a cat"),  # too_small
        ("jpg", picture(22), ""),  # caption_length
        ("jpg", picture(23), None),  # caption_length
        ("jpg", picture(24), "12 345 - 6"),  # caption_characters
    ]


def run_of(root: Path, name: str, **changes: Any) -> Run:
    """A run in the driver, in partitions of six rows."""
    run = Run(name=name, storage=str(root / "out"), crawlers=0, rows_per_shard=6, rows_per_part=4, min_images=1)
    return dataclasses.replace(run, **changes)


def write_shard(path: Path, content: list[tuple[str, bytes, str | None]]) -> str:
    with webdataset.TarWriter(str(path)) as writer:
        for number, (extension, image, caption) in enumerate(content):
            text = {} if caption is None else {"txt": caption}
            writer.write({"__key__": f"{number:09d}", extension: image, **text})
    return str(path)


def rows_of(run: Run) -> dict[str, list[dict[str, Any]]]:
    return {table: tables.read_table(run.storage, table, run.name).to_pylist() for table in TABLES}


def without_places(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Rows without what tells the list they come from."""
    for rows in found.values():
        for row in rows:
            for name in ("source", "url", "shard", "key"):
                row.pop(name, None)
            if row.get("duplicate_of"):
                row["duplicate_of"] = row["duplicate_of"]["row"]
    return found


def test_the_rows_are_those_of_a_list_of_the_same_files(tmp_path: Path) -> None:
    content = samples()
    shards = run_of(tmp_path, "shards", shards=write_shard(tmp_path / "a.tar", content))
    summary = prepare(shards)
    for number, (extension, image, _) in enumerate(content):
        (tmp_path / f"{number}.{extension}").write_bytes(image)
    listed = {
        "url": [str(tmp_path / f"{number}.{extension}") for number, (extension, _, _) in enumerate(content)],
        "caption": [caption for _, _, caption in content],
    }
    local = run_of(tmp_path, "local")
    assert dataclasses.replace(prepare_local(local, pa.table(listed)), seconds=summary.seconds) == summary
    assert summary.kept == 12
    assert summary.rejected == {
        "caption_characters": 1, "caption_length": 2, "duplicate_bytes": 1, "near_duplicate": 1, "not_an_image": 1,
        "too_small": 1, "truncated": 1,
    }  # fmt: skip
    found = rows_of(shards)
    for row in found["pairs"]:
        uri, _, place = row["url"].partition("#")
        offset, size = map(int, place.split("+"))
        extension, image, _ = content[row["row"]]
        assert (uri, storage.read_bytes(uri, offset=offset, size=size)) == (str(tmp_path / "a.tar"), image)
    assert [row["name"] for row in found["concepts"]] == ["bus", "cat", "dog", "sofa"]
    assert without_places(found) == without_places(rows_of(local))


def test_shards_of_img2dataset_keep_their_further_columns(tmp_path: Path) -> None:
    (tmp_path / "cc3m").mkdir()
    for shard in range(3):
        members: dict[str, bytes] = {}
        for number in range(4):
            key, error = f"{shard:05d}{number:04d}", "none" if shard == 1 else None
            about = {"caption": CAPTIONS[number], "url": f"http://web/{key}.jpg", "key": key, "status": "success"}
            about |= {"error_message": error, "width": 64, "height": 48, "exif": "{}", "similarity": 0.5 + number}
            members[f"{key}.jpg"] = picture(shard * 4 + number)
            members |= {f"{key}.json": json.dumps(about).encode(), f"{key}.txt": CAPTIONS[number].encode()}
        write_tar(tmp_path / f"cc3m/{shard:05d}.tar", members)
        (tmp_path / f"cc3m/{shard:05d}.parquet").write_bytes(b"not read")
        (tmp_path / f"cc3m/{shard:05d}_stats.json").write_text("{}")
    run = run_of(tmp_path, "all", shards=str(tmp_path / "cc3m/{00000..00002}.tar"))
    assert prepare(run).kept == 12
    row = rows_of(run)["pairs"][-1]
    expected = {"status": "success", "input_width": 64, "exif": "{}", "input_key": row["web_url"][11:20]}
    assert {name: row[name] for name in expected} == expected
    assert {row["similarity"] for row in rows_of(run)["pairs"]} == {0.5, 1.5, 2.5, 3.5}
    assert sorted(str(row["error_message"]) for row in rows_of(run)["pairs"]) == ["None"] * 8 + ["none"] * 4
    for same in ("cc3m", "cc3m/*", "cc3m/0000?.tar", "cc3m/0000{1,2,0}.tar"):
        assert prepare(dataclasses.replace(run, shards=str(tmp_path / same))).reused
    alone = run_of(tmp_path, "grown", shards=str(tmp_path / "cc3m/00000.tar"))
    prepare(alone)
    assert prepare(dataclasses.replace(alone, shards=run.shards, add=True)).kept == 12


def test_samples_that_cannot_be_used_are_rejects_with_their_reasons(tmp_path: Path) -> None:
    members = {f"x.y/{number}.JPG": picture(number) for number in range(4)}
    members |= {"x.y/3.txt": b"a cat", "4.jpg": picture(4), "4.json": b"{", "5.txt": b"a dog", "6.json": b"{}"}
    members |= {"7.b.jpg": picture(7), "7.b.txt": b"a cat", "8.jpg": picture(8), "8.txt": b"a dog"}
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar") as tar:
        last = tar.getmember("8.jpg")
    os.truncate(tmp_path / "a.tar", last.offset_data + last.size * 3 // 4)
    run = run_of(tmp_path, "t", shards=str(tmp_path / "a.tar"))
    summary = prepare(run)
    rejects = rows_of(run)["rejects"]
    assert summary.input == summary.kept + len(rejects)
    assert [row["stage"] for row in rejects] == ["filter"] * 3 + ["input"] * 4 + ["decode", "input"]
    assert [row["reason"] for row in rejects] == ["caption_length"] * 3 + ["bad_row"] * 4 + ["truncated", "bad_row"]
    problems = [row["detail"] for row in rejects if row["reason"] == "bad_row"]
    assert problems[0].startswith("4: its .json: Expecting property name")
    assert problems[1:4] == [
        "5: no image among its members (txt)",
        "6: no image among its members (json)",
        "7: no image among its members (b.jpg, b.txt)",
    ]
    assert problems[4].startswith("the shard is cut off or damaged from byte ")
    assert summary.kept == 1
    assert "rejected: input" in (tmp_path / "out/reports/pairs-t.html").read_text()
    with pytest.raises(InputError, match=r"--retry bad_row: a sample of a shard stays as it is"):
        prepare(dataclasses.replace(run, retry=("bad_row",)))


def test_a_run_that_ends_early_continues_and_reads_little_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", [("jpg", picture(number), "a cat") for number in range(40)])
    undisturbed = run_of(tmp_path / "one", "t", shards=shard, rows_per_shard=20, parts_per_crawler=2)
    prepare(undisturbed)
    reads: list[str] = []
    read = files.FileReader._read

    def ends_early(self: files.FileReader, url: str) -> bytes:
        reads.append(url)
        if len(reads) == 25:
            raise OSError("the network is gone")
        return read(self, url)

    monkeypatch.setattr(files.FileReader, "_read", ends_early)
    run = dataclasses.replace(undisturbed, storage=str(tmp_path / "two"))
    with pytest.raises(OSError, match="the network is gone"):
        prepare(run)
    before = len(reads)
    prepare(run)
    assert len(reads) - before <= 40 - (25 - 2 * 4 - 1)
    assert table_files(tmp_path / "two") == table_files(Path(undisturbed.storage))


def table_files(root: Path) -> dict[str, bytes]:
    """The files of `pairs`, but the manifest, which tells how long it took."""
    paths = [path for path in (root / "pairs").rglob("*.*") if path.name != "manifest.json"]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": "page.tar"}, "page.tar: no uncompressed tar file"),
        (
            {"shards": "texts.tar"},
            "texts.tar: has no images, expected members with the extensions jpg, jpeg, png, webp",
        ),
        ({"shards": "{good,texts}.tar"}, "texts.tar: has no images"),
        ({"shards": "empty.tar"}, "empty.tar: has no images"),
        ({"shards": "zipped.tar.gz"}, "zipped.tar.gz: unknown format, expected an uncompressed .tar shard"),
        ({"shards": "zipped.tar"}, "zipped.tar: no uncompressed tar file"),
        ({"shards": "{good,none}.tar"}, "none.tar: cannot be read, expected an uncompressed .tar shard"),
        ({"shards": "lists"}, "lists: cannot be read, expected an uncompressed .tar shard"),
        ({"shards": "{good.tar"}, "--shards {good.tar: Unbalanced braces"),
        ({"shards": "good.tar", "urls": "list.tsv"}, "--urls: given beside --shards, expected one of them"),
        (
            {"urls": "good.tar"},
            "good.tar: unknown format, expected a URL list (.tsv, .csv, .txt, .jsonl, .json or .parquet",
        ),
        ({"urls": "*.tar"}, "*.tar: cannot be read, expected a URL list (.tsv, .csv, .txt, .jsonl, .json or .parquet"),
        ({"shards": "none://bucket/0.tar"}, "none://bucket/0.tar: not a storage location"),
        ({"shards": "{good,copy}.tar"}, "copy.tar: holds the same as good.tar, expected it once"),
    ],
)
def test_bad_shards_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "good.tar", {"0.jpg": picture(0), "0.txt": b"a cat"})
    (tmp_path / "copy.tar").write_bytes((tmp_path / "good.tar").read_bytes())
    write_tar(tmp_path / "texts.tar", {"0.txt": b"a cat", "0.json": b"{}"})
    write_tar(tmp_path / "empty.tar", {})
    (tmp_path / "page.tar").write_bytes(b"<!doctype html>" * 100)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/00000_stats.json").write_text("{}")
    for name, mode in (("zipped.tar.gz", "w:gz"), ("zipped.tar", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(InputError) as caught:
        prepare(run_of(tmp_path, "t", **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_commands_are_refused_and_never_run(tmp_path: Path) -> None:
    flags = ["--config", "web", "--name", "t", "--shards", "pipe:touch executed; cat {0..9}.tar"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    expected = "error: --shards pipe:touch executed; cat 0.tar: a command, which is never run; expected a path or URI\n"
    assert done.stderr == expected
    assert list(tmp_path.iterdir()) == []


def test_shards_in_object_storage_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = samples()
    local = run_of(tmp_path, "t", shards=str(tmp_path / "{00000..00001}.tar"))
    write_shard(tmp_path / "00000.tar", content[:11])
    write_shard(tmp_path / "00001.tar", content[11:])
    summary = prepare(local)
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for number in range(2):
            uri = f"s3://bucket/my%20shards/{number:05d}.tar"
            storage.write_bytes(uri, (tmp_path / f"{number:05d}.tar").read_bytes())
        flags = ["--config", "web", "--name", "t", "--storage", "s3://bucket/ovd", "--decode.max-side", "None"]
        flags += ["--shards", "s3://bucket/my%20shards/{00000..00001}.tar", "--corpus.max-caption-uses", "None"]
        flags += ["--rows-per-shard", "6", "--rows-per-part", "4", "--min-images", "1", "--crawlers", "0"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *flags],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{summary.kept} of {summary.input} rows kept" in done.stdout
        assert "--max-side None" in done.stdout
        found = {table: tables.read_table("s3://bucket/ovd", table, "t").to_pylist() for table in TABLES}
    assert all(row["url"].startswith("s3://bucket/my%20shards/0000") for row in found["pairs"])
    assert without_places(found) == without_places(rows_of(local))

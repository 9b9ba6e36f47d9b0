import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep import storage, tables
from ovd_models.errors import InputError


def concepts(names: list[str]) -> pa.Table:
    count = len(names)
    numbers = pa.array(range(count), pa.int64())
    return pa.table(
        {
            "name": names,
            "concept_id": numbers,
            "image_count": numbers,
            "start": numbers,
            "stop": numbers,
            "extra": names,
        }
    )


def test_a_table_is_written_published_and_read(tmp_path: Path) -> None:
    root = str(tmp_path)
    entry = tables.write_part(root, "concepts", "t", "part-0.parquet", concepts(["cat", "dog"]))
    manifest = tables.publish(root, "concepts", "t", [entry], producer="test", config_hash="h", details={"n": 2})
    assert manifest.rows == 2
    found = tables.read_table(root, "concepts", "t")
    assert found.column_names == [*tables.SCHEMAS["concepts"].names, "extra"]
    assert found["concept_id"].type == pa.int32()
    assert found["name"].to_pylist() == ["cat", "dog"]
    assert tables.read_manifest(root, "concepts", "t") == manifest
    assert tables.read_table(root, "concepts", "t", ["name"]).column_names == ["name"]


def test_without_a_manifest_there_is_no_table(tmp_path: Path) -> None:
    tables.write_part(str(tmp_path), "concepts", "t", "part-0.parquet", concepts(["cat"]))
    assert tables.find_manifest(str(tmp_path), "concepts", "t") is None
    with pytest.raises(InputError, match=r"no such table; `python workflows/prepare_pairs\.py` makes it"):
        tables.read_table(str(tmp_path), "concepts", "t")


def test_the_close_name_of_a_published_table_is_named(tmp_path: Path) -> None:
    for name in ("photos-train", "photos-eval"):
        tables.publish(str(tmp_path), "boxes", name, [], producer="test", config_hash="h")
    tables.write_part(str(tmp_path), "concepts", "photo", "part-0.parquet", concepts(["cat"]))
    with pytest.raises(InputError, match=r"boxes/photo-eval: no such table; .* makes it; did you mean photos-eval\?$"):
        tables.read_table(str(tmp_path), "boxes", "photo-eval")
    for table, name in (("boxes", "street"), ("concepts", "photos")):
        with pytest.raises(InputError, match=r"makes it$"):
            tables.read_table(str(tmp_path), table, name)  # type: ignore[arg-type]


def test_a_table_may_be_empty(tmp_path: Path) -> None:
    tables.publish(str(tmp_path), "rejects", "t", [], producer="test", config_hash="h")
    assert tables.read_table(str(tmp_path), "rejects", "t").schema.equals(tables.SCHEMAS["rejects"])
    assert tables.read_table(str(tmp_path), "rejects", "t", ["row"]).column_names == ["row"]


def test_parts_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = str(tmp_path)
    entries = [tables.write_part(root, "concepts", "t", f"{n}.parquet", concepts([str(n)])) for n in (2, 0, 1)]
    tables.publish(root, "concepts", "t", entries, producer="test", config_hash="h")
    assert tables.read_table(root, "concepts", "t")["name"].to_pylist() == ["0", "1", "2"]


def test_files_are_read_side_by_side_but_not_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, names, waiting = str(tmp_path), [f"{number:02d}" for number in range(20)], 0
    most, lock, together = 0, threading.Lock(), threading.Barrier(tables.FILES_AT_A_TIME)

    def slow(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        if int(Path(uri).stem) < tables.FILES_AT_A_TIME:
            together.wait(10)  # raises if they are read one after another
        with lock:
            waiting -= 1
        return read(uri, columns)

    read = tables.read_parquet
    entries = [tables.write_part(root, "concepts", "t", f"{name}.parquet", concepts([name])) for name in names]
    tables.publish(root, "concepts", "t", entries, producer="test", config_hash="h")
    monkeypatch.setattr(tables, "read_parquet", slow)
    assert tables.read_table(root, "concepts", "t", ["name"])["name"].to_pylist() == names
    assert most == tables.FILES_AT_A_TIME


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": [{"path": "a"}]}'])
def test_a_broken_manifest_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    storage.write_bytes(str(tmp_path / "pairs/t/manifest.json"), content)
    with pytest.raises(InputError, match="not a table manifest") as caught:
        tables.find_manifest(str(tmp_path), "pairs", "t")
    assert "\n" not in str(caught.value)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    tables.publish(str(tmp_path), "pairs", "t", [], producer="test", config_hash="h")
    path = tmp_path / "pairs/t/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(InputError, match=f"schema version 99, this program reads version {tables.SCHEMA_VERSION}"):
        tables.find_manifest(str(tmp_path), "pairs", "t")


def test_lists_are_plain_arrow_lists_and_every_column_is_documented() -> None:
    for schema in tables.SCHEMAS.values():
        for field in schema:
            assert not isinstance(field.type, pa.ExtensionType)
            assert field.metadata[b"doc"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a/b.bin"), b"0123456789")
    assert storage.read_bytes(str(tmp_path / "a/b.bin"), offset=3, size=4) == b"3456"
    assert storage.read_bytes(str(tmp_path / "a/b.bin"), offset=8) == b"89"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.bin"]
    with pytest.raises(InputError, match="not a storage location"):
        storage.resolve("nonsense://x")

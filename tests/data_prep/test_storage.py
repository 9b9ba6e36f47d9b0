import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest

from data_prep import storage
from ovd_models.errors import InputError


def test_a_file_is_read_whole_or_by_range(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, offset=3, size=4) == b"3456"
    assert storage.read_bytes(tmp_path.as_uri() + "/a/b.bin", offset=8) == b"89"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["b.bin"]


def test_a_file_whose_writing_fails_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"first"
        raise OSError(28, "No space left on device")

    uri = storage.join(str(tmp_path), "b.bin")
    with pytest.raises(OSError, match=r"b\.bin: cannot be written: .*No space left on device"):
        storage.write_chunks(uri, chunks())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("s3://b/x?region=eu&scheme=http", ("y", "z.json"), "s3://b/x/y/z.json?region=eu&scheme=http"),
        ("s3://b/x/?region=eu", ("y",), "s3://b/x/y?region=eu"),
        ("s3://b/x?region=eu", ("s3://b/x/y",), "s3://b/x/y"),
        ("s3://b/x?region=eu", ("/y",), "/y"),
        ("s3://b/a?b", ("y",), "s3://b/a?b/y"),
        ("/a?b=c", ("y",), "/a?b=c/y"),
        ("a?b=c", ("s3://b/x", "y"), "s3://b/x/y"),
    ],
)
def test_a_path_is_joined_in_front_of_the_options_of_a_uri(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(uri, *parts) == joined


def test_the_name_of_a_uri_is_without_its_options() -> None:
    assert storage.base_name("gs://b/x/y.json?endpoint_override=http://a.b:1/") == "y.json"
    assert [storage.base_name(uri) for uri in ("s3://b/x", "a/b?c=d", "a", "a/")] == ["x", "b?c=d", "a", ""]


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    assert storage.open_storage(str(tmp_path / "new/store")) == str(tmp_path / "new/store")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--storage .*file/store: .*/file is a file, expected a folder"):
        storage.open_storage(str(tmp_path / "file/store"))
    with pytest.raises(InputError, match=r"--storage /proc/store: .*expected a folder that this user may write to"):
        storage.open_storage("/proc/store")
    assert storage.open_storage("/proc", writes=False) == "/proc"


def test_an_object_store_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        uri = f"gs://anonymous@bucket/ovd?endpoint_override=127.0.0.1:{port}&scheme=http"
        with pytest.raises(
            InputError, match=r"--storage gs://.*: no answer in 0.5 s, expected a folder that this user"
        ):
            storage.open_storage(uri)


def test_a_local_folder_is_its_own_copy_whether_path_or_uri(tmp_path: Path) -> None:
    assert storage.local_folder(str(tmp_path)) == storage.local_folder(tmp_path.as_uri()) == tmp_path


def test_a_remote_folder_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket/sub").mkdir(parents=True)
    (tmp_path / "bucket/sub/a.txt").write_text("x")
    elsewhere = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(storage, "resolve", lambda uri: (elsewhere, uri.removeprefix("s3://")))
    copy = storage.local_folder("s3://bucket")
    assert (copy / "sub/a.txt").read_text() == "x"
    assert storage.local_folder("s3://bucket") == copy
    (tmp_path / "bucket/sub/a.txt").write_text("other")
    changed = storage.local_folder("s3://bucket")
    assert (changed / "sub/a.txt").read_text() == "other"
    assert (copy / "sub/a.txt").read_text() == "x"  # another job may read it still
    with storage.borrow_folder("s3://bucket") as borrowed:
        assert (borrowed / "sub/a.txt").read_text() == "other"
    assert not borrowed.exists()
    with pytest.raises(InputError, match="s3://none: cannot be read"):
        storage.local_folder("s3://none")
    with pytest.raises(InputError, match="s3://none: cannot be read"), storage.borrow_folder("s3://none"):
        pass


def test_the_file_that_marks_a_whole_folder_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.bin", "text/table.json"):
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_text(name)
    written: list[str] = []
    write = storage.write_chunks
    monkeypatch.setattr(storage, "write_chunks", lambda uri, chunks: (written.append(uri), write(uri, chunks)))
    storage.upload_folder(tmp_path / "local", str(tmp_path / "there"))
    there = [uri.removeprefix(f"{tmp_path}/there/") for uri in written]
    assert there == ["model.bin", "text/table.json", "config.json"]
    assert (tmp_path / "there/text/table.json").read_text() == "text/table.json"


def test_an_unknown_scheme_is_told() -> None:
    with pytest.raises(InputError, match=r"^nowhere://x: not a storage location"):
        storage.resolve("nowhere://x")


@pytest.mark.parametrize(
    ("uri", "root", "found"),
    [
        ("/a/b/c", "/a", "b/c"),
        ("/a/b/c", "/a/", "b/c"),
        ("/ab/c", "/a", "/ab/c"),
        ("s3://bucket/a/b", "s3://bucket/a", "b"),
        ("s3://bucket/a", "/a", "s3://bucket/a"),
    ],
)
def test_a_path_below_a_root_is_given_back_under_another(uri: str, root: str, found: str) -> None:
    assert storage.relative(uri, root) == found
    assert storage.join(root, found) == uri
    assert storage.relative("x/y", "x") == "y"

# ruff: noqa: E501  # one line for each case
"""Further storage folders, written before the code that opens them was looked at."""

import os
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from data_prep import storage
from ovd_models.errors import InputError
from workflows.common import tracking

NAMES = [
    "a:b", "s3:x", "C:\\x", "file:x", "a\\b", "e\u0301", "\U0001f4c1", "x" * 200, "a ", "a.", "a|b", "$HOME", "`x`", "{}", "*", "a\nb",
    "a\tb", "!", "%zz", "%00", "a;b", "a,b", "..a", "<x>", "@", "^", "http", "a=1", "year=2020", "_x", ".x", "nul", "\u202ex",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_folder_of_any_name_holds_what_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    uri = storage.open_storage(str(folder))
    storage.write_bytes(storage.join(uri, "t", "a.txt"), b"x")
    assert (folder / "t" / "a.txt").read_bytes() == b"x"
    assert storage.read_bytes(storage.join(uri, "t", "a.txt")) == b"x"
    assert [Path(file).name for file in storage.list_files(storage.join(uri, "t"), "txt")] == ["a.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name]
    assert unquote(tracking.tracking_uri(uri)) == f"sqlite:///{folder}/mlflow.db"


@pytest.mark.parametrize("name", ["a:b", "s3:x", "-x", "a#b", "a?b", "100%", "..."])
def test_a_folder_of_any_name_below_the_present_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = storage.open_storage(name)
    storage.write_bytes(storage.join(uri, "a.txt"), b"x")
    assert (tmp_path / name / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["a b", "100%", "a#b", "a?b", "\u00e9"])
def test_a_file_address_is_unquoted(name: str, tmp_path: Path) -> None:
    uri = storage.open_storage(f"file://{quote(str(tmp_path / name))}")
    storage.write_bytes(storage.join(uri, "a.txt"), b"x")
    assert (tmp_path / name / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize("kind", ["link", "link to a link", "dots", "slash", "slashes"])
def test_other_ways_to_a_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "one").symlink_to("real")
    (tmp_path / "two").symlink_to("one")
    path = {"link": "one", "link to a link": "two", "dots": "real/../real/.", "slash": "real/", "slashes": "real//"}[
        kind
    ]
    uri = storage.open_storage(f"{tmp_path}/{path}")
    storage.write_bytes(storage.join(uri, "a.txt"), b"x")
    assert (tmp_path / "real" / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    "path",
    [
        "{}/file",
        "{}/file/below",
        "{}/dangling/x",
        "{}/loop",
        "/dev/null",
        "/dev/null/x",
        "/proc/x/y",
        "{}/" + "x" * 300,
        "",
        "ssh://h/x",
        "s3://",
        "s3:///x",
        "gs://",
        "http://h/x",
        "file://otherhost/x",
        "{}/a\0b",
        "{}/fifo",
        "sqlite:///x.db",
    ],
    ids=ascii,
)
def test_what_cannot_be_a_storage_is_refused_in_one_line(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ANSWER_SECONDS", 0.5)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((InputError, OSError)) as caught:
        storage.open_storage(path.replace("{}", str(tmp_path)))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)

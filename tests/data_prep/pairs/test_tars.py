import json
import tarfile
from pathlib import Path

import pytest
from formats import write_tar

from data_prep import storage
from data_prep.pairs import tars
from data_prep.pairs.tars import locate, read_tar
from ovd_models.errors import InputError


def rows_of(path: Path, *, seekable: bool = True) -> list[dict[str, object]]:
    with path.open("rb") as stream:
        return [row for rows in read_tar(stream, str(path), seekable=seekable) for row in rows.to_pylist()]


@pytest.mark.parametrize("seekable", [True, False])
def test_a_row_is_a_sample_whose_url_is_a_range_of_the_file(tmp_path: Path, seekable: bool) -> None:
    about = json.dumps({"url": "http://a/1", "caption": "from json", "status": "success"}).encode()
    members = {"000.jpg": b"one", "000.json": about, "000.txt": b" A cat\n", "001.png": b"two", "001.json": about}
    path = write_tar(tmp_path / "00000.tar", members | {"001.seg.png": b"mask", "README": b"x"})
    rows = rows_of(path, seekable=seekable)
    assert [(row["caption"], row["label"], row["web_url"]) for row in rows] == [
        ("A cat", None, "http://a/1"),
        ("from json", None, "http://a/1"),
    ]
    for row, content in zip(rows, (b"one", b"two"), strict=True):
        uri, offset, size = locate(str(row["url"]))
        assert uri == str(path)
        assert storage.read_bytes(uri, offset=offset, size=size) == content


def test_the_class_is_that_of_cls_or_json(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "x/1.jpg": b"1", "x/1.cls": b"7", "x/1.json": b'{"label": 8}',
            "y/1.JPEG": b"2", "y/1.json": b'{"label": "dog", "cls": 3}',
            "y/2.cls": b"9",
        },
    )  # fmt: skip
    rows = rows_of(path)
    assert [row["label"] for row in rows] == ["7", "dog", "9"]
    assert [row["url"] is None for row in rows] == [False, False, True]  # the last has no image


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{n // 2}.{'jt'[n % 2]}{'px'[n % 2]}{'gt'[n % 2]}": b"c" for n in range(14)})
    whole = rows_of(path)
    monkeypatch.setattr(tars, "ROWS_PER_BLOCK", 2)
    with path.open("rb") as stream:
        assert [rows.num_rows for rows in read_tar(stream, str(path), seekable=True)] == [2, 2, 2, 1]
    assert rows_of(path) == whole
    assert len(whole) == 7


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("1.json", b"{", r"a\.tar: 1\.json: .*expected a JSON object"),
        ("1.json", b"[]", r"a\.tar: 1\.json: .*expected a JSON object"),
        ("1.txt", b"caf\xe9", r"a\.tar: 1\.txt: .*expected UTF-8 text"),
    ],
)
def test_malformed_members_are_named(tmp_path: Path, member: str, content: bytes, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", {"1.jpg": b"x", member: content})
    with pytest.raises(InputError, match=message):
        rows_of(path)


def test_an_empty_tar_gives_no_rows_and_another_file_is_refused(tmp_path: Path) -> None:
    assert rows_of(write_tar(tmp_path / "a.tar", {})) == []
    (tmp_path / "b.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(tarfile.TarError):
        rows_of(tmp_path / "b.tar")


def test_other_urls_are_whole_files() -> None:
    assert locate("/x/a.jpg") == ("/x/a.jpg", 0, None)
    assert locate("s3://b/a#1+2.jpg") == ("s3://b/a#1+2.jpg", 0, None)

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from formats import write_tar

from data_prep import storage
from data_prep.pairs import tars
from data_prep.pairs.tars import IMAGES, PROBLEM, locate, read_samples
from ovd_models.errors import InputError

ABOUT = {"url": "http://a/1", "caption": "from json", "key": "000", "status": "success", "width": 7}
"""Fields that img2dataset writes."""


def rows_of(path: Path, caption: str = "caption", label: str = "") -> list[dict[str, Any]]:
    with path.open("rb") as stream:
        return list(read_samples(stream, str(path), url="url", caption=caption, label=label))


def problems_of(path: Path, label: str = "") -> list[str | None]:
    """Why samples cannot be used; those that can have an address."""
    rows = rows_of(path, label=label)
    assert all((row["url"] is None) == (PROBLEM in row) for row in rows)
    return [row.get(PROBLEM) for row in rows]


def image_of(row: dict[str, Any]) -> bytes:
    place = locate(row["url"])
    assert place
    return storage.read_bytes(place[0], offset=place[1], size=place[2])


def tar_of(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file whose members may share names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_a_row_is_a_sample_whose_url_is_a_range_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "000", "jpg": b"one", "txt": "A cat\n", "json": {"width": 7, "url": "http://a/1"}})
        writer.write({"__key__": "001", "png": b"two", "json": ABOUT, "seg.png": b"mask"})
    first, second = rows_of(path)
    assert {**first, "url": None} == {"url": None, "caption": "A cat", "width": 7, "web_url": "http://a/1"}
    about = {name: value for name, value in ABOUT.items() if name != "url"}
    assert {**second, "url": None} == {**about, "url": None, "web_url": "http://a/1"}
    assert (image_of(first), image_of(second)) == (b"one", b"two")


def test_samples_are_those_that_webdataset_sees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = {
        f"{folder}{key}.{extension}": rng.bytes(900)
        for folder in ("", "x/", "./v1.0/")
        for key in ("0", "a-b c")
        for extension in ("jpg", "seg.png", "npy")
    }
    path = write_tar(tmp_path / "a.tar", members | {"README": b"no sample"})
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [image_of(row) for row in rows_of(path)] == [sample["jpg"] for sample in found]
    assert len(found) == 6


@pytest.mark.parametrize(
    ("column", "about", "text", "expected"),
    [
        ("caption", {"caption": "json"}, b"text", "json"),
        ("caption", {"other": "json"}, b" text\n", "text"),
        ("alt", {"caption": "json", "alt": "another"}, b"text", "another"),
        ("caption", {"caption": None}, b"text", "text"),
        ("caption", {"caption": 7}, b"text", "7"),
        ("caption", {}, b"\xef\xbb\xbftext", "text"),
        ("caption", {}, b"", ""),
        ("caption", {}, None, None),
        ("caption", None, b"text", "text"),
    ],
)
def test_the_caption_is_the_named_field_or_else_the_text(
    tmp_path: Path, column: str, about: dict[str, Any] | None, text: bytes | None, expected: str | None
) -> None:
    members = {"0.jpg": b"x"}
    members |= {} if text is None else {"0.txt": text}
    members |= {} if about is None else {"0.json": json.dumps(about).encode()}
    (row,) = rows_of(write_tar(tmp_path / "a.tar", members), caption=column)
    assert row[column] == expected
    assert row["url"]


@pytest.mark.parametrize("extension", [*IMAGES, "JPG", "Jpeg", "WEBP"])
def test_extensions_may_have_any_case(tmp_path: Path, extension: str) -> None:
    path = write_tar(tmp_path / "a.tar", {f"0.{extension}": b"x", "0.TXT": b"a cat", "0.Json": b'{"n": 1}'})
    (row,) = rows_of(path)
    assert (row["caption"], row["n"], image_of(row)) == ("a cat", 1, b"x")


def test_of_several_images_the_first_extension_counts_whatever_their_order(tmp_path: Path) -> None:
    for order in (("png", "jpg"), ("jpg", "png")):
        path = write_tar(tmp_path / "a.tar", {f"0.{extension}": extension.encode() for extension in order})
        assert [image_of(row) for row in rows_of(path)] == [b"jpg"]


def test_the_class_is_the_named_field_or_else_that_of_cls(tmp_path: Path) -> None:
    members = {
        "1.jpg": b"1", "1.cls": b"7", "2.jpg": b"2", "2.json": b'{"label": 8}', "3.jpg": b"3", "3.cls": b" \n",
    }  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert [row["label"] for row in rows_of(path, label="label")] == ["7", "8", None]
    assert problems_of(path, label="label") == [None, None, "3: no class"]
    assert "cls" not in rows_of(path)[0]


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"x/1.txt": b"a cat", "x/1.mp3": b""}, "x/1: no image among its members (txt, mp3)"),
        ({"1.v2.jpg": b"x", "1.v2.txt": b"a cat"}, "1: no image among its members (v2.jpg, v2.txt)"),
        ({"1.jpg": b"x", "1.json": b"{"}, "1: its .json: Expecting property name"),
        ({"1.jpg": b"x", "1.json": b""}, "1: its .json: Expecting value"),
        ({"1.jpg": b"x", "1.json": b"[]"}, "1: its .json: expected an object"),
        ({"1.jpg": b"x", "1.json": b"[" * 100_000}, "1: maximum recursion depth"),
        ({"1.jpg": b"x", "1.json": b'{"caption": ["a", "b"]}'}, "1: its .json: 'caption' is ['a', 'b'], expected text"),
        ({"1.jpg": b"x", "1.json": b'{"n": "\\ud800"}'}, "1: 'utf-8' codec can't encode"),
        ({"1.jpg": b"x", "1.txt": b"caf\xe9"}, "1: its .txt: 'utf-8' codec can't decode"),
        ({"1.jpg": b"x", "1.txt": b"a" * (1 << 20) + b"b"}, "1: its .txt: expected at most 1,048,576 bytes"),
        ({"\udce9.txt": b"a cat"}, "?: no image among its members (txt)"),
    ],
)
def test_a_sample_that_cannot_be_used_says_why_and_others_stay(
    tmp_path: Path, members: dict[str, bytes], problem: str
) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", **members, "9.jpg": b"y"})
    first, found, last = problems_of(path)
    assert (first, last) == (None, None)
    assert found
    assert found.startswith(problem)
    assert "\n" not in found


def test_a_sample_without_an_image_keeps_its_fields(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "1.json": json.dumps(ABOUT).encode()})
    row = rows_of(path)[1]
    assert (row["url"], row["caption"], row["web_url"]) == (None, "from json", "http://a/1")


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.json": b'{"score": NaN, "other": -Infinity}'})
    (row,) = rows_of(path)
    assert (row["score"], row["other"]) == (None, None)


def test_a_name_twice_in_a_sample_rejects_that_sample_alone(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("1.jpg", b"a"), ("1.txt", b"a cat"), ("1.JPG", b"b"), ("2.jpg", b"y")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert problems_of(tmp_path / "a.tar") == [None, "1: two members of one name", None]


def test_a_key_that_comes_again_later_is_another_sample(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("1.jpg", b"y"), ("0.jpg", b"z")]
    (tmp_path / "a.tar").write_bytes(tar_of(members))
    assert [image_of(row) for row in rows_of(tmp_path / "a.tar")] == [b"x", b"y", b"z"]


def test_members_of_a_sample_that_are_not_together_are_samples_of_their_own(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "1.jpg": b"y", "0.txt": b"a", "1.txt": b"b"})
    assert [row["caption"] for row in rows_of(path)] == [None, None, "a", "b"]
    assert problems_of(path) == [
        None, None, "0: no image among its members (txt)", "1: no image among its members (txt)",
    ]  # fmt: skip


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_every_format_are_read(tmp_path: Path, format: int) -> None:
    name = "a folder/é" + "x" * 80
    (tmp_path / "a.tar").write_bytes(tar_of([(f"{name}.jpg", b"x" * 600), (f"{name}.txt", b"a cat")], format))
    (row,) = rows_of(tmp_path / "a.tar")
    assert (image_of(row), row["caption"]) == (b"x" * 600, "a cat")


def test_links_and_folders_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert problems_of(tmp_path / "a.tar") == [None]


# ---------------------------------------------------------------------------------------------------- damaged files

WHOLE = [("0.jpg", b"x" * 700), ("0.txt", b"a cat"), ("1.jpg", b"y" * 700), ("1.txt", b"a dog")]
"""Headers at 0, 1536, 2560 and 4096; the file's end at 5120."""


@pytest.mark.parametrize(
    ("damage", "kept", "broken"),
    [
        pytest.param(lambda tar: tar[:5120], [1, 1], False, id="no mark of the end"),
        pytest.param(lambda tar: tar[:5000], [1, 1], True, id="in the padding of the last text"),
        pytest.param(lambda tar: tar[:4610], [1, 1], True, id="in the last text"),
        pytest.param(lambda tar: tar[:4300], [1, 1], True, id="in the last header"),
        pytest.param(lambda tar: tar[:4096], [1, 1], False, id="before the last text"),
        pytest.param(lambda tar: tar[:3100], [1, 1], True, id="in the last image"),
        pytest.param(lambda tar: tar[:2560] + b"<html>" * 600, [1], True, id="other content after a sample"),
        pytest.param(lambda tar: tar[:2560] + b"\1" * 512 + tar[3072:], [1], True, id="one damaged header"),
    ],
)
def test_what_precedes_a_cut_is_kept_and_the_rest_is_one_row_that_says_so(
    tmp_path: Path, damage: Callable[[bytes], bytes], kept: list[int], broken: bool
) -> None:
    (tmp_path / "a.tar").write_bytes(damage(tar_of(WHOLE)))
    problems = problems_of(tmp_path / "a.tar")
    assert [problem is None for problem in problems] == [True] * len(kept) + [False] * broken
    if broken:
        assert problems[-1]
        assert problems[-1].startswith("the shard is cut off or damaged from byte ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.tar: no uncompressed tar file \(empty file\), expected a WebDataset shard"),
        (b"<!doctype html><title>404</title>", r"a\.tar: no uncompressed tar file"),
        (b"<!doctype html>" * 1000, r"a\.tar: no uncompressed tar file"),
        (b"\x1f\x8b\x08" + b"compressed" * 1000, r"a\.tar: no uncompressed tar file"),
        (tar_of([]), r"a\.tar: has no images, expected members with the extensions jpg, jpeg, png, webp"),
        (tar_of([("0.txt", b"a cat"), ("1.mp3", b"x")]), r"a\.tar: has no images"),
    ],
)
def test_what_is_no_shard_of_images_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        rows_of(tmp_path / "a.tar")
    assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_number_of_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{number:05d}.jpg": b"x" for number in range(3000)})
    opened: list[tarfile.TarFile] = []
    with pytest.MonkeyPatch.context() as patch:
        original = tarfile.open
        patch.setattr(tars.tarfile, "open", lambda **given: opened.append(original(**given)) or opened[-1])
        assert len(rows_of(path)) == 3000
    assert len(opened[0].members) <= 1


def test_reading_urls_needs_no_torch() -> None:
    program = "import sys, workflows.prepare_pairs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_other_urls_are_whole_files() -> None:
    assert locate("/x/a.jpg") is None
    assert locate("s3://b/a#1+2.jpg") is None


def header_of(kind: bytes, size: int) -> bytes:
    """A header of a long name or of further fields that claims a size."""
    member = tarfile.TarInfo("0")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


class Asked(io.BytesIO):
    """A file that notes the largest read, and has a few bytes of it only."""

    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None and size >= 0
        self.largest = max(self.largest, size)
        return super().read(min(size, 1 << 20))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [64 << 30, 11])
def test_headers_of_any_size_and_number_are_not_read_into_memory(kind: bytes, size: int) -> None:
    more = header_of(kind, size) + b"11 foo=bar\n".ljust(512, b"\0")
    file = Asked(tar_of([("0.jpg", b"x")], tarfile.USTAR_FORMAT)[:1024] + more * 2000)
    first, broken = read_samples(file, "a.tar", url="url", caption="caption", label="")
    assert first["url"] == "a.tar#512+1"
    assert broken[PROBLEM].endswith("from byte 1,024 on: a member with headers of more than 131,072 bytes")
    assert file.largest <= tars.MAX_HEADER_BYTES
    with pytest.raises(InputError, match=r"a\.tar: no uncompressed tar file \(a member with headers of more than"):
        next(read_samples(io.BytesIO(more * 2000), "a.tar", url="url", caption="caption", label=""))


def test_texts_that_are_no_captions_are_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "0.ocr.txt": b"a" * 100_000, "0.txt": b"a cat"})
    file = Asked(path.read_bytes())
    (row,) = read_samples(file, "a.tar", url="url", caption="caption", label="")
    assert (row["caption"], file.largest) == ("a cat", 512)


def test_a_member_of_negative_size_ends_the_shard(tmp_path: Path) -> None:
    content = bytearray(tar_of([("a.jpg", b"x" * 600), ("a.txt", b"a cat")]))
    content[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512, in base 256
    content[148:156] = b"        "
    content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match="has no images"):
        rows_of(tmp_path / "a.tar")

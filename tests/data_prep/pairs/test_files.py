import asyncio
from pathlib import Path

import pytest
from formats import write_tar
from pyarrow import NativeFile

from data_prep.pairs import files
from data_prep.pairs.fetch import Fetched
from data_prep.pairs.files import FileReader
from data_prep.pairs.tars import read_samples


def fetched(reader: FileReader, urls: list[str | None]) -> list[Fetched]:
    async def run() -> list[Fetched]:
        async with asyncio.timeout(10):
            return await asyncio.gather(*(reader.fetch(url) for url in urls))

    return asyncio.run(run())


def addresses(shard: Path) -> list[str | None]:
    with shard.open("rb") as stream:
        return [row["url"] for row in read_samples(stream, str(shard), url="url", caption="caption", label="")]


def test_local_files_are_read_in_the_place_of_urls(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    found = fetched(FileReader(), [str(tmp_path / "a"), None])
    assert [(result.content, result.reason) for result in found] == [(b"content", None), (None, "bad_url")]


def test_images_of_a_shard_are_read_from_one_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = files._open_file

    def counted(uri: str) -> NativeFile:
        opened.append(uri)
        return original(uri)

    monkeypatch.setattr(files, "_open_file", counted)
    shards = [
        write_tar(tmp_path / name, {f"{n}.jpg": f"{n}".encode() for n in range(50)}) for name in ("a.tar", "b.tar")
    ]
    urls = [url for pair in zip(*map(addresses, shards), strict=True) for url in pair]
    reader = FileReader()
    reader._slots = asyncio.Semaphore(1)  # else several threads may open one before any has done so
    assert [result.content for result in fetched(reader, urls)] == [f"{n // 2}".encode() for n in range(100)]
    assert opened == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_an_image_of_any_claimed_size_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x" * 100, "1.jpg": b"y" * 101})
    first, second = fetched(FileReader(max_bytes=100), addresses(path))
    assert first.content == b"x" * 100
    assert (second.content, second.reason, second.detail) == (None, "too_large", "101 bytes, at most 100")


def test_at_most_a_few_shards_stay_open(tmp_path: Path) -> None:
    reader = FileReader()
    for shard in range(files.OPEN_SHARDS + 5):
        fetched(reader, addresses(write_tar(tmp_path / f"{shard}.tar", {"0.jpg": b"x"})))
    links = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert len([link for link in links if link.parent == tmp_path]) == files.OPEN_SHARDS


def test_an_image_that_is_cut_off_gives_what_there_is(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"x" * 600})
    (url,) = addresses(path)
    path.write_bytes(path.read_bytes()[:612])
    assert [result.content for result in fetched(FileReader(), [url])] == [b"x" * 100]

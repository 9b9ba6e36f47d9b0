"""Storage on a server with S3's API: settings, wrong ones, large objects, uploads that fail or are killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import object_storage
import pyarrow as pa
import pytest
from object_storage import BUCKET

from data_prep import s3, storage, tables
from data_prep.pairs import inputs
from data_prep.streams import images
from ovd_models.errors import InputError

ROOT = "s3://bucket/ovd"
MEGABYTE = 1 << 20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield variables


def test_a_file_is_written_read_listed_and_removed(server: dict[str, str]) -> None:
    uri = storage.join(ROOT, "a", "b.bin")
    assert storage.write_chunks(uri, [b"01234", b"56789"]) == (10, storage.sha256(b"0123456789"))
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, offset=3, size=4) == b"3456"
    assert storage.exists(uri)
    assert storage.list_files(f"{ROOT}/a", "bin") == [uri]
    storage.remove_folder(f"{ROOT}/a")
    assert not storage.exists(uri)
    assert object_storage.keys(server) == []


WAYS = ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "query"]


@pytest.mark.parametrize("way", WAYS)
def test_the_endpoint_and_the_key_are_found_where_aws_tools_look(
    way: str, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = object_storage.temporary_key(server)
    allowed = object_storage.use_keys_only(server)
    given = temporary if way == "AWS_SESSION_TOKEN" else dict(allowed)
    endpoint, uri = given.pop("AWS_ENDPOINT_URL"), ROOT
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    del given["AWS_DEFAULT_REGION"]
    if way == "query":
        uri += f"?endpoint_override={endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "restored later")
    elif way == "AWS_PROFILE":
        key, secret = given.pop("AWS_ACCESS_KEY_ID"), given.pop("AWS_SECRET_ACCESS_KEY")
        (tmp_path / "credentials").write_text(f"[mine]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
        (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
        given["AWS_SHARED_CREDENTIALS_FILE"] = str(tmp_path / "credentials")
        given |= {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "mine"}
    else:
        given |= {way if "ENDPOINT" in way else "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    opened = storage.open_storage(uri)
    assert opened == ROOT
    storage.write_bytes(f"{opened}/a.txt", b"x")
    assert storage.read_bytes(f"{opened}/a.txt") == b"x"
    assert object_storage.keys(allowed) == ["ovd/a.txt"]  # the probe is gone


def test_other_inputs_may_have_an_endpoint_of_their_own(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{ROOT}/a.txt", b"x")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = f"?endpoint_override={server['AWS_ENDPOINT_URL']}"
    assert storage.read_bytes(f"{ROOT}/a.txt{options}") == b"x"
    assert storage.read_bytes(storage.join(f"{ROOT}{options}", "a.txt")) == b"x"
    assert storage.list_files(f"{ROOT}{options}", "txt") == [f"{ROOT}/a.txt{options}"]
    assert inputs.find_lists(f"{ROOT}/*.txt{options}") == [f"{ROOT}/a.txt{options}"]
    storage.download_folder(f"{ROOT}{options}", tmp_path)
    assert (tmp_path / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("uri", "variables", "message"),
    [
        ("s3://other/x", {}, r"--storage s3://other/x: cannot be written \(NoSuchBucket: .*expected a bucket at http"),
        (ROOT, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"Could not connect .*expected a bucket at http://127\.0"),
        (ROOT, {"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, r"Could not connect to .*nowhere\.invalid"),
        (ROOT, {"AWS_ENDPOINT_URL": "nonsense"}, r"Invalid endpoint: nonsense"),
        (ROOT, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, r"Unable to locate credentials.*AWS_PROFILE"),
        (ROOT, {"AWS_ACCESS_KEY_ID": "wrong"}, r"\(InvalidAccessKeyId: .*credentials that may do so in AWS_ACCESS_KEY"),
        (ROOT, {"AWS_SECRET_ACCESS_KEY": "wrong"}, r"\(SignatureDoesNotMatch: "),
        (ROOT, {"AWS_SESSION_TOKEN": "expired"}, r"\(InvalidToken: "),
        (ROOT, {"AWS_PROFILE": "none"}, r"config profile \(none\) could not be found"),
        ("s3://key:secret@bucket/x", {}, r"credentials in a URI would be logged"),
        ("s3://bucket/x?endpoint=host", {}, r"unknown option endpoint, expected endpoint_override, region, scheme"),
        ("s3:///x", {}, "names no bucket"),
    ],
)
def test_wrong_settings_are_told_in_one_line_within_seconds(
    uri: str, variables: dict[str, str], message: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = object_storage.use_keys_only(server) if "SECRET" not in uri else server
    for name, value in {**allowed, **variables}.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as raised:
        storage.open_storage(uri)
    assert time.monotonic() - started < 10
    assert "\n" not in str(raised.value)


def test_a_server_that_never_answers_is_given_up_within_seconds(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.socket() as silent:  # accepts connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(InputError, match="Read timeout on endpoint"):
            storage.open_storage(ROOT)
        assert time.monotonic() - started < 30


def pieces(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * MEGABYTE


def test_a_large_object_is_written_in_parts_in_bounded_memory(server: dict[str, str]) -> None:
    uri = f"{ROOT}/large.bin"
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from data_prep import storage
storage.write_bytes({uri!r}, b"x" * {MEGABYTE})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
storage.write_chunks({uri!r}, (bytes([number]) * {MEGABYTE} for number in range(250)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 200
    assert storage.read_bytes(uri, offset=199 * MEGABYTE, size=MEGABYTE) == bytes([199]) * MEGABYTE


def test_a_folder_is_fetched_in_ranges(server: dict[str, str], tmp_path: Path) -> None:
    content = b"".join(pieces(20)) + b"end"
    storage.write_bytes(f"{ROOT}/folder/sub/large.bin", content)
    assert storage.read_bytes(f"{ROOT}/folder/sub/large.bin") == content
    assert storage.read_bytes(f"{ROOT}/folder/sub/large.bin", offset=5, size=18 * MEGABYTE) == content[5:][: 18 << 20]
    storage.write_bytes(f"{ROOT}/folder/empty.txt", b"")
    storage.download_folder(f"{ROOT}/folder", tmp_path)
    assert (tmp_path / "sub/large.bin").read_bytes() == content
    assert (tmp_path / "empty.txt").read_bytes() == b""


def test_an_object_whose_name_leads_out_of_the_folder_is_not_fetched(server: dict[str, str], tmp_path: Path) -> None:
    client = object_storage.client(server)
    for key in ("ovd/folder/a.txt", "ovd/folder/../../evil.txt"):
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    with pytest.raises(OSError, match=r"s3://bucket/ovd/folder: the object '.*evil\.txt' leads out of the folder"):
        storage.download_folder(f"{ROOT}/folder", tmp_path / "copies/copy")
    assert list(tmp_path.rglob("*.txt")) == []


def test_an_object_that_may_not_be_deleted_is_told(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "kept.txt"):
        storage.write_bytes(f"{ROOT}/folder/{name}", b"x")
    policy = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:DeleteObject",
        "Resource": "arn:aws:s3:::bucket/*/kept.txt",
    }
    content = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
    object_storage.client(server).put_bucket_policy(Bucket=BUCKET, Policy=content)
    with pytest.raises(
        OSError, match=r"s3://bucket/ovd/folder: cannot be removed: ovd/folder/kept\.txt: Access Denied"
    ):
        storage.remove_folder(f"{ROOT}/folder")
    assert object_storage.keys(server) == ["ovd/folder/kept.txt"]


@pytest.mark.parametrize("count", [1, 30])
def test_an_upload_whose_source_fails_leaves_nothing(count: int, server: dict[str, str]) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(count)
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match=r"s3://bucket/ovd/a\.bin: cannot be written: .*Input/output error"):
        storage.write_chunks(f"{ROOT}/a.bin", broken())
    assert object_storage.keys(server) == []
    assert object_storage.unfinished(server) == []


def test_an_upload_that_is_killed_is_never_seen_and_its_parts_are_removed(server: dict[str, str]) -> None:
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from data_prep import storage
def chunks():
    for number in range(40):
        yield bytes({MEGABYTE})
    time.sleep(60)
storage.write_chunks("{ROOT}/table/a.bin", chunks())
"""
    writer = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not object_storage.unfinished(server):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert object_storage.keys(server) == []
    storage.remove_temporary(f"{ROOT}/tab")  # another folder
    assert object_storage.unfinished(server) == ["ovd/table/a.bin"]
    storage.remove_temporary(f"{ROOT}/table")
    assert object_storage.unfinished(server) == []


def test_lost_buckets_and_expired_keys_are_told_with_the_uri(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"s3://lost/a: cannot be written: S3 error NoSuchBucket: "):
        storage.write_bytes("s3://lost/a", b"x")
    with pytest.raises(InputError, match=r"s3://bucket/a: no such file, expected an image"):
        images.read_image("s3://bucket/a")
    for ask in (storage.exists, lambda uri: storage.list_files(uri, "json"), images.read_image):
        with pytest.raises(OSError, match="s3://lost/a: cannot be read: no bucket lost"):
            ask("s3://lost/a")
    storage.write_bytes(f"{ROOT}/a", tables.parquet_bytes(pa.table({"x": [1]})))
    object_storage.use_keys_only(server)
    for read in (storage.read_bytes, tables.read_parquet, images.read_image):
        with pytest.raises(OSError, match=r"s3://bucket/ovd/a: cannot be read: .*ACCESS_DENIED"):
            read(f"{ROOT}/a")
    with pytest.raises(OSError, match=r"s3://bucket/ovd/a: cannot be written: S3 error InvalidAccessKeyId: "):
        storage.write_bytes(f"{ROOT}/a", b"x")


def test_clients_are_shared_by_threads_and_follow_the_environment(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = [
        threading.Thread(target=storage.write_bytes, args=(f"{ROOT}/{number}", bytes([number]))) for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [storage.read_bytes(f"{ROOT}/{number}") for number in range(8)] == [bytes([number]) for number in range(8)]
    place = s3.parse(ROOT)
    assert s3.client(place) is s3.client(s3.parse(f"s3://{BUCKET}/other"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    assert s3.client(place) is not None

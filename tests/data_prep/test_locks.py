"""One job of a name at a time, on a local folder and on a server with S3's API, among real processes."""

import contextlib
import dataclasses
import getpass
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import object_storage
import pytest

from data_prep import locks, s3, storage
from ovd_models.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A storage that does not exist yet."""
    if request.param == "folder":
        yield str(tmp_path / "store")
        return
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/store"


@contextlib.contextmanager
def other_process(script: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python process that has printed a line; killed at the end."""
    script = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['job.py']\n{script}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def holding(place: str) -> str:
    return f"""
from data_prep import locks
with locks.hold({place!r}, "pairs/mine"):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_the_second_job_is_told_who_works_and_a_killed_one_holds_nothing(place: str) -> None:
    with other_process(holding(place)) as process:
        since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
        who = re.escape(f"job.py, pid {process.pid} of {getpass.getuser()} on {socket.gethostname()} ")
        message = f"^pairs/mine: being written by {who}{since}, expected one job of a name at a time$"
        with pytest.raises(InputError, match=message), locks.hold(place, "pairs/mine", wait_seconds=0.5):
            pass
        with locks.hold(place, "pairs/other", wait_seconds=0):
            pass
        assert not locks.is_free(place, "pairs/mine")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert locks.is_free(place, "pairs/mine")
        started = time.monotonic()
        with locks.hold(place, "pairs/mine"):
            assert time.monotonic() - started < 3
            assert not locks.is_free(place, "pairs/mine")


def test_a_job_waits_for_one_that_ends_soon(place: str) -> None:
    script = holding(place).replace("time.sleep(60)", "time.sleep(1)") + "\ntime.sleep(60)"
    with other_process(script), locks.hold(place, "pairs/mine", wait_seconds=20):
        pass


def test_a_lock_leaves_nothing_and_may_be_held_inside_itself(place: str) -> None:
    with locks.hold(place, "pairs/mine"):
        with locks.hold(place, "pairs/mine", wait_seconds=0):
            assert storage.list_files(f"{place}/locks", "lock")
        assert storage.list_files(f"{place}/locks", "lock")
    assert not storage.exists(place)
    with pytest.raises(FileNotFoundError), locks.hold(place, "pairs/mine"):
        raise FileNotFoundError
    assert not storage.exists(place)


@dataclasses.dataclass(frozen=True)
class Run:
    storage: str
    name: str


@locks.exclusive("pairs", "rejects")
def job(run: Run) -> None:
    storage.write_bytes(f"{run.storage}/pairs/{run.name}/other.bin", b"x")


def test_the_next_job_removes_what_a_killed_writer_left(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
from data_prep import storage
def chunks():
    for number in range(40):
        yield bytes(1 << 20)
    print("written", flush=True)
    time.sleep(60)
storage.write_chunks("{place}/pairs/mine/shards/a.tar", chunks())
"""
    with other_process(script) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "a.tar" not in names_in(place)
    assert len(names_in(place)) == 1
    job(Run(place, "another"))
    assert len(names_in(place)) == 2
    job(Run(place, "mine"))
    assert names_in(place) == ["other.bin", "other.bin"]


def names_in(place: str) -> list[str]:
    """Names of all files, and of unfinished uploads."""
    if not place.startswith("s3"):
        return sorted(path.name for path in Path(place).rglob("*") if path.is_file())
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    uploads = [f"{key}.upload" for key in object_storage.unfinished(variables)]
    return sorted(key.rpartition("/")[2] for key in object_storage.keys(variables) + uploads)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/store"


def write_foreign_lock(bucket: str) -> str:
    """The lock of a process of another machine; returns its tag."""
    holder = dataclasses.replace(locks.Holder.this_process(), host="elsewhere", machine="another", pid=1)
    place = s3.parse(f"{bucket}/locks/pairs-mine.lock")
    content = json.dumps(dataclasses.asdict(holder)).encode()
    return str(s3.client(place).put_object(Bucket=place.bucket, Key=place.key, Body=content)["ETag"])


def test_a_lock_of_another_machine_is_taken_over_when_it_is_not_refreshed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign_lock(bucket)
    with pytest.raises(InputError, match="on elsewhere since"), locks.hold(bucket, "pairs/mine", wait_seconds=2):
        pass
    monkeypatch.setattr(locks, "EXPIRES_SECONDS", 1.0)
    with locks.hold(bucket, "pairs/mine", wait_seconds=5):
        pass


def test_a_lock_is_refreshed_while_its_job_lives(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "REFRESH_SECONDS", 0.2)
    monkeypatch.setattr(locks, "EXPIRES_SECONDS", 2.0)
    monkeypatch.setattr(locks.Holder, "is_dead", lambda holder: False)
    with locks.hold(bucket, "pairs/mine"):
        other = locks.ObjectLock(f"{bucket}/locks/pairs-mine.lock")
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            assert not other.acquire()
            time.sleep(0.2)


def test_of_two_that_find_an_old_lock_one_gets_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = write_foreign_lock(bucket)
    first, second = (locks.ObjectLock(f"{bucket}/locks/pairs-mine.lock") for _ in range(2))
    monkeypatch.setattr(locks, "EXPIRES_SECONDS", -1.0)
    assert first.acquire()
    assert not second._put(IfMatch=tag)  # it has read the old lock, too
    assert first.refresh()


def test_a_lock_whose_answer_was_lost_is_still_held(bucket: str) -> None:
    lock = locks.ObjectLock(f"{bucket}/locks/pairs-mine.lock")
    assert lock.acquire()
    before = lock._tag
    assert lock.refresh()
    lock._tag, lock._writes = before, lock._writes - 1  # the client's second attempt meets what the first one wrote
    assert lock.refresh()
    assert lock.refresh()


def test_a_paused_job_that_lost_its_lock_ends(bucket: str) -> None:
    script = f"""
from data_prep import locks
locks.REFRESH_SECONDS = 0.5
def ends(signum, frame):
    print("stopped", flush=True)
    sys.exit(7)
import signal; signal.signal(signal.SIGTERM, ends)
with locks.hold({bucket!r}, "pairs/mine"):
    print("holds", flush=True)
    time.sleep(60)
"""
    with other_process(script) as process:
        tag = write_foreign_lock(bucket)
        assert process.wait(timeout=20) == 7
        place = s3.parse(f"{bucket}/locks/pairs-mine.lock")
        assert s3.client(place).head_object(Bucket=place.bucket, Key=place.key)["ETag"] == tag  # not removed


def test_a_lock_in_a_lost_bucket_is_an_error_of_the_storage() -> None:
    with object_storage.s3_server() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with pytest.raises(OSError, match="NoSuchBucket"), locks.hold("s3://lost/store", "pairs/mine"):
            pass

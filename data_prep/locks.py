"""One job of a name at a time on one storage; the second one is told who is at work.

    with locks.hold(run.storage, "pairs/mine"):
        ...

On a local or network file system a job holds flock(2) on `<storage>/locks/<name>.lock`, which ends with the process,
however it ends. On S3 it holds an object that is created only if there is none, and refreshed while the job lives: one
of a dead process on this machine is taken over at once, one of another machine after `EXPIRES_SECONDS` without a
refresh. Other object stores have no lock.
"""

import contextlib
import fcntl
import functools
import getpass
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TextIO, TypeVar

from pyarrow import fs

from data_prep import s3, storage, tables
from ovd_models.errors import InputError

WAIT_SECONDS = 5.0
"""A job that only finds its tables published holds its lock this short."""
POLL_SECONDS = 0.2
REFRESH_SECONDS, EXPIRES_SECONDS = 30.0, 120.0
CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
"""S3's answers to a conditional write of an object that another process wrote, is writing, or deleted."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    job: str
    """The script."""
    user: str
    host: str
    pid: int
    since: str
    """Local time with its zone."""
    machine: str
    """Boot id and namespace of process ids: `pid` means something on an equal machine only."""
    started: str
    """Start time of the process in clock ticks since boot, since pids are used again."""

    @classmethod
    def this_process(cls) -> "Holder":
        """The description of this process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(
            job=Path(sys.argv[0]).name or "python",
            user=_user(),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            machine=f"{boot} {Path('/proc/self/ns/pid').readlink()}",
            started=_start_time(os.getpid()),
        )

    @classmethod
    def parse(cls, text: str) -> "Holder | None":
        """The holder in the first line of a text that begins with one's `to_json`; None if there is none."""
        try:
            return cls(**json.loads(text.partition("\n")[0]))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    def is_dead(self) -> bool:
        """Whether it was a process of this machine that has ended."""
        return self.machine == Holder.this_process().machine and _start_time(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.job}, pid {self.pid} of {self.user} on {self.host} since {self.since}"


class NamedRun(Protocol):
    """A run that makes tables of its name."""

    @property
    def storage(self) -> str:
        """Folder or URI of all tables."""

    @property
    def name(self) -> str:
        """Name of the tables."""


R = TypeVar("R", bound=NamedRun)
_held: set[str] = set()
"""Locks of this process, which its jobs may hold again inside each other."""


@contextlib.contextmanager
def hold(storage_uri: str, name: str, *, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock of a name, such as `pairs/mine`, while the block runs.

    Raises:
        InputError: another process holds it and goes on to for `wait_seconds`.
    """
    uri = _lock_uri(storage_uri, name)
    if uri in _held:
        yield
        return
    filesystem, path = storage.resolve(uri)
    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + wait_seconds
        if isinstance(filesystem, fs.LocalFileSystem):
            stack.enter_context(_hold_file(Path(path), name, deadline))
        elif uri.startswith(s3.SCHEME):
            stack.enter_context(_hold_object(uri, name, deadline))
        _held.add(uri)
        try:
            yield
        finally:
            _held.discard(uri)


def is_free(storage_uri: str, name: str) -> bool:
    """Whether no process holds the lock of a name, on any machine; False where the storage has no locks."""
    uri = _lock_uri(storage_uri, name)
    has_locks = isinstance(storage.resolve(uri)[0], fs.LocalFileSystem) or uri.startswith(s3.SCHEME)
    if uri in _held or not has_locks:
        return False
    try:
        with hold(storage_uri, name, wait_seconds=0):
            return True
    except InputError:
        return False


def exclusive(*names: tables.TableName) -> Callable[[Callable[Concatenate[R, P], T]], Callable[Concatenate[R, P], T]]:
    """Decorate a job, called with its run, that alone may write the tables `names` of the run's name.

    It begins without the temporary files that a killed one left.
    """

    def decorate(job: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
        @functools.wraps(job)
        def locked(run: R, /, *arguments: P.args, **options: P.kwargs) -> T:
            with hold(run.storage, f"{names[0]}/{run.name}"):
                for table in names:
                    storage.remove_temporary(tables.table_uri(run.storage, table, run.name))
                    storage.remove_temporary(storage.join(run.storage, "staging", table, run.name))
                return job(run, *arguments, **options)

        return locked

    return decorate


def _lock_uri(storage_uri: str, name: str) -> str:
    return storage.absolute(storage.join(storage_uri, "locks", f"{name.replace('/', '-')}.lock"))


def _refusal(name: str, holder: Holder | None) -> InputError:
    who = holder or "a process that has not said who it is"
    return InputError(f"{name}: being written by {who}, expected one job of a name at a time")


# ------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _hold_file(path: Path, name: str, deadline: float) -> Iterator[None]:
    created = [each for each in (path.parent, path.parent.parent) if not each.exists()]
    while (file := _try_file(path)) is None:
        if time.monotonic() > deadline:
            holder = None
            with contextlib.suppress(FileNotFoundError):  # removed just now
                holder = Holder.parse(path.read_text())
            raise _refusal(name, holder)
        time.sleep(POLL_SECONDS)
    with file:  # its end ends the lock
        file.truncate(0)
        file.write(Holder.this_process().to_json())
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for folder in created:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()


def _try_file(path: Path) -> TextIO | None:
    """The locked file, or None if another process holds it or removed it just now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino != os.fstat(file.fileno()).st_ino:
                return None
        except (BlockingIOError, FileNotFoundError):
            return None
        stack.pop_all()
        return file


# ----------------------------------------------------------------------------------------------------------- objects


@contextlib.contextmanager
def _hold_object(uri: str, name: str, deadline: float) -> Iterator[None]:
    lock = ObjectLock(uri)
    while not lock.acquire():
        if time.monotonic() > deadline:
            raise _refusal(name, lock.holder)
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    thread = threading.Thread(target=_refresh, args=(lock, name, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lock.release()


def _refresh(lock: "ObjectLock", name: str, ended: threading.Event) -> None:
    while not ended.wait(REFRESH_SECONDS):
        if not lock.refresh():
            print(f"error: {name}: another job took the lock over, since this one paused", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return


class ObjectLock:
    """An object of S3 that a process creates, refreshes and deletes, each only if no other has changed it."""

    def __init__(self, uri: str) -> None:
        self._uri, place = uri, s3.parse(uri)
        self._client, self._object = s3.client(place), {"Bucket": place.bucket, "Key": place.key}
        self._tag, self._writes, self._id = "", 0, uuid.uuid4().hex
        self.holder: Holder | None = None
        """Who had it at the last attempt."""

    def acquire(self) -> bool:
        """Create the object, or replace that of a dead process; returns whether this process holds it."""
        if self._put(IfNoneMatch="*"):
            return True
        with s3.errors(self._uri, "cannot be read"):
            try:
                found = self._client.get_object(**self._object)
            except self._client.exceptions.NoSuchKey:
                return False  # released just now
            self.holder = Holder.parse(found["Body"].read().decode())
        answered = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])  # by the server's clock
        is_old = (answered - found["LastModified"]).total_seconds() > EXPIRES_SECONDS
        is_dead = self.holder is not None and self.holder.is_dead()
        return (is_old or is_dead) and self._put(IfMatch=found["ETag"])

    def refresh(self) -> bool:
        """Write the object again, for its time; returns False if it is another's. A server may fail for a while."""
        try:
            return self._put(IfMatch=self._tag)
        except OSError:
            return True

    def release(self) -> None:
        """Delete the object, unless it is another's."""
        from botocore.exceptions import BotoCoreError, ClientError

        with contextlib.suppress(BotoCoreError, ClientError):
            self._client.delete_object(**self._object, IfMatch=self._tag)

    def _put(self, **condition: str) -> bool:
        """Write the object on a condition; returns whether it held."""
        from botocore.exceptions import ClientError

        self._writes += 1  # another content each time, and so another tag
        body = f"{Holder.this_process().to_json()}\n{self._id} {self._writes}"
        with s3.errors(self._uri, "cannot be written"):
            try:
                written: Any = self._client.put_object(**self._object, Body=body.encode(), **condition)
            except ClientError as error:
                if error.response["Error"]["Code"] in CONDITION_FAILED:
                    return self._has_written(body)
                raise
        self._tag = str(written["ETag"])
        return True

    def _has_written(self, body: str) -> bool:
        """Whether the object is what was written: the answer was lost, and the second attempt met the first one's."""
        try:
            found = self._client.get_object(**self._object)
        except self._client.exceptions.NoSuchKey:
            return False
        if found["Body"].read().decode() != body:
            return False
        self._tag = str(found["ETag"])
        return True


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]

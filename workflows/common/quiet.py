"""What the console does not show of a job's libraries and processes; imports nothing heavy."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STORAGE_FAILURES = (
    "No space left on device",
    "disk is full",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "AWS Error",
    "S3 error",
    "An error occurred (",
    ": cannot be read: ",
)
"""Parts of messages of the operating system, SQLite, pyarrow's object stores, ours and boto3."""


START_TIMED_OUT = "The worker group startup timed out"
"""Start of a message of Ray Train's, with a traceback for each try; the job ends with one line about it."""
LOGIN = re.compile(r"://[^/\s]+@")
"""The name and password of a server's or database's address."""
NATIVE_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z] \d+ \d+\]")
"""Start of a line of Ray's native code."""


@contextlib.contextmanager
def native_code() -> Iterator[None]:
    """Drop what goes to the standard error; Ray's native code says there that it has read its log level."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def drop_native_lines() -> None:
    """Print the lines of workers without those of Ray's native code."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    for name, handle in list(dispatcher.handlers):

        def filtered(data: dict[str, Any], handle: Callable[[dict[str, Any]], None] = handle) -> None:
            lines = [line for line in data["lines"] if not NATIVE_LINE.match(line)]
            if lines:
                handle({**data, "lines": lines})

        dispatcher.remove_handler(name)
        dispatcher.add_handler(name, filtered)


def setup() -> None:
    """Set up a worker process of a Ray that was started on this machine: log only errors."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    _hide_slow_starts()
    _keep_to_cluster()


def setup_on_cluster() -> None:
    """Set up a worker process of a cluster, whose warnings may concern its owner: log warnings and errors."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    _hide_slow_starts()
    _keep_to_cluster()


def _keep_to_cluster() -> None:
    """Let this process ask its own cluster, also where another Ray runs on the machine.

    Ray Train has an actor that looks for a cluster by itself and, in another one, takes this training for dead.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


def _hide_slow_starts() -> None:
    """Drop what the controller of a training says about starts that timed out."""
    controller = logging.getLogger("ray.train.v2._internal.execution.controller.controller")
    controller.addFilter(lambda record: START_TIMED_OUT not in record.getMessage())


def hide_logins(text: str) -> str:
    """A text with `***` in place of the names and passwords in the addresses of servers and databases."""
    return LOGIN.sub("://***@", text)


def is_storage_failure(text: str) -> bool:
    """Whether a message says that storage failed."""
    return any(part in text for part in STORAGE_FAILURES)


def hide_storage_failures(*loggers: str) -> None:
    """Drop what loggers say about storage that failed, since the job ends with one line about it."""
    for name in loggers:
        logger = logging.getLogger(name)
        if _is_about_something_else not in logger.filters:
            logger.addFilter(_is_about_something_else)


def _is_about_something_else(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not is_storage_failure(f"{record.getMessage()} {error}")

"""What the console does not show of a job's libraries and processes; imports nothing heavy."""

import logging
import os
import warnings

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


def setup() -> None:
    """Set up a worker process of a Ray that was started on this machine: log only errors."""
    logging.disable(logging.WARNING)
    _keep_to_cluster()


def setup_on_cluster() -> None:
    """Set up a worker process of a cluster, whose warnings may concern its owner: log warnings and errors."""
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
    _keep_to_cluster()


def _keep_to_cluster() -> None:
    """Let this process ask its own cluster, also where another Ray runs on the machine.

    Ray Train has an actor that looks for a cluster by itself and, in another one, takes this training for dead.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


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

"""Where a script writes: checks before its work, and folders that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ovd_models.errors import InputError, as_input_error

T = TypeVar("T")


def check_folder(out: str, flag: str = "--out") -> None:
    """Raise InputError, which names the flag, unless a folder can be made there, or is empty."""
    if "://" in out or "\0" in out:
        raise InputError(f"{flag} {out!r}: expected a folder of this machine")
    target = Path(out)
    with as_input_error(f"{flag} {out}: no folder can be made there"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{flag} {out}: exists, expected a new or an empty folder")
        _check_above(out, flag)


def check_place(path: str, flag: str) -> None:
    """Raise InputError, which names the flag, unless a file can be written there; URIs are not checked."""
    if not path or "://" in path:
        return
    with as_input_error(f"{flag} {path}: no file can be written there"):
        if Path(path).is_dir():
            raise InputError(f"{flag} {path}: a folder, expected the name of a file")
        _check_above(path, flag)


def _check_above(path: str, flag: str) -> None:
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{flag} {path}: {above} is a file, expected a folder")
    if not os.access(above, os.W_OK):
        raise InputError(f"{flag} {path}: {above} is read-only, expected a folder that can be written to")


def write_folder(save: Callable[[Path], T], target: Path) -> T:
    """Write a folder beside its place, then move it there, so that a stopped script leaves none.

    Returns:
        What `save` returns.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        saved = save(fresh)
        fresh.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return saved

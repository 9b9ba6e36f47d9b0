"""Folders that a script writes whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ovd_models.errors import InputError, as_input_error


def check_folder(out: str) -> None:
    """Raise InputError unless a folder can be made there, or is empty."""
    if "://" in out or "\0" in out:
        raise InputError(f"--out {out!r}: expected a folder of this machine")
    target = Path(out)
    with as_input_error(f"--out {out}: no folder can be made there"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"--out {out}: exists, expected a new or an empty folder")
        above = next(folder for folder in target.absolute().parents if folder.exists())
        if not above.is_dir():
            raise InputError(f"--out {out}: {above} is a file, expected a folder")


def write_folder(save: Callable[[Path], None], target: Path) -> None:
    """Write a folder beside its place, then move it there, so that a stopped script leaves none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh.chmod(0o755)
        save(fresh)
        fresh.replace(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)

"""What a checkpoint's `config.json` says; without torch, so that commands can check a folder at once."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovd_models.errors import InputError, as_input_error

FORMAT = 1
SOURCE = "source.json"
"""In a folder that was converted: the released files and their sha256."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The contents of `config.json`."""

    method: str
    model: dict[str, Any]
    """The model's config."""
    vocabulary: tuple[str, ...]
    """Default names."""
    splits: dict[str, str]
    """`base` or `novel` by name, as in training."""
    run: dict[str, Any]
    """The resolved run of the training."""


def read_info(folder: str | Path) -> CheckpointInfo:
    """The contents of a checkpoint's `config.json`.

    Raises:
        InputError: the folder holds no checkpoint, or one of another format.
    """
    source = Path(folder)
    path = source / "config.json"
    if not path.is_file():
        other = " (it holds a CLIP model, not a detector)" if (source / "clip.json").is_file() else ""
        raise InputError(f"{source}: no detector checkpoint, expected config.json and model.safetensors{other}")
    with as_input_error(f"{path}: not a checkpoint config"):
        raw = json.loads(path.read_text())
        if raw.get("format") != FORMAT:
            raise InputError(f"{path}: format {raw.get('format')!r}, this program reads format {FORMAT}")
        return CheckpointInfo(raw["method"], raw["model"], tuple(raw["vocabulary"]), raw["splits"], raw["run"])


def read_source(folder: str | Path) -> str:
    """The released files that a folder was converted from, `NAME sha256:DIGEST, ...`; empty if it was trained here.

    Raises:
        InputError: the record is broken.
    """
    path = Path(folder) / SOURCE
    if not path.is_file():
        return ""
    with as_input_error(f"{path}: not a record of released files"):
        return ", ".join(f"{name} sha256:{digest}" for name, digest in json.loads(path.read_text()).items())

"""What a checkpoint's `config.json` says; without torch, so that commands can check a folder at once."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ovd_models.errors import InputError, as_input_error

FORMAT = 1
CALIBRATION = "calibration.json"
DEFAULT_THRESHOLD = 0.3
"""Score threshold of detectors that were never evaluated."""
KINDS = {"method": str, "model": dict, "vocabulary": list, "splits": dict, "run": dict}
"""Fields of `config.json` and their types."""
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
    score_threshold: float = DEFAULT_THRESHOLD
    """Score above which F1 was best where the checkpoint was evaluated, if it was."""


def read_info(folder: str | Path) -> CheckpointInfo:
    """The contents of a checkpoint's `config.json`.

    Raises:
        InputError: the folder holds no checkpoint, or one of another format.
    """
    if "://" in str(folder) or str(folder).startswith("models:/"):
        raise InputError(f"{folder}: a URI, expected a local folder; workflows.common.models.load takes URIs")
    source = Path(folder)
    path = source / "config.json"
    if not path.is_file():
        other = " (it holds a CLIP model, not a detector)" if (source / "clip.json").is_file() else ""
        raise InputError(f"{source}: no detector checkpoint, expected config.json and model.safetensors{other}")
    with as_input_error(f"{path}: not a checkpoint config"):
        raw = json.loads(path.read_text())
        if raw.get("format") != FORMAT:
            raise InputError(f"{path}: format {raw.get('format')!r}, this program reads format {FORMAT}")
        for key, kind in KINDS.items():
            if not isinstance(raw[key], kind):
                raise InputError(f"{path}: {key} is a {type(raw[key]).__name__}, expected a {kind.__name__}")
        info = CheckpointInfo(raw["method"], raw["model"], tuple(raw["vocabulary"]), raw["splits"], raw["run"])
    calibration = source / CALIBRATION
    if not calibration.is_file():
        return info
    with as_input_error(f"{calibration}: not a calibration"):
        return replace(info, score_threshold=float(json.loads(calibration.read_text())["score_threshold"]))


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits of a checkpoint's files, those of its text encoder too."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt", ".npy")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def write_calibration(folder: str | Path, threshold: float, data_set: str) -> None:
    """Write the score above which F1 is best on a data set beside a checkpoint's `config.json`.

    Rounded down, so that detections with exactly this score remain.
    """
    values = {"score_threshold": math.floor(1000 * threshold) / 1000, "data_set": data_set}
    Path(folder, CALIBRATION).write_text(json.dumps(values, indent=1))


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

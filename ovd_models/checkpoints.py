"""Checkpoint folders, of all methods: complete, so that a folder serves new names anywhere.

model.safetensors     weights
config.json           method, model config, resolved run, default vocabulary; written last
calibration.json      the default score threshold, where the checkpoint was evaluated
text/                 the text tower, or a table of embedded names; a SAM has none
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ovd_models.checkpoint_info import FORMAT, CheckpointInfo, read_info
from ovd_models.clip.model import ClipTextEncoder, load_text_encoder, save_text_encoder, weights_digest
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError, as_input_error
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskModelConfig
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.vild.model import ViLD, ViLDConfig
from ovd_models.vocabulary import EmbeddingTable, TextEncoder

__all__ = [
    "CheckpointInfo",
    "load_encoder",
    "load_model",
    "read_info",
    "sam_id",
    "save_checkpoint",
    "save_encoder",
]
METHODS: dict[str, tuple[type[nn.Module], type[Any]]] = {
    "codet": (CoDet, CoDetConfig),
    "vild": (ViLD, ViLDConfig),
    "sam": (SamModel, SamConfig),
    "ovsam": (OvSam, OvSamConfig),
    "text_to_mask": (TextToMask, TextToMaskModelConfig),
}
"""Model and config classes by method."""
MAX_DEPTH = 1_000
"""Maximum number of layers of one kind in a checkpoint's config."""

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def save_checkpoint(
    model: CoDet | ViLD | SamModel | OvSam | TextToMask,
    encoder: TextEncoder | None,
    folder: str | Path,
    *,
    splits: Mapping[str, str],
    run: Mapping[str, Any],
) -> None:
    """Write a complete checkpoint folder; `config.json` comes last, so a folder that has it is whole.

    Args:
        model: the trained model.
        encoder: of its names; None for a SAM.
        folder: made if need be.
        splits: the default vocabulary, `base` or `novel` by name.
        run: the resolved run of the training.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, target / "model.safetensors")
    if encoder is not None:
        save_encoder(encoder, target / "text")
    info = {
        "format": FORMAT,
        "method": next(method for method, (kind, _) in METHODS.items() if isinstance(model, kind)),
        "model": asdict(model.config),
        "vocabulary": list(splits),
        "splits": splits,
        "run": run,
    }
    (target / "config.json").write_text(json.dumps(info, indent=1, default=str))


def load_model(folder: str | Path, *kinds: type[M]) -> M:
    """The model of a checkpoint folder, in evaluation mode; `kinds` are the accepted classes, such as `ViLD`.

    Raises:
        InputError: it is a checkpoint of another method, or broken.
    """
    info = read_info(folder)
    accepted = [method for method, (kind, _) in METHODS.items() if kind in kinds]
    if info.method not in accepted:
        expected = " or ".join(map(repr, accepted))
        other = "`workflows.common.models.load` opens any"
        raise InputError(f"{folder}: checkpoint of method {info.method!r}, expected {expected}; {other}")
    kind, config = METHODS[info.method]
    with as_input_error(f"{folder}: not a readable {info.method} checkpoint"):
        check_depth(info.model)
        settings = from_json(config, info.model)
        check_size(partial(kind, settings), Path(folder) / "model.safetensors")
        model = kind(settings)
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    assert isinstance(model, kinds)
    return model.eval()


def check_depth(value: Any, key: str = "model") -> None:
    """Check that an untrusted config does not ask for millions of layers, which take memory even without weights.

    Raises:
        InputError: it does.
    """
    if isinstance(value, dict):
        for name, entry in value.items():
            check_depth(entry, str(name))
    elif isinstance(value, list | tuple):
        for entry in value:
            check_depth(entry, key)
    elif isinstance(value, int) and value > MAX_DEPTH and any(word in key for word in ("depth", "layers", "convs")):
        raise InputError(f"{key}: {value:,}, expected at most {MAX_DEPTH:,}")


def check_size(build: Callable[[], nn.Module], weights: Path) -> None:
    """Check that a model fits its file of weights before memory is taken for it.

    Raises:
        InputError: the model is far larger than the file.
    """
    with torch.device("meta"):
        size = sum(value.nbytes for value in build().state_dict().values())
    most = 4 * weights.stat().st_size + 1_000_000  # the file may hold half precision
    if size > most:
        raise InputError(f"config.json: a model of {size:,} bytes, {weights.name} has {weights.stat().st_size:,}")


def sam_id(model: SamModel) -> str:
    """Identifies a SAM's config and weights."""
    config = torch.frombuffer(bytearray(json.dumps(asdict(model.config), sort_keys=True).encode()), dtype=torch.uint8)
    return f"sam:{weights_digest({**model.state_dict(), 'config': config})}"


def from_json(kind: type[T], raw: dict[str, Any]) -> T:
    """A config dataclass from its JSON form: lists become tuples and objects nested configs where the type says so.

    Raises:
        TypeError: a field is unknown or missing.
    """
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    unknown = set(raw) - {entry.name for entry in fields(kind)}
    if unknown:
        raise TypeError(f"unknown field {sorted(unknown)[0]!r} of {kind.__name__}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        hint = hints[name]
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
            value = from_json(hint, value)
        elif isinstance(value, list) and getattr(hint, "__origin__", None) is tuple:
            value = tuple(value)
        values[name] = value
    return kind(**values)


# ----------------------------------------------------------------------------------------------------- text encoders


def save_encoder(encoder: TextEncoder, folder: Path) -> None:
    """Write a text encoder to a folder that `load_encoder` reads."""
    if isinstance(encoder, ClipTextEncoder):
        save_text_encoder(encoder, folder)
        return
    if not isinstance(encoder, EmbeddingTable):
        raise TypeError(f"no format for {type(encoder).__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": encoder.embeddings.contiguous()}, folder / "table.safetensors")
    table = {"names": encoder.names, "teacher": encoder.teacher, "prompt_set": encoder.prompt_set}
    (folder / "table.json").write_text(json.dumps(table, indent=1))


def load_encoder(folder: str | Path) -> TextEncoder:
    """The text encoder of a `text/` folder, or of a CLIP checkpoint.

    Raises:
        InputError: the folder holds neither, or is broken.
    """
    source = Path(folder)
    if not (source / "table.json").is_file():
        return load_text_encoder(source)
    with as_input_error(f"{source}: not a readable table of embedded names"):
        table = json.loads((source / "table.json").read_text())
        rows = load_file(source / "table.safetensors")["embeddings"]
        names = tuple(table["names"])
        if rows.ndim != 2 or len(rows) != len(names):
            raise ValueError(f"{len(names)} names, embeddings {list(rows.shape)}")
        return EmbeddingTable(names, rows, table["teacher"], table["prompt_set"])

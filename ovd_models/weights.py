"""Read files of weights without running code from them, and load released weights by name."""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ovd_models.errors import InputError
from ovd_models.torchscript import check_archive, is_torchscript, read_torchscript

NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8")
"""Array types that are converted to tensors."""
STATE_KEYS = ("state_dict", "model", "module", "blobs")
"""Where files keep a state dict beside other things: trainers, detectron2, DeepSpeed, Detectron."""


@dataclass(frozen=True)
class TensorAccount:
    """What happens to every tensor of a released file."""

    used: dict[str, str]
    """Released name -> ours."""
    ignored: dict[str, str]
    """Released name -> reason."""
    unaccounted: tuple[str, ...]
    """Released names that are neither used nor ignored."""
    missing: tuple[str, ...] = ()
    """Our names without a released tensor of the right shape."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file saved by safetensors, torch or TorchScript, or of a `.pkl` with arrays.

    It may lie inside another dict, under one of `STATE_KEYS`. No code in the file is run.

    Raises:
        InputError: the file cannot be read, or holds anything but tensors and plain values.
    """
    source = Path(path)
    try:
        raw = read_file(source)
    except Exception as error:  # a broken pickle can raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{source}: cannot be read safely, expected tensors or arrays by name ({reason})") from error
    for key in STATE_KEYS:
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
    if not isinstance(raw, dict) or not raw:
        raise InputError(f"{source}: expected tensors by name, perhaps under one of {', '.join(STATE_KEYS)}")
    state: dict[str, Tensor] = {}
    for name, value in raw.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype in NUMBERS else value
        if not isinstance(tensor, Tensor):
            raise InputError(f"{source}: {name} is a {type(value).__name__}, expected a tensor or an array of numbers")
        if not is_plain(tensor):
            raise InputError(f"{source}: {name} is no plain tensor of real numbers, expected a dense one with values")
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise InputError(f"{source}: {name} has shape {list(tensor.shape)}, expected no more than the file holds")
        state[str(name).removeprefix("module.")] = tensor
    return state


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has values on the CPU, one after the other; sparse, nested, quantised and empty ones do not."""
    strided = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
    return strided and tensor.device.type == "cpu" and not tensor.is_complex()


def read_file(path: Path) -> Any:
    """What a file of weights holds.

    Raises:
        Exception: of many kinds, if it is broken or holds code.
    """
    if path.suffix == ".pkl":
        with path.open("rb") as stream:
            return ArrayUnpickler(stream, encoding="latin1").load()
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[8:] == b"{":  # after the length of the header
        return load_file(path)
    if is_torchscript(path):
        return read_torchscript(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_archive(archive)
    with path.open("rb") as stream, warnings.catch_warnings():  # by its content: torch goes by a path's ending
        warnings.simplefilter("ignore")  # about kinds of tensors that are then refused
        return torch.load(stream, weights_only=True, map_location="cpu")


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and numpy arrays, and refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the few callables that pickled arrays need."""
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("numpy", "ndarray"): "ndarray",  # an argument of `_reconstruct`; called, it could take any memory
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
        }
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which arrays do not need")
        return allowed[module, name]


def _empty_array(*_: object) -> np.ndarray:
    """An array for `__setstate__`, which checks that the shape fits the bytes."""
    return np.empty(0)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in pickle protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def load_strict(module: nn.Module, state: dict[str, Tensor], origin: str | Path) -> None:
    """Load weights that must fit exactly.

    Raises:
        InputError: a name or a shape does not fit; the message names the first.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = re.sub('", ".*', '" ...', str(error).splitlines()[:2][-1].strip())
        raise InputError(f"{origin}: weights do not fit ({reason})") from error

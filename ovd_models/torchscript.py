"""Read the tensors of a TorchScript file without TorchScript: OpenAI's CLIPs come as such files, which hold programs.

`torch.jit.load` compiles and runs the file's own code for modules that set their state. Here the archive's pickle is
read as plain objects whose attributes are tensors or further objects; nothing else is called.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100
"""Maximum depth of modules inside modules."""
DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ScriptObject:
    """A module of a TorchScript file: attributes by name."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        """Keep the attributes; a module with a state of its own kind has none that is read."""
        if isinstance(state, dict):
            self.attributes = state


class ScriptUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive; refuses every name but those of modules, tensors and storages."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for a module, the constructor of tensors, or the name of a storage's type."""
        if module.startswith("__torch__"):
            return ScriptObject
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in DTYPES:
            return name
        if module == "torch.jit._pickle":  # annotations of lists, as functions of the list
            return _same
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which weights do not need")

    def persistent_load(self, key: Any) -> Tensor:
        """A storage [N] of the archive by its key, `("storage", type, name, device, length)`."""
        _, kind, name = key[:3]
        if name not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/data/{int(name)}"))
            dtype = DTYPES[str(kind)]
            self.storages[name] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self.storages[name]


def _same(value: Any, *_: object) -> Any:
    return value


def rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    """A view of a storage; torch refuses one that leaves it."""
    return storage.as_strided(size, stride, offset)


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, which holds code besides the weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.endswith("/constants.pkl") for entry in archive.namelist())


def read_torchscript(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a TorchScript file, parameters and buffers; no code in it is run.

    Raises:
        Exception: of many kinds, if the file is broken.
    """
    with zipfile.ZipFile(path) as archive:
        check_archive(archive)
        root = next(name.partition("/")[0] for name in archive.namelist() if name.endswith("/data.pkl"))
        module = ScriptUnpickler(archive, root).load()
    return dict(tensors_of(module, ""))


def check_archive(archive: zipfile.ZipFile) -> None:
    """Refuse an archive that unpacks to more than it holds: torch stores tensors uncompressed.

    Entries that share their bytes count once, by the size of the file.

    Raises:
        ValueError: it does.
    """
    assert archive.fp is not None
    packed = archive.fp.seek(0, io.SEEK_END)
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 10 * packed + 1_000_000:  # code of TorchScript is compressed
        raise ValueError(f"an archive of {packed:,} bytes that unpacks to {unpacked:,}")


def tensors_of(value: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module and of those inside it, by dotted names."""
    if depth > MAX_DEPTH:
        raise ValueError(f"modules nested deeper than {MAX_DEPTH}")
    for name, entry in value.attributes.items() if isinstance(value, ScriptObject) else ():
        if isinstance(entry, Tensor):
            yield f"{prefix}{name}", entry
        elif isinstance(entry, ScriptObject):
            yield from tensors_of(entry, f"{prefix}{name}.", depth + 1)

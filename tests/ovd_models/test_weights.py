import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ovd_models.errors import InputError
from ovd_models.weights import read_state


def test_a_state_is_read_from_every_kind_of_file(tmp_path: Path) -> None:
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2])}
    tensors = OrderedDict((name, torch.from_numpy(array)) for name, array in arrays.items())
    torch.save({"model": tensors, "iteration": 3, "optimizer": {"state": {}, "lr": 0.1}}, tmp_path / "a.pth")
    torch.save(OrderedDict((f"module.{name}", value) for name, value in tensors.items()), tmp_path / "b.pth")
    for protocol in (2, 4):
        content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "c.pth")
    torch.save({"module": tensors}, tmp_path / "d.pt")
    (tmp_path / "blobs.pkl").write_bytes(pickle.dumps({"blobs": arrays}, protocol=2))
    save_file(dict(tensors), tmp_path / "e.safetensors")
    for file in ("a.pth", "b.pth", "c.pth", "d.pt", "e.safetensors", "2.pkl", "4.pkl", "blobs.pkl"):
        state = read_state(tmp_path / file)
        assert {name: value.tolist() for name, value in state.items()} == {n: a.tolist() for n, a in arrays.items()}


class Harm:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": Harm(touched)}))
    torch.save({"model": Harm(touched)}, tmp_path / "a.pth")
    for file in ("a.pkl", "a.pth"):
        with pytest.raises(InputError, match="cannot be read safely"):
            read_state(tmp_path / file)
    assert not touched.exists()
    importable = np.array([Harm(touched)], dtype=object)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"model": {"x": importable}}))
    with pytest.raises(InputError):
        read_state(tmp_path / "b.pkl")
    assert not touched.exists()


BROKEN = [
    b"",
    b"\x80",
    b"no pickle",
    b"error: not found",
    b"hello",
    pickle.dumps([1]),
    pickle.dumps({"model": {"a": "text"}}),
    pickle.dumps({}),
    pickle.dumps({"a": np.zeros(2, np.longdouble)}),
]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_and_foreign_files_are_one_line(content: bytes, tmp_path: Path) -> None:
    for name in ("a.pkl", "a.pth"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_state(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"missing\.pth"):
        read_state(tmp_path / "missing.pth")


def test_files_that_grow_when_they_are_read_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10_000_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    with pytest.raises(InputError, match=r"bomb\.pth: cannot be read safely.*unpacks to 40,"):
        read_state(tmp_path / "bomb.pth")
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "wide.pth")
    with pytest.raises(InputError, match=r"a has shape \[1000000000000\], expected no more than the file holds"):
        read_state(tmp_path / "wide.pth")

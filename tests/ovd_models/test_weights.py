import json
import pickle
import resource
import struct
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


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:  # type: ignore[override]
        return self.call


def header(content: bytes, data: bytes = b"") -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(content)) + content + data


def claims(**entries: tuple[list[int], int]) -> bytes:
    """A header of tensors with a shape and an end, all from the start."""
    tensors = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]} for name, (shape, end) in entries.items()
    }
    return header(json.dumps(tensors).encode(), bytes(16))


NESTED = b"[" * 200_000
ABSURD: dict[str, bytes] = {
    "array.pkl": pickle.dumps({"a": Call(np.ndarray, (10**10,))}),
    "bytes.pkl": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "lists.pkl": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "nested.safetensors": header(b'{"a":' + NESTED),
    "long.safetensors": struct.pack("<Q", 2**62) + b'{"a":1}',
    "wide.safetensors": claims(a=([10**6, 10**6], 4 * 10**12)),
    "twice.safetensors": claims(a=([4], 16), b=([4], 16)),
}


@pytest.mark.parametrize("name", ABSURD)
def test_files_that_claim_more_than_they_hold_take_no_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ABSURD[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=name) as caught:
        read_state(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values_are_refused(tmp_path: Path) -> None:
    kinds = {
        "sparse": torch.eye(3).to_sparse(),
        "rows": torch.eye(3).to_sparse_csr(),
        "empty": torch.zeros(10**6, 10**6, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        "coded": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8),
        "complex": torch.zeros(3, dtype=torch.complex64),
    }
    for kind, tensor in kinds.items():
        torch.save({"good": torch.zeros(2), kind: tensor}, tmp_path / "a.pth")
        with pytest.raises(InputError, match=rf"a\.pth: ({kind} is no plain tensor|cannot be read safely)"):
            read_state(tmp_path / "a.pth")


def test_renamed_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save(state, tmp_path / "torch")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe")
    (tmp_path / "arrays").write_bytes(pickle.dumps({"a": np.arange(3.0)}))
    for content in ("torch", "old", "safe", "arrays"):
        for ending in (".pth", ".pkl", ".safetensors", ".bin", ""):
            path = tmp_path / f"renamed{ending}"
            path.write_bytes((tmp_path / content).read_bytes())
            if (content == "arrays") == (ending == ".pkl"):  # a pickle is read as such by its name alone
                assert read_state(path)["a"].tolist() == [0, 1, 2]
                continue
            with pytest.raises(InputError, match=r"cannot be read safely|expected tensors by name") as caught:
                read_state(path)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_file_is_refused(share: float, tmp_path: Path) -> None:
    state = {f"layer{index}.weight": torch.randn(20, 30) for index in range(5)}
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(20, 30)})
    torch.save(state, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.safetensors")
    (tmp_path / "d.pkl").write_bytes(pickle.dumps({name: value.numpy() for name, value in state.items()}))
    torch.jit.script(module["a"]).save(tmp_path / "e.pt")
    for file in ("a.pth", "b.pth", "c.safetensors", "d.pkl", "e.pt"):
        whole = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=f"{file}: cannot be read safely") as caught:
            read_state(tmp_path / file)
        assert "\n" not in str(caught.value)


def test_entries_of_an_archive_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Each of them unpacks to as much as it seems to hold, all together to far more than the file."""
    path = tmp_path / "shared.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", bytes(2_000_000))
        first = archive.infolist()[0]
        archive.filelist += [first] * 100
    with pytest.raises(InputError, match=r"shared\.pth: cannot be read safely.*unpacks to 202,"):
        read_state(path)


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

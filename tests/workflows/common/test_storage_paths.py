"""Storage folders with any character, and commands that can be pasted."""

import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest

from data_prep import storage
from workflows.common import tracking

NAMES = [
    "a b", "100%", "a%20b", "a%2Fb", "a?b", "a#b", "a&b;c", "[1]", "caf\u00e9", "a'b", 'a"b', "a=b", "a+b", "~x", "-x",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_address_of_the_database_is_its_path_once_unquoted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = tracking.tracking_uri(storage.open_storage(str(tmp_path / name)))
    assert "?" not in uri
    assert unquote(uri) == f"sqlite:///{tmp_path / name}/mlflow.db"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a%20b", "a?b", "100%", "a b"])
def test_the_database_lies_in_the_storage_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = str(tmp_path / name)
    with tracking.run(uri, experiment="x", name="y", params={}):
        pass
    assert (tmp_path / name / "mlflow.db").stat().st_size > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_folder_is_one_word_of_a_shell(name: str, tmp_path: Path) -> None:
    assert shlex.split(f"--storage {shlex.quote(str(tmp_path / name))}") == ["--storage", str(tmp_path / name)]

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ovd_models.clip.model import Clip, ClipConfig, load_text_encoder, save_clip
from ovd_models.errors import InputError
from workflows import embed_texts
from workflows.embed_texts import Run

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig(embed_dim=8, text=TEXT)), folder)
    return str(folder)


def test_a_file_of_names_is_embedded(model: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("aerosol_can\n\n Dr.\naerosol_can\n")
    run = Run(storage=str(tmp_path), model=model, names=str(tmp_path / "names.txt"), prompt_set="name", clean=True)
    store, count = embed_texts.embed(run)
    assert count == 2
    expected = load_text_encoder(model)
    assert store.teacher == expected.teacher
    assert store.missing(["aerosol can", "dr", "cat"], "name") == ["cat"]
    assert embed_texts.embed(run)[1] == 0
    assert embed_texts.embed(dataclasses.replace(run, prompt_set="vild"))[1] == 2


def test_a_matrix_is_imported_and_its_order_checked_by_its_model(model: str, tmp_path: Path) -> None:
    names = ["cat", "red anchor", "umbrella and telephone"]
    rows = load_text_encoder(model).embed_names(names)
    np.save(tmp_path / "rows.npy", rows.numpy())
    categories = [{"id": 7 + index, "name": name} for index, name in enumerate(names)]
    (tmp_path / "names.json").write_text(json.dumps({"categories": categories[::-1]}))
    run = Run(storage=str(tmp_path), matrix=str(tmp_path / "rows.npy"), categories=str(tmp_path / "names.json"))
    store, count = embed_texts.embed(dataclasses.replace(run, teacher="ViT-B-32:openai"))
    assert (count, store.name) == (3, "ViT-B-32-openai")
    assert torch.allclose(store.read(names[:1], "given"), rows[:1], atol=1e-6)
    checked, _ = embed_texts.embed(dataclasses.replace(run, model=model, prompt_set="colours"))
    assert checked.teacher == load_text_encoder(model).teacher
    assert checked.missing(names, "colours") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--model: missing"),
        ({"model": "MODEL"}, "--names: missing"),
        ({"model": "MODEL", "names": "none.txt"}, "--names none.txt: .* expected a text file"),
        ({"model": "MODEL", "prompt_set": "unheard"}, "prompt set 'unheard': unknown"),
        ({"model": "MODEL", "boxes": "none"}, "no such table"),
        ({"model": "ViT-B-32"}, "--model|no CLIP checkpoint"),
        ({"model": "ViT-B-32", "pretrained": "none.pt"}, "no such file and no weights of ViT-B-32"),
        ({"matrix": "rows.npy"}, "--categories: missing"),
    ],
)
def test_what_is_missing_is_told(model: str, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    given = {key: model if value == "MODEL" else value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        embed_texts.embed(Run(storage=str(tmp_path), **given))  # type: ignore[arg-type]


def test_an_empty_file_is_told_on_the_command_line(model: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n\n")
    command = [sys.executable, embed_texts.__file__, "--storage", str(tmp_path), "--model", model]
    done = subprocess.run(
        [*command, "--names", str(tmp_path / "names.txt")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: vocabulary: empty, expected at least one name\n")

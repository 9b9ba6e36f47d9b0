import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from data_prep import tables
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, load_text_encoder, save_clip
from ovd_models.errors import InputError
from workflows.common.teacher import find_teacher, open_encoder, read_codet_names, read_synonyms

NAME = "ViT-for-teacher-tests"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights of a small architecture that open_clip knows."""
    folder = tmp_path_factory.mktemp("open_clip")
    small = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (folder / f"{NAME}.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": small, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    torch.save(Clip(ClipConfig(name=NAME)).model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def test_a_teacher_by_name_and_file_has_the_id_of_its_checkpoint(weights: Path, tmp_path: Path) -> None:
    folder = find_teacher(str(tmp_path), "photos", data="d", teacher=NAME, pretrained=str(weights))
    by_name, by_folder = load_clip(NAME, str(weights)), load_clip(folder)
    assert by_name[1] == by_folder[1] == load_text_encoder(folder).teacher
    assert find_teacher(str(tmp_path), "photos", data="d", teacher=folder) == folder


@pytest.mark.parametrize(
    ("teacher", "pretrained", "texts", "message"),
    [
        ("", "", "", "--teacher: missing, expected a checkpoint of `python workflows/clip.py`"),
        ("nowhere", "", "", r"--teacher nowhere: no CLIP checkpoint \(clip.json\)"),
        ("ViT-B-32", "", "", "--teacher ViT-B-32: no CLIP checkpoint .* with --pretrained TAG|FILE"),
        ("", "openai", "", "--pretrained openai: expected --teacher with an architecture"),
        ("ViT-B-322", "openai", "", "ViT-B-322.*unknown to open_clip"),
        ("ViT-B-32", "absent.pt", "", "--pretrained absent.pt: no such file and no weights of ViT-B-32"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(
    teacher: str, pretrained: str, texts: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_teacher(str(tmp_path), "lvis_r50", data="", teacher=teacher, pretrained=pretrained, texts=texts)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_weights_of_another_architecture_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=str(weights)):
        find_teacher(str(tmp_path), "photos", data="d", teacher="RN50", pretrained=str(weights))
    assert not (tmp_path / "teachers").exists()


@pytest.fixture
def storage_uri(tmp_path: Path) -> str:
    """Three categories, one of them with a synonym, two concepts, and a CLIP in `clip`."""
    categories = [
        {"category_id": 1, "name": "anchor", "synonyms": [], "frequency": "f", "split": "base", "image_count": 3},
        {"category_id": 2, "name": "sofa", "synonyms": ["couch"], "frequency": "f", "split": "base", "image_count": 2},
        {"category_id": 3, "name": "cat", "synonyms": ["kitten"], "frequency": "r", "split": "novel", "image_count": 0},
    ]
    concepts = [{"concept_id": 1, "name": "sea"}, {"concept_id": 2, "name": "sofa"}]
    for table, rows in (("categories", categories), ("concepts", concepts)):
        schema = tables.SCHEMAS[table]
        whole = [{name: row.get(name, 0) for name in schema.names} for row in rows]
        part = tables.write_part(str(tmp_path), table, "t", "part.parquet", pa.Table.from_pylist(whole, schema))
        tables.publish(str(tmp_path), table, "t", [part], producer="test", config_hash="0")
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), tmp_path / "clip")
    return str(tmp_path)


def test_synonyms_count_in_training_where_the_config_says_so(storage_uri: str) -> None:
    encoder = open_encoder(storage_uri, "t", teacher=f"{storage_uri}/clip", texts="")
    assert read_synonyms(storage_uri, "t") == {"sofa": ["couch"], "cat": ["kitten"]}
    rows = encoder.embed_names(["anchor", "sofa", "couch", "sea"])
    for rule in ("none", "mean"):
        names = read_codet_names(storage_uri, "t", "t", encoder, rule)
        second = rows[1] if rule == "none" else F.normalize(rows[1] + rows[2], dim=0)
        # Stored rows are float16.
        assert torch.allclose(names.base_embeddings, torch.stack((rows[0], second)), atol=1e-3)
        assert torch.allclose(names.concept_embeddings, rows[[3, 1]], atol=1e-3)


def test_the_prompt_set_of_a_run_replaces_the_teachers_own(storage_uri: str) -> None:
    own, published = (
        open_encoder(storage_uri, "t", teacher=f"{storage_uri}/clip", texts="", prompt_set=name)
        for name in ("", "name:a")
    )
    assert isinstance(published, ClipTextEncoder)
    assert (own.prompt_set, published.prompt_set) == ("colours", "name:a")
    assert own.teacher == published.teacher
    assert torch.allclose(published.embed_names(["anchor"]), published.embed_captions(["a anchor"]), atol=1e-6)
    with pytest.raises(InputError, match="prompt set 'nice': unknown"):
        open_encoder(storage_uri, "t", teacher=f"{storage_uri}/clip", texts="", prompt_set="nice")


def test_a_table_of_names_must_match_the_data_set(storage_uri: str, tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.ones((2, 8), np.float32))
    with pytest.raises(InputError, match=r"two.npy: array of shape \[2, 8\], expected one row for each of 3"):
        open_encoder(storage_uri, "t", teacher="", texts=str(tmp_path / "two.npy"))
    np.save(tmp_path / "three.npy", np.eye(3, 8, dtype=np.float32))
    assert open_encoder(storage_uri, "t", teacher="", texts=str(tmp_path / "three.npy")).prompt_set == "given"
    with pytest.raises(InputError, match="--prompt-set vild: the names of --texts are embedded already"):
        open_encoder(storage_uri, "t", teacher="", texts=str(tmp_path / "three.npy"), prompt_set="vild")

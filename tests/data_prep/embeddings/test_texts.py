import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_data import LVIS, needs

from data_prep import tables
from data_prep.embeddings import texts
from data_prep.embeddings.texts import (
    PreloadedEncoder,
    StoredEncoder,
    TextStore,
    check_order,
    read_category_names,
    read_matrix,
)
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder
from ovd_models.errors import InputError
from ovd_models.vocabulary import EmbeddingTable, build_vocabulary

NAMES = ["cat", "anchor", "red umbrella"]
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def encoder(prompt_set: str = "name", teacher: str = "clip:0123", width: int = 8) -> ClipTextEncoder:
    torch.manual_seed(0)
    model = Clip(ClipConfig(embed_dim=width, text=TEXT, prompt_set=prompt_set))
    for value in model.model.text.transformer.parameters():
        value.data.mul_(5)  # so that texts differ
    return ClipTextEncoder(model.config, model.model.text, teacher)


def test_names_are_embedded_once_and_read_by_all(tmp_path: Path) -> None:
    teacher = encoder()
    store = TextStore(str(tmp_path), teacher.teacher)
    assert store.fill(teacher, NAMES) == 3
    assert store.fill(teacher, ["anchor", "cat"]) == 0
    assert torch.equal(
        store.read(["anchor", "cat", "anchor"], "name"), teacher.embed_names(["anchor", "cat", "anchor"])
    )
    rows = tables.read_table(str(tmp_path), "texts", "clip-0123")
    assert rows["name"].to_pylist() == NAMES
    assert rows.schema.equals(tables.SCHEMAS["texts"])


def test_new_names_and_prompt_sets_come_in_new_generations(tmp_path: Path) -> None:
    plain, photo = encoder("name"), encoder("photo")
    store = TextStore(str(tmp_path), plain.teacher)
    store.fill(plain, NAMES)
    first = store.manifest()
    store.fill(plain, ["dog", "cat"])
    store.fill(photo, ["cat"])
    last = store.manifest()
    assert first is not None
    assert last is not None
    assert (first.details["generation"], last.details["generation"]) == (0, 2)
    assert set(first.files) < set(last.files)
    assert (last.rows, last.details["prompt_sets"]) == (5, ["name", "photo"])
    for teacher in (plain, photo):
        assert torch.allclose(store.read(["cat"], teacher.prompt_set), teacher.embed_names(["cat"]), atol=1e-6)
    assert store.missing(["dog", "cat", "bird"], "photo") == ["dog", "bird"]


def test_a_vocabulary_is_looked_up_and_completed(tmp_path: Path) -> None:
    teacher = encoder()
    stored = StoredEncoder(teacher, TextStore(str(tmp_path), teacher.teacher))
    assert (stored.teacher, stored.prompt_set) == ("clip:0123", "name")
    first = build_vocabulary(stored, NAMES)
    assert torch.allclose(first.embeddings, build_vocabulary(teacher, NAMES).embeddings, atol=1e-6)
    assert stored.store.missing(NAMES, "name") == []
    assert stored.embed_captions(["a cat"]) is not None
    with pytest.raises(InputError, match="vocabulary: empty"):
        build_vocabulary(stored, [])


def test_a_preloaded_store_answers_for_its_names_and_grows_by_none(tmp_path: Path) -> None:
    teacher = encoder()
    store = TextStore(str(tmp_path), teacher.teacher)
    empty = PreloadedEncoder(teacher, store)
    assert torch.equal(empty.embed_names(NAMES), teacher.embed_names(NAMES))
    store.import_table(EmbeddingTable(("cat", "anchor"), torch.eye(8)[:2], teacher.teacher, "name"))
    store.import_table(EmbeddingTable(("dog",), torch.eye(8)[:1], teacher.teacher, "photo"))
    full = PreloadedEncoder(teacher, store)
    assert (full.teacher, full.prompt_set) == ("clip:0123", "name")
    rows_KD = full.embed_names(["dog", "anchor", "cat", "anchor", "dog"])
    assert torch.equal(rows_KD[1:4], torch.eye(8)[[1, 0, 1]])
    assert torch.equal(rows_KD[[0, 4]], teacher.embed_names(["dog", "dog"]))  # that of another prompt set is not taken
    assert store.missing(["dog"], "name") == ["dog"]
    assert full.embed_names([]).shape == (0, 8)
    assert full.embed_captions(["a cat"]) is not None


def test_a_fill_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PART", 2)
    names = [f"thing {number}" for number in range(5)]
    teacher = encoder()
    store = TextStore(str(tmp_path), teacher.teacher)
    with monkeypatch.context() as patch:
        publish, calls = tables.publish, []

        def dies(*given: object, **options: object) -> object:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return publish(*given, **options)  # type: ignore[arg-type]

        patch.setattr(tables, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            store.fill(teacher, names)
    assert store.missing(names, "name") == names[2:]
    assert store.fill(teacher, names) == 3
    rows = tables.read_table(str(tmp_path), "texts", store.name)
    assert sorted(rows["name"].to_pylist()) == names
    assert rows.num_rows == 5
    assert torch.allclose(store.read(names, "name"), teacher.embed_names(names), atol=1e-5)


def test_a_publication_leaves_the_files_that_others_are_writing(tmp_path: Path) -> None:
    teacher = encoder()
    other, store = (TextStore(str(tmp_path), teacher.teacher) for _ in range(2))

    def chunks() -> Iterator[bytes]:
        yield b"half "
        other.fill(teacher, ["dog"])
        yield b"and half"

    store.fill(teacher, NAMES)
    tables.write_file(str(tmp_path), "texts", store.name, "file", chunks())
    assert Path(store.uri, "file").read_bytes() == b"half and half"
    assert store.missing([*NAMES, "dog"], teacher.prompt_set) == []


def test_another_teacher_width_or_prompt_set_is_told(tmp_path: Path) -> None:
    teacher = encoder()
    store = TextStore(str(tmp_path), teacher.teacher)
    with pytest.raises(InputError, match=r"no such table; `python workflows/embed_texts\.py` makes it"):
        store.read(["cat"], "name")
    store.fill(teacher, NAMES)
    other = TextStore(str(tmp_path), "clip/0123")  # the same folder
    with pytest.raises(InputError, match="embedded by clip:0123, expected clip/0123"):
        other.read(["cat"], "name")
    with pytest.raises(InputError, match="the store of clip:0123, expected that of clip:4567"):
        store.fill(encoder(teacher="clip:4567"), NAMES)
    with pytest.raises(InputError, match="embeddings of width 8, these have 6"):
        store.fill(encoder(width=6), ["dog"])
    with pytest.raises(InputError, match=r"no 'cat' with prompt set 'vild'; `python workflows/embed_texts.py` embeds"):
        store.read(["cat"], "vild")
    with pytest.raises(InputError, match="vocabulary: empty"):
        store.fill(teacher, [])


def test_teachers_have_tables_of_their_own() -> None:
    assert TextStore("s", "clip:0123ab").name == "clip-0123ab"
    assert TextStore("s", "ViT-B-32:openai/x").name == "ViT-B-32-openai-x"


# ---------------------------------------------------------------------------------------------------- many names


def test_memory_is_bounded_by_the_part(tmp_path: Path) -> None:
    store = TextStore(str(tmp_path), "t")
    names = [f"thing {number}" for number in range(3 * texts.PART)]
    rows = np.ones((texts.PART, 512), np.float32) / np.sqrt(np.float32(512))
    tracemalloc.start()
    for start in range(0, len(names), texts.PART):
        part = EmbeddingTable(tuple(names[start : start + texts.PART]), torch.from_numpy(rows), "t", "bare")
        store.import_table(part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * rows.nbytes  # of three parts written
    assert store.missing([*names, "another"], "bare") == ["another"]
    assert torch.equal(store.read(names[-2:], "bare"), torch.from_numpy(rows[:2]))


# ------------------------------------------------------------------------------------------- matrices of others


def matrix(path: Path, rows: np.ndarray) -> str:
    np.save(path, rows)
    return str(path)


def test_rows_follow_the_category_ids(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text(json.dumps([{"id": 9, "name": "b"}, {"id": 2, "name": "a"}]))
    names = read_category_names(str(tmp_path / "names.json"))
    assert names == ["a", "b"]
    table = read_matrix(matrix(tmp_path / "rows.npy", np.array([[3.0, 4, 0], [0, 0, 2]], np.float16)), names)
    assert torch.allclose(table.embeddings, torch.tensor([[0.6, 0.8, 0], [0, 0, 1]]))
    turned = read_matrix(matrix(tmp_path / "turned.npy", np.array([[3.0, 0], [4, 0], [0, 2]])), names)
    assert torch.equal(turned.embeddings, table.embeddings)
    store = TextStore(str(tmp_path), table.teacher)
    assert store.import_table(table) == 2
    assert torch.equal(store.read(["b", "a"], "given"), table.embeddings[[1, 0]])
    assert store.import_table(table) == 0
    manifest = store.manifest()
    assert manifest is not None
    assert manifest.rows == 2


def test_a_wrong_count_or_width_is_told_with_both(tmp_path: Path) -> None:
    path = matrix(tmp_path / "rows.npy", np.ones((4, 3), np.float32))
    with pytest.raises(InputError, match=r"rows.npy: array of shape \[4, 3\], expected one row for each of 2"):
        read_matrix(path, ["a", "b"])
    with pytest.raises(InputError, match=r"rows.npy: embeddings of width 3, expected 512"):
        read_matrix(path, list("abcd"), width=512)
    with pytest.raises(InputError, match=r"none.npy: cannot be read"):
        read_matrix(str(tmp_path / "none.npy"), ["a"])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"images": []}',
        '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]',
        '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]',
    ],
)
def test_broken_categories_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(InputError, match=r"names\.json: ") as caught:
        read_category_names(str(tmp_path / "names.json"))
    assert "\n" not in str(caught.value)


def test_rows_in_another_order_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Clip(ClipConfig(embed_dim=32, text=TEXT, prompt_set="name"))
    model.model.text.token_embedding.weight.data.mul_(50)  # so that every word tells
    teacher = ClipTextEncoder(model.config, model.model.text, "clip:0123")
    names = ["cat", "anchor", "umbrella", "dog", "cup", "house", "bird", "boat", "key"]
    rows = teacher.embed_names(names)
    right = EmbeddingTable(tuple(names), rows, "someone")
    assert check_order(right, teacher, "rows.npy") == 1
    wrong = EmbeddingTable(tuple(names), rows.roll(1, 0), "someone")
    with pytest.raises(InputError, match=r"rows.npy: only 0% of 9 names are nearest to their own row"):
        check_order(wrong, teacher, "rows.npy")


@needs("data/lvis")
def test_the_released_lvis_matrix_is_imported(tmp_path: Path) -> None:
    names = read_category_names(str(LVIS / "lvis_v1_categories.json"))
    table = read_matrix(str(LVIS / "lvis_v1_clip_vitb32_a_name.npy"), names, width=512)
    store = TextStore(str(tmp_path), table.teacher)
    store.import_table(replace(table, prompt_set="name:a"))
    raw = np.load(LVIS / "lvis_v1_clip_vitb32_a_name.npy")[names.index("zucchini")].astype(np.float32)
    assert np.allclose(store.read(["zucchini"], "name:a")[0], raw / np.linalg.norm(raw), atol=1e-3)
    # related names are near each other, which rows in another order would not be
    near = store.read(["sofa", "sofa_bed", "zebra"], "name:a")
    assert float(near[0] @ near[1]) > float(near[0] @ near[2])
    with pytest.raises(InputError, match=r"shape \[80, 512\], expected one row for each of 1203"):
        read_matrix(str(LVIS / "coco_clip_vitb32_a_name.npy"), names)

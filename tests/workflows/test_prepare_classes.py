"""Image-level sets and downloaded shards: from files to groups that CoDet trains from."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats import write_tar, write_wordnet

from data_prep import tables
from data_prep.pictograms.world import SCENES, World, encode_jpeg
from ovd_models.errors import InputError
from workflows import codet, prepare_pairs
from workflows.configs import codet as codet_configs
from workflows.configs import pairs as configs
from workflows.configs.pairs import Run
from workflows.prepare_pairs import prepare

SCRIPT = Path(prepare_pairs.__file__)
CLASSES = {"n00000001": "umbrella", "n00000002": "anchor", "n00000003": "telephone"}
IMAGES = 5
"""Images of a class."""


def pictures(name: str, count: int = IMAGES) -> list[bytes]:
    """Scenes of one pictogram alone."""
    world = World.create(0)
    alone = np.eye(len(world.names))[world.names.index(name)]
    style = dataclasses.replace(SCENES, object_counts=(1,))
    return [encode_jpeg(world.scene(np.random.default_rng([7, n]), style, alone).pixels) for n in range(count)]


def rows_of(root: str, name: str) -> dict[str, list[dict[str, Any]]]:
    return {
        table: tables.read_table(root, table, name).to_pylist() for table in ("pairs", "rejects", "concepts", "groups")
    }


def write_folders(root: Path) -> Path:
    for key, name in CLASSES.items():
        (root / key).mkdir(parents=True)
        for number, content in enumerate(pictures(name)):
            (root / key / f"{key}_{number}.JPEG").write_bytes(content)
    return root


def classes_run(root: Path, **changes: object) -> Run:
    run = dataclasses.replace(configs.classes(), storage=str(root / "store"), crawlers=0, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(run, corpus=dataclasses.replace(run.corpus, near_bits=None))


def names_file(root: Path) -> str:
    (root / "names.tsv").write_text("".join(f"{key}\t{name}, {name}s\n" for key, name in CLASSES.items()))
    return str(root / "names.tsv")


@pytest.mark.slow
@pytest.mark.ray
def test_codet_trains_from_a_folder_of_classes(ray_cluster: None, tmp_path: Path) -> None:
    columns = dataclasses.replace(configs.classes().columns, class_names=names_file(tmp_path))
    run = classes_run(tmp_path, images=str(write_folders(tmp_path / "train")), columns=columns)
    assert prepare(run).kept == 3 * IMAGES
    found = rows_of(run.storage, "classes")
    concepts = [(row["name"], row["image_count"]) for row in found["concepts"]]
    assert concepts == [(name, IMAGES) for name in sorted(CLASSES.values())]
    assert {row["caption"] for row in found["groups"]} == {
        "a photo of an anchor", "a photo of a telephone", "a photo of an umbrella",
    }  # fmt: skip
    assert all(row["concept_ids"] == [row["concept_id"]] for row in found["groups"])
    assert {(row["label"], row["url"].split("/")[-2]) for row in found["pairs"]} == {
        (name, key) for key, name in CLASSES.items()
    }
    assert prepare(run).reused
    training = codet.prepare_data(dataclasses.replace(codet_configs.smoke(), storage=run.storage))
    trained = codet.train(dataclasses.replace(training, pairs="classes"))
    assert 0 <= trained.metrics.codet.summary()["ap50_novel"] <= 1


def test_shards_with_classes_and_lists_with_labels_give_the_same_groups(tmp_path: Path) -> None:
    write_folders(tmp_path / "train")
    members: dict[str, bytes] = {}
    lines = ["url\tkind"]
    for number, (key, name) in enumerate(CLASSES.items()):
        for place, content in enumerate(pictures(name)):
            members |= {f"{key}-{place}.jpg": content, f"{key}-{place}.cls": str(number).encode()}
            lines.append(f"http://127.0.0.1/{key}-{place}.jpg\t{name}")
    write_tar(tmp_path / "a.tar", members)
    index = {str(number): [key, name] for number, (key, name) in enumerate(CLASSES.items())}
    (tmp_path / "index.json").write_text(json.dumps(index))
    columns = dataclasses.replace(configs.classes().columns, class_names=str(tmp_path / "index.json"))
    tar = classes_run(tmp_path, name="tar", shards=str(tmp_path / "a.tar"), columns=columns)
    folder = classes_run(tmp_path, name="folder", images=str(tmp_path / "train"), columns=columns)
    groups = []
    for run in (tar, folder):
        assert prepare(run).kept == 3 * IMAGES
        found = rows_of(run.storage, run.name)["groups"]
        groups.append([(row["concept_id"], row["image_id"], row["caption"]) for row in found])
    assert groups[0] == groups[1]
    (tmp_path / "list.tsv").write_text("\n".join(lines) + "\n")  # a URL list: rejected, but labelled
    listed = dataclasses.replace(configs.classes().columns, label="kind")
    prepare(classes_run(tmp_path, name="list", urls=str(tmp_path / "list.tsv"), columns=listed))
    rejects = rows_of(str(tmp_path / "store"), "list")["rejects"]
    assert {(row["label"], row["caption"]) for row in rejects} == {
        (name, row["caption"]) for name in CLASSES.values() for row in rejects if row["caption"].endswith(f" {name}")
    }


def img2dataset_folder(root: Path) -> Path:
    """Two shards as img2dataset writes them, with its list and statistics beside each."""
    root.mkdir()
    for shard, caption in enumerate(("a truck with a cake in a city", "a mouse on a cake")):
        members: dict[str, bytes] = {}
        for number, content in enumerate(pictures(("umbrella", "anchor")[shard], 3)):
            key = f"{shard:05d}{number:04d}"
            about = {"caption": caption, "url": f"http://web/{key}.jpg", "key": key, "status": "success"}
            members |= {f"{key}.jpg": content, f"{key}.json": json.dumps(about).encode()}
            members[f"{key}.txt"] = caption.encode()
        write_tar(root / f"{shard:05d}.tar", members)
        (root / f"{shard:05d}.parquet").write_bytes(b"not read")
        (root / f"{shard:05d}_stats.json").write_text("{}")
    return root


def test_downloaded_cc3m_becomes_groups_by_codets_rule(tmp_path: Path) -> None:
    folder = img2dataset_folder(tmp_path / "cc3m")
    run = dataclasses.replace(configs.cc3m(), storage=str(tmp_path / "store"), shards=str(folder), crawlers=0)
    assert run.min_images == 20
    lenient = dataclasses.replace(run.corpus, near_bits=None)
    run = dataclasses.replace(run, corpus=lenient, min_images=3, wordnet=str(write_wordnet(tmp_path / "wordnet")))
    assert prepare(run).kept == 6
    found = rows_of(run.storage, "cc3m")
    concepts = {row["name"]: row["image_count"] for row in found["concepts"]}
    assert concepts == {"cake": 6, "mouse": 3, "truck": 3}  # no city
    assert {row["web_url"] for row in found["pairs"]} >= {"http://web/000000000.jpg", "http://web/000010002.jpg"}
    words = dataclasses.replace(run, name="words", wordnet="")
    prepare(words)
    assert "city" in {row["name"] for row in rows_of(run.storage, "words")["concepts"]}
    with pytest.raises(InputError, match="made from another config, expected"):
        prepare(dataclasses.replace(words, name="cc3m"))
    with pytest.raises(InputError, match="--wordnet: given beside a vocabulary"):
        prepare(dataclasses.replace(run, names=("cake",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "classes", "--images", "none"], "none: no images, expected files with the extensions"),
        (["--config", "classes", "--images", "train"], "train: class 'n1' is an id, expected --columns.class-names"),
        (["--config", "web", "--images", "train"], "--columns.label: empty, expected --config classes --images FOLDER"),
        (["--config", "classes", "--images", "a", "--urls", "b"], "--urls: given beside --images"),
        (["--config", "classes", "--images", "a", "--shards", "b"], "--shards: given beside --images"),
        (
            ["--config", "classes", "--shards", "a.tar"],
            "a.tar: class '7' is an id, expected --columns.class-names with",
        ),
        (["--config", "cc3m", "--shards", "a.tar", "--wordnet", "x"], "x/index.noun: cannot be read"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "train/n1").mkdir(parents=True)
    (tmp_path / "train/n1/x.jpg").write_bytes(b"x")
    write_tar(tmp_path / "a.tar", {"1.jpg": b"x", "1.cls": b"7"})
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1

import dataclasses
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainings
from PIL import Image

import ovd_models
from data_prep import tables
from ovd_models.batches import Detections
from ovd_models.checkpoints import load_model
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import Vocabulary
from workflows import failures, vild
from workflows.common import cli, tracking
from workflows.common.runs import Trained
from workflows.configs import vild as vild_configs
from workflows.configs.vild import Run
from workflows.reports import failures as gallery
from workflows.reports.detections import read_box_images

NOVEL = 17


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The smoke config with its tables and its untrained teacher."""
    run: Run = trainings.prepared("vild", str(tmp_path_factory.mktemp("vild")))
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[DetectionMetrics]:
    return vild.train(prepared)


@pytest.mark.ray
def test_every_stage_leaves_what_the_next_one_reads(prepared: Run, trained: Trained[DetectionMetrics]) -> None:
    manifest = tables.read_manifest(prepared.storage, "regions", trained.outputs["regions"])
    assert manifest.details["crops"] == {"scales": [1.0, 1.5], "fit": "warp"}
    counts = tables.read_table(prepared.storage, "regions", trained.outputs["regions"], ["count"])["count"].to_pylist()
    assert len(counts) == 48
    assert 0 < max(counts) <= prepared.max_proposals
    detector = ovd_models.load(trained.model)
    assert (detector.method, len(detector.vocabulary)) == ("vild", 68)
    before, after = (
        load_model(trained.outputs["proposals"], ViLD).detector.state_dict(),
        load_model(trained.model, ViLD).detector.state_dict(),
    )
    assert not all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.ray
def test_losses_of_both_stages_are_tracked_and_finite(prepared: Run, trained: Trained[DetectionMetrics]) -> None:
    uri = tracking.tracking_uri(prepared.storage)
    histories = tracking.metric_history(uri, trained.run_id, "train/loss")
    found = {(name, step): value for name, points in histories.items() for step, value in points}
    expected = {5: ("objectness", "rpn_box"), 10: ("objectness", "rpn_box", "box", "classes", "image")}
    assert set(found) == {(f"train/loss_{name}", step) for step, names in expected.items() for name in names}
    assert [step for step, _ in tracking.metric_history(uri, trained.run_id, "eval/ap50")["eval/ap50_base"]] == [8, 10]
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


@pytest.mark.ray
def test_broken_images_end_no_stage(
    prepared: Run, trained: Trained[DetectionMetrics], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for table in ("boxes", "categories", "images"):
        shutil.copytree(Path(prepared.storage, table), tmp_path / table)
    for part, step in (("train", 3), ("eval", 4)):
        for row in tables.read_table(str(tmp_path), "boxes", f"smoke-{part}").to_pylist()[::step]:
            (tmp_path / row["uri"]).unlink()
    found = vild.train(dataclasses.replace(prepared, storage=str(tmp_path)))
    printed = capsys.readouterr().out
    for stage in ("rpn", "detector"):
        assert printed.count(f"vild {stage}: replaced an image that cannot be read: {tmp_path}/images") == 1
    history = tracking.metric_history(tracking.tracking_uri(str(tmp_path)), found.run_id, "train/replaced")
    assert [step for step, count in history["train/replaced_images"] if count >= 1] == [5, 10]
    assert "boxes/smoke-train: 16 of 48 images cannot be read, such as" in printed
    assert "left out: 4 images that cannot be read (" in printed
    assert math.isfinite(found.metrics.mean("ap50"))


@pytest.mark.ray
def test_the_resolved_run_lies_beside_the_checkpoint(trained: Trained[DetectionMetrics]) -> None:
    info = json.loads((Path(trained.model) / "config.json").read_text())
    assert info["run"]["model"]["detector"]["embed_dim"] == info["model"]["detector"]["embed_dim"] == 128
    assert list(info["splits"].values()).count("novel") == NOVEL


@pytest.mark.ray
def test_any_names_attributes_and_hierarchies_are_answered(trained: Trained[DetectionMetrics]) -> None:
    detector = ovd_models.load(trained.model)
    picture = Image.new("RGB", (128, 128), "grey")
    assert detector.detect(picture, ["anchor", "a name of nobody"]).names == ("anchor", "a name of nobody")
    coloured = detector.detect(picture, ["anchor", "cat"], attributes=["red", "blue"], score_threshold=0.0)
    assert coloured.names == ("red anchor", "red cat", "blue anchor", "blue cat")
    family = detector.detect(picture, {"animal": ["cat", "cow"], "anchor": []}, score_threshold=0.0)
    assert family.names == ("anchor", "cat", "cow")
    plain, worded = (
        detector.detect(picture, ["cat", "cow"], prompts=prompts, score_threshold=0.0, scoring=Scoring(objectness=0.5))
        for prompts in ("", "a drawing of {a}")
    )
    assert not torch.equal(plain.scores, worded.scores)


@pytest.mark.ray
def test_an_earlier_runs_proposals_and_embeddings_are_used_again(
    prepared: Run, trained: Trained[DetectionMetrics]
) -> None:
    model = dataclasses.replace(prepared.model, variant="vild")
    again = vild.train(dataclasses.replace(prepared, model=model, proposals=trained.outputs["proposals"]))
    assert (again.outputs["proposals"], again.outputs["regions"]) == (
        trained.outputs["proposals"],
        trained.outputs["regions"],
    )
    assert load_model(again.model, ViLD).config.variant == "vild"


@pytest.mark.ray
def test_a_detector_is_continued_with_its_own_architecture_and_proposals(
    prepared: Run, trained: Trained[DetectionMetrics]
) -> None:
    settings = vild_configs.finetune()
    stage = dataclasses.replace(
        settings.detector_stage, steps=5, checkpoint_every=5, workers=0, rate_factors={"detector.backbone.": 0.0}
    )
    run = dataclasses.replace(
        settings,
        storage=prepared.storage,
        boxes="smoke",
        teacher=prepared.teacher,
        box_model=trained.model,
        max_proposals=8,
        regions_per_step=4,
        embed=prepared.embed,
        detector_stage=stage,
        detection_batch=2,
        validate_every=0,
    )
    found = vild.train(vild.prepare_data(run))
    assert found.outputs["proposals"] == trained.model
    before, after = (load_model(folder, ViLD) for folder in (trained.model, found.model))
    assert after.config == before.config
    pairs = [
        zip(getattr(before.detector, part).parameters(), getattr(after.detector, part).parameters(), strict=True)
        for part in ("backbone", "projection")
    ]
    assert [all(torch.equal(one, two) for one, two in each) for each in pairs] == [True, False]
    with pytest.raises(InputError, match="--box-model: missing, expected the ViLD checkpoint to continue"):
        vild.prepare_data(dataclasses.replace(run, box_model=""))


@pytest.mark.ray
def test_supervised_training_finds_no_novel_name(prepared: Run, trained: Trained[DetectionMetrics]) -> None:
    model = dataclasses.replace(prepared.model, variant="supervised")
    found = vild.train(dataclasses.replace(prepared, model=model, proposals=trained.outputs["proposals"]))
    assert found.metrics.summary()["ap50_novel"] == 0.0
    assert len(load_model(found.model, ViLD).config.supervised_names) == 68 - NOVEL
    rows = tables.read_table(prepared.storage, "categories", "smoke").to_pylist()
    novel = [row["name"] for row in rows if row["split"] == "novel"]
    assert len(ovd_models.load(found.model).detect(Image.new("RGB", (64, 64)), novel, score_threshold=0.0)) == 0


def test_objects_under_another_name_are_confusions_and_no_pair_fills_the_page() -> None:
    image = Image.new("RGB", (100, 20))
    boxes = np.array([[at, 0, at + 8, 8] for at in (0, 20, 40, 60, 80)], np.float32)
    things = [
        gallery.AnnotatedObject(image.copy, box, name)
        for box, name in zip(boxes, ("cat", "cow", "cow", "cow", "cat"), strict=True)
    ]
    # The first is called by its name, the last one is found nowhere, and one detection is too small to be the second.
    labels, scores = [0, 0, 1, 0, 0], [0.9, 0.8, 0.95, 0.8, 0.7]
    moved = boxes.copy()
    moved[4] = [80, 10, 88, 18]
    found = Detections(
        torch.from_numpy(np.concatenate([moved, [[20, 0, 23, 8]]]).astype(np.float32)),
        torch.tensor([*scores, 1.0]), torch.tensor([*labels, 1]), ("cat", "cow"), 100, 20,
    )  # fmt: skip
    vocabulary = Vocabulary(("cat", "cow"), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    wrong = gallery.find_confusions([things], [found], vocabulary)
    assert [(entry.target.name, entry.predicted) for entry in wrong] == [("cow", "cat"), ("cow", "cat")]
    assert [entry.similarity for entry in wrong] == pytest.approx([0.6, 0.6])
    assert gallery.find_confusions([things, []], [found, found], vocabulary) == wrong
    assert len(gallery.limit_repeats(wrong * 3, most=3)) == 3


@pytest.mark.ray
def test_failures_are_found_and_written(
    prepared: Run, trained: Trained[DetectionMetrics], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[weakref.ref[Image.Image]] = []
    in_memory: list[int] = []

    def read_counted(*arguments: Any) -> Iterator[tuple[Any, Image.Image | None]]:
        for row, image in read_box_images(*arguments):
            assert image is not None
            read.append(weakref.ref(image))
            in_memory.append(sum(entry() is not None for entry in read))
            yield row, image

    monkeypatch.setattr(failures, "read_box_images", read_counted)
    run = failures.Run(
        storage=prepared.storage,
        model=trained.model,
        teacher=prepared.teacher,
        boxes="smoke-eval",
        max_images=6,
        score_threshold=0.0,
        elongated=1.2,
    )
    found = failures.find_failures(run)
    text = gallery.render_gallery(found, dataclasses.asdict(run), 2)
    assert found.counts["objects"] > found.counts["elongated"] > 0
    assert (len(in_memory), max(in_memory)) == (
        6,
        2,
    )  # 300 photographs would take 10 GB
    for fit in ("warp", "pad", "centre"):
        assert f"<figcaption>{fit}: " in text
    assert 'src="http' not in text


def test_the_papers_schedule() -> None:
    run = vild_configs.lvis_r50()
    stage = run.detector_stage
    assert (stage.steps * stage.warmup, [round(stage.steps * part) for part in stage.decay_at]) == (
        pytest.approx(1000),
        [162_000, 171_000, 175_500],
    )
    assert (run.detection_batch, run.augmentation.side, run.augmentation.scales) == (256, 1024, (0.1, 2.0))
    assert vild_configs.lvis_r152().model.image_weight == 2.0
    for make in vild_configs.CONFIGS.values():
        assert cli.flatten(make())["config"] == make().config


def test_as_many_detections_are_evaluated_as_the_rules_of_the_data_set_count() -> None:
    limits = {run.config: run.max_detections for run in (make() for make in vild_configs.CONFIGS.values())}
    assert limits == {name: 300 if name.startswith("lvis") else 100 for name in vild_configs.CONFIGS}


# ---------------------------------------------------------------------------------------------------- bad input


def bad(change: Callable[[Run], Run], prepared: Run) -> str:
    with pytest.raises(InputError) as caught:
        vild.train(change(prepared))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.ray
def test_what_cannot_be_trained_is_told(prepared: Run, trained: Trained[DetectionMetrics], tmp_path: Path) -> None:
    replace = dataclasses.replace
    given = replace(prepared, proposals=trained.outputs["proposals"])
    assert "--teacher: missing" in bad(lambda run: replace(run, teacher=""), prepared)
    assert "regions_per_step: 9, expected 1 to 8" in bad(lambda run: replace(run, regions_per_step=9), prepared)
    assert "no CLIP checkpoint" in bad(lambda run: replace(run, teacher=str(tmp_path)), prepared)
    assert "boxes/nowhere: no such table" in bad(lambda run: replace(run, train_boxes="nowhere"), prepared)
    assert "no such table; `python workflows/embed.py`" in bad(lambda run: replace(run, regions="nowhere"), given)
    earlier = sorted(Path(prepared.storage, "runs").rglob("*"))
    assert "no such table; `python workflows/embed.py`" in bad(lambda run: replace(run, regions="nowhere"), prepared)
    assert sorted(Path(prepared.storage, "runs").rglob("*")) == earlier  # before the proposals are trained
    wider = replace(prepared.model, detector=replace(prepared.model.detector, pyramid_channels=128))
    assert "pyramid_channels is 64, expected 128" in bad(lambda run: replace(run, model=wider), given)
    info = json.loads(Path(trained.outputs["proposals"], "config.json").read_text())
    shutil.copytree(trained.outputs["proposals"], tmp_path / "seen")
    Path(tmp_path, "seen", "config.json").write_text(json.dumps({**info, "run": {**info["run"], "novel_boxes": True}}))
    told = bad(lambda run: replace(run, proposals=str(tmp_path / "seen")), prepared)
    assert "trained on novel boxes, expected proposals trained on base boxes" in told
    other = replace(prepared.crops, fit="pad")
    assert "made with crops" in bad(lambda run: replace(run, regions=trained.outputs["regions"], crops=other), given)
    texts = tmp_path / "texts.npy"
    np.save(texts, np.ones((68, 8)))
    assert "--texts: names only" in bad(lambda run: replace(run, texts=str(texts)), prepared)


def test_a_gallery_needs_its_checkpoints() -> None:
    with pytest.raises(InputError, match="--model, --teacher: missing"):
        failures.find_failures(failures.Run())

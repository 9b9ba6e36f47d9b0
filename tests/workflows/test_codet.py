import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import trainings
from mlflow.tracking import MlflowClient
from PIL import Image
from reference_data import LVIS, PHOTOS, needs
from tiny_centernet2 import TINY_CENTERNET2

import ovd_models
from data_prep import tables
from data_prep.embeddings.teachers import store_checkpoint
from data_prep.streams.augmentation import Augmentation
from data_prep.streams.box_loader import detection_loader
from data_prep.streams.collate import DetectionCollate
from ovd_models.checkpoint_info import SOURCE
from ovd_models.checkpoints import load_model
from ovd_models.clip.model import Clip, ClipConfig
from ovd_models.codet.model import CoDet
from ovd_models.errors import InputError
from workflows import codet, evaluate
from workflows.codet import Metrics
from workflows.common import cli, tracking
from workflows.common.runs import Trained
from workflows.common.teacher import expected_teacher, read_categories
from workflows.common.training import Stage
from workflows.configs import codet as codet_configs
from workflows.configs.codet import Run

TEXTS = LVIS / "coco_clip_vitb32_a_name.npy"
SCRIPT = Path(codet.__file__)


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The smoke config with its tables and its untrained teacher."""
    run: Run = trainings.prepared("codet", str(tmp_path_factory.mktemp("codet")))
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[Metrics]:
    return codet.train(prepared)


def with_workers(run: Run, workers: int) -> Run:
    stage = dataclasses.replace(run.box_stage, workers=workers)
    return dataclasses.replace(run, box_stage=stage, joint_stage=stage)


def losses_of(run: Run, trained: Trained[Metrics]) -> dict[str, float]:
    """Every loss of both stages, by name and step."""
    histories = tracking.metric_history(tracking.tracking_uri(run.storage), trained.run_id, "train/loss")
    return {f"{name} {step}": value for name, points in histories.items() for step, value in points}


LOSSES = {
    *(f"train/loss_{name} {step}" for step in (5, 10) for name in ("objectness", "rpn_box", "classes", "box")),
    "train/loss_concept 10",
    "train/loss_caption 10",
}


@pytest.mark.ray
def test_both_stages_leave_a_checkpoint_that_detects(prepared: Run, trained: Trained[Metrics]) -> None:
    for folder in (trained.outputs["boxes_model"], trained.model):
        detector = ovd_models.load(folder)
        assert (detector.method, len(detector.vocabulary)) == ("codet", 68)
        picture = Image.new("RGB", (128, 128), "grey")
        assert detector.detect(picture, ["anchor", "a name of nobody"]).names == ("anchor", "a name of nobody")
    before, after = (
        load_model(trained.outputs["boxes_model"], CoDet).state_dict(),
        load_model(trained.model, CoDet).state_dict(),
    )
    assert not all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.ray
def test_losses_are_finite_and_tracked_with_all_stages_on_one_axis(prepared: Run, trained: Trained[Metrics]) -> None:
    found = losses_of(prepared, trained)
    assert set(found) == LOSSES
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


@pytest.mark.ray
def test_ap_during_training_has_the_name_and_axis_of_the_final_one(prepared: Run, trained: Trained[Metrics]) -> None:
    history = tracking.metric_history(tracking.tracking_uri(prepared.storage), trained.run_id, "eval/ap50_base")
    assert [step for step, _ in history["eval/ap50_base"]] == [3, 5, 8, 10]
    assert history["eval/ap50_base"][-1][1] == trained.metrics.codet.summary()["ap50_base"]
    (folder,) = Path(prepared.storage, "mlartifacts").glob(f"smoke/{trained.run_id}/artifacts/images")
    shown = {path.name.split("+")[0] for path in folder.iterdir()}
    assert {f"validation_{number}" for number in range(4)} <= shown


@pytest.mark.ray
@pytest.mark.slow
def test_replaced_images_are_counted_over_all_workers(prepared: Run, tmp_path: Path) -> None:
    for table in ("boxes", "categories", "images", "pairs", "concepts", "groups"):
        shutil.copytree(Path(prepared.storage, table), tmp_path / table)
    for row in tables.read_table(str(tmp_path), "boxes", "smoke-train").to_pylist()[::2]:
        (tmp_path / row["uri"]).unlink()
    boxes_alone = dataclasses.replace(prepared.model, supervision="boxes")
    run = with_workers(dataclasses.replace(prepared, storage=str(tmp_path), model=boxes_alone), 2)
    found = codet.train(run)
    categories = read_categories(run.storage, run.boxes)
    base = [key for key, name in categories[0].items() if categories[1][name] == "base"]
    loader = detection_loader(run.storage, "smoke-train", base, seed=run.box_stage.seed, augmentation=run.augmentation)
    (points,) = tracking.metric_history(
        tracking.tracking_uri(str(tmp_path)), found.run_id, "train/replaced_images"
    ).values()
    replaced = DetectionCollate()(loader(np.arange(10))).unreadable  # five steps of two images
    assert len(replaced) > 1
    assert points == [(5, len(replaced))]


@pytest.mark.ray
def test_the_resolved_run_lies_beside_the_checkpoint(prepared: Run, trained: Trained[Metrics]) -> None:
    info = json.loads((Path(trained.model) / "config.json").read_text())
    assert info["run"]["teacher"] == prepared.teacher
    assert info["run"]["model"]["detector"]["embed_dim"] == info["model"]["detector"]["embed_dim"] == 128
    assert list(info["splits"].values()).count("novel") == 17


@pytest.mark.ray
def test_novel_boxes_never_reach_training(prepared: Run) -> None:
    categories = tables.read_table(prepared.storage, "categories", "smoke").to_pylist()
    novel = {row["category_id"] for row in categories if row["split"] == "novel"}
    train = tables.read_table(prepared.storage, "boxes", "smoke-train", ["category_ids"]).to_pylist()
    assert len(novel) == 17
    assert not novel & {key for row in train for key in row["category_ids"]}
    held_out = tables.read_table(prepared.storage, "boxes", "smoke-eval", ["category_ids"]).to_pylist()
    assert novel & {key for row in held_out for key in row["category_ids"]}


@pytest.mark.ray
def test_a_checkpoint_is_evaluated_by_its_own_script(
    prepared: Run, trained: Trained[Metrics], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", trained.model, "--storage", prepared.storage, "--boxes", "smoke-eval", "--num-pictures", "2"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0].lower(): float(line.split()[1]) for line in lines if line.startswith(("AP50_", "AP_"))}
    shown = {name: value for name, value in shown.items() if not name.endswith("_only")}
    expected = {name: -1 if math.isnan(value) else value for name, value in trained.metrics.codet.summary().items()}
    assert set(shown) == set(expected)
    assert all(shown[name] == pytest.approx(expected[name], abs=6e-4) for name in shown)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A run on two workers, and whether Ctrl-C means the same after it."""

    run: Run
    trained: Trained[Metrics]
    same_interrupt: bool


@pytest.fixture(scope="module")
def pair(prepared: Run, trained: Trained[Metrics]) -> Iterator[Pair]:
    # Box supervision stays inside the driver, to save the time that a group of workers takes to start.
    run = dataclasses.replace(prepared, joint_stage=dataclasses.replace(prepared.joint_stage, workers=2))
    before = signal.getsignal(signal.SIGINT)
    found = codet.train(run)
    same = signal.getsignal(signal.SIGINT) is before
    signal.signal(signal.SIGINT, before)
    yield Pair(run, found, same)


@pytest.mark.ray
def test_ctrl_c_means_the_same_after_training(pair: Pair) -> None:
    assert pair.same_interrupt


@pytest.mark.ray
def test_two_workers_give_the_same_kind_of_result(prepared: Run, trained: Trained[Metrics], pair: Pair) -> None:
    run, found = pair.run, pair.trained
    losses = losses_of(run, found)
    assert set(losses) == LOSSES
    assert all(math.isfinite(value) for value in losses.values())
    one, two = load_model(trained.model, CoDet).state_dict(), load_model(found.model, CoDet).state_dict()
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    first = losses_of(prepared, trained)
    for step in (5, 10):  # the other losses of five steps depend on which proposals were drawn
        name = f"train/loss_objectness {step}"
        assert losses[name] == pytest.approx(first[name], rel=0.1)


@pytest.mark.ray
def test_a_run_can_be_repeated(prepared: Run, trained: Trained[Metrics], pair: Pair) -> None:
    # both had their box supervision inside the driver
    one, two = (
        load_model(trained.outputs["boxes_model"], CoDet).state_dict(),
        load_model(pair.trained.outputs["boxes_model"], CoDet).state_dict(),
    )
    assert all(torch.allclose(value, two[name], atol=1e-3) for name, value in one.items())


@pytest.mark.ray
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_joint_stage_starts_from_a_given_box_model(prepared: Run, trained: Trained[Metrics], workers: int) -> None:
    stage = dataclasses.replace(prepared.joint_stage, workers=workers)
    found = codet.train(
        dataclasses.replace(prepared, box_stage=stage, joint_stage=stage, box_model=trained.outputs["boxes_model"])
    )
    assert found.outputs["boxes_model"] == trained.outputs["boxes_model"]
    assert "boxes" not in found.seconds
    assert found.metrics.box_supervised.summary() == pytest.approx(
        trained.metrics.box_supervised.summary(), nan_ok=True
    )
    # The same joint stage from the same weights as in the run that trained both.
    one, two = load_model(trained.model, CoDet).state_dict(), load_model(found.model, CoDet).state_dict()
    assert all(torch.allclose(value, two[name], atol=1e-3) for name, value in one.items())


@pytest.mark.ray
def test_a_detector_is_continued_with_its_own_architecture_and_encoder(
    prepared: Run, trained: Trained[Metrics], tmp_path: Path
) -> None:
    stage = dataclasses.replace(
        codet_configs.finetune().joint_stage,
        steps=5,
        checkpoint_every=5,
        workers=0,
        rate_factors={"detector.backbone.": 0.0},
    )
    run = dataclasses.replace(
        codet_configs.finetune(),
        storage=prepared.storage,
        boxes="smoke",
        box_model=trained.model,
        box_stage=stage,
        joint_stage=stage,
        detection_batch=2,
        validate_every=0,
    )
    record = Path(trained.model, SOURCE)
    record.write_text('{"CoDet.pth": "0123"}')  # as if it had been imported
    found = codet.train(codet.prepare_data(run))
    record.unlink()
    tags = MlflowClient(tracking.tracking_uri(run.storage)).get_run(found.run_id).data.tags
    assert tags["source"] == "box_model CoDet.pth sha256:0123"
    before, after = (load_model(folder, CoDet) for folder in (trained.model, found.model))
    assert after.config.detector == before.config.detector
    assert ovd_models.load(found.model).teacher == ovd_models.load(trained.model).teacher
    moved = {
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert "detector.projection.weight" in moved
    assert not [name for name in moved if name.startswith("detector.backbone.")]  # a factor of 0 freezes it
    for model in ("", str(tmp_path), "Detic_OVCOCO_CLIP_R50_1x_max-size.pth"):
        with pytest.raises(InputError, match="no detector to continue, expected a checkpoint folder, such as"):
            codet.prepare_data(dataclasses.replace(run, box_model=model))


@pytest.mark.ray
def test_kinds_of_batches_can_alternate(prepared: Run, trained: Trained[Metrics]) -> None:
    stage = dataclasses.replace(prepared.joint_stage, steps=4, checkpoint_every=10, log_every=1)
    run = dataclasses.replace(prepared, box_model=trained.outputs["boxes_model"], alternate=True, joint_stage=stage)
    joint = Stage(job="codet joint", name="joint", settings=stage, folder="")
    assert [codet.kinds_of_step(run, joint, step) for step in range(3)] == [(True, False), (False, True), (True, False)]
    found = codet.train(run)
    uri = tracking.tracking_uri(run.storage)
    history = tracking.metric_history(uri, found.run_id, "train/loss")
    assert [step for step, _ in history["train/loss_box"]] == [1, 3]
    assert [step for step, _ in history["train/loss_concept"]] == [2, 4]


@pytest.mark.ray
@pytest.mark.slow
def test_the_detector_of_lvis_trains_with_masks_and_is_evaluated(prepared: Run) -> None:
    small = dataclasses.replace(
        TINY_CENTERNET2,
        min_size=128,
        max_size=128,
        rois_per_image=32,
    )
    model = dataclasses.replace(
        prepared.model,
        architecture="centernet2",
        centernet2=small,
        aggregation="learned",
        guidance="dimensions",
        num_proposals=8,
        group_size=2,
        caption_sizes=(64, 64),
    )
    jitter = Augmentation(flip_probability=0.5, side=128)
    found = codet.train(
        dataclasses.replace(prepared, model=model, augmentation=jitter, repeat_threshold=0.1, measure_masks=True)
    )
    uri = tracking.tracking_uri(prepared.storage)
    history = tracking.metric_history(uri, found.run_id, "train/loss")
    assert {"train/loss_mask", "train/loss_classes_2", "train/loss_concept"} <= set(history)
    evaluation = evaluate.Run(storage=prepared.storage, model=found.model, boxes="smoke-eval", iou_type="segm")
    numbers, _ = evaluate.evaluate_model(evaluation)
    assert numbers["AP50_all"] == pytest.approx(found.metrics.codet.summary()["ap50_all"])


@pytest.mark.ray
def test_where_the_model_looks_is_tracked_as_pictures(prepared: Run, trained: Trained[Metrics]) -> None:
    (folder,) = (Path(prepared.storage) / "mlartifacts/smoke").glob(f"{trained.run_id}/artifacts/images")
    for name in ("attention", "similarity"):
        (path,) = folder.glob(f"{name}*.png")
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_published_settings() -> None:
    # Images with boxes, captioned images, images of a group, proposals, weight, guidance, steps.
    expected = {
        "coco_r50": (16, 64, 2, 32, 0.1, "dimensions", 90_000),
        "lvis_r50": (64, 256, 8, 128, 0.2, "none", 90_000),
        "lvis_swin_b": (32, 128, 8, 128, 0.2, "none", 180_000),
        "lvis_eva": (32, 256, 8, 128, 0.2, "none", 90_000),
    }
    for name, make in codet_configs.CONFIGS.items():
        run = make()
        assert run.config == name
        if name in expected:
            model, stage = run.model, run.joint_stage
            found = (
                *(run.detection_batch, run.groups_per_step * run.group_size, run.group_size, model.num_proposals),
                *(model.concept_weight, model.guidance, stage.steps),
            )
            assert found == expected[name]
            assert model.concept_weight == model.caption_weight
            assert round(stage.warmup * stage.steps) == 1000
            assert (stage.clip_value, stage.clip_norm) == (1.0, None)
            assert model.sampled_concepts == (50 if name.startswith("lvis") else 0)
            assert model.mentioned_are_negatives
            assert run.max_detections == (300 if name.startswith("lvis") else 100)
    assert codet_configs.coco_r50().joint_stage.rate_factors == {"aggregations": 0.1}
    assert codet_configs.lvis_eva().joint_stage.rate_factors == {"detector.pyramid.": 0.25}
    assert [round(part * 90_000) for part in codet_configs.coco_r50().joint_stage.decay_at] == [60_000, 80_000]
    assert (
        codet_configs.lvis_swin_b().model.centernet2.min_size == 2 * codet_configs.lvis_swin_b().model.caption_sizes[0]
    )


def test_lvis_is_measured_by_masks_and_coco_by_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(codet.evaluation, "evaluate_trained", lambda settings, *_: kinds.append(settings.iou_type))
    configs = [
        codet_configs.coco_r50(),
        codet_configs.lvis_r50(),
        codet_configs.lvis_swin_b(),
        codet_configs.lvis_eva(),
    ]
    for run in configs:
        codet.evaluate_model(run, Mock(), "model", "eval", run.joint_stage)
    assert kinds == ["bbox", "segm", "segm", "segm"]


def test_published_configs_jitter_images_as_published() -> None:
    # OV-COCO: shorter edge and mirroring. OV-LVIS: the canvas of images with boxes and of captioned ones, in pixels.
    coco = codet_configs.coco_r50()
    assert coco.augmentation == coco.caption_augmentation == Augmentation(flip_probability=0.5)
    assert coco.model.caption_sizes == (400, 667)
    for make, sides in (
        (codet_configs.lvis_r50, (800, 400)),
        (codet_configs.lvis_swin_b, (896, 448)),
        (codet_configs.lvis_eva, (1280, 640)),
    ):
        run = make()
        assert run.augmentation == Augmentation(flip_probability=0.5, side=sides[0], scales=(0.1, 2.0))
        assert run.caption_augmentation == Augmentation(flip_probability=0.5, side=sides[1], scales=(0.5, 1.5))
        assert run.model.caption_sizes == (sides[1], sides[1])  # the jitter's size is not undone


# ---------------------------------------------------------------------------------------------------- bad input


def bad(change: Callable[[Run], Run], prepared: Run) -> str:
    with pytest.raises(InputError) as caught:
        codet.train(change(prepared))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.ray
def test_what_cannot_be_trained_is_told_before_any_work(
    prepared: Run, trained: Trained[Metrics], tmp_path: Path
) -> None:
    replace = dataclasses.replace
    assert "--teacher: missing" in bad(lambda run: replace(run, teacher=""), prepared)
    assert "group_size: 1, expected at least 2" in bad(lambda run: replace(run, group_size=1), prepared)
    assert "detection_batch: 3, expected a multiple of the 2 workers" in bad(
        lambda run: with_workers(replace(run, detection_batch=3), 2), prepared
    )
    assert "groups_per_step: 1" in bad(lambda run: with_workers(replace(run, groups_per_step=1), 2), prepared)
    assert "no CLIP checkpoint" in bad(lambda run: replace(run, teacher=str(tmp_path)), prepared)
    missing = bad(lambda run: replace(run, storage=str(tmp_path)), prepared)
    assert "no such table; `python workflows/prepare_boxes.py` makes it" in missing
    assert "no such table; `python workflows/prepare_pairs.py` makes it" in bad(
        lambda run: replace(run, pairs="other"), prepared
    )
    assert "model.group_size: 0, expected the group_size, 2" in bad(
        lambda run: replace(run, model=replace(run.model, aggregation="learned", guidance="none")), prepared
    )
    assert 'model.guidance: "support", expected' in bad(
        lambda run: replace(run, model=replace(run.model, aggregation="learned", group_size=2)), prepared
    )
    odd = replace(prepared.joint_stage, checkpoint_every=15)
    assert "checkpoint_every: 15, expected a multiple of 10" in bad(
        lambda run: replace(run, alternate=True, joint_stage=odd), prepared
    )
    assert "no detector checkpoint" in bad(lambda run: replace(run, box_model=str(tmp_path)), prepared)
    wider = replace(prepared.model, detector=replace(prepared.model.detector, head_width=32))
    assert "expected [32" in bad(
        lambda run: replace(run, box_model=trained.outputs["boxes_model"], model=wider), prepared
    )
    torch.manual_seed(1)
    store_checkpoint(Clip(ClipConfig()), str(tmp_path / "another"))
    boxes_model, other = trained.outputs["boxes_model"], str(tmp_path / "another")
    assert "trained with teacher clip:" in bad(lambda run: replace(run, box_model=boxes_model, teacher=other), prepared)
    assert "no concept has 1000 images" in bad(lambda run: replace(run, group_size=1000), prepared)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((3, 8)), "array of shape [3, 8], expected one row for each of 68"),
        (np.full((68, 8), np.nan), "holds NaN"),
        (None, "cannot be read"),
        (b"no numpy", "cannot be read"),
        (b"", "cannot be read"),
        ({"a": np.ones(3)}, "expected"),
    ],
)
def test_texts_that_do_not_fit_are_told(prepared: Run, tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "texts.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        with path.open("wb") as file:
            np.savez(file, **content)
    elif content is not None:
        np.save(path, content)
    assert message in bad(lambda run: dataclasses.replace(run, texts=str(path)), prepared)


@pytest.mark.ray
def test_an_unknown_run_cannot_be_resumed(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(codet, "train_stage", never)
    Path(prepared.storage, "runs/codet").mkdir(parents=True, exist_ok=True)
    for name in ("smoke-19990101-000000", ".", "..", "../codet"):
        told = bad(lambda run, name=name: dataclasses.replace(run, resume=name), prepared)  # type: ignore[misc]
        assert "no such run, expected the name of a folder" in told


def script(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.ray
def test_bad_input_is_one_line_and_exit_code_2(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["codet.py", "--config", "pictograms", "--storage", str(tmp_path)])
    before = signal.getsignal(signal.SIGTERM)
    assert cli.outcome(codet.main) == 2
    signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.splitlines() == [f"error: --teacher: missing, expected {expected_teacher()}"]


# ---------------------------------------------------------------------------------------------------- photographs


@pytest.mark.ray
@pytest.mark.slow
@needs("data/coco_photos", "data/lvis/coco_clip_vitb32_a_name.npy")
def test_photographs_train_checkpoint_evaluate_and_draw(tmp_path: Path) -> None:
    stages = [
        f"--{stage}-stage.{name}={value}"
        for stage in ("box", "joint")
        for name, value in (("steps", 3), ("checkpoint-every", 5), ("log-every", 1), ("workers", 0))
    ]
    found = script(
        *("--config", "photos", "--storage", str(tmp_path), "--data", str(PHOTOS), "--texts", str(TEXTS)),
        *("--model.detector.backbone", "resnet10t", "--from-scratch"),
        *stages,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "CoDet" in found.stdout
    (folder,) = tmp_path.glob("runs/codet/*/model")
    detector = ovd_models.load(folder)
    assert len(detector.vocabulary) == 65
    picture = next(iter(sorted((PHOTOS / "images").iterdir())))
    answer = detector.detect(picture, ["person", "cat"], score_threshold=0.0)
    answer.draw(tmp_path / "drawn.png")
    with Image.open(picture) as opened:
        assert (answer.width, answer.height) == opened.size
    assert list(tmp_path.glob("mlartifacts/photos/*/artifacts/eval/picture_*.jpg"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS} is absent")
def test_captions_built_from_names_mention_no_novel_thing(ray_cluster: None, tmp_path: Path) -> None:
    run = dataclasses.replace(codet_configs.photos(), storage=str(tmp_path), data=str(PHOTOS), texts=__file__)
    codet.prepare_data(run)
    concepts = set(tables.read_table(str(tmp_path), "concepts", "photos", ["name"])["name"].to_pylist())
    categories = tables.read_table(str(tmp_path), "categories", "photos").to_pylist()
    assert concepts and concepts <= {row["name"] for row in categories if row["split"] == "base"}

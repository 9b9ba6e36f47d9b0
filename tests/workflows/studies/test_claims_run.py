"""All claims' parts from end to end, with the smallest settings: that they run, not what they find."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import trainings

from ovd_models.clip.model import Clip, ClipConfig, load_clip, save_clip
from workflows import claims, clip, prepare_boxes
from workflows.common.optimisation import Optimisation
from workflows.configs import boxes as boxes_configs
from workflows.studies.claims import clip_parts, codet_parts, parts, sam_parts, teachers, transfer_parts, vild_parts
from workflows.studies.claims.catalogue import PARTS
from workflows.studies.claims.parts import Part
from workflows.studies.study import StudyRun

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def given_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Parts use the tables and the teacher of their settings, and an untrained ViT."""
    vision = {"image_size": 64, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    save_clip(Clip(ClipConfig(vision=vision)), tmp_path / "vit")
    for module in (clip_parts, codet_parts, sam_parts, vild_parts):
        monkeypatch.setattr(module, "teacher_of", lambda run, *_: run.teacher)
    for module in (codet_parts, sam_parts, transfer_parts, vild_parts):
        monkeypatch.setattr(module, "prepare_world", lambda *_, **__: None)
    monkeypatch.setattr(clip_parts, "long_trained_teacher", lambda run, _: run.teacher)
    monkeypatch.setattr(sam_parts, "transformer_teacher", lambda _: str(tmp_path / "vit"))


def clip_settings(part: Part, storage: str) -> Any:
    """Few pictures and names."""
    run = trainings.prepared("vild", storage)
    small = {"pictures": 68, "vocabulary_sizes": (68, 1_203)}
    return replace(part.settings, storage=storage, teacher=run.teacher, **small)


def vild_settings(part: Part, storage: str) -> Any:
    """ViLD's smoke config on scenes that also show novel objects."""
    run = trainings.prepared("vild", storage)
    if part is transfer_parts.TRANSFER:
        for config in transfer_parts.OTHER_STYLES.values():
            prepare_boxes.prepare(replace(config, storage=storage, train_images=4, eval_images=8))
    small = {"rpn_steps": (5, 10), "teacher_steps": (10,), "widths": (0.5,), "weights": (0.1,)}
    training = replace(run, train_boxes="smoke-mixed")
    return replace(
        part.settings, storage=storage, teacher=run.teacher, training=training, boxes=boxes_configs.smoke(), **small
    )


def codet_settings(part: Part, storage: str) -> Any:
    """CoDet's smoke config."""
    run = trainings.prepared("codet", storage)
    small: dict[str, Any] = {"training": run, "planted_groups": 2}
    if part is codet_parts.SHARED:
        small["both_scenes"] = 40
    if part is codet_parts.SWEEPS:
        joint = replace(run.joint_stage, checkpoint_every=10)  # kinds of batches alternate in one variant
        small |= {"training": replace(run, joint_stage=joint)}
        small |= {"group_sizes": (2,), "proposal_counts": (4,), "images_per_step": 4}
    return replace(part.settings, storage=storage, teacher=run.teacher, **small)


def ovsam_settings(part: Part, storage: str) -> Any:
    """OV-SAM's smoke config."""
    run = trainings.prepared("ovsam", storage)
    small: dict[str, Any] = {"training": replace(run, text_to_mask=False)}
    if part is sam_parts.CLICKS:
        small |= {"images": 4, "clicks": 2}
    if part is sam_parts.DETECTORS:
        small |= {"vild": vild_settings(vild_parts.DISTILLATION, storage), "detector_images": 2}
    return replace(part.settings, storage=storage, teacher=run.teacher, **small)


SETTINGS: dict[Any, Callable[[Part, str], Any]] = {
    clip_parts.ClipStudy: clip_settings,
    vild_parts.VildRun: vild_settings,
    sam_parts.SamStudy: ovsam_settings,
    sam_parts.OvsamRun: ovsam_settings,
    sam_parts.DetectorRun: ovsam_settings,
}
"""The smallest settings by the type of a part's; the others are CoDet's."""
SAMPLED = set(PARTS) - {10}
"""Claims whose metrics have values on other draws of the images."""


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: f"claim-{part.number}")
def test_a_part_measures_all_columns_of_its_table(
    ray_cluster: None, given_world: None, tmp_path: Path, part: Part
) -> None:
    assert part.columns
    run = SETTINGS.get(type(part.settings), codet_settings)(part, str(tmp_path))
    record = parts.measure(replace(part, settings=run), 0, run.storage, run.teacher)
    metrics = {name for values in record.results.values() for name in values}
    assert set(part.columns.values()) <= metrics | {"ap50_novel", "accuracy_novel"}  # few scenes may show no novel one
    assert record.results == json.loads(json.dumps(asdict(record)))["results"]
    named = {claim.variant for claim in part.claims if claim.variant in record.results}
    if part.number in SAMPLED and named:
        assert named & record.draws.keys()
        assert {len(draws) for of in record.draws.values() for draws in of.values()} == {100}
    if part.picture:
        assert min(part.picture(run, 0).size) > 100


def test_a_check_trains_again_in_an_empty_storage(
    ray_cluster: None, given_world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = replace(PARTS[2], settings=vild_settings(PARTS[2], str(tmp_path)))
    record = parts.measure(part, 0, str(tmp_path), "")
    monkeypatch.setattr(claims, "PARTS", {2: part})
    monkeypatch.setattr(vild_parts, "prepare_world", lambda uri, **_: trainings.prepared("vild", uri))
    run = claims.Run(storage=str(tmp_path))
    assert claims.check(run, {2: [record]})
    assert list((tmp_path / "check/runs/vild").glob("study-0-rpn-*"))
    wrong = {name: {metric: value + 0.1 for metric, value in of.items()} for name, of in record.results.items()}
    elsewhere = claims.Run(storage=str(tmp_path / "again"))  # MLflow keeps the database of a storage open
    assert not claims.check(elsewhere, {2: [replace(record, results=wrong)]})


def test_a_clip_is_trained_once_for_all_claims(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trainings.prepared("clip", str(tmp_path))
    quick = Optimisation(steps=2, learning_rate=1e-3, workers=0)
    monkeypatch.setattr(teachers, "prepare_world", lambda *_, **__: None)
    run = StudyRun(storage=str(tmp_path))
    folder = teachers.train_clip(run, 1, "clip-2", replace(config, optimisation=quick))
    assert load_clip(folder)[0].config.embed_dim == ClipConfig().embed_dim

    def never(_: object) -> None:
        raise AssertionError("trained already")

    monkeypatch.setattr(clip, "train", never)
    assert teachers.train_clip(run, 1, "clip-2", replace(config, optimisation=quick)) == folder

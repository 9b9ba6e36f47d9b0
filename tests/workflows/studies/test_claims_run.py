"""Parts of claims from end to end, with the smallest settings: that they run, not what they find."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trainings

from workflows import prepare_boxes
from workflows.studies.claims import codet_parts, sam_parts, vild_parts
from workflows.studies.claims.parts import Part
from workflows.studies.study import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def given_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts use the tables and the teacher of their settings."""
    for module in (codet_parts, sam_parts, vild_parts):
        monkeypatch.setattr(module, "prepare_world", lambda *_, **__: None)
        monkeypatch.setattr(module, "teacher_of", lambda run, *_: run.teacher)


def vild_settings(part: Part, storage: str) -> Any:
    """ViLD's smoke config on scenes that also show novel objects."""
    run = trainings.prepared("vild", storage)
    small = {"rpn_steps": (5, 10), "teacher_steps": (10,), "widths": (0.5,), "weights": (0.1,)}
    training = replace(run, train_boxes="smoke-mixed")
    return replace(
        part.settings, storage=storage, teacher=run.teacher, training=training, boxes=prepare_boxes.smoke(), **small
    )


def codet_settings(part: Part, storage: str) -> Any:
    """CoDet's smoke config."""
    run = trainings.prepared("codet", storage)
    small: dict[str, Any] = {"training": run, "planted_groups": 2}
    if part is codet_parts.SHARED:
        small["both_scenes"] = 40
    if part is codet_parts.SWEEPS:
        small |= {"group_sizes": (2,), "proposal_counts": (4,), "images_per_step": 4}
    return replace(part.settings, storage=storage, teacher=run.teacher, **small)


def ovsam_settings(part: Part, storage: str) -> Any:
    """OV-SAM's smoke config."""
    run = trainings.prepared("ovsam", storage)
    return replace(part.settings, storage=storage, teacher=run.teacher, training=replace(run, text_to_mask=False))


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        (vild_parts.QUALITY, vild_settings),
        (vild_parts.RARE, vild_settings),
        (vild_parts.BACKBONES, vild_settings),
        (vild_parts.TEACHERS, vild_settings),
        (vild_parts.WEIGHTS, vild_settings),
        (codet_parts.SHARED, codet_settings),
        (codet_parts.SWEEPS, codet_settings),
        (codet_parts.GROUPS_AGAINST_NAMES, codet_settings),
        (sam_parts.NAIVE, ovsam_settings),
    ],
    ids=lambda value: f"claim-{value.number}" if isinstance(value, Part) else "",
)
def test_a_part_measures_all_columns_of_its_table(
    ray_cluster: None, given_world: None, tmp_path: Path, part: Part, settings: Callable[[Part, str], Any]
) -> None:
    assert part.measure and part.columns
    run = settings(part, str(tmp_path))
    found: dict[str, Metrics] = dict(part.measure(run, 0))
    assert any(set(part.columns.values()) <= metrics.keys() for metrics in found.values())
    if part.picture:
        assert min(part.picture(run, 0).size) > 100

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trainings
from PIL import Image

from data_prep.pictograms.world import World
from ovd_models.codet.model import CoDet
from ovd_models.errors import InputError
from workflows import codet
from workflows.common import cli
from workflows.configs import codet as codet_configs
from workflows.studies import codet as codet_study
from workflows.studies import study
from workflows.studies.study import Result


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_measures_once_and_continues(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = trainings.prepared("codet", str(tmp_path))
    run = replace(codet_study.smoke(), storage=prepared.storage, teacher=prepared.teacher)
    first = study.run_study(codet_study.codet_study(run))
    names = ["box-stage", "region-region", "max-size", "both-guided"]
    assert list(first.results) == names
    assert [judged.claim.statement for judged in first.claims] == ["novel AP50: region-region above max-size"]
    assert all(first.results[name].has(["planted_groups"]) for name in names)
    for ending in ("json", "md"):
        assert (tmp_path / f"reports/codet_study.{ending}").exists()

    def never(*_: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(codet, "train", never)
    assert study.run_study(codet_study.codet_study(run)).text == first.text


def test_variants_are_chosen_on_the_command_line() -> None:
    parse: Callable[[list[str]], codet_study.Run] = lambda flags: cli.parse(codet_study.CONFIGS, "", flags)  # noqa: E731
    assert parse(["--variants", *codet_study.VARIANTS]).variants == tuple(codet_study.VARIANTS)
    with pytest.raises(InputError, match="variants"):
        parse(["--variants", "both"])


def test_variants_on_shared_concepts_have_their_own_pairs() -> None:
    trainings = codet_study.seed_trainings(codet_study.pictograms(), 1)
    assert [name for name, own in trainings.items() if own.pairs != "pictograms"] == ["both-guided", "both-unguided"]
    assert {own.joint_stage.seed for own in trainings.values()} == {1}


def test_sweeps_are_trainings_of_their_own_and_drawn_as_curves() -> None:
    trainings = codet_study.seed_trainings(codet_study.sweeps(), 0)
    assert [(own.group_size, own.groups_per_step) for name, own in trainings.items() if "group" in name] == [
        (2, 8),
        (4, 4),
        (8, 2),
    ]
    assert [own.model.num_proposals for name, own in trainings.items() if "proposals" in name] == [4, 16, 64]
    results = {name: Result({0: {"ap50_base": 0.5, "ap50_novel": 0.4}}) for name in trainings}
    with Image.open(io.BytesIO(codet_study.draw_curves(results))) as picture:
        assert picture.width > picture.height > 200


def test_planted_groups_share_an_object_whose_box_is_known() -> None:
    for batch, boxes in codet_study.planted_groups(["anchor", "umbrella"], 3, 3):
        assert (batch.num_images, batch.group_size) == (3, 3)
        for image, box in zip(batch.images, boxes, strict=True):
            assert (image.shape, box.shape) == ((3, 128, 128), (1, 4))
            assert bool((box[:, 2:] > box[:, :2]).all())


def test_all_requested_objects_are_drawn() -> None:
    world, rng = World.create(0), np.random.default_rng(0)
    scene = codet_study.draw_all(rng, world, np.array([3, 7, 40, 41]))
    assert sorted(scene.labels.tolist()) == [3, 7, 40, 41]


@pytest.mark.parametrize("variant", codet_study.VARIANTS)
def test_every_variant_of_the_study_can_be_built(variant: codet_study.Variant) -> None:
    CoDet(codet_study.VARIANTS[variant](codet_configs.pictograms()))

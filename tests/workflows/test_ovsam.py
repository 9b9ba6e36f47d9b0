import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import ovd_models
from ovd_models.checkpoints_ovsam import load_ovsam_folder, load_sam_folder, load_text_to_mask
from ovd_models.errors import InputError
from ovd_models.sam import VIT_H, EverythingConfig
from ovd_models.segments import Prompts
from workflows import cli, ovsam, tracking
from workflows.ovsam import Run, Trained


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ovsam.prepare_data(dataclasses.replace(ovsam.smoke(), storage=str(tmp_path_factory.mktemp("ovsam"))))


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained:
    return ovsam.train(prepared)


@pytest.mark.ray
def test_smoke_leaves_a_checkpoint_that_segments_and_names(trained: Trained) -> None:
    segmenter = ovd_models.load_segmenter(trained.model)
    assert len(segmenter.vocabulary) == 68
    picture = Image.new("RGB", (100, 80), "grey")
    found = segmenter.segment(picture, Prompts.create(points=[[50, 40]]), ["anchor", "a name of nobody"])
    assert found.names == ("anchor", "a name of nobody")
    assert found.masks.shape == (1, 80, 100)
    assert found.draw().width >= 100
    everything = EverythingConfig(points_per_side=3, min_iou=-9, min_stability=0.0)
    assert (segmenter.everything(picture, None, everything).labels >= 0).all()
    with pytest.raises(InputError, match="lies outside the image of 100 x 80"):
        segmenter.segment(picture, Prompts.create(points=[[100, 40]]))


@pytest.mark.ray
def test_every_stage_changes_its_part_and_no_other(prepared: Run, trained: Trained) -> None:
    sam, _ = load_sam_folder(trained.sam)
    model, info = load_ovsam_folder(trained.model)
    prompt = sam.sam.prompt_encoder.state_dict()
    assert all(torch.equal(value, prompt[name]) for name, value in model.prompt_encoder.state_dict().items())
    before = sam.sam.mask_decoder.state_dict()
    after = model.mask_decoder.state_dict()
    assert any(not torch.equal(value, before[name][: len(value)]) for name, value in after.items())
    assert list(info.splits.values()).count("novel") == 17
    assert info.run["teacher"] == prepared.teacher


@pytest.mark.ray
def test_everything_is_measured_for_both_kinds_of_prompt(trained: Trained) -> None:
    report = trained.report
    assert {kind for _, kind in report.rows} == {"box", "point", "text"}
    assert {"sam", "ovsam", "image crop", "mask features", "roi features"} <= {variant for variant, _ in report.rows}
    assert 0 <= report.rows["ovsam", "box"]["iou_all"] <= 1
    assert math.isnan(report.rows["sam", "box"]["accuracy_all"])
    assert report.costs["ovsam"].parameters > 0 and report.costs["sam"].flops > 0
    text = report.table()
    assert "ovsam, point" in text and "GFLOP" in text


@pytest.mark.ray
def test_names_are_prompts_too(prepared: Run, trained: Trained) -> None:
    model = load_text_to_mask(Path(trained.model).parent / "text_model")
    names = load_ovsam_folder(trained.model)[1].vocabulary
    found = model.segment_text(torch.zeros(3, 50, 70, dtype=torch.uint8), torch.eye(128)[: len(names)])
    assert found.masks.shape == (len(names), 50, 70)
    with pytest.raises(InputError, match="checkpoint of method 'text_to_mask'"):
        load_ovsam_folder(Path(trained.model).parent / "text_model")


@pytest.mark.ray
def test_losses_are_tracked_by_stage(prepared: Run, trained: Trained) -> None:
    uri = tracking.tracking_uri(prepared.storage)
    names = {
        "sam": ("focal", "dice", "iou"),
        "sam2clip": ("distillation",),
        "clip2sam": ("classes", "mask", "dice", "iou"),
    }
    for stage, losses in names.items():
        found = tracking.metric_history(uri, trained.run_id, f"{stage}/train/loss")
        assert set(found) == {f"{stage}/train/loss_{name}" for name in losses}
        assert all(math.isfinite(points[-1][1]) for points in found.values())


@pytest.mark.ray
def test_a_trained_sam_is_taken_over_and_its_cache_used_again(prepared: Run, trained: Trained) -> None:
    (cache,) = (Path(prepared.storage) / "features").iterdir()
    before = (cache / "manifest.json").stat().st_mtime_ns
    again = ovsam.train(dataclasses.replace(prepared, sam=trained.sam))
    assert again.sam == trained.sam
    assert (cache / "manifest.json").stat().st_mtime_ns == before
    one, two = (load_ovsam_folder(folder)[0].state_dict() for folder in (trained.model, again.model))
    assert all(torch.allclose(value, two[name], atol=1e-4) for name, value in one.items())


@pytest.mark.ray
def test_bad_input_is_told_before_any_work(prepared: Run, tmp_path: Path) -> None:
    def refused(**changes: object) -> str:
        with pytest.raises(InputError) as caught:
            ovsam.train(dataclasses.replace(prepared, **changes))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "--teacher: missing" in refused(teacher="")
    assert "no such table; `python workflows/prepare_boxes.py` makes it" in refused(boxes="other")
    assert "batch_size: 0" in refused(batch_size=0)
    assert "cannot be read" in refused(sam=str(tmp_path / "none.pth"))


def test_every_config_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ovsam.CONFIGS) == {"smoke", "pictograms", "photos", "coco_rn50x16", "lvis_rn50x16", "lvis_convnext_l"}
    for name, make in ovsam.CONFIGS.items():
        run = make()
        assert run.config == name
        json.loads(cli.to_json(run))
        monkeypatch.setattr(sys, "argv", ["ovsam.py", "--config", name, "--sam2clip-stage.steps", "7"])
        assert cli.parse(ovsam.CONFIGS, ovsam.__doc__).sam2clip_stage.steps == 7
    assert ovsam.coco_rn50x16().sam_model == VIT_H

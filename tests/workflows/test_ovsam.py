import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
import trainings
from PIL import Image
from serving import SMALL_SAM, save_segmenter

import ovd_models
from data_prep import tables
from data_prep.streams.augmentation import Augmentation
from ovd_models.checkpoints import load_model, read_info
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.errors import InputError
from ovd_models.ovsam.model import OvSam
from ovd_models.sam.model import VIT_H, EverythingConfig, SamModel
from ovd_models.segments import Prompts
from ovd_models.vocabulary import Vocabulary
from workflows import evaluate, ovsam, prepare_boxes
from workflows.common import cli, starting_weights, tracking
from workflows.common.runs import Trained
from workflows.common.teacher import read_categories
from workflows.configs import ovsam as ovsam_configs
from workflows.configs.ovsam import Run
from workflows.inputs import ovsam as ovsam_inputs
from workflows.reports import evaluation
from workflows.reports import pointing as pointing_report
from workflows.reports.pointing import SegmentationReport


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run: Run = trainings.prepared("ovsam", str(tmp_path_factory.mktemp("ovsam")))
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[SegmentationReport]:
    return ovsam.train(prepared)


@pytest.mark.ray
def test_smoke_leaves_a_checkpoint_that_segments_and_names(trained: Trained[SegmentationReport]) -> None:
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
def test_the_adapter_may_learn_from_a_folder_of_images(
    prepared: Run, trained: Trained[SegmentationReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sa-1b" / "sa_000020"  # as SA-1B's archives are unpacked
    folder.mkdir(parents=True)
    for number, side in enumerate((60, 80, 100)):
        Image.new("RGB", (side, 64), (90 * number, 50, 200)).save(folder / f"sa_{number}.jpg")
    (folder / "sa_0.json").write_text("{}")
    (folder / "sa_2.jpg").write_bytes(b"no image")
    run = dataclasses.replace(prepared, sam=trained.outputs["sam"], distill_images=str(tmp_path / "sa-1b"))
    again = ovsam.train(ovsam.prepare_data(run))
    rows = tables.read_table(run.storage, "boxes", "smoke-distill").to_pylist()
    assert [(row["uri"], row["width"], row["height"], row["boxes"]) for row in rows] == [
        (f"{folder}/sa_0.jpg", 60, 64, []),
        (f"{folder}/sa_1.jpg", 80, 64, []),
    ]
    assert "boxes/smoke-distill: 2 images without boxes; left out: 1 images that cannot be read (" in (
        capsys.readouterr().out
    )
    (cache,) = Path(run.storage, "features").glob("smoke-distill-*")
    assert tables.read_table(run.storage, "features", cache.name).num_rows == 2
    own, other = (load_model(model, OvSam).adapter.state_dict() for model in (trained.model, again.model))
    assert any(not torch.equal(value, other[name]) for name, value in own.items())
    ovsam.prepare_data(run)  # the same folder again
    (folder / "sa_3.jpg").write_bytes((folder / "sa_0.jpg").read_bytes())
    with pytest.raises(InputError, match=r"boxes/smoke-distill: made of other images than those of .*sa-1b"):
        ovsam.prepare_data(run)
    with pytest.raises(InputError, match=r"elsewhere: no images, expected files with the extensions jpg, jpeg, jpe"):
        prepare_boxes.prepare_images(run.storage, "x", str(tmp_path / "elsewhere"))


@pytest.mark.ray
def test_every_stage_changes_its_part_and_no_other(prepared: Run, trained: Trained[SegmentationReport]) -> None:
    sam = load_model(trained.outputs["sam"], SamModel)
    model, info = load_model(trained.model, OvSam), read_info(trained.model)
    prompt = sam.sam.prompt_encoder.state_dict()
    assert all(torch.equal(value, prompt[name]) for name, value in model.prompt_encoder.state_dict().items())
    before = sam.sam.mask_decoder.state_dict()
    after = model.mask_decoder.state_dict()
    assert any(not torch.equal(value, before[name][: len(value)]) for name, value in after.items())
    assert list(info.splits.values()).count("novel") == 17
    assert info.run["teacher"] == prepared.teacher


@pytest.mark.ray
def test_everything_is_measured_for_both_kinds_of_prompt(trained: Trained[SegmentationReport]) -> None:
    report = trained.metrics
    assert {kind for _, kind in report.rows} == {"box", "point", "text"}
    assert {"sam", "ovsam", "image crop", "mask features", "roi features"} <= {variant for variant, _ in report.rows}
    assert 0 <= report.rows["ovsam", "box"]["iou_all"] <= 1
    assert math.isnan(report.rows["sam", "box"]["accuracy_all"])
    assert 0 <= report.rows["sam", "text"]["accuracy_all"] <= 1
    assert report.costs["ovsam"].parameters > 0 and report.costs["sam"].flops > 0
    text = report.table()
    assert "ovsam, point" in text and "GFLOP" in text


@pytest.mark.ray
def test_a_checkpoint_is_measured_again(
    prepared: Run,
    trained: Trained[SegmentationReport],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = evaluate.Run(
        storage=prepared.storage,
        model=trained.model,
        boxes=f"{prepared.boxes}-eval",
        images=prepared.eval_images,
        sam=trained.outputs["sam"],
    )
    again = evaluation.evaluate_segmenter(run)
    assert set(again.rows) == {key for key in trained.metrics.rows if key[1] != "text"}
    for key, values in again.rows.items():
        assert values == pytest.approx(trained.metrics.rows[key], abs=1e-3, nan_ok=True)
    monkeypatch.setattr(
        sys,
        "argv",
        ["evaluate.py", "--storage", run.storage, "--boxes", run.boxes, "--model", run.model, "--images", "1"],
    )
    assert cli.outcome(evaluate.main) == 0
    printed = capsys.readouterr().out
    assert "ovsam, box" in printed and "image crop" not in printed and tracking.tracking_uri(run.storage) in printed


@pytest.mark.ray
def test_names_are_prompts_too(prepared: Run, trained: Trained[SegmentationReport]) -> None:
    segmenter = ovd_models.load_text_segmenter(Path(trained.model).parent / "text_model")
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    assert segmenter.segment(image).names == read_info(trained.model).vocabulary
    found = segmenter.segment(image, ["umbrella", "red cat"])
    assert found.masks.shape == (2, 50, 70)
    assert [found.names[label] for label in found.labels.tolist()] == ["umbrella", "red cat"]
    expected = segmenter.model.segment_text(image, segmenter.encoder.embed_names(["umbrella", "red cat"]))
    assert torch.equal(found.scores, expected.ious) and torch.equal(found.masks, expected.masks)
    assert found.draw().size[0] >= 70
    with pytest.raises(InputError, match="checkpoint of method 'text_to_mask'"):
        load_model(Path(trained.model).parent / "text_model", OvSam)


@pytest.mark.ray
@pytest.mark.parametrize(("shift", "shown", "expected"), [(0, True, 1.0), (1, True, 0.0), (0, False, 0.0)])
def test_masks_of_names_are_right_where_they_agree_with_what_is_so_named(
    prepared: Run,
    trained: Trained[SegmentationReport],
    monkeypatch: pytest.MonkeyPatch,
    shift: int,
    shown: bool,
    expected: float,
) -> None:
    categories, _ = read_categories(prepared.storage, prepared.boxes)
    label_of = {key: label for label, key in enumerate(categories)}
    rows = [
        row
        for row in tables.read_table(prepared.storage, "boxes", f"{prepared.boxes}-eval").to_pylist()
        if len(row["category_ids"]) > 1 and len(set(row["category_ids"])) == len(row["category_ids"])
    ]
    assert rows
    images = list(pointing_report.read_objects(prepared.storage, rows, label_of))
    masks = iter([objects.masks.roll(shift, 0) & shown for objects in images])
    text = ovd_models.load_text_segmenter(Path(trained.model).parent / "text_model").model
    monkeypatch.setattr(text, "segment_text", lambda *_: SimpleNamespace(masks=next(masks)))
    vocabulary = Vocabulary(tuple(categories.values()), torch.zeros(len(categories), 2))
    summary = pointing_report.segment_names(images, vocabulary, text)["sam", "text"].summary()
    assert summary["accuracy_all"] == expected
    assert (summary["iou_all"] == 1) == (expected == 1)


@pytest.mark.ray
def test_losses_are_tracked_with_all_stages_on_one_axis(prepared: Run, trained: Trained[SegmentationReport]) -> None:
    uri = tracking.tracking_uri(prepared.storage)
    histories = tracking.metric_history(uri, trained.run_id, "train/loss")
    found = {(name, step): value for name, points in histories.items() for step, value in points}
    sam = ("focal", "dice", "iou")  # text-to-mask, after the other stages, has the losses of SAM
    expected = {5: sam, 10: ("distillation",), 15: ("classes", "mask", "dice", "iou"), 20: sam}
    assert set(found) == {(f"train/loss_{name}", step) for step, names in expected.items() for name in names}
    assert all(map(math.isfinite, found.values()))
    history = tracking.metric_history(uri, trained.run_id, "eval/iou_base")["eval/iou_base"]
    assert [step for step, _ in history] == [13, 20]


@pytest.mark.ray
def test_a_trained_sam_is_taken_over_and_its_cache_used_again(
    prepared: Run, trained: Trained[SegmentationReport]
) -> None:
    (cache,) = (Path(prepared.storage) / "features").glob("smoke-train-*")
    before = (cache / "manifest.json").stat().st_mtime_ns
    again = ovsam.train(dataclasses.replace(prepared, sam=trained.outputs["sam"]))
    assert again.outputs["sam"] == trained.outputs["sam"]
    assert (cache / "manifest.json").stat().st_mtime_ns == before
    one, two = (load_model(folder, OvSam).state_dict() for folder in (trained.model, again.model))
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
    categories = tables.read_table(prepared.storage, "categories", prepared.boxes)
    named, splits = categories.schema.get_field_index("name"), categories.schema.get_field_index("split")
    for name, changed, message in (
        (
            "twice",
            categories.set_column(named, "name", [["anchor"] * len(categories)]),
            "'anchor' is the name of several",
        ),
        (
            "lone",
            categories.set_column(splits, "split", [["base"] + ["novel"] * (len(categories) - 1)]),
            "1 base names",
        ),
    ):
        entry = tables.write_part(prepared.storage, "categories", name, "part-00000.parquet", changed)
        tables.publish(prepared.storage, "categories", name, [entry], producer="test", config_hash="")
        assert message in refused(boxes=name)
    evaluated = tables.read_table(prepared.storage, "boxes", f"{prepared.boxes}-eval")
    bare = [{**row, "masks": [""] * len(row["masks"])} for row in evaluated.to_pylist()]
    for table, name, rows in (
        ("categories", "bare", tables.read_table(prepared.storage, "categories", prepared.boxes)),
        ("boxes", "bare-train", tables.read_table(prepared.storage, "boxes", f"{prepared.boxes}-train")),
        ("boxes", "bare-eval", pa.Table.from_pylist(bare, schema=evaluated.schema)),
        ("categories", "blank", tables.read_table(prepared.storage, "categories", prepared.boxes)),
        ("boxes", "blank-train", pa.Table.from_pylist(bare, schema=evaluated.schema)),
        ("boxes", "blank-eval", evaluated),
    ):
        entry = tables.write_part(prepared.storage, table, name, "part-00000.parquet", rows)
        tables.publish(prepared.storage, table, name, [entry], producer="test", config_hash="")
    assert "boxes/bare-eval: no mask of a category" in refused(boxes="bare")
    sam = str(Path(prepared.storage, "sam"))  # is not read before the tables are checked
    assert "boxes/blank-train: no masks, expected segmentations" in refused(boxes="blank", sam=sam)


@pytest.mark.ray
def test_a_resumed_run_keeps_its_sam_and_its_teacher(
    prepared: Run, trained: Trained[SegmentationReport], tmp_path: Path
) -> None:
    again = dataclasses.replace(prepared, resume=Path(trained.model).parent.name)
    with pytest.raises(InputError, match=r"began with sam its own, now has sam:\w+, expected the same"):
        ovsam.train(dataclasses.replace(again, sam=trained.outputs["sam"]))
    torch.manual_seed(1)
    save_clip(Clip(ClipConfig()), tmp_path / "other")
    with pytest.raises(InputError, match=r"began with teacher clip:\w+, now has clip:\w+"):
        ovsam.train(dataclasses.replace(again, teacher=str(tmp_path / "other")))


def test_every_config_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(ovsam_configs.CONFIGS) == {
        "smoke",
        "pictograms",
        "photos",
        "photos_laptop",
        "photos_gpu",
        "photos_8gpu",
        "coco_rn50x16",
        "lvis_rn50x16",
        "lvis_convnext_l",
    }
    for name, make in ovsam_configs.CONFIGS.items():
        run = make()
        assert run.config == name
        json.loads(cli.to_json(run))
        monkeypatch.setattr(sys, "argv", ["ovsam.py", "--config", name, "--sam2clip-stage.steps", "7"])
        assert cli.parse(ovsam_configs.CONFIGS, ovsam.__doc__).sam2clip_stage.steps == 7
    published = ovsam_configs.coco_rn50x16()
    assert published.sam_model == VIT_H
    recipe = Augmentation(flip_probability=0.5, side=1024, scales=(0.9, 2.0), min_mask_area=32)
    assert published.augmentation == recipe
    for make in (ovsam_configs.lvis_rn50x16, ovsam_configs.lvis_convnext_l):
        assert make().augmentation == dataclasses.replace(recipe, scales=(0.1, 2.0))
    for stage in (published.sam2clip_stage, published.clip2sam_stage):
        assert round(stage.warmup * stage.steps) == 500
        assert not stage.decay_norms


def test_a_config_without_a_sam_of_its_own_asks_for_it_with_file_and_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting_weights, "find_published", lambda published: "")
    with pytest.raises(InputError, match=r"--sam: missing, .* sam_vit_b_01ec64\.pth from https://\S+/sam_vit_b"):
        ovsam.prepare_data(ovsam_configs.photos_gpu())
    run = ovsam_configs.photos_laptop()
    assert ovsam_inputs.choose_sam(run) == run
    assert "sam: random weights; sam_vit_b_01ec64.pth from https://" in capsys.readouterr().out
    given = dataclasses.replace(ovsam_configs.coco_rn50x16(), sam=str(tmp_path / "sam"), data="nowhere")
    for sam, message in (
        (given.sam, r"--sam \S+: no checkpoint \(config\.json\)"),
        ("gone.pth", r"--sam gone\.pth: no such file"),
        (str(save_segmenter(tmp_path / "ovsam")), "--sam .*: a checkpoint of method 'ovsam', expected 'sam'"),
    ):
        with pytest.raises(InputError, match=message):
            ovsam.prepare_data(dataclasses.replace(given, sam=sam))
    ovsam.write_sam(run, SamModel(SMALL_SAM), tmp_path / "sam")
    assert ovsam_inputs.choose_sam(given) == given
    monkeypatch.setattr(starting_weights, "find_published", lambda published: f"cache/{published.file}")
    assert ovsam_inputs.choose_sam(ovsam_configs.photos_gpu()).sam == "cache/sam_vit_b_01ec64.pth"
    assert ovsam_inputs.choose_sam(run).sam == ""  # a ViT-B is too large for a laptop


def test_operations_of_fused_attention_are_counted() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    tokens = torch.zeros(1, 4, 8)
    # Four projections of 4 x 8 x 8, and two products of 2 heads x 4 x 4 x 4; each a multiplication and an addition.
    expected = 2 * (4 * 4 * 8 * 8 + 2 * 2 * 4 * 4 * 4)
    with torch.no_grad():
        assert pointing_report.count_flops(lambda: attention(tokens, tokens, tokens, need_weights=False)) == expected
    assert torch.backends.mha.get_fastpath_enabled()

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from PIL import Image

import ovd_models
from data_prep import tables
from data_prep.pictograms.world import GLYPHS
from data_prep.streams.collate import decode_masks
from ovd_models.batches import Detections
from ovd_models.checkpoints import save_detector
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_detections
from ovd_models.ovsam.checkpoints import load_ovsam_folder, load_sam_folder
from ovd_models.sam.model import VIT_H, EverythingConfig
from ovd_models.segments import Prompts, Segments, boxes_of
from ovd_models.vocabulary import Vocabulary
from workflows import evaluate, ovsam
from workflows.common import cli, tracking
from workflows.common.runs import Trained
from workflows.common.teacher import read_categories
from workflows.configs import ovsam as ovsam_configs
from workflows.configs.ovsam import Run
from workflows.reports import pointing as pointing_report
from workflows.reports.pointing import SegmentationReport
from workflows.studies import ovsam as ovsam_study
from workflows.studies import ovsam_boxes, ovsam_names


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ovsam.prepare_data(dataclasses.replace(ovsam_configs.smoke(), storage=str(tmp_path_factory.mktemp("ovsam"))))


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
def test_every_stage_changes_its_part_and_no_other(prepared: Run, trained: Trained[SegmentationReport]) -> None:
    sam, _ = load_sam_folder(trained.outputs["sam"])
    model, info = load_ovsam_folder(trained.model)
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
    again = evaluate.evaluate_segmenter(run)
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
    assert segmenter.segment(image).names == load_ovsam_folder(trained.model)[1].vocabulary
    found = segmenter.segment(image, ["umbrella", "red cat"])
    assert found.masks.shape == (2, 50, 70)
    assert [found.names[label] for label in found.labels.tolist()] == ["umbrella", "red cat"]
    expected = segmenter.model.segment_text(image, segmenter.encoder.embed_names(["umbrella", "red cat"]))
    assert torch.equal(found.scores, expected.ious) and torch.equal(found.masks, expected.masks)
    assert found.draw().size[0] >= 70
    with pytest.raises(InputError, match="checkpoint of method 'text_to_mask'"):
        load_ovsam_folder(Path(trained.model).parent / "text_model")


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
    summary = pointing_report.segment_names(images, vocabulary, text).summary()
    assert summary["accuracy_all"] == expected
    assert (summary["iou_all"] == 1) == (expected == 1)


@pytest.mark.ray
def test_losses_are_tracked_by_stage(prepared: Run, trained: Trained[SegmentationReport]) -> None:
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
def test_a_trained_sam_is_taken_over_and_its_cache_used_again(
    prepared: Run, trained: Trained[SegmentationReport]
) -> None:
    (cache,) = (Path(prepared.storage) / "features").iterdir()
    before = (cache / "manifest.json").stat().st_mtime_ns
    again = ovsam.train(dataclasses.replace(prepared, sam=trained.outputs["sam"]))
    assert again.outputs["sam"] == trained.outputs["sam"]
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
    assert "--sam: missing" in refused(needs_sam=True)
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
    ):
        entry = tables.write_part(prepared.storage, table, name, "part-00000.parquet", rows)
        tables.publish(prepared.storage, table, name, [entry], producer="test", config_hash="")
    assert "boxes/bare-eval: no mask of a category" in refused(boxes="bare")


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
    assert ovsam_configs.coco_rn50x16().sam_model == VIT_H


def detector_folder(prepared: Run, folder: Path) -> str:
    """An untrained CoDet with the teacher's text tower."""
    clip, teacher = load_clip(prepared.teacher)
    encoder = ClipTextEncoder(clip.config, clip.model.text, teacher)
    torch.manual_seed(0)
    rows = tables.read_table(prepared.storage, "categories", prepared.boxes).to_pylist()
    splits = {row["name"]: row["split"] for row in rows if row["split"]}
    save_detector(CoDet(CoDetConfig()).eval(), encoder, folder, splits=splits, run={})
    return str(folder)


@pytest.mark.ray
def test_a_detectors_boxes_get_masks_and_names(
    prepared: Run, trained: Trained[SegmentationReport], tmp_path: Path
) -> None:
    run = ovsam_boxes.Run(
        storage=prepared.storage,
        model=trained.model,
        sam=trained.outputs["sam"],
        boxes=prepared.boxes,
        images=2,
        score_threshold=0.0,
        max_detections=5,
    )
    results = ovsam_boxes.compare(run, detector_folder(prepared, tmp_path / "codet"))
    assert set(results) == {"SAM masks", "OV-SAM masks", "OV-SAM masks and names"}
    for values in results.values():
        assert 0 <= values["ap50_all"] <= 1
    assert "OV-SAM masks and names" in ovsam_boxes.as_table({"codet": results})
    thin = Detections(
        torch.tensor([[9.0, 3, 9, 20], [1, 1, 5, 5]]), torch.ones(2), torch.zeros(2).long(), ("a",), 9, 20
    )
    assert thin.with_area().boxes.tolist() == [[1, 1, 5, 5]]
    nothing = ovsam_boxes.compare(dataclasses.replace(run, score_threshold=2.0), str(tmp_path / "codet"))
    assert nothing["SAM masks"]["ap50_all"] == 0
    with pytest.raises(InputError, match="--detectors: missing"):
        ovsam_boxes.check(run)


def answering(segments: Segments) -> Callable[[Prompts], Segments]:
    return lambda prompts: segments


@pytest.mark.ray
def test_perfect_boxes_masks_and_names_have_an_ap_of_one(prepared: Run) -> None:
    rows = tables.read_table(prepared.storage, "boxes", f"{prepared.boxes}-eval").to_pylist()[:3]
    categories, splits = read_categories(prepared.storage, prepared.boxes)
    names = tuple(categories.values())
    found = []
    for row in rows:
        masks = decode_masks(row["masks"], row["height"], row["width"])
        labels = torch.tensor([names.index(categories[key]) for key in row["category_ids"]])
        wrong = Detections(boxes_of(masks), torch.ones(len(masks)), labels * 0, names, row["width"], row["height"])
        low = torch.zeros(len(masks), 4, 4)
        segments = Segments(masks, torch.ones(len(masks)), labels, torch.ones(len(masks)), names, low)
        found.append(ovsam_boxes.masked(wrong, answering(segments)))
    assert evaluate_detections(rows, found, categories, splits, "segm").summary()["ap_all"] == 1
    # Without names of their own, the detector's stay.
    unnamed = dataclasses.replace(segments, names=())
    assert torch.equal(ovsam_boxes.masked(wrong, answering(unnamed)).labels, wrong.labels)


@pytest.mark.ray
def test_a_study_measures_once_and_continues(
    prepared: Run, trained: Trained[SegmentationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"image_size": 64, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    save_clip(Clip(ClipConfig(vision=vision)), tmp_path / "vit")
    smoke = ovsam_study.smoke()
    run = dataclasses.replace(
        smoke,
        storage=prepared.storage,
        teacher=prepared.teacher,
        other_teachers=(str(tmp_path / "vit"),),
        detectors=(detector_folder(prepared, tmp_path / "codet" / "model"),),
        training=dataclasses.replace(smoke.training, eval_images=2),
    )
    trainings: list[Run] = []
    train = ovsam.train

    def noted(own: Run) -> Trained[SegmentationReport]:
        trainings.append(own)
        return train(own)

    def caches() -> set[Path]:
        return set((Path(prepared.storage) / "features").glob("smoke-train-*"))

    monkeypatch.setattr(ovsam, "train", noted)
    before = caches()
    first = ovsam_study.study(run)
    results = first["results"]
    assert {"sam, box", "ovsam, point", "teacher 1: ovsam, box", "ovsam, cost", "names: 100", "fusions"} <= set(results)
    (detector,) = run.detectors
    assert {f"{detector}: SAM masks", f"{detector}: OV-SAM masks and names", "teacher 1: fusions"} <= set(results)
    assert set(first["differences"]) >= {"OV-SAM above its SAM, box: IoU", "first teacher above teacher 1, box: IoU"}
    one, other = trainings
    assert one.sam == other.sam  # and with it the cache of its embeddings
    assert len(caches() - before) <= 1  # one for both; none where its weights came out as those of the fixture's SAM
    assert one.sam2clip_stage.steps != other.sam2clip_stage.steps
    text = ovsam_study.as_table(first)
    for name in ("fusions", "teacher 1: fusions"):
        assert set(results[name][0]) == {f"1, 1, {bias}: {split}" for bias in (0, 1) for split in ("base", "novel")}
    for part in ("| ovsam, box |", "| OV-SAM's part of |", "| names: 68 | names: 100 |", f"| {detector}: SAM masks |"):
        assert part in text, part

    def never(*_: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(ovsam, "train", never)
    monkeypatch.setattr(ovsam, "teach_sam", never)
    assert ovsam_study.as_table(ovsam_study.study(run)) == text


def test_operations_of_fused_attention_are_counted() -> None:
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    tokens = torch.zeros(1, 4, 8)
    # Four projections of 4 x 8 x 8, and two products of 2 heads x 4 x 4 x 4; each a multiplication and an addition.
    expected = 2 * (4 * 4 * 8 * 8 + 2 * 2 * 4 * 4 * 4)
    with torch.no_grad():
        assert pointing_report.count_flops(lambda: attention(tokens, tokens, tokens, need_weights=False)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_best_baseline_is_compared_with() -> None:
    def row(accuracy: float) -> dict[str, float]:
        return {"accuracy_novel": accuracy, "iou_all": 0.5}

    names = [*ovsam_study.IMAGE_CROPS, *ovsam_study.FEATURES]
    results = {f"{name}, {kind}": {0: row(0.3), 1: row(0.3)} for name in names for kind in ("box", "point")}
    results |= {f"{name}, {kind}": {0: row(0.9), 1: row(0.8)} for name in ("ovsam", "sam") for kind in ("box", "point")}
    results["image crop x1.5, box"] = {0: row(0.7), 1: row(0.6)}
    found = ovsam_study.compare(results)
    claim = "OV-SAM above the best baseline of image crops (image crop x1.5), box: novel accuracy"
    assert found[claim]["mean"] == pytest.approx(0.2)
    assert found["OV-SAM above its SAM, point: IoU"]["mean"] == 0

    results["names: 300"] = dict.fromkeys((0, 1), {f"{name}, novel": 0.3 for name in names} | {"ovsam, novel": 0.4})
    results["names: 300"][1] = results["names: 300"][0] | {"mask features, novel": 0.2, "roi features, novel": 0.1}
    found = ovsam_study.compare(results)
    claim = "OV-SAM above the best baseline of features (roi features x1.5), names: 300: novel accuracy"
    assert found[claim]["mean"] == pytest.approx(0.1)


def test_the_report_has_a_table_for_each_kind_of_result() -> None:
    splits, seeds = ("base", "novel", "all"), (0, 1)
    pointing = {f"{value}_{split}": 0.5 for value in ("iou", "accuracy") for split in splits}
    cost = {"parameters": 2e6, "flops": 3e9, "encode_ms": 4.0, "prompt_ms": 1.0}
    overlap = {f"{value}_{split}": 0.25 for value in ("ap", "ap50") for split in splits}
    variants = ["sam", "ovsam", *ovsam_study.IMAGE_CROPS, *ovsam_study.FEATURES]
    rows = {f"{name}, {kind}": pointing for name in variants for kind in ("box", "point")}
    rows |= {f"{name}, cost": cost for name in variants}
    rows |= {"names: 68": {f"{name}, novel": 0.75 for name in variants[1:]}}
    rows |= {"fusions": {"0, 0, 0: base": 0.5, "0, 0, 0: novel": 0.25, "1, 1, 0.5: base": 0.6, "1, 1, 0.5: novel": 0.4}}
    rows |= {"teacher 1: fusions": {"1, 1, 0: base": 0.25, "1, 1, 0: novel": 0.75}}
    rows |= {"codet: OV-SAM masks and names": overlap}
    results = {name: dict.fromkeys(seeds, numbers) for name, numbers in rows.items()}
    text = ovsam_study.as_table({"results": results, "differences": ovsam_study.compare(results)})
    for line in (
        "| ovsam, box | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500, 0.500 |",
        "| OV-SAM above its SAM, box: IoU | +0.000 | +0.000 to +0.000 | 2 |",
        "| ovsam | 2,000,000 | 3.00 | 4.0 ms | 1.0 ms |",
        "| image crop | 1.00 | 1.00 |",
        "| accuracy | names: 68 |",
        "| ovsam, novel | 0.750 |",
        "| 1, 1, 0.5 | 0.600 | 0.400 | 0.480 |",
        "| teacher 1: fusions: alpha, beta, novel bias (other images) | accuracy base | novel | harmonic mean |",
        "| 1, 1, 0 | 0.250 | 0.750 | 0.375 |",
        "| codet: OV-SAM masks and names | 0.250 | 0.250 | 0.250 | 0.250 |",
    ):
        assert line in text.splitlines(), line


def test_distracting_names_are_many_different_and_nobodys() -> None:
    names = ovsam_names.composed_names()
    assert len(set(names)) == len(names) > 22_000
    assert not set(names) & set(GLYPHS)
    nouns = [name.split(" ", 1)[1] for name in names[:1000]]
    assert len(set(nouns)) == 1000


def test_a_study_tells_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--teacher: missing"):
        ovsam_study.study(ovsam_study.pictograms())
    rows = pa.Table.from_pylist(
        [
            {"category_id": key, "name": name, "split": split, "synonyms": [], "frequency": "", "image_count": 1}
            for key, name, split in ((1, "cat", "base"), (2, "cup", "novel"))
        ]
    )
    entry = tables.write_part(str(tmp_path), "categories", "smoke", "part-00000.parquet", rows)
    tables.publish(str(tmp_path), "categories", "smoke", [entry], producer="test", config_hash="")
    file = tmp_path / "names.txt"
    file.write_text("wooden chair\n\nCup\n")
    compete = partial(ovsam_names.competing_names, str(tmp_path), "smoke")
    assert compete([2, 3], str(file)) == ["cat", "cup", "wooden chair"]
    assert compete([], "") == ["cat", "cup"]
    with pytest.raises(InputError, match=r"names.txt: 3 names with the set's, expected 4"):
        compete([4], str(file))
    with pytest.raises(InputError, match="expected at least the set's 2 names"):
        compete([1, 3], str(file))

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import trainings
from pretend_device import DEVICE, pretended

from data_prep import tables
from data_prep.pictograms.world import GLYPHS
from ovd_models.batches import Detections
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.evaluation import evaluate_detections
from ovd_models.segments import Prompts, Segments, boxes_of
from workflows import ovsam
from workflows.common.runs import Trained
from workflows.common.teacher import read_categories
from workflows.configs import ovsam as ovsam_configs
from workflows.configs.ovsam import Run
from workflows.reports.pointing import SegmentationReport, decode_masks
from workflows.studies import ovsam as ovsam_study
from workflows.studies import ovsam_boxes, ovsam_names, study
from workflows.studies.study import Metrics, Result


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run: Run = trainings.prepared("ovsam", str(tmp_path_factory.mktemp("ovsam")))
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[SegmentationReport]:
    return ovsam.train(replace(prepared, text_to_mask=False))


def detector_folder(prepared: Run, folder: Path) -> str:
    """An untrained CoDet with the teacher's text tower."""
    clip, teacher = load_clip(prepared.teacher)
    encoder = ClipTextEncoder(clip.config, clip.model.text, teacher)
    torch.manual_seed(0)
    rows = tables.read_table(prepared.storage, "categories", prepared.boxes).to_pylist()
    splits = {row["name"]: row["split"] for row in rows if row["split"]}
    save_checkpoint(CoDet(CoDetConfig()).eval(), encoder, folder, splits=splits, run={})
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
    results = ovsam_boxes.mask_ap(run, detector_folder(prepared, tmp_path / "codet"))
    assert set(results) == {"SAM masks", "OV-SAM masks", "OV-SAM masks and names"}
    for values in results.values():
        assert 0 <= values["ap50_all"] <= 1
    with pretended():
        there = ovsam_boxes.mask_ap(replace(run, device=str(DEVICE)), str(tmp_path / "codet"))
    for name, values in results.items():
        assert there[name]["ap50_all"] == pytest.approx(values["ap50_all"], abs=1e-3)
    thin = Detections(
        torch.tensor([[9.0, 3, 9, 20], [1, 1, 5, 5]]), torch.ones(2), torch.zeros(2).long(), ("a",), 9, 20
    )
    assert thin.with_area().boxes.tolist() == [[1, 1, 5, 5]]
    nothing = ovsam_boxes.mask_ap(replace(run, score_threshold=2.0), str(tmp_path / "codet"))
    assert nothing["SAM masks"]["ap50_all"] == 0


def test_checkpoints_of_boxes_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ovsam_boxes", "--model", "model", "--sam", "sam"])
    with pytest.raises(InputError, match="--detectors: missing"):
        ovsam_boxes.main()


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
        found.append(ovsam_boxes.with_masks(wrong, answering(segments), torch.device("cpu")))
    assert evaluate_detections(rows, found, categories, splits, "segm").summary()["ap_all"] == 1
    # Without names of their own, the detector's stay.
    unnamed = replace(segments, names=())
    assert torch.equal(ovsam_boxes.with_masks(wrong, answering(unnamed), torch.device("cpu")).labels, wrong.labels)


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_measures_once_and_continues(
    prepared: Run, trained: Trained[SegmentationReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = {"image_size": 64, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
    save_clip(Clip(ClipConfig(vision=vision)), tmp_path / "vit")
    smoke = ovsam_study.smoke()
    run = replace(
        smoke,
        storage=prepared.storage,
        teacher=prepared.teacher,
        other_teachers=(str(tmp_path / "vit"),),
        detectors=(detector_folder(prepared, tmp_path / "codet" / "model"),),
        training=replace(smoke.training, eval_images=2),
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
    first = study.run_study(ovsam_study.ovsam_study(run))
    (detector,) = run.detectors
    assert set(first.results) >= {
        "sam, box",
        "ovsam, point",
        "ovsam, cost",
        "ovsam, 100 names",
        "alpha 1, beta 1, bias 1",
        "teacher 1: ovsam, box",
        "teacher 1: alpha 1, beta 1, bias 0",
        f"{detector}: SAM masks",
        f"{detector}: OV-SAM masks and names",
    }
    assert "teacher 1: sam, box" not in first.results  # SAM is the same for all teachers
    statements = {judged.claim.statement for judged in first.claims}
    assert statements == {claim.statement for claim in ovsam_study.study_claims(run)}
    assert statements >= {"IoU, box: OV-SAM close to its SAM", "IoU, box: first teacher above teacher 1"}
    one, other = trainings
    assert one.sam == other.sam  # and with it the cache of its embeddings
    assert len(caches() - before) <= 1  # one for both; none if its weights are those of the fixture's SAM
    assert one.sam2clip_stage.steps != other.sam2clip_stage.steps
    for part in ("| ovsam, box |", "| OV-SAM relative to |", "| ovsam, 68 names |", f"| {detector}: SAM masks |"):
        assert part in first.text, part

    def never(*_: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(ovsam, "train", never)
    monkeypatch.setattr(ovsam, "teach_sam", never)
    assert study.run_study(ovsam_study.ovsam_study(run)).text == first.text


def test_the_sam_of_a_seed_depends_on_its_own_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Run] = []

    def remember(method: str, seed: int, name: str, run: Run, *_: object) -> dict[str, str]:
        asked.append(run)
        return {"sam": "folder"}

    monkeypatch.setattr(study, "remember", remember)
    own = ovsam_configs.smoke()
    other_head = replace(own, teacher="another", alpha=0.7, clip2sam_stage=replace(own.clip2sam_stage, steps=9))
    other_sam = replace(own, sam_stage=replace(own.sam_stage, steps=9))
    for each in (own, other_head, other_sam):
        assert ovsam_study.train_sam(each, 0) == "folder"
    assert asked[0] == asked[1] != asked[2]
    assert ovsam_study.train_sam(replace(own, sam="given"), 0) == "given"
    assert len(asked) == 3


def test_the_best_baseline_is_compared_with() -> None:
    def row(accuracy: float) -> Result:
        return Result({seed: {"accuracy_novel": accuracy, "iou_all": 0.5} for seed in (0, 1)})

    baselines = [*ovsam_study.IMAGE_CROPS, *ovsam_study.FEATURES]
    results = {f"{name}, {kind}": row(0.3) for name in baselines for kind in ("box", "point", "68 names")}
    results |= {f"{name}, {kind}": row(0.9) for name in ("ovsam", "sam") for kind in ("box", "point", "68 names")}
    results["image crop x1.5, box"] = row(0.7)
    results["roi features x1.5, 68 names"] = row(0.4)
    judged = {
        claim.statement: study.judge(claim, results) for claim in ovsam_study.study_claims(ovsam_study.pictograms())
    }
    crops = judged["novel accuracy, box: OV-SAM above the best baseline of image crop"]
    assert crops and (crops.baseline, crops.mean) == ("image crop x1.5, box", pytest.approx(0.2))
    features = judged["novel accuracy, 68 names: OV-SAM above the best baseline of CLIP features"]
    assert features and (features.baseline, features.mean) == ("roi features x1.5, 68 names", pytest.approx(0.5))
    sam = judged["IoU, point: OV-SAM close to its SAM"]
    assert sam and sam.mean == 0 and sam.holds
    assert judged["novel accuracy, 1203 names: OV-SAM above the best baseline of image crop"] is None


def test_the_report_has_a_table_for_each_kind_of_result() -> None:
    splits = ("base", "novel", "all")
    pointing: Metrics = {f"{value}_{split}": 0.5 for value in ("iou", "accuracy") for split in splits}
    cost: Metrics = {"parameters": 2e6, "flops": 3e9, "encode_ms": 4.0, "prompt_ms": 1.0}
    overlap: Metrics = {f"{value}_{split}": 0.25 for value in ("ap", "ap50") for split in splits}
    variants = ["sam", "ovsam", *ovsam_study.IMAGE_CROPS, *ovsam_study.FEATURES]
    rows = {f"{name}, {kind}": pointing for name in variants for kind in ("box", "point")}
    rows |= {f"{name}, cost": cost for name in variants}
    rows |= {f"{name}, 68 names": {"accuracy_base": 0.5, "accuracy_novel": 0.75} for name in variants[1:]}
    rows["alpha 0, beta 0, bias 0"] = {"accuracy_base": 0.5, "accuracy_novel": 0.25}
    rows["alpha 1, beta 1, bias 0.5"] = {"accuracy_base": 0.6, "accuracy_novel": 0.4}
    rows["teacher 1: alpha 1, beta 1, bias 0"] = {"accuracy_base": 0.25, "accuracy_novel": 0.75}
    rows["codet: OV-SAM masks and names"] = overlap
    lines = ovsam_study.result_tables({name: Result({0: row, 1: row}) for name, row in rows.items()})
    for line in (
        "| ovsam, box | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500, 0.500 |",
        "| ovsam | 2,000,000 | 3.00 | 4.0 ms | 1.0 ms |",
        "| image crop, box | 1.00 | 1.00 |",
        "| ovsam, 68 names | 0.500 | 0.750 |",
        "| teacher 1: alpha 1, beta 1, bias 0 | 0.250 | 0.750 | 0.375 |",
        "| codet: OV-SAM masks and names | 0.250 | 0.250 | 0.250 | 0.250 |",
    ):
        assert line in lines, line
    best, other = (
        "| alpha 1, beta 1, bias 0.5 | 0.600 | 0.400 | 0.480 |",
        "| alpha 0, beta 0, bias 0 | 0.500 | 0.250 | 0.333 |",
    )
    assert lines.index(best) + 1 == lines.index(other)


def test_distractors_are_many_and_share_no_name_with_the_set() -> None:
    names = ovsam_names.composed_names()
    assert len(set(names)) == len(names) > 22_000
    assert not set(names) & set(GLYPHS)
    nouns = [name.split(" ", 1)[1] for name in names[:1000]]
    assert len(set(nouns)) == 1000


def test_names_are_filled_up_with_distractors(tmp_path: Path) -> None:
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

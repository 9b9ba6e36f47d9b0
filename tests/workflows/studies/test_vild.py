from dataclasses import replace
from pathlib import Path

import pytest
import trainings
from pretend_device import DEVICE, pretended

import ovd_models
from ovd_models.checkpoints import load_model
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.vild.model import Variant, ViLD
from workflows import vild
from workflows.common.runs import Trained
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.configs.vild import Run
from workflows.reports import evaluation
from workflows.studies import study, vild_sweep
from workflows.studies import vild as vild_study


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run: Run = trainings.prepared("vild", str(tmp_path_factory.mktemp("vild")))
    return run


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[DetectionMetrics]:
    return vild.train(prepared)


@pytest.mark.ray
def test_a_sweep_at_the_checkpoints_own_scoring_gives_its_evaluation(
    prepared: Run, trained: Trained[DetectionMetrics], tmp_path: Path
) -> None:
    detector = ovd_models.load(trained.model)
    run = vild_sweep.Run(storage=prepared.storage, boxes="smoke-eval", score_threshold=prepared.score_threshold)
    recorded = vild_sweep.record(detector, run)
    own = vild_sweep.measure(recorded, load_model(trained.model, ViLD).config.scoring, run)
    settings = EvaluationRun(storage=prepared.storage, model=trained.model, boxes="smoke-eval")
    metrics = evaluation.evaluate(settings).metrics
    for name, value in metrics.summary().items():
        assert own.summary()[name] == pytest.approx(value, nan_ok=True)
    with pretended():
        elsewhere = replace(run, model=trained.model, device=str(DEVICE))
        there = vild_sweep.measure(vild_sweep.record(elsewhere.load_detector(), elsewhere), Scoring(), elsewhere)
    here = vild_sweep.measure(recorded, Scoring(), run)
    assert there.summary()["ap50_all"] == pytest.approx(here.summary()["ap50_all"], abs=1e-3)
    save_clip(Clip(ClipConfig()), tmp_path / "other")
    with pytest.raises(InputError, match=f"expected the detector's teacher, {detector.teacher}"):
        vild_sweep.baselines(recorded, replace(run, teacher=str(tmp_path / "other")))


def test_a_sweep_tries_all_settings() -> None:
    grid = dict(vild_sweep.scorings(vild_sweep.Run(temperature=(10.0, 20.0)), Scoring()))
    assert len(grid) == 4 * 2 * 2
    assert all(scoring.base_image + scoring.novel_image == pytest.approx(1) for scoring in grid.values())


@pytest.mark.ray
def test_the_teacher_alone_is_measured_on_the_same_regions(prepared: Run, trained: Trained[DetectionMetrics]) -> None:
    run = vild_sweep.Run(storage=prepared.storage, boxes="smoke-eval", teacher=prepared.teacher, max_crops=4)
    recorded = vild_sweep.record(ovd_models.load(trained.model), run)
    metrics = vild_sweep.baselines(recorded, run)
    assert list(metrics) == ["clip-crops", "clip-crops-objectness", "text-and-clip"]
    assert all(0 <= each.summary()["ap50_all"] <= 1 for each in metrics.values())


def test_only_the_variant_with_one_head_has_a_weight_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "remember", lambda *_: {"proposals": "proposals", "regions": "regions"})
    run = replace(vild_study.pictograms(), one_head_weight=0.7)
    variants: tuple[Variant, ...] = ("vild", "ensemble", "image")
    weights = {variant: vild_study.variant_training(run, variant, 1).model.image_weight for variant in variants}
    usual = run.training.model.image_weight
    assert weights == {"vild": 0.7, "ensemble": usual, "image": usual}


@pytest.mark.slow
@pytest.mark.ray
def test_a_study_measures_once_and_continues(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(
        vild_study.smoke(),
        storage=prepared.storage,
        teacher=prepared.teacher,
        other_teachers=(prepared.teacher,),
        variants=("text",),
        parts=("variants", "fusions", "proposals", "baselines", "supervised_full", "teachers"),
    )
    first = study.run_study(vild_study.vild_study(run))
    names = {"rpn-base", "rpn-base-and-novel", "text", "clip-crops", "clip-crops-objectness", "text-and-clip"}
    names |= {"teacher", "teacher-1", "ensemble-teacher-1", "ensemble-text-head", "ensemble-paper-scoring"}
    assert set(first.results) == names | {"supervised-novel-boxes"}
    assert set(first.results["teacher"].by_seed[0]) == {"top1_base", "top1_novel"}
    assert set(first.results["rpn-base"].by_seed[0]) == {
        f"ar{limit}_{split}" for limit in (100, 300, 1000) for split in ("novel", "base")
    }
    assert "ar100_novel" in {judged.claim.metric for judged in first.claims}
    assert (Path(prepared.storage) / f"reports/vild_study_{run.training.train_table}.md").exists()

    def never(*_: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(vild, "train", never)
    monkeypatch.setattr(vild, "train_rpn", never)
    assert study.run_study(vild_study.vild_study(run)).text == first.text

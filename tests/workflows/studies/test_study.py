import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from ovd_models.errors import InputError
from workflows.common import runs
from workflows.configs import codet as codet_configs
from workflows.studies import codet, ovsam, study, vild
from workflows.studies.study import Claim, Metrics, Result, Results, Study


def results_of(**values: list[float]) -> Results:
    """Novel AP50 of variants with the seeds 0, 1, ..."""
    return {
        name: Result({seed: {"ap50_novel": value} for seed, value in enumerate(each)}) for name, each in values.items()
    }


def test_confidence_interval_by_hand() -> None:
    # Mean 0.05; standard deviation 0.01; 4.303 is Student's t for two degrees of freedom.
    interval = study.confidence_interval([0.04, 0.05, 0.06])
    assert interval == pytest.approx((0.05 - 4.303 * 0.01 / 3**0.5, 0.05 + 4.303 * 0.01 / 3**0.5), abs=1e-5)
    assert study.confidence_interval([0.1, 0.1]) == pytest.approx((0.1, 0.1))
    assert study.confidence_interval([0.1]) is None


def test_a_claim_about_an_interval_needs_all_of_it() -> None:
    claim = Claim("ViLD above ViLD-text", "ap50_novel", "vild", ("text",))
    text, close = [0.3, 0.4, 0.5], [0.35, 0.45, 0.56]
    judged = study.judge(claim, results_of(text=text, vild=close))
    assert judged and judged.holds
    assert (judged.mean, list(judged.ours)) == (pytest.approx(0.16 / 3), [0, 1, 2])
    judged = study.judge(claim, results_of(text=text, vild=[*close[:2], 0.7]))
    assert judged and judged.interval
    assert (judged.interval[0] < 0 < judged.mean, judged.holds) == (True, False)
    one_seed = study.judge(claim, results_of(text=text[:1], vild=close[:1]))
    assert one_seed and not one_seed.holds


def test_a_claim_about_a_mean_needs_no_interval() -> None:
    bounds = Claim("supervised", "ap50_novel", "supervised", tested="mean", at_most=0.0)
    for value, holds in ((0.0, True), (0.1, False), (-0.1, False)):
        judged = study.judge(bounds, results_of(supervised=[value]))
        assert judged and judged.holds == holds and judged.interval is None
    floor = Claim("ensemble", "ap50_novel", "ensemble", tested="mean", at_least=0.45)
    judged = study.judge(floor, results_of(ensemble=[0.3, 0.4, 0.5]))
    assert judged and not judged.holds


def test_the_best_baseline_is_subtracted_over_shared_seeds() -> None:
    claim = Claim("ours above the best", "ap50_novel", "ours", ("low", "high", "missing"))
    judged = study.judge(claim, results_of(ours=[0.9, 0.8, 0.1], low=[0.3, 0.3], high=[0.7, 0.6]))
    assert judged and judged.baseline == "high"
    assert judged.ours == pytest.approx({0: 0.2, 1: 0.2})
    assert study.judge(claim, results_of(ours=[0.9])) is None
    assert study.judge(claim, results_of(low=[0.9])) is None


def test_results_are_remembered_by_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[codet_configs.Run] = []

    def job(run: codet_configs.Run) -> Metrics:
        seen.append(run)
        return {"value": float(len(seen))}

    monkeypatch.setattr(runs, "find_run", lambda storage, workflow, label: f"{label}-killed")
    run = study.seeded(codet_configs.smoke(), str(tmp_path), "clip", 3)
    assert {run.box_stage.seed, run.joint_stage.seed} == {3}
    assert study.remember("codet", 3, "variant", run, job) == {"value": 1.0}
    assert study.remember("codet", 3, "variant", run, job) == {"value": 1.0}
    assert seen[0].config.startswith("study-3-variant-")
    assert seen[0].resume == f"{seen[0].config}-killed"
    for changed in (replace(run, group_size=5), study.seeded(run, str(tmp_path), "clip", 4)):
        study.remember("codet", 3, "variant", changed, job)
    study.remember("codet", 3, "variant", run, job, "another setting")
    assert len(seen) == 4
    assert len(list((tmp_path / "reports/codet_study").glob("*.json"))) == 4


def test_a_report_has_results_claims_and_tables(tmp_path: Path) -> None:
    def measure(seed: int) -> dict[str, Metrics]:
        return {"ours": {"ap50_novel": 0.5 + seed / 10}, "theirs": {"ap50_novel": 0.4}}

    claims = (
        Claim("ours above theirs", "ap50_novel", "ours", ("theirs",), paper=0.25, source="Table 1"),
        Claim("never measured", "ap50_novel", "nothing"),
    )
    report = study.run_study(
        Study(
            name="report",
            storage=str(tmp_path),
            seeds=(0, 1),
            measurements=[measure],
            claims=claims,
            tables=lambda results: study.metric_table(results, "name", {"novel": "ap50_novel"}, each="ap50_novel"),
            figure=lambda results: b"a picture",
        )
    )
    lines = (tmp_path / "reports/report.md").read_text().splitlines()
    assert lines[:4] == [
        "| name | novel | each seed |",
        "|---|---|---|",
        "| ours | 0.550 | 0.500, 0.600 |",
        "| theirs | 0.400 | 0.400, 0.400 |",
    ]
    assert report.claims[0].interval
    low, high = report.claims[0].interval
    cells = f"interval at least 0 | +0.250 (Table 1) | +0.150 | {low:+.3f} to {high:+.3f} | 2 | no |"
    assert lines[-1] == f"| ours above theirs | {cells}"
    written = json.loads((tmp_path / "reports/report.json").read_text())
    assert written["results"]["ours"] == {"0": {"ap50_novel": 0.5}, "1": {"ap50_novel": 0.6}}
    assert [entry["claim"]["statement"] for entry in written["claims"]] == ["ours above theirs"]
    assert math.isclose(written["claims"][0]["mean"], 0.15)
    assert (tmp_path / "reports/report.png").read_bytes() == b"a picture"


def test_studies_need_a_teacher() -> None:
    for plan in (
        lambda: codet.codet_study(codet.pictograms()),
        lambda: ovsam.ovsam_study(ovsam.pictograms()),
        lambda: vild.vild_study(vild.pictograms()),
    ):
        with pytest.raises(InputError, match="--teacher: missing"):
            plan()

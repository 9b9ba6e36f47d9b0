import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from trainings import STAGES, smoke

from workflows import clip, codet, ovsam, vild
from workflows.common import rehearsal, runs, training
from workflows.common.runs import Trained, TrainingConfig
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import vild as vild_configs

DRY_RUN = {"clip": clip.dry_run, "vild": vild.dry_run, "codet": codet.dry_run, "ovsam": ovsam.dry_run}
REHEARSED = {
    "clip": ["train"],
    "vild": ["rpn", "detector"],
    "codet": ["boxes", "joint"],
    "ovsam": ["sam", "clip2sam", "text"],
}


@pytest.mark.ray
@pytest.mark.parametrize(
    "method", ["clip", "codet", *(pytest.param(m, marks=pytest.mark.slow) for m in ("vild", "ovsam"))]
)
def test_a_dry_run_prints_what_the_workers_need_and_opens_no_run(
    method: str, ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = smoke(method, str(tmp_path))
    stages = {name: dataclasses.replace(getattr(run, name), workers=2, steps=7200) for name in STAGES[method]}
    text = {"text_to_mask": True} if method == "ovsam" else {}
    run = dataclasses.replace(run, **stages, **text)
    before = set(tmp_path.glob("runs/*/*"))
    DRY_RUN[method](run)
    assert set(tmp_path.glob("runs/*/*")) == before
    assert not list(tmp_path.rglob("mlflow.db"))
    printed = capsys.readouterr().out
    step = r"dry run, (\w+): a worker's share takes (\S+) s a step on this CPU, (\S+) CPU s with its loading, "
    step += r"which takes (\S+) CPU s"
    need = r"    workers: 2, cores for loading: (\d+), hours for 7,200 steps: (\S+)"
    cost = r"    worker-hours: (\S+), images to the workers: (\S+) GB, "
    cost += r"peak memory of a worker: (\S+) GB, a checkpoint every 5 steps: (\S+) MB"
    found = re.findall(f"{step}\n{need}\n{cost}\n", printed)
    assert [name for name, *_ in found] == REHEARSED[method]
    for _, *numbers in found:
        seconds, used, loading, cores, hours, worker_hours, gigabytes, peak, megabytes = map(float, numbers)
        assert seconds > 0
        assert used > 0
        assert cores >= 2 * loading / seconds > 0
        assert hours == pytest.approx(2 * seconds, rel=0.01)
        assert worker_hours == pytest.approx(2 * hours, rel=0.01)
        assert gigabytes > 0
        assert 0.2 < peak < 20  # torch alone takes as much
        assert megabytes > 0.1
    resolved, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    assert resolved["config"] == "smoke"


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (dataclasses.replace(codet_configs.smoke(), box_model="x"), ["joint_stage"]),
        (dataclasses.replace(vild_configs.smoke(), proposals="x"), ["detector_stage"]),
        (dataclasses.replace(ovsam_configs.smoke(), sam="x", text_to_mask=False), ["clip2sam_stage"]),
    ],
)
def test_a_stage_that_is_not_trained_is_not_rehearsed(
    run: TrainingConfig, names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rehearsal.Rehearsal, "costs", lambda self: (1.0, 1.0, 1.0))
    fields = ("box_stage", "joint_stage", "rpn_stage", "detector_stage", "sam_stage", "clip2sam_stage", "text_stage")
    rehearsed: list[str] = []
    rehearsal.rehearse(run, {field: field for field in fields}, lambda _, stage, __: rehearsed.append(stage.name))
    assert rehearsed == names
    assert capsys.readouterr().out.count("dry run, ") == 1


def test_results_of_few_steps_are_called_so_also_where_a_stage_is_not_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = dataclasses.replace(codet_configs.smoke().box_stage, steps=7200)
    run = dataclasses.replace(codet_configs.smoke(), box_stage=long, storage=str(tmp_path))
    trained = Trained(model="m", metrics=None, seconds={}, run_id="r", experiment_id="1", outputs={})
    for given, expected in (("", False), ("x", True)):
        runs.print_results(dataclasses.replace(run, box_model=given), trained, "table", "command")
        assert ("steps only show that the training runs" in capsys.readouterr().out) == expected


def test_a_worker_takes_its_share_of_every_batch() -> None:
    run = codet_configs.lvis_r50()
    share = rehearsal.one_worker(run, "joint_stage")
    workers = run.joint_stage.workers
    assert workers > 1
    assert share.detection_batch * workers == run.detection_batch
    assert share.groups_per_step * workers == run.groups_per_step
    assert (share.joint_stage.workers, share.joint_stage.learning_rate) == (0, run.joint_stage.learning_rate)
    other = dataclasses.replace(run.joint_stage, workers=2, accumulate=16)
    uneven = rehearsal.one_worker(dataclasses.replace(run, joint_stage=other), "box_stage")
    assert (uneven.detection_batch, uneven.joint_stage.accumulate) == (run.detection_batch // workers, 1)


def test_loading_is_measured_in_cpu_time_of_one_step() -> None:
    calls: list[list[int]] = []

    def load(positions: np.ndarray) -> None:
        calls.append(positions.tolist())

    feed = training.feed(load, 4, codet_configs.smoke().box_stage)
    assert 0 <= rehearsal.loading_seconds(feed) < 1
    assert calls[1:] == [[0, 1, 2, 3], list(range(4, 12))]  # the first call checks that there is an image

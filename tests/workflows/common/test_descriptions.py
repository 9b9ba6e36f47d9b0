import dataclasses
from typing import Any

import pytest

from workflows.common.descriptions import description, run_name, teacher_key
from workflows.configs import clip, codet, vild


def seeded(run: codet.Run, **seeds: int) -> codet.Run:
    stages: dict[str, Any] = {name: dataclasses.replace(getattr(run, name), seed=seed) for name, seed in seeds.items()}
    return dataclasses.replace(run, **stages)


def test_a_name_is_the_config_and_what_differs_from_it() -> None:
    run = codet.pictograms()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, supervision="region-text"))
    run = seeded(run, box_stage=1, joint_stage=1)
    assert run_name("codet", run, codet.CONFIGS) == "codet pictograms, region-text, seed 1"


def test_a_change_of_one_stage_names_the_stage() -> None:
    run = seeded(codet.pictograms(), joint_stage=2)
    assert run_name("codet", run, codet.CONFIGS) == "codet pictograms, joint stage seed 2"


def test_places_and_settings_without_effect_are_not_named() -> None:
    run = dataclasses.replace(vild.pictograms(), storage="s3://a/b", teacher="c/d", resume="e", wait_minutes=1)
    assert run_name("vild", run, vild.CONFIGS) == "vild pictograms"
    label = dataclasses.replace(run, config="study-0")
    assert run_name("vild", label, vild.CONFIGS) == "vild study-0"


def test_switches_and_missing_values_are_words() -> None:
    run = dataclasses.replace(clip.pictograms(), max_side=None, pairs="mine", shuffle="shards", dry_run=True, shift=0)
    name = "clip pictograms, pairs mine, max side None, shuffle shards, shift 0, dry run"
    assert run_name("clip", run, clip.CONFIGS) == name
    long = dataclasses.replace(run, eval_images=1, validate_every=2, chunks=3)
    assert run_name("clip", long, clip.CONFIGS).endswith(", 2 more")


@pytest.mark.parametrize(
    ("teacher", "key"),
    [
        ("store/runs/clip/pictograms-1/model", "clip/pictograms-1"),
        ("s3://bucket/ovd/runs/clip/a/model/", "clip/a"),
        ("runs/clip/a/model", "clip/a"),
        ("store/runs/clip/untrained", ""),
        ("runs/demo/codet", ""),
        ("ViT-B-32", ""),
        ("", ""),
    ],
)
def test_a_teachers_run_follows_from_its_folder(teacher: str, key: str) -> None:
    assert teacher_key(teacher) == key


def test_a_description_has_the_command_the_model_and_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "workflows/vild.py", "--storage", "a b"])
    lines = description("a b/runs/vild/x/model", "t", "[clip](#/x)").split("\n\n")
    assert lines == [
        "command: `python workflows/vild.py --storage 'a b'`",
        "model: `a b/runs/vild/x/model`",
        "teacher: `t`, [clip](#/x)",
    ]
    assert "teacher" not in description("m", "", "")

from dataclasses import replace

import pytest

from data_prep import tables
from ovd_models.errors import InputError
from workflows import prepare_boxes
from workflows.configs import boxes as boxes_configs
from workflows.studies import finetune
from workflows.studies.study import Result, judge


def test_each_seed_trains_on_images_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    storage = str(tmp_path_factory.mktemp("store"))
    pool = replace(boxes_configs.second_style(), name="pool", train_images=8, eval_images=2, storage=storage)
    prepare_boxes.prepare(pool)
    run = replace(finetune.smoke(), storage=storage, boxes=pool, counts=(2, 4), seeds=(0, 1))
    shares = {}
    for seed in run.seeds:
        for count in run.counts:
            name = finetune.publish_share(run, count, seed)
            rows = tables.read_table(storage, "boxes", f"{name}-train")
            shares[seed, count] = rows["image_id"].to_pylist()
            assert tables.read_table(storage, "boxes", f"{name}-eval").num_rows == 2
            assert tables.read_table(storage, "categories", name).num_rows == 68
    assert shares[0, 2] == shares[0, 4][:2]
    assert len(shares[0, 4]) == 4
    assert not set(shares[0, 4]) & set(shares[1, 4])
    assert finetune.publish_share(run, 2, 1) == "pool-1-2"  # a second time nothing is written


def test_the_claims_compare_with_zero_shot() -> None:
    run = replace(finetune.pictograms(), box_model="model")
    study = finetune.finetune_study(run)
    metrics = {"zero-shot": 0.1, "10 images": 0.15, "50 images": 0.25, "200 images": 0.4}
    results = {
        name: Result({seed: {"ap50_all": value + 0.001 * seed, "ap50_base": value, "ap50_novel": value}})
        for name, value in metrics.items()
        for seed in (0,)
    }
    for result in results.values():
        (value,) = result.values("ap50_all")
        result.by_seed.update({seed: {**result.by_seed[0], "ap50_all": value + 0.001 * seed} for seed in (1, 2)})
    judged = [judge(claim, results) for claim in study.claims]
    assert [each.holds for each in judged if each] == [True, True, True]
    assert [round(each.mean, 3) for each in judged if each] == [0.05, 0.15, 0.3]
    results["50 images"] = results["10 images"]  # 0.05 is not the 0.1 that 50 images must give
    assert not judge(study.claims[1], results).holds  # type: ignore[union-attr]
    assert study.figure is not None and study.figure(results).startswith(b"\x89PNG")
    assert "| 200 images | 0.401 |" in "\n".join(study.tables(results))


def test_a_missing_detector_and_a_small_pool_are_told() -> None:
    with pytest.raises(InputError, match="--box-model: missing"):
        finetune.finetune_study(finetune.smoke())
    with pytest.raises(InputError, match="train-images: 600, expected 800 for seed 3"):
        finetune.finetune_study(replace(finetune.pictograms(), box_model="model", seeds=(0, 3)))

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from data_prep import tables
from data_prep.pictograms.world import PICTURES, World, single_objects
from ovd_models.clip.model import Clip, load_clip, load_text_encoder
from ovd_models.errors import InputError
from workflows import clip, prepare_pairs
from workflows.clip import Accuracy, held_out, random_shift, read_pretrained
from workflows.common import cli, registry, tracking, training
from workflows.common.runs import Trained
from workflows.common.session import Session
from workflows.configs import clip as clip_configs
from workflows.configs import pairs as pairs_configs
from workflows.configs.clip import Run
from workflows.inputs.pairs import pictogram_site


def test_a_shift_moves_each_image_by_itself_and_repeats_its_edges() -> None:
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(60):
        moved = random_shift(images, 2, generator)
        assert moved.shape == images.shape
        seen.append([shift_of(before, after) for before, after in zip(images, moved, strict=True)])
    assert len(set(map(tuple, seen))) > 45
    assert len({pair[0] for pair in seen}) > 15
    assert random_shift(images, 0, generator) is images


def shift_of(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """The one shift, within 2 pixels, that makes `after` of `before`, by trying all."""
    (found,) = [
        (x, y)
        for x in range(-2, 3)
        for y in range(-2, 3)
        for rows, columns in [(torch.arange(8) + y, torch.arange(8) + x)]
        if torch.equal(after, before[:, rows.clamp(0, 7)][:, :, columns.clamp(0, 7)].float())
    ]
    return found


def test_an_untrained_model_names_at_chance() -> None:
    torch.manual_seed(0)
    run = dataclasses.replace(clip_configs.smoke(), eval_images=272)
    accuracy = held_out(Clip(run.model).eval(), run).accuracy()
    assert 0 <= accuracy.top1_base < 0.1  # one of 68
    assert 0 <= accuracy.top1_novel < 0.15


def test_a_model_that_is_measured_stays_trainable() -> None:
    run = clip_configs.smoke()
    model = Clip(run.model)
    clip.measure(dataclasses.replace(run, eval_images=68), model)
    assert all(value.requires_grad for value in model.parameters())


def test_a_model_that_knows_the_answer_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(clip_configs.smoke(), eval_images=136)
    world = World.create(0)
    _, labels = single_objects(world, PICTURES, 136, seed=1_000)
    wrong = np.array([split == "novel" for split in world.splits])[labels]
    answers = iter([torch.nn.functional.one_hot(torch.from_numpy(labels + wrong) % 68, 68).float()])
    monkeypatch.setattr(clip, "zero_shot_logits", lambda *_: next(answers))
    assert held_out(Clip(run.model).eval(), run).accuracy() == Accuracy(top1_base=1.0, top1_novel=0.0)


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = str(tmp_path_factory.mktemp("clip"))
    with pictogram_site(dataclasses.replace(pairs_configs.smoke(), storage=root)) as crawl:
        prepare_pairs.prepare(crawl)
    return dataclasses.replace(clip_configs.smoke(), storage=root)


@pytest.fixture(scope="module")
def trained(prepared: Run) -> Trained[Accuracy]:
    return clip.train(prepared)


def test_a_flag_that_names_an_architecture_brings_its_settings() -> None:
    model = cli.parse(clip.CONFIGS, "", ["--model.name", "ViT-B-32"]).model
    assert model.statistics == (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    assert (model.image_size, model.logit_scale_bound, model.templates) == (224, 100, "vild")
    flags = ["--model.name", "ViT-B-32", "--model.max-logit-scale", "30", "--model.text.layers", "4"]
    assert cli.parse(clip.CONFIGS, "", flags).model.logit_scale_bound == 30
    tiny = cli.parse(clip.CONFIGS, "", ["--model.text.layers", "4"]).model
    assert (tiny.text["layers"], tiny.logit_scale_bound, tiny.templates) == (4, 50, "colours")


@pytest.mark.ray
def test_smoke_trains_evaluates_and_saves(prepared: Run, trained: Trained[Accuracy]) -> None:
    model, teacher = load_clip(trained.model)
    assert teacher.startswith("clip:")
    assert held_out(model, prepared).accuracy() == trained.metrics
    assert load_text_encoder(trained.model).embed_names(["anchor"]).shape == (1, 128)
    saved = json.loads((Path(trained.model) / "run.json").read_text())
    assert (saved["config"], saved["pairs"], saved["optimisation"]["steps"]) == ("smoke", "smoke", 10)


@pytest.mark.ray
def test_losses_and_accuracy_are_tracked(prepared: Run, trained: Trained[Accuracy]) -> None:
    uri = tracking.tracking_uri(prepared.storage)
    losses = tracking.metric_history(uri, trained.run_id, "train/loss")["train/loss_contrastive"]
    assert [step for step, _ in losses] == [10]
    during = tracking.metric_history(uri, trained.run_id, "eval/")["eval/accuracy_base"]
    assert [step for step, _ in during] == [5, 10]
    assert tracking.metric_history(uri, trained.run_id, "calibration/")["calibration/temperature"][0][1] > 0
    assert 0 < losses[0][1] < 2 * math.log(32)  # chance is the logarithm of the batch
    assert set(tracking.metric_history(uri, trained.run_id, "eval/")) == {
        "eval/accuracy_base",
        "eval/accuracy_novel",
    }
    run = MlflowClient(uri).get_run(trained.run_id)
    assert run.info.run_name is not None
    assert run.info.run_name.startswith("clip smoke")
    assert MlflowClient(uri).get_experiment(run.info.experiment_id).name == "smoke"
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["pairs/smoke"]
    assert f"model: `{trained.model}`" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["train/total_loss"] == pytest.approx(losses[0][1])
    assert 0 < run.data.metrics["train/learning_rate"] <= prepared.optimisation.learning_rate
    assert registry.model_folder(f"models:/ovd-clip-smoke@{registry.CHAMPION}", prepared.storage).is_dir()


@pytest.mark.ray
def test_a_finished_run_resumes_to_the_same_model(prepared: Run, trained: Trained[Accuracy]) -> None:
    name = Path(trained.model).parent.name
    again = clip.train(dataclasses.replace(prepared, resume=name))
    assert again.model == trained.model
    assert again.metrics == trained.metrics


def first_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights that a worker starts from."""
    first = read_pretrained(run)
    assert first is not None
    return first.state_dict()


@pytest.mark.ray
def test_training_goes_on_from_our_own_checkpoint_and_from_a_file(prepared: Run, trained: Trained[Accuracy]) -> None:
    ours = load_clip(trained.model)[0]
    tuned = dataclasses.replace(prepared, pretrained=trained.model)
    assert all(torch.equal(value, first_weights(tuned)[name]) for name, value in ours.state_dict().items())
    with pytest.raises(InputError, match=r"--pretrained none: expected --model\.name, or a checkpoint folder"):
        read_pretrained(dataclasses.replace(prepared, pretrained="none"))
    once = dataclasses.replace(prepared.optimisation, steps=5, checkpoint_every=5, learning_rate=1e-9, warmup=0.0)
    again = clip.train(dataclasses.replace(tuned, optimisation=once, config="tuned"))
    after = load_clip(again.model)[0].state_dict()
    for name, value in ours.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.allclose(value, after[name], atol=1e-5), name


@pytest.mark.ray
def test_a_sigmoid_loss_in_chunks_with_an_average_trains(prepared: Run) -> None:
    settings = dataclasses.replace(prepared.optimisation, ema_decay=0.9, schedule="cosine", steps=5, checkpoint_every=5)
    model = dataclasses.replace(prepared.model, loss="siglip")
    run = dataclasses.replace(prepared, config="sigmoid", model=model, chunks=4, optimisation=settings)
    found, _ = load_clip(clip.train(run).model)
    assert found.config.loss == "siglip"
    assert found.model.logit_bias.item() != -10
    with pytest.raises(InputError, match="chunks: 33, expected 1 to a worker's share of the batch"):
        dataclasses.replace(prepared, chunks=33)


@pytest.mark.ray
def test_shuffled_shards_give_the_same_pairs_in_another_order(prepared: Run) -> None:
    by_shards = dataclasses.replace(prepared, shuffle="shards", buffer_pairs=50)
    positions = np.arange(120)  # the small pictures
    rows, mixed = (clip.open_pairs(run)(positions).select(["image", "caption"]) for run in (prepared, by_shards))
    assert mixed != rows
    assert sorted(mixed.to_pylist(), key=str) == sorted(rows.to_pylist(), key=str)
    with pytest.raises(InputError, match="buffer_pairs: 0, expected at least 1"):
        dataclasses.replace(prepared, buffer_pairs=0)


@pytest.mark.ray
def test_captions_are_tokenised_outside_the_loop(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Session.batches

    def forbidden(*_: object) -> None:
        raise AssertionError("the loop tokenises")

    def guarded(session: Session, *arguments: Any, **settings: Any) -> Iterator[Any]:
        for batch in batches(session, *arguments, **settings):
            with monkeypatch.context() as loop:
                loop.setattr(Clip, "tokenize", forbidden)
                yield batch

    monkeypatch.setattr(Session, "batches", guarded)
    once = dataclasses.replace(prepared.optimisation, steps=5, checkpoint_every=5, warmup=0.0, schedule="cosine")
    assert clip.train(dataclasses.replace(prepared, config="tokens", validate_every=0, optimisation=once)).model


@pytest.mark.ray
def test_missing_and_unfit_pairs_are_told(prepared: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no such table; `python workflows/prepare_pairs\.py` makes it"):
        clip.train(dataclasses.replace(prepared, storage=str(tmp_path)))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a run was opened")

    monkeypatch.setattr(clip.runs, "open_run", never)
    with pytest.raises(InputError, match="no pair with sides up to 3 px"):
        clip.train(dataclasses.replace(prepared, max_side=3))


@pytest.mark.ray
def test_a_batch_that_cannot_be_shared_is_told(prepared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(training, "fit", never)
    two = dataclasses.replace(prepared.optimisation, workers=2)
    with pytest.raises(InputError, match="batch_size: 33, expected a multiple of the 2 workers"):
        clip.train(dataclasses.replace(prepared, batch_size=33, optimisation=two))


@pytest.mark.ray
def test_the_pairs_are_all_small_pictures(prepared: Run) -> None:
    rows = tables.read_table(prepared.storage, "pairs", "smoke", ["width", "height"]).to_pylist()
    assert sum(max(row["width"], row["height"]) <= 64 for row in rows) == 120

import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from serving import NAMES, save_classifier, save_detector, save_segmenter, save_text_segmenter

import ovd_models
from ovd_models.clip.model import load_text_encoder
from ovd_models.errors import InputError
from ovd_models.predictors import Classifier, Detector, Segmenter, TextSegmenter
from workflows.common import models, registry, runs, tracking


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (save_detector, Detector),
        (save_segmenter, Segmenter),
        (save_text_segmenter, TextSegmenter),
        (save_classifier, Classifier),
    ],
)
def test_any_method_is_loaded_from_a_folder_or_a_uri(save: object, kind: type, tmp_path: Path) -> None:
    assert callable(save)
    save(tmp_path / "model")
    for uri in (str(tmp_path / "model"), (tmp_path / "model").as_uri()):
        assert isinstance(models.load(uri, device="cpu"), kind)


def test_a_registered_model_is_loaded_by_its_name(tmp_path: Path) -> None:
    folder = save_detector(tmp_path / "model")
    with tracking.run(str(tmp_path), experiment="x", name="a", params={}, tags={}) as tracked:
        registry.register(tracked, folder, method="codet", data_set="x", metric="ap50_novel", value=0.5)
    assert models.load("models:/ovd-codet-x@champion", str(tmp_path)).vocabulary == NAMES


def test_a_finished_training_leaves_the_threshold_of_its_evaluation(tmp_path: Path) -> None:
    with tracking.run(str(tmp_path), experiment="x", name="a", params={}, tags={}) as tracked:
        active = runs.ActiveRun(
            workflow="codet", data_set="x", folder=str(tmp_path / "run"), tracked=tracked, wait_minutes=1
        )
        found = runs.Evaluation(metrics=None, headline="eval/ap50_all", value=0.5, threshold=0.2519)
        trained = active.finish(save_detector, lambda _: found)
    for uri in (trained.model, "models:/ovd-codet-x@champion"):
        predictor = models.load(uri, str(tmp_path))
        assert isinstance(predictor, Detector)
        assert predictor.info.score_threshold == 0.251  # rounded down


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move])
def test_a_moved_storage_keeps_its_models_and_writes_beside_them(move: object, tmp_path: Path) -> None:
    assert callable(move)
    old, new = tmp_path / "old store", tmp_path / "new"
    folder = save_detector(tmp_path / "model")

    def log(storage: Path, value: float) -> tracking.TrackedRun:
        with tracking.run(str(storage), experiment="x", name="a", params={}, tags={}) as tracked:
            tracked.log_text("text", "note.txt")
            registry.register(tracked, folder, method="codet", data_set="x", metric="ap50_novel", value=value)
        return tracked

    first = log(old, 0.5)
    before = sorted(path.name for path in old.rglob("*")) if move is shutil.copytree else []
    move(old, new)
    assert registry.model_folder("models:/ovd-codet-x@champion", str(new)).is_relative_to(new)
    second = log(new, 0.9)
    assert second.artifact_uri.startswith(new.as_uri())
    artifact = MlflowClient(second.uri).get_run(first.run_id).info.artifact_uri
    assert artifact == first.artifact_uri.replace(old.as_uri(), new.as_uri())
    assert registry.model_folder("models:/ovd-codet-x@champion", str(new)).is_relative_to(new)
    assert sorted(path.name for path in old.rglob("*")) == before
    if move is shutil.copytree:
        assert registry.model_folder("models:/ovd-codet-x/1", str(old)).is_relative_to(old)


def test_a_predictors_text_tower_is_on_its_device(tmp_path: Path) -> None:
    encoder = load_text_encoder(save_classifier(tmp_path / "clip"))
    detector = ovd_models.load(save_detector(tmp_path / "model"))
    Detector(detector.model, encoder, detector.info, "meta")
    assert {value.device.type for value in encoder.tower.parameters()} == {"meta"}


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no detector checkpoint, expected config"):
        models.load(str(tmp_path))
    with pytest.raises(InputError, match="--model: missing"):
        models.load("")
    folder = save_detector(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"codet"', '"sam"', 1))
    with pytest.raises(InputError, match="method 'sam', expected one of codet, vild, ovsam, text_to_mask, clip"):
        models.load(str(folder))

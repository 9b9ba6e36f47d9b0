import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from eval_data import lvis_like, predictions_for, write_results
from mlflow.tracking import MlflowClient
from object_storage import BUCKET, s3_server
from PIL import Image
from serving import save_segmenter

from data_prep import tables
from data_prep.boxes import annotations
from data_prep.parts import HERE
from data_prep.pictograms.world import World
from ovd_models.batches import Detections
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.metrics.matching import average_precisions, mean_of
from ovd_models.metrics.protocols import Protocol, measure
from ovd_models.predictors import Detector
from ovd_models.vocabulary import EmbeddingTable
from workflows import embed_texts, evaluate, failures
from workflows.common import cli, measured, tracking
from workflows.common.teacher import open_teacher
from workflows.configs.evaluation import Run
from workflows.reports import evaluation
from workflows.reports.detections import annotations_as_detections, draw_comparison, read_box_image
from workflows.reports.explanation import explain
from workflows.studies import ovsam_boxes, vild_sweep

WORLD = World.create(0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten scenes, and an untrained detector of the same names."""
    root = tmp_path_factory.mktemp("evaluate")
    rows = list(annotations.draw_scenes(str(root), "t-eval", WORLD, range(10), seed=0, base_only=False))
    categories = annotations.pictogram_categories(WORLD)
    for table, name, content in (("boxes", "t-eval", rows), ("categories", "t", categories)):
        part = pa.Table.from_pylist(content, schema=tables.SCHEMAS[table])
        entry = tables.write_part(str(root), table, name, "part-00000.parquet", part)
        tables.publish(str(root), table, name, [entry], producer="test", config_hash="0")
    torch.manual_seed(0)
    model = CoDet(CoDetConfig())
    embeddings = np.random.default_rng(0).normal(size=(68, 128)).astype(np.float32)
    table_of_names = EmbeddingTable.from_array(WORLD.names, embeddings, "t.npy")
    splits = dict(zip(WORLD.names, WORLD.splits, strict=True))
    save_checkpoint(model, table_of_names, root / "model", splits=splits, run={})
    return Run(storage=str(root), model=str(root / "model"), boxes="t-eval", batch_size=4, num_pictures=3)


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.read_table(run.storage, "boxes", run.boxes).to_pylist()
    return rows


def names_of(run: Run) -> dict[int, str]:
    return {row["category_id"]: row["name"] for row in tables.read_table(run.storage, "categories", "t").to_pylist()}


def test_an_untrained_detector_scores_near_zero(run: Run) -> None:
    evaluated = evaluation.evaluate(run)
    assert evaluated.protocol == "coco-ovd"
    assert [entry.name for entry in evaluated.metrics.categories] == list(WORLD.names)
    summary = evaluated.metrics.summary()
    assert all(0 <= summary[f"ap50_{split}"] < 0.05 for split in ("base", "novel", "all"))
    assert summary["ap50_novel"] == pytest.approx(evaluated.measured.numbers["AP50_novel"])
    assert len(evaluation.draw_pictures(run, evaluated.table)) == 3


def test_the_annotations_score_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run.storage, tmp_path / "store")
    run = dataclasses.replace(run, storage=str(tmp_path / "store"), score_threshold=0.02)  # not yet predicted
    names, rows = names_of(run), {tuple(read_box_image(run.storage, row).tobytes()[:999]): row for row in rows_of(run)}

    def detect_truth(_: Detector, images: list[Image.Image], vocabulary: list[str], **__: object) -> list[Detections]:
        nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), tuple(vocabulary), 128, 128)
        return [annotations_as_detections(rows[tuple(image.tobytes()[:999])], names, nothing) for image in images]

    monkeypatch.setattr(Detector, "detect", detect_truth)
    metrics = evaluation.evaluate(run).metrics
    assert metrics.mean("ap50") == metrics.mean("ap") == pytest.approx(1.0)
    present = {key for row in rows_of(run) for key in row["category_ids"]}
    unseen = [entry.name for entry in metrics.categories if math.isnan(entry.ap50)]
    assert unseen == [name for key, name in names_of(run).items() if key not in present]


def test_as_many_predictions_of_an_image_as_the_protocol_counts(run: Run) -> None:
    every = dataclasses.replace(run, score_threshold=0.0)
    for protocol, most in (("auto", 100), ("lvis-fixed", 10_000)):
        table = evaluation.predict_boxes(dataclasses.replace(every, protocol=protocol))
        counts = [len(row["scores"]) for row in tables.read_table(run.storage, "predictions", table).to_pylist()]
        assert max(counts) == 100 if most == 100 else 100 < max(counts) <= most


def test_an_image_that_cannot_be_read_keeps_its_truth_and_is_named(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.storage, tmp_path / "store", ignore=shutil.ignore_patterns("predictions"))
    broken = dataclasses.replace(run, storage=str(tmp_path / "store"), score_threshold=0.0)
    rows = rows_of(run)
    (tmp_path / "store" / rows[1]["uri"]).unlink()
    evaluated = evaluation.evaluate(broken)
    assert len(evaluated.truth.labels) == sum(len(row["boxes"]) for row in rows)
    found = tables.read_table(broken.storage, "predictions", evaluated.table).to_pylist()
    assert [row["image_id"] for row in found] == [row["image_id"] for row in rows]
    assert [len(row["scores"]) > 0 for row in found] == [number != 1 for number in range(10)]
    assert len(evaluation.draw_pictures(broken, evaluated.table)) == 2  # of the first three images
    assert f"left out: 1 images that cannot be read ({broken.storage}/{rows[1]['uri']}" in capsys.readouterr().out
    for row in rows:
        (tmp_path / "store" / row["uri"]).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^no image can be read: 10 images that cannot be read \(.*not an image"):
        evaluation.evaluate(dataclasses.replace(broken, score_threshold=0.01))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_script_that_runs_a_model_takes_a_device(run: Run, tmp_path: Path) -> None:
    given: dict[str, Any] = {"storage": run.storage, "model": run.model, "boxes": run.boxes, "device": "cuda"}
    save_clip(Clip(ClipConfig()), tmp_path)
    jobs: list[Callable[[], object]] = [
        lambda: evaluation.evaluate(dataclasses.replace(run, device="cuda")),
        lambda: failures.find_failures(failures.Run(**given, teacher="clip")),
        vild_sweep.Run(**given).load_detector,
        lambda: ovsam_boxes.mask_ap(ovsam_boxes.Run(**given, sam="sam"), run.model),
        lambda: embed_texts.open_text_encoder(embed_texts.Run(model=str(tmp_path), device="cuda")),
        lambda: open_teacher(str(tmp_path), "clip:1", "cuda:7"),
    ]
    for job in jobs:
        with pytest.raises(InputError, match=r"^--device cuda.*: not on this machine \(.*\), expected auto, cpu"):
            job()
    with pytest.raises(InputError, match=r"^--device gpu: not on this machine"):
        evaluation.evaluate(dataclasses.replace(run, device="gpu"))


def test_batch_size_does_not_change_the_metrics(run: Run) -> None:
    one, all_at_once = (evaluation.evaluate(dataclasses.replace(run, batch_size=size)).metrics for size in (1, 10))
    for first, second in zip(one.categories, all_at_once.categories, strict=True):
        assert first.ap50 == pytest.approx(second.ap50, abs=1e-3, nan_ok=True)


def test_synonyms_of_the_categories_may_count(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    detect = Detector.detect

    def recorded(self: Detector, *arguments: Any, **settings: Any) -> Any:
        given.append(settings)
        return detect(self, *arguments, **{**settings, "synonyms": None})

    monkeypatch.setattr(Detector, "detect", recorded)
    monkeypatch.setattr(Run, "read_synonyms", lambda _: {"anchor": ["grapnel"]})
    for rule in ("none", "mean", "max"):
        evaluation.evaluate(dataclasses.replace(run, synonyms=rule, images=1))
    assert [(entry["synonyms"], entry["merge"]) for entry in given] == [
        *[(None, "mean"), ({"anchor": ["grapnel"]}, "mean"), ({"anchor": ["grapnel"]}, "max")]
    ]


def bytes_of(run: Run, table: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(run.storage, "predictions", table).glob("*.parquet"))]


def fresh(run: Run, folder: Path) -> Run:
    shutil.copytree(run.storage, folder, ignore=shutil.ignore_patterns("predictions"))
    return dataclasses.replace(run, storage=str(folder), model=str(folder / "model"), batch_size=1)


@pytest.mark.slow
@pytest.mark.ray
def test_the_table_is_the_same_for_any_number_of_actors_and_is_made_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    alone, shared = fresh(run, tmp_path / "alone"), fresh(run, tmp_path / "shared")
    one, two = evaluation.evaluate(alone), evaluation.evaluate(dataclasses.replace(shared, workers=2))
    assert one.table == two.table
    assert len(bytes_of(alone, one.table)) == 3  # parts of four images
    assert bytes_of(alone, one.table) == bytes_of(shared, two.table)
    assert one.measured.numbers == two.measured.numbers
    monkeypatch.setattr(Detector, "detect", None)  # a second run predicts nothing
    assert evaluation.evaluate(alone).measured.numbers == one.measured.numbers


def test_a_stopped_prediction_continues_with_its_saved_parts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = fresh(run, tmp_path / "whole"), fresh(run, tmp_path / "stopped")
    expected = bytes_of(whole, evaluation.evaluate(whole).table)
    detect, calls = Detector.detect, []

    def detect_some(self: Detector, *arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise InputError("stopped")
        return detect(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "pool_of", lambda *_: HERE)
        patch.setattr(Detector, "detect", detect_some)
        with pytest.raises(InputError, match="stopped"):
            evaluation.evaluate(stopped)
        assert not list(Path(stopped.storage, "predictions").glob("*/manifest.json"))
        capsys.readouterr()
        assert bytes_of(stopped, evaluation.evaluate(stopped).table) == expected
    assert "1 of 3 parts are there already" in capsys.readouterr().out
    assert len(calls) == 6 + 6  # two parts of four and of two images


def test_annotations_and_detections_are_drawn_side_by_side(run: Run) -> None:
    row, names = rows_of(run)[0], names_of(run)
    picture = read_box_image(run.storage, row)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), tuple(names.values()), 128, 128, picture)
    truth = annotations_as_detections(row, names, nothing)
    assert truth.boxes.tolist() == row["boxes"]
    assert [truth.names[label] for label in truth.labels] == [names[key] for key in row["category_ids"]]
    assert len(annotations_as_detections({**row, "boxes": [], "category_ids": []}, names, nothing)) == 0
    pair = draw_comparison(row, nothing, names)
    assert pair.size == (2 * 320 + 6, 320)
    assert np.array_equal(np.array(pair)[:, 326:], np.array(nothing.draw()))
    assert not np.array_equal(np.array(pair)[:, :320], np.array(nothing.draw()))


def main(monkeypatch: pytest.MonkeyPatch, run: Run, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--storage", run.storage, "--boxes", run.boxes, *flags])
    return cli.outcome(evaluate.main)


def test_the_script_prints_and_tracks(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, export = Path(run.storage, "metrics.json"), Path(run.storage, "dt.json")
    flags = ["--num-pictures", "1", "--output", str(output), "--export", str(export)]
    assert main(monkeypatch, run, "--model", run.model, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "AP50_novel" in [line.split()[0] for line in lines]
    numbers = json.loads(output.read_text())
    assert list(numbers)[:3] == ["AP50_novel", "AP50_base", "AP50_all"]
    rows = json.loads(export.read_text())
    assert {row["image_id"] for row in rows} <= {row["source_id"] for row in rows_of(run)}
    assert tracking.tracking_uri(run.storage) in lines[-2]
    assert (
        lines[-1] == f"next: python workflows/predict.py --model {run.model} --storage {run.storage} --images PICTURES"
    )
    client = MlflowClient(tracking.tracking_uri(run.storage))
    (tracked,) = client.search_runs([client.get_experiment_by_name("t").experiment_id])
    assert {
        "eval/ap50_novel",
        "eval/ap50_base",
        "eval/ap_all",
        "eval/coco-ovd/AR_100_novel",
    } <= tracked.data.metrics.keys()
    assert [entry.dataset.name for entry in tracked.inputs.dataset_inputs] == ["boxes/t-eval"]
    (table,) = Path(run.storage).glob("mlartifacts/t/*/artifacts/eval/per_class.json")
    assert len(json.loads(table.read_text())["data"]) == 68
    assert len(list(Path(run.storage).glob("mlartifacts/t/*/artifacts/eval/picture_*.jpg"))) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "/nowhere: no detector checkpoint, expected config.json and model.safetensors"),
        (["--model", "models:/none@champion"], "models:/none@champion: "),
        (["--boxes", "none-eval"], "no such table; `python workflows/prepare_boxes.py` makes it"),
        (["--categories", "none"], "no such table; `python workflows/prepare_boxes.py` makes it"),
        (["--model", "file:///nowhere"], "/nowhere: no detector checkpoint"),
        (["--batch-size", "0"], "batch_size"),
        (["--export", "x.txt"], "--export x.txt: expected a name that ends with .json or .parquet"),
        (["--protocol", "ovsam"], "is of method 'codet', expected an OV-SAM"),
        (["--engine", "lvis"], "--engine lvis: reads files, expected --ground-truth and --predictions, not --model"),
        (["--novel", "novel.txt"], "--novel novel.txt: of files, expected --ground-truth"),
        (["--iou-type", "segm"], "predicts boxes only, expected a detector with masks"),
        (["--output", "."], "--output .: a folder, expected the name of a file"),
        (["--output", f"{__file__}/numbers.json"], "test_evaluate.py is a file, expected a folder"),
    ],
)
def test_bad_input_is_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    def never(*given: object) -> None:
        raise AssertionError("predicted")

    monkeypatch.setattr(Detector, "detect", never)
    given = flags if "--model" in flags else ["--model", run.model, *flags]
    assert main(monkeypatch, run, *given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_an_ov_sam_exports_no_boxes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(save_segmenter(tmp_path / "ovsam"))
    assert main(monkeypatch, run, "--model", model, "--export", f"{tmp_path}/dt.json") == 2
    assert "is an OV-SAM, expected a detector" in capsys.readouterr().err


def test_names_of_another_set_are_matched_with_those_of_the_training(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.model, tmp_path / "model")
    info = json.loads((tmp_path / "model/config.json").read_text())
    base, novel = (
        WORLD.names[0],
        next(n for n, split in zip(WORLD.names, WORLD.splits, strict=True) if split == "novel"),
    )
    info["splits"], info["run"] = {base.upper(): "base", novel: "novel", "unicorn": "base"}, {"boxes": "other"}
    (tmp_path / "model/config.json").write_text(json.dumps(info))
    assert main(monkeypatch, run, "--model", str(tmp_path / "model")) == 0
    lines = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line[2:] == ["names"]] == [
        *(["base", "1", "names"], ["novel", "1", "names"], ["new", "66", "names"])
    ]
    assert evaluation.evaluate(run).transfer == {}


TRUTH = lvis_like(4, 6, 9)


@pytest.fixture
def annotated(tmp_path: Path) -> list[str]:
    """Flags with an annotation file and results of another tool."""
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    write_results(predictions_for(TRUTH, 20, masks=True), tmp_path / "dt.json")
    return ["--ground-truth", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "dt.json")]


def on_files(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    return cli.outcome(evaluate.main)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_predictions_made_elsewhere_are_evaluated_by_either_engine(
    annotated: list[str], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    monkeypatch.chdir(tmp_path)
    for engine in ("fast", "lvis"):
        flags = ["--iou-type", kind, "--engine", engine, "--output", f"{engine}.json"]
        assert on_files(monkeypatch, *annotated, *flags) == 0
        found[engine] = json.loads((tmp_path / f"{engine}.json").read_text())
    assert len(found["fast"]) == 13
    assert list(found["fast"]) == list(found["lvis"])
    assert found["fast"] == pytest.approx(found["lvis"], abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["AP", f"{found['fast']['AP']:.3f}"]
    assert lines[14].startswith(f"lvis, {kind}: 4 images, {len(TRUTH['annotations'])} objects, 80 predictions; ")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("protocol", ["lvis", "lvis-fixed", "coco", "coco-ovd"])
def test_the_page_explains_the_ap_of_its_protocol(protocol: Protocol, tmp_path: Path) -> None:
    annotated = lvis_like(6, 6, 4)  # names in neither split count for COCO alone
    if not protocol.startswith("lvis"):
        annotated["categories"] = [{"id": entry["id"], "name": entry["name"]} for entry in annotated["categories"]]
    (tmp_path / "gt.json").write_text(json.dumps(annotated))
    write_results(predictions_for(annotated, 500), tmp_path / "dt.json")
    truth = measured.read_truth_file(str(tmp_path / "gt.json"), "bbox")
    splits = ("base", "novel", "base", "")
    categories = [dataclasses.replace(each, split=split) for each, split in zip(truth.categories, splits, strict=True)]
    truth = dataclasses.replace(truth, categories=tuple(categories))
    found = measured.read_prediction_file(str(tmp_path / "dt.json"), truth, "bbox")
    numbers = measure(truth, found, protocol, "bbox").numbers
    explained = explain(truth, found, protocol, "bbox")
    ap_K = average_precisions(explained.truth, explained.matches).mean(0)
    expected = numbers["AP_all"] if protocol == "coco-ovd" else numbers["AP"]
    assert mean_of(ap_K[explained.groups["all"]]) == pytest.approx(expected, abs=1e-9)


def test_our_predictions_are_evaluated_as_anybody_elses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluation.evaluate(run)
    rows, names = rows_of(run), names_of(run)
    splits = {entry.name: entry.split for entry in expected.truth.categories}
    truth = {
        "images": [{"id": row["source_id"], "width": row["width"], "height": row["height"]} for row in rows],
        "annotations": [
            {"image_id": row["source_id"], "category_id": key, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            for row in rows
            for key, (x0, y0, x1, y1) in zip(row["category_ids"], row["boxes"], strict=True)
        ],
        "categories": [{"id": key, "name": name} for key, name in names.items()],
    }
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "novel.txt").write_text("\n".join(name for name in names.values() if splits[name] == "novel"))
    for ending in ("json", "parquet"):
        rows_out = tables.read_parts(run.storage, "predictions", expected.table)
        file = str(tmp_path / f"dt.{ending}")
        uri = f"{Path(file).as_uri()}?region=eu" if ending == "json" else file
        measured.export(expected.predictions, expected.truth, uri, rows_out)
        flags = ["--ground-truth", str(tmp_path / "gt.json"), "--predictions", file, "--output", f"{file}.out"]
        assert on_files(monkeypatch, *flags, "--novel", str(tmp_path / "novel.txt")) == 0
        assert json.loads(Path(f"{file}.out").read_text()) == pytest.approx(dict(expected.measured.numbers))
    with pytest.raises(InputError, match=r"^--export x.csv: expected a name that ends with .json or .parquet"):
        measured.export(expected.predictions, expected.truth, "x.csv", iter(()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "voc"], "--protocol: 'voc', expected one of auto, lvis, lvis-fixed, coco, coco-ovd, ovsam"),
        (["--protocol", "coco-ovd", "--novel", "none.txt"], "none.txt: cannot be read"),
        (["--protocol", "coco", "--engine", "lvis"], "--engine lvis: evaluates --protocol lvis only, not coco"),
        (["--predictions", "none.json"], "none.json: cannot be read (No such file or directory), expected a results"),
        (["--ground-truth", "none.json"], "none.json: cannot be read (No such file or directory), expected an annot"),
        (["--predictions", ""], "--predictions: missing, expected both"),
        (["--export", "dt.json"], "--export: not with --predictions"),
    ],
)
def test_bad_files_are_one_line(
    annotated: list[str],
    flags: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert on_files(monkeypatch, *annotated, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_remote_storage_without_tracking_is_refused_before_any_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("evaluation began")

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(evaluation, "evaluate", never)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--storage", f"s3://{BUCKET}/x", "--model", run.model])
    with s3_server() as variables, pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        evaluate.main()

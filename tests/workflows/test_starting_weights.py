"""What the detectors of both trainings start from; the features that weights give are tested with the importer."""

import dataclasses
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import timm
import torch
import trainings
from reference_data import needs
from torch import Tensor
from torch.nn import functional as F

from benchmarks import parity_packs
from data_prep import tables
from ovd_models.batches import DetectionBatch
from ovd_models.checkpoints import load_encoder, load_model, save_checkpoint
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.c4 import coco_r50_c4
from ovd_models.detectors.centernet import CenterNetConfig
from ovd_models.detectors.centernet2 import CenterNet2Config
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.errors import InputError
from ovd_models.importers import codet as releases
from ovd_models.vild.model import ViLD, ViLDConfig
from ovd_models.vocabulary import EmbeddingTable, Vocabulary
from workflows import codet, import_weights, vild
from workflows.common import cli, starting_weights
from workflows.common.optimisation import build_optimiser
from workflows.common.teacher import CodetNames
from workflows.configs import codet as codet_configs
from workflows.configs import vild as vild_configs
from workflows.inputs import codet as codet_inputs
from workflows.inputs import vild as vild_inputs

CAT = Vocabulary(("cat",), torch.eye(16)[:1], torch.tensor([True]))
NAMES = CodetNames({1: "cat"}, {"cat": "base"}, CAT, torch.eye(16)[:1], ("cat",), (1,))
OPTIONS = {"channels": [8, 8, 16, 16], "stem_width": 8}
SMALL = RCNNConfig(backbone="resnet26", backbone_options=OPTIONS, freeze_norm=True)
DETECTORS = {
    "fpn": CoDetConfig(detector=SMALL),
    "c4": CoDetConfig(
        architecture="c4",
        detector=dataclasses.replace(
            coco_r50_c4(), backbone="resnet26", backbone_options=OPTIONS, head_width=64, anchor_sizes=(32, 64)
        ),
    ),
    "centernet2": CoDetConfig(
        architecture="centernet2",
        centernet2=CenterNet2Config(
            backbone="resnet26",
            backbone_options=OPTIONS,
            pyramid_channels=64,
            proposals=CenterNetConfig(num_convs=1),
            head_width=32,
            mask_convs=0,
        ),
    ),
}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting_weights, "find_published", lambda published: "")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A file of a classifier with the detectors' backbone."""
    torch.manual_seed(3)
    state = timm.create_model("resnet26", **OPTIONS).state_dict()
    torch.save({name: value + 0.1 if value.is_floating_point() else value for name, value in state.items()}, (
        tmp_path / "classifier.pth"
    ))  # fmt: skip
    return tmp_path / "classifier.pth"


def config_of(model: CoDetConfig) -> RCNNConfig | CenterNet2Config:
    return model.centernet2 if model.architecture == "centernet2" else model.detector


def started(run: codet_configs.Run) -> tuple[codet_configs.Run, dict[str, Tensor]]:
    return codet_inputs.initial_weights(codet_inputs.find_weights(run), NAMES, "teacher")


# ----------------------------------------------------------------------------------------------- backbone weights


@pytest.mark.parametrize("architecture", DETECTORS)
def test_every_detector_of_codet_starts_from_the_file(architecture: str, classifier: Path) -> None:
    run = dataclasses.replace(codet_configs.smoke(), model=DETECTORS[architecture])
    given, weights = started(dataclasses.replace(run, backbone_weights=str(classifier)))
    random, _ = started(run)
    # Norms are frozen by the config where there are weights to freeze, in every detector alike.
    assert (config_of(given.model).freeze_norm, config_of(random.model).freeze_norm) == (True, False)
    assert config_of(given.model).bottleneck_stride == "3x3"
    model = CoDet(given.model)
    model.load_state_dict(weights)
    file = torch.load(classifier, weights_only=True)
    trunk = {"fpn": "backbone", "c4": "backbone", "centernet2": "pyramid.maps.trunk"}[architecture]
    for name in ("layer1.0.conv1.weight", "layer3.1.bn2.running_var"):
        assert torch.equal(weights[f"detector.{trunk}.{name}"], file[name])
    if architecture != "fpn":  # its small pyramid ends with the third stage
        last = "detector.res5" if architecture == "c4" else f"detector.{trunk}.layer4"
        for name in ("0.conv3.weight", "1.bn1.bias"):
            assert torch.equal(weights[f"{last}.{name}"], file[f"layer4.{name}"])


def test_both_stages_of_vild_start_from_the_file(classifier: Path) -> None:
    run = dataclasses.replace(vild_configs.smoke(), model=ViLDConfig(detector=SMALL), start_from_proposals=False)
    names = vild_inputs.VildNames([1], {"cat": "base"}, {1: "cat"}, Vocabulary(("cat",), torch.eye(16)[:1]))
    given = vild_inputs.find_weights(dataclasses.replace(run, backbone_weights=str(classifier)))
    completed = vild_inputs.complete(given, names)
    assert completed.model.detector.freeze_norm
    assert not vild_inputs.complete(vild_inputs.find_weights(run), names).model.detector.freeze_norm
    start = vild_inputs.detector_start(completed, "")
    assert torch.equal(
        start["detector.backbone.layer2.0.conv2.weight"],
        torch.load(classifier, weights_only=True)["layer2.0.conv2.weight"],
    )


def test_given_proposals_bring_their_own_norms(tmp_path: Path) -> None:
    detector = dataclasses.replace(SMALL, embed_dim=16, freeze_norm=False, bottleneck_stride="1x1")
    table = EmbeddingTable(("cat",), torch.eye(16)[:1], "teacher", "name")
    save_checkpoint(ViLD(ViLDConfig(detector=detector)), table, tmp_path, splits={"cat": "base"}, run={})
    run = dataclasses.replace(vild_configs.lvis_r50_short(), model=ViLDConfig(detector=SMALL), proposals=str(tmp_path))
    names = vild_inputs.VildNames([1], {"cat": "base"}, {1: "cat"}, Vocabulary(("cat",), torch.eye(16)[:1]))
    completed = vild_inputs.complete(vild_inputs.find_weights(run), names)
    assert (completed.model.detector.freeze_norm, completed.model.detector.bottleneck_stride) == (False, "1x1")
    vild_inputs.check_proposals(completed)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet10t", channels=[8, 8, 8, 8], stem_width=8).state_dict(), tmp_path / "other.pth")
    for model in DETECTORS.values():
        run = dataclasses.replace(codet_configs.smoke(), model=model, backbone_weights=str(tmp_path / "other.pth"))
        with pytest.raises(InputError, match=r"other.pth: conv1.weight is missing, expected \[64, 3, 7, 7\]"):
            started(run)


@pytest.mark.parametrize("method", ["codet", "vild"])
def test_missing_files_are_refused_before_tables_are_made(method: str, tmp_path: Path) -> None:
    (tmp_path / "names.npy").touch()
    given = {"storage": f"{tmp_path}/store", "data": "nowhere", "texts": f"{tmp_path}/names.npy"}
    run: Any = codet_configs.smoke() if method == "codet" else vild_configs.smoke()
    if method == "vild":
        run = dataclasses.replace(run, model=ViLDConfig(variant="text"))
    prepare = {"codet": codet.prepare_data, "vild": vild.prepare_data}[method]
    cases = [
        ({"box_model": "gone"}, "--box-model gone: no checkpoint"),
        ({"texts": "gone.npy"}, r"--texts gone\.npy: no such file"),
        ({"backbone_weights": "gone.pth"}, r"--backbone-weights gone\.pth: no such file"),
        ({"prompt_set": "unheard"}, "prompt set 'unheard': unknown"),
    ]
    if method == "codet":
        cases += [
            ({"box_model": "gone.pth"}, r"--box-model gone\.pth: no such file"),
            ({"box_model": f"{tmp_path}/names.npy", "backbone_weights": "gone.pth"}, "no checkpoint"),
        ]
    else:
        cases += [
            ({"proposals": "gone"}, "--proposals gone: no checkpoint"),
            ({"regions": "gone"}, "regions/gone: no such table"),
        ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message):
            prepare(dataclasses.replace(run, **{**given, **changes}))


@pytest.mark.parametrize("config", ["coco_r50", "lvis_r50", "lvis_swin_b", "lvis_eva"])
def test_published_configs_refuse_to_start_from_nothing(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    flags = ["codet.py", "--config", config, "--no-use-gpu", "--storage", str(tmp_path / "store"), "--data", "nowhere"]
    monkeypatch.setattr(sys, "argv", flags)
    assert cli.outcome(codet.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --config {config}: the backbone starts from ")
    monkeypatch.setattr(sys, "argv", [*flags[:-2], "--from-scratch"])
    assert cli.outcome(codet.main) == 2
    signal.signal(signal.SIGTERM, before)
    assert "--teacher: missing" in capsys.readouterr().err
    assert not (tmp_path / "store" / "boxes").exists()


def test_vilds_configs_say_what_they_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for name, make in vild_configs.CONFIGS.items():
        found = vild_inputs.find_weights(make())
        assert vild_inputs.find_weights(found) == found  # and say it once
        assert found.from_scratch
        said[name] = capsys.readouterr().out.count("backbone: random weights; resnet")
    assert {name for name, count in said.items() if count} == {
        *(
            "photos",
            "photos_laptop",
            "photos_gpu",
            "photos_8gpu",
            "coco_48_17_short",
            "lvis_r50_short",
            "lvis_r152_short",
        )
    }
    assert max(said.values()) == 1


# ----------------------------------------------------------------------------------------------------- box models


def small_releases() -> dict[str, releases.Release]:
    """R50-C4 in small."""
    release = releases.released_architectures()["r50_c4"]
    return {"r50_c4": dataclasses.replace(release, config=DETECTORS["c4"])}


def write_release(path: Path, model: CoDet, release: releases.Release, table_KD: Tensor) -> None:
    """A file of Detic's box supervision: the detector, and the embeddings of all names with a zero for background."""
    state: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        names = releases.released_names(ours, release)
        state.update(zip(names, value.split(1) if len(names) > 1 else [value], strict=True))
    column = "roi_heads.box_predictor.cls_score.detection_weight"
    state[column] = torch.cat((table_KD, torch.zeros(1, table_KD.shape[1]))).T
    torch.save({"model": state, "iteration": 90_000}, path)


@pytest.mark.slow
@pytest.mark.ray
def test_the_joint_stage_starts_from_a_released_box_model(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = small_releases()["r50_c4"]
    monkeypatch.setattr(releases, "released_architectures", small_releases)
    prepared = trainings.prepared("codet", str(tmp_path))
    categories = tables.read_table(str(tmp_path), "categories", "smoke").to_pylist()
    in_order = [row["name"] for row in sorted(categories, key=lambda row: row["category_id"])]
    table_KD = load_encoder(prepared.teacher).embed_names(in_order)
    config = dataclasses.replace(
        release.config,
        detector=dataclasses.replace(release.config.detector, embed_dim=table_KD.shape[1], min_size=64, max_size=96),
    )
    monkeypatch.setattr(
        releases, "released_architectures", lambda: {"r50_c4": dataclasses.replace(release, config=config)}
    )
    torch.manual_seed(5)
    boxes = CoDet(config)
    path = tmp_path / "BoxSup.pth"
    write_release(path, boxes, release, table_KD)
    run = dataclasses.replace(prepared, model=config, box_model=str(path), from_scratch=False, config="lvis_r50")

    found = codet.train(run)
    assert "boxes" not in found.seconds
    kept = load_model(found.outputs["boxes_model"], CoDet)
    assert kept.config.detector.freeze_norm
    state = kept.state_dict()
    for name, value in boxes.state_dict().items():  # the file has blue first, and so is turned twice
        expected = value.flip(1) if name == release.bgr else value
        assert torch.equal(state[name], expected), name
    assert not torch.equal(
        load_model(found.model, CoDet).detector.projection.weight, state["detector.projection.weight"]
    )

    write_release(path, boxes, release, table_KD.flip(1))
    with pytest.raises(InputError, match=r"BoxSup.pth: the teacher embeds names otherwise .* expected the file's"):
        codet.train(run)
    write_release(path, boxes, release, table_KD[:3])
    codet_inputs.read_box_model(
        run, dataclasses.replace(NAMES, vocabulary=dataclasses.replace(CAT, embeddings=torch.eye(128)[:1])), "teacher"
    )
    assert "BoxSup.pth: records no teacher; Detic and CoDet used CLIP ViT-B/32" in capsys.readouterr().out
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"BoxSup.pth: holds no released detector"):
        codet.train(run)


def test_a_step_from_an_imported_detector_is_that_of_the_released_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = small_releases()["r50_c4"]
    sized = dataclasses.replace(release.config.detector, embed_dim=16, min_size=75, max_size=109)
    release = dataclasses.replace(release, config=dataclasses.replace(release.config, detector=sized))
    monkeypatch.setattr(releases, "released_architectures", lambda: {"r50_c4": release})
    torch.manual_seed(5)
    released, rows_KD, words = CoDet(release.config), torch.eye(16)[:3], ("cat", "dog", "cow")
    for value in released.state_dict().values():
        value += 0.05 * torch.rand_like(value)
    write_release(tmp_path / "BoxSup.pth", released, release, rows_KD)
    (tmp_path / "names.txt").write_text("\n".join(words))
    folder = str(tmp_path / "imported")
    files = import_weights.Run(weights=(str(tmp_path / "BoxSup.pth"),), names=str(tmp_path / "names.txt"), out=folder)
    import_weights.convert(files)

    run = dataclasses.replace(codet_configs.finetune(), box_model=folder)
    encoder = load_encoder(codet_inputs.own_encoder(run))
    embedded = Vocabulary(words, encoder.embed_names(words), torch.ones(3, dtype=torch.bool))
    splits = dict.fromkeys(words, "base")
    names = CodetNames(dict(enumerate(words)), splits, embedded, embedded.embeddings, words, (1, 1, 1))
    run, start = codet_inputs.initial_weights(codet_inputs.find_weights(run), names, encoder.teacher)
    imported = CoDet(run.model)
    imported.load_state_dict(start)
    with torch.no_grad():  # the file takes blue first
        first = released.get_parameter(release.bgr)
        first.copy_(first.flip(1).clone())

    generator = torch.Generator().manual_seed(7)
    sizes = ((75, 109), (101, 61))  # windows, strides and padding divide neither
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    boxes = [torch.tensor([[3.0, 5.0, 60.0, 70.0], [20.0, 8.0, 50.0, 40.0]]), torch.tensor([[1.0, 9.0, 55.0, 90.0]])]
    batch = DetectionBatch(images, boxes, [torch.tensor([0, 2]), torch.tensor([1])])
    losses = []
    for model in (imported, released):
        torch.manual_seed(9)  # of the sampled regions
        losses.append(model.train()(batch, None, embedded.embeddings, None))
        torch.stack(list(losses[-1].values())).sum().backward()
    assert losses[0].keys() == losses[1].keys() >= {"objectness", "rpn_box", "classes", "box"}
    for name, loss in losses[0].items():
        assert torch.allclose(loss, losses[1][name], rtol=1e-5), name
        assert float(loss.detach()) > 0, name

    stage = run.joint_stage
    assert stage.rate_factors == {"detector.backbone.": 0.1}
    before = {name: value.detach().clone() for name, value in imported.named_parameters()}
    build_optimiser(imported, stage).step()
    theirs = dict(released.named_parameters())
    for name, value in imported.named_parameters():
        gradient, expected = theirs[name].grad, theirs[name].detach()
        assert (value.grad is None) == (gradient is None)
        if gradient is not None:
            # AdamW's first step: the decay, and the sign of the gradient, softened where it is tiny.
            rate = stage.learning_rate * (0.1 if name.startswith("detector.backbone.") else 1.0)
            expected = expected * (1 - rate * stage.weight_decay) - rate * gradient / (gradient.abs() + 1e-8)
            moved = (value - before[name]).abs().max()
            assert moved > 0.9 * rate or not gradient.any(), name
        assert torch.allclose(value, expected, rtol=1e-5, atol=stage.learning_rate * 1e-2), name


@pytest.mark.slow
@needs("parity/manifests/codet_boxsup_ovlvis_r50.json")
def test_detics_box_model_starts_the_published_config(tmp_path: Path) -> None:
    manifest = json.loads((parity_packs.PACKS / "manifests" / "codet_boxsup_ovlvis_r50.json").read_text())
    torch.manual_seed(0)
    state = {name: torch.rand(shape) for name, (shape, _) in manifest.items()}
    torch.save({"model": state}, tmp_path / "BoxSup.pth")
    count = 1203
    rows = [
        {"category_id": at, "name": str(at), "synonyms": [], "frequency": "f", "split": "base", "image_count": 1}
        for at in range(1, count + 1)
    ]
    part = tables.write_part(str(tmp_path), "categories", "lvis", "0.parquet", pa.Table.from_pylist(rows))
    tables.publish(str(tmp_path), "categories", "lvis", [part], producer="test", config_hash="")
    column = state["roi_heads.box_predictor.0.cls_score.detection_weight"]
    names = dataclasses.replace(
        NAMES,
        categories={at: str(at) for at in range(1, count + 1)},
        splits={str(at): "base" for at in range(1, count + 1)},
        vocabulary=Vocabulary(
            tuple(map(str, range(1, count + 1))), F.normalize(column.T[:-1], dim=1), torch.ones(count, dtype=torch.bool)
        ),
    )
    run = dataclasses.replace(codet_configs.lvis_r50(), storage=str(tmp_path), box_model=str(tmp_path / "BoxSup.pth"))
    found, weights = codet_inputs.initial_weights(codet_inputs.find_weights(run), names, "teacher")
    assert found.model.centernet2.freeze_norm
    theirs = "backbone.bottom_up.base.layer4.0.conv2.weight"
    assert torch.equal(weights["detector.pyramid.maps.trunk.layer4.0.conv2.weight"], state[theirs])
    CoDet(found.model).load_state_dict(weights)

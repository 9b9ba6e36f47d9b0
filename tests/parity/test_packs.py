"""Our models against numbers recorded from the released ones; `python benchmarks/parity.py` prints the differences."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import measure
import numpy as np
import parity
import parity_models
import pytest
import torch
from reference_data import PARITY, needs
from torch import Tensor
from torch.nn import functional as F

from benchmarks import manifests
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.importers.ovsam import account_ovsam_tensors
from ovd_models.losses import cosine_logits
from ovd_models.ovsam.model import RN50X16, OvSam, published
from ovd_models.vocabulary import Vocabulary

ALL = parity.find_packs()
FULL_SIZE = [path for path in ALL if (kind := parity.kind_of(path)) and kind.full_size]
OVSAM_MANIFESTS = sorted(path for path in PARITY.glob("manifests/ovsam_*.json") if not path.name.endswith(".meta.json"))


def beyond(path: Path) -> list[parity.Comparison]:
    rows = parity.compare_pack(path)
    assert rows
    return [row for row in rows if not row.within]


@pytest.mark.parametrize("path", [path for path in ALL if path not in FULL_SIZE], ids=parity.pack_name)
def test_small_packs_are_reproduced(path: Path) -> None:
    assert beyond(path) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL_SIZE, ids=parity.pack_name)
def test_full_size_models_are_reproduced(path: Path) -> None:
    assert beyond(path) == []


def test_a_difference_beyond_the_tolerance_is_noticed() -> None:
    pairs = [
        *[("near", 1.00005, 1.0), ("far", 1.001, 1.0), ("shape", torch.ones(2), torch.ones(3))],
        ("no number", torch.tensor([float("nan")]), torch.tensor([0.0])),
    ]
    assert [row.within for row in parity.compare(pairs, 1e-4, 1e-5)] == [True, False, False, False]


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def other_packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recordings with packs of other seeds and no others, which the command reads."""
    goldens = tmp_path / "goldens"
    for ours, theirs in {
        "codet/centernet_s7": "codet/centernet_s0",
        "codet/align_zs_s5": "codet/align_zs_s1",
        "codet/align_g4_N6_s5_guided_fed50": "codet/align_g4_N6_s1_guided_fed50",
        "ovsam/sam2clip_adapter_s9_448x448": "ovsam/sam2clip_adapter_s3_448x448",
        "sam/tiny_sam_s4": "sam/tiny_sam_s1",
    }.items():
        (goldens / ours).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PARITY / f"goldens/{theirs}.npz", goldens / f"{ours}.npz")
    monkeypatch.setattr(parity, "PACKS", tmp_path)
    monkeypatch.setattr(measure, "BENCH", tmp_path / "bench")
    monkeypatch.setattr(sys, "argv", ["parity.py"])
    return tmp_path


def figures_of(folder: Path) -> dict[str, Any]:
    """The figures that the command wrote."""
    figures: dict[str, Any] = json.loads((folder / "bench/parity.json").read_text())
    return figures


@needs("parity")
def test_packs_of_any_seed_are_found_by_their_names(other_packs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity.main()
    figures = figures_of(other_packs)
    assert (figures["packs"], figures["out_of_tolerance"]) == (4, 0)
    assert figures["quantities"] > 70
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"4 packs, {figures['quantities']} quantities, 0 out of tolerance"


@needs("parity")
def test_a_changed_number_and_a_foreign_pack_fail_the_command(
    other_packs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = other_packs / "goldens/codet/centernet_s7.npz"
    arrays = dict(np.load(changed))
    arrays["agn_l2"][0, 0, 0, 0] += 1
    np.savez(changed, **arrays)
    foreign = other_packs / "goldens/ovsam/sam2clip_adapter_s1_64x64.npz"
    for path in (foreign, other_packs / "goldens/codet/unheard_s0.npz"):
        np.savez(path, x=np.zeros(3))
    with pytest.raises(SystemExit) as ended:
        parity.main()
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert f"{foreign}: cannot be compared (KeyError" in text
    assert "unheard_s0.npz: cannot be compared (ValueError: its name is of no known kind)" in text
    assert text.endswith(" 1 out of tolerance\n")
    assert (figures_of(other_packs)["packs"], figures_of(other_packs)["out_of_tolerance"]) == (4, 1)


def record(path: Path, size: tuple[int, int]) -> None:
    """A pack of a whole LVIS detector, computed by our own."""
    names = parity_models.embedded("lvis_v1_clip_vitb32_a_name.npy")
    model = parity_models.filled_model(f"codet_{path.stem}", path.stem, size)
    detector = model.detector
    assert isinstance(detector, CenterNet2)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = detector.preprocess([image])
        features = detector.features(batch)
        proposals = detector.propose(batch, features)
        pack = {"image": image.permute(1, 2, 0), "hw": torch.tensor(size)}
        pack["preprocessed_stats"] = parity_models.statistics(batch.tensors)
        for level, values in enumerate(features.values(), start=8 - len(features)):
            pack[f"feat_p{level}_slice"] = parity_models.sampled(values, min(2048, values.numel()))
        pack |= {"prop_boxes": proposals.boxes[0], "prop_scores": proposals.scores[0]}
        for index, output in enumerate(detector.cascade(features, proposals.boxes, batch.image_sizes)):
            logits = F.pad(cosine_logits(output.embeddings, names, 50.0), (0, 1))
            pack[f"stage{index}_logits_slice"] = parity_models.sampled(logits, 8192)
            pack[f"stage{index}_logits_stats"] = parity_models.statistics(logits)
            pack[f"stage{index}_deltas"] = output.deltas
            pack[f"stage{index}_boxes"] = detector.stages[index].refined(output)[0]
        vocabulary = Vocabulary(tuple(map(str, range(len(names)))), names)
        (found,) = model.detect([image], vocabulary, score_threshold=0.02, max_detections=300)
        masks = detector.mask_logits(features, [found.boxes]).sigmoid()
        areas = parity_models.paste_masks(masks, found.boxes * 2, 2 * size[0], 2 * size[1]).sum((1, 2))
    pack |= {"det_classes": found.labels, "det_boxes": found.boxes, "det_scores": found.scores}
    pack |= {"post_boxes": found.boxes * 2, "post_mask_area": areas}
    pack |= {"det_masks_slice": masks[:64], "det_masks_stats": parity_models.statistics(masks)}
    np.savez(path, **{name: value.numpy() for name, value in pack.items()})


@needs("parity", "data/lvis")
@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "levels"), [("swinb", 5), ("eva", 6)])
def test_packs_of_other_backbones_are_compared(backbone: str, levels: int, tmp_path: Path) -> None:
    path = tmp_path / f"codet_full/ovlvis_{backbone}.npz"
    path.parent.mkdir()
    record(path, (96, 128))
    rows = parity.compare_pack(path)
    assert [row for row in rows if not row.within] == []
    assert len([row for row in rows if row.quantity in ("p2", "p3", "p4", "p5", "p6", "p7")]) == levels
    assert len(rows) == 24 + levels


def record_captions(path: Path, table: Tensor, size: tuple[int, int]) -> None:
    """A pack of OV-COCO's caption step: our features, and everything after them written out image by image."""
    whole, count = "ovcoco_r50c4", 32
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, *size, 3), dtype=torch.uint8, generator=generator)
    captions = torch.randn(4, 512, generator=generator)
    model = parity_models.filled_model(f"codet_{whole}", whole, size).train()
    detector, mlp = model.detector, model.aggregations[0]
    batch = detector.preprocess(list(images.permute(0, 3, 1, 2).flip(1)))
    features = detector.features(batch)
    boxes = [entry[:count] for entry in detector.propose(batch, features).boxes]
    whole_image = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    given = [torch.cat((entry, whole_image)) for entry in boxes]
    rows = detector.projection(detector.region_features(features, given)).view(4, count + 1, -1)
    pack = {"images": images, "g": torch.tensor(2), "caption_feats": captions}
    pack["labels"] = torch.tensor([[5, 10], [5, 20], [100, 101], [101, 7]])
    pack |= {f"top_boxes_{image}": entry for image, entry in enumerate(given)}
    weights, prototypes, region, caption = [], [], [], []
    for image, concept in enumerate((5, 5, 101, 101)):
        other = image ^ 1
        own, theirs = (F.normalize(rows[index, :count], dim=1) for index in (image, other))
        guidance = table[concept].abs() * 512 / table[concept].abs().sum()
        similarity = (own * guidance) @ theirs.T
        weights.append(mlp.score(mlp.hidden(similarity).relu())[:, 0].softmax(0))
        prototypes.append(weights[-1] @ rows[image, :count])
        cosines = table @ prototypes[-1] / prototypes[-1].norm()
        terms = [F.softplus(-50 * cosine if row == concept else 50 * cosine) for row, cosine in enumerate(cosines)]
        region.append(torch.stack(terms).sum() + np.log(2))
        terms = []
        for row, sentence in enumerate(captions):
            logit = 50 * F.cosine_similarity(rows[image, -1], sentence, dim=0)
            terms.append(F.softplus(-logit) if row == image else 0.125 * F.softplus(logit))
        caption.append(torch.stack(terms).sum())
    pack |= {"st0_weights": torch.stack(weights), "st0_prototype": torch.stack(prototypes)}
    pack |= {"st0_region_loss": torch.stack(region), "st0_caption_loss": torch.stack(caption)}
    pack["loss:image_loss"] = 0.1 * (torch.stack(region).mean() + torch.stack(caption).mean())
    pack["loss:image_loss"].backward()
    release = parity_models.manifest_release(f"codet_{whole}")
    for name in (
        "detector.backbone.layer3.5.conv3.weight",
        "detector.projection.weight",
        "aggregations.0.hidden.weight",
    ):
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        (theirs_name,) = parity_models.released_names(name, release)
        both = parity_models.statistics(gradient), parity_models.sampled(gradient, 64)
        pack[f"grad:{theirs_name}"] = torch.cat(both)
    np.savez(path, **{name: value.detach().numpy() for name, value in pack.items()})


@needs("parity", "data/lvis")
@pytest.mark.slow
def test_the_caption_step_of_ovcoco_is_compared_to_its_gradients_with_the_table_of_concepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = F.normalize(torch.randn(120, 512, generator=torch.Generator().manual_seed(1)), dim=1)
    monkeypatch.setattr(parity_models, "coco_concepts", lambda: table)
    path = tmp_path / "codet_full/caption_ovcoco_r50c4.npz"
    path.parent.mkdir()
    record_captions(path, table, (97, 131))  # windows and strides divide neither
    rows = parity.compare_pack(path)
    assert [row for row in rows if not row.within] == []
    found = {row.quantity for row in rows}
    assert found >= {
        "region loss",
        "caption loss",
        "attention",
        "prototypes",
        "loss",
        "gradient backbone.res4.5.conv3.weight",
    }
    assert len([name for name in found if name.startswith("gradient ")]) == 3
    arrays = dict(np.load(path))
    arrays["grad:roi_heads.box_predictor.fc1.weight"][10] += arrays["grad:roi_heads.box_predictor.fc1.weight"][4]
    arrays["st0_region_loss"][1] *= 1.01
    np.savez(path, **arrays)
    wrong = [row.quantity for row in parity.compare_pack(path) if not row.within]
    assert wrong == ["region loss", "gradient roi_heads.box_predictor.fc1.weight"]


# --------------------------------------------------------------------------------------------------- manifests


@needs("parity")
def test_every_released_tensor_is_used_or_ignored_for_a_reason() -> None:
    found = manifests.accounts()
    assert len([name for name in found if name.startswith("codet_")]) >= 5
    for account in found.values():
        assert (account.unaccounted, account.missing) == ((), ())
        assert all(account.ignored.values())


@pytest.mark.parametrize("path", OVSAM_MANIFESTS, ids=lambda path: path.stem)
def test_every_published_ovsam_tensor_has_its_place(path: Path) -> None:
    manifest: dict[str, Any] = json.loads(path.read_text())
    found = account_ovsam_tensors(manifest)
    assert found.unaccounted == ()
    assert len(found.used) + len(found.ignored) == len(manifest)
    assert {name for name in found.ignored if "label_mlp" not in name} == set()
    with torch.device("meta"):
        ours = OvSam(published(RN50X16)).state_dict()
    for name, our in found.used.items():
        assert list(ours[our].shape) == manifest[name][0], (name, our)
    if "sam2clip" not in path.name:
        assert set(found.used.values()) == set(ours)

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ovsam_release import published_form
from PIL import Image
from reference_data import needs

import ovd_models
from benchmarks import parity_models, parity_packs
from ovd_models import load_segmenter
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, save_clip
from ovd_models.codet.model import CoDet
from ovd_models.errors import InputError
from ovd_models.importers import codet as importers
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.segments import Prompts
from workflows import import_weights
from workflows.import_weights import OvSamRun, Run


@pytest.fixture
def lvis(tmp_path: Path) -> Path:
    path = tmp_path / "lvis.json"
    categories = [{"id": 2, "name": "tennis_ball", "frequency": "r"}, {"id": 1, "name": "Anchor", "frequency": "f"}]
    path.write_text(json.dumps({"categories": categories}))
    return path


def test_names_are_sorted_by_id_and_rare_ones_are_novel(lvis: Path, tmp_path: Path) -> None:
    assert import_weights.read_released_names(str(lvis)) == {"anchor": "base", "tennis ball": "novel"}
    assert list(import_weights.read_released_names(str(lvis))) == ["anchor", "tennis ball"]
    assert import_weights.read_released_names("") == {}
    (tmp_path / "broken.json").write_text('{"categories": [{}]}')
    for path in ("broken.json", "missing.txt"):
        with pytest.raises(InputError, match=path):
            import_weights.read_released_names(str(tmp_path / path))


def test_coco_names_are_split_and_unknown_names_are_novel(tmp_path: Path) -> None:
    coco = [{"id": 9, "name": "traffic light"}, {"id": 2, "name": "car"}, {"id": 1, "name": "dog"}]
    (tmp_path / "coco.json").write_text(json.dumps({"categories": coco}))
    found = import_weights.read_released_names(str(tmp_path / "coco.json"))
    assert list(found.items()) == [("dog", "novel"), ("car", "base"), ("traffic light", "")]
    for text, expected in (
        ("dog\n\n car \n", {"dog": "novel", "car": "base"}),
        ("dog\ngryphon\ncar", dict.fromkeys(("dog", "gryphon", "car"), "novel")),
    ):
        (tmp_path / "names.txt").write_text(text)
        assert import_weights.read_released_names(str(tmp_path / "names.txt")) == expected


def test_missing_flags_and_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--weights"):
        import_weights.convert_detector(Run(out="folder"))
    with pytest.raises(InputError, match="--out"):
        import_weights.convert_detector(Run(weights="file.pth"))
    with pytest.raises(InputError, match=r"absent\.pth"):
        import_weights.convert_detector(Run(weights=str(tmp_path / "absent.pth"), out=str(tmp_path / "out")))


def test_a_given_table_takes_precedence_over_the_files_own(lvis: Path, tmp_path: Path) -> None:
    names, rows = tuple(import_weights.read_released_names(str(lvis))), np.eye(2, 512, dtype=np.float16)
    np.save(tmp_path / "rows.npy", rows)
    own = torch.eye(2, 512).flip(0)
    imported = importers.ImportedDetector(CoDet.__new__(CoDet), None, own)
    given = import_weights.choose_encoder(Run(table=str(tmp_path / "rows.npy")), imported, names)
    assert torch.equal(given.embed_names(["anchor"])[0], torch.eye(2, 512)[0])
    inside = import_weights.choose_encoder(Run(weights="file.pth"), imported, names)
    assert torch.equal(inside.embed_names(["anchor"])[0], own[0])
    with pytest.raises(InputError, match="one row for each of 1"):
        import_weights.choose_encoder(Run(weights="file.pth"), imported, names[:1])
    nothing = importers.ImportedDetector(CoDet.__new__(CoDet), None, None)
    with pytest.raises(InputError, match="no text encoder"):
        import_weights.choose_encoder(Run(weights="file.pth"), nothing, names)


@pytest.mark.slow
@needs("parity")
@pytest.mark.parametrize("text", [True, False])
def test_an_imported_detector_gives_the_released_detections(text: bool, tmp_path: Path) -> None:
    entries = json.loads((parity_packs.PACKS / "manifests" / "codet_ovcoco_r50c4.json").read_text())
    table = parity_models.embedded("coco_clip_vitb32_a_name.npy")
    state = {
        name: parity_models.filled(name, shape, "ovcoco_r50c4")
        for name, (shape, _) in entries.items()
        if not name.endswith(("zs_weight", "detection_weight")) and (text or not name.startswith("text_encoder"))
    }
    state["roi_heads.box_predictor.cls_score.detection_weight"] = torch.nn.functional.pad(table.T, (0, 1))
    torch.save({"model": state, "iteration": 89999}, tmp_path / "released.pth")
    (tmp_path / "names.txt").write_text("\n".join(f"name {index}" for index in range(80)))
    run = Run(weights=str(tmp_path / "released.pth"), out=str(tmp_path / "ours"), names=str(tmp_path / "names.txt"))
    import_weights.convert_detector(run)
    detector = ovd_models.load(run.out)
    pack = parity_packs.read("codet_full/ovcoco_r50c4")
    image = pack["image"].flip(2).numpy()
    if text:
        found = detector.detect(image, ["unknown name", "anchor"], score_threshold=0.0)
        assert found.names == ("unknown name", "anchor")
        assert len(found) > 0
        return
    config = detector.model.detector.transform
    config.min_size, config.max_size = (224,), 288  # the recorded image was not resized
    found = detector.detect(image, max_detections=100)
    assert torch.allclose(found.scores, pack["det_scores"], atol=1e-4)
    assert torch.allclose(found.boxes, pack["det_boxes"], atol=1e-2)
    assert torch.equal(found.labels, pack["det_classes"])


def test_an_imported_ovsam_segments_and_names(lvis: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
    clip = Clip(ClipConfig(vision=vision)).eval()
    save_clip(clip, tmp_path / "clip")
    sam = SamModel(
        SamConfig(
            image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32
        )
    )
    torch.save(sam.sam.state_dict(), tmp_path / "sam.pth")
    config = clip.config
    source = OvSam(published(TowerConfig(embed_dim=config.embed_dim, vision=vision), sam.config))
    released = published_form(source)
    parts = {"adapter.pth": ("neck.",), "head.pth": ("mask_decoder.", "fpn_neck.")}
    for name, prefixes in parts.items():
        torch.save(
            {"state_dict": {key: released[key] for key in released if key.startswith(prefixes)}}, tmp_path / name
        )
    run = OvSamRun(
        clip=str(tmp_path / "clip"),
        pretrained="",
        sam=str(tmp_path / "sam.pth"),
        sam_model=sam.config,
        adapter=str(tmp_path / "adapter.pth"),
        head=str(tmp_path / "head.pth"),
        out=str(tmp_path / "out"),
        names=str(lvis),
    )
    import_weights.convert_ovsam(run)
    segmenter = load_segmenter(run.out)
    state = segmenter.model.state_dict()
    for name, value in source.state_dict().items():
        if name.startswith(("adapter.", "mask_decoder.", "namer.", "label_token.")):
            assert torch.equal(state[name], value), name
    assert torch.equal(state["clip.tower.conv1.weight"], clip.model.visual.state_dict()["conv1.weight"])
    found = segmenter.segment(Image.new("RGB", (64, 48)), Prompts.create(boxes=[[4, 4, 30, 30]]), ["anchor", "cup"])
    assert found.masks.shape == (1, 48, 64)
    assert found.names == ("anchor", "cup")
    assert segmenter.names().is_base.tolist() == [True, False]
    assert segmenter.names(["cup", " anchor "]).is_base.tolist() == [False, True]
    assert segmenter.names(["cup", "kite"]).is_base is None  # the split is unknown
    released = ClipTextEncoder(dataclasses.replace(config, prompt_set="ovsam"), clip.model.text, "any")
    assert torch.allclose(segmenter.names(["cup"]).embeddings, released.embed_names(["cup"]), atol=1e-5)
    torch.save({name: value for name, value in sam.sam.state_dict().items() if "image_encoder" not in name}, run.sam)
    with pytest.raises(InputError, match=r"sam\.pth: tensor .* expected those of a whole SAM"):
        import_weights.convert_ovsam(run)
    torch.save(sam.sam.state_dict(), run.sam)
    with pytest.raises(InputError, match="Missing"):
        import_weights.convert_ovsam(dataclasses.replace(run, head=""))
    with pytest.raises(InputError, match="--out: missing"):
        import_weights.convert_ovsam(dataclasses.replace(run, out=""))

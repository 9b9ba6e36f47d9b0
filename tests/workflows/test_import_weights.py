import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from open_clip.model import CLIP, convert_to_custom_text_state_dict
from ovsam_release import published_form
from PIL import Image
from reference_data import needs
from safetensors.torch import save_file

import ovd_models
from benchmarks import parity_models, parity_packs
from ovd_models import load_segmenter
from ovd_models.checkpoint_info import read_source
from ovd_models.checkpoints import load_model, sam_id
from ovd_models.clip.model import Clip, ClipConfig, ClipTextEncoder, load_clip, save_clip
from ovd_models.errors import InputError
from ovd_models.importers import sam as sam_importer
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.segments import Prompts
from workflows import import_weights
from workflows.common import runs
from workflows.common.teacher import find_teacher
from workflows.configs import codet as codet_configs
from workflows.import_weights import Run

SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NAME = "ViT-small-to-import"


def add_architecture(folder: Path, name: str, config: dict[str, object]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")


@pytest.fixture(autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip knows an architecture of 1.6 million parameters."""
    add_architecture(tmp_path_factory.mktemp("configs"), NAME, SMALL)
    yield
    open_clip.factory._MODEL_CONFIGS.pop(NAME)


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
    for uri in (lvis.as_uri(), f"{lvis.as_uri()}?region=eu"):
        assert import_weights.read_released_names(uri) == import_weights.read_released_names(str(lvis))
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


def test_a_repeated_name_is_refused_since_rows_would_move(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("dog\ncar\ndog\n")
    with pytest.raises(InputError, match=r"names\.txt: 'dog' is there twice"):
        import_weights.read_released_names(str(tmp_path / "names.txt"))


def convert(*files: Path, **flags: object) -> None:
    import_weights.convert(Run(weights=tuple(map(str, files)), **flags))  # type: ignore[arg-type]


def small_clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(SMALL["embed_dim"], SMALL["vision_cfg"], SMALL["text_cfg"]).eval()


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An open_clip state dict under the names of HF transformers' `CLIPModel`."""
    towers = {"visual.": "vision_model.", "": "text_model."}
    found = {"logit_scale": state["logit_scale"], "text_model.embeddings.position_ids": torch.arange(16)[None]}
    for name, value in state.items():
        tower = "visual." if name.startswith("visual.") else ""
        bare, theirs = name.removeprefix(tower), towers[tower]
        fixed = {
            "class_embedding": "embeddings.class_embedding",
            "conv1.weight": "embeddings.patch_embedding.weight",
            "token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_pre.weight": "pre_layrnorm.weight",
            "ln_pre.bias": "pre_layrnorm.bias",
            "ln_post.weight": "post_layernorm.weight",
            "ln_post.bias": "post_layernorm.bias",
            "ln_final.weight": "final_layer_norm.weight",
            "ln_final.bias": "final_layer_norm.bias",
        }
        if bare in fixed:
            found[theirs + fixed[bare]] = value
        elif bare in ("proj", "text_projection"):
            found["visual_projection.weight" if tower else "text_projection.weight"] = value.T.contiguous()
        elif bare.startswith("transformer.resblocks."):
            number, rest = bare.removeprefix("transformer.resblocks.").split(".", 1)
            layer = f"{theirs}encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{layer}self_attn.{letter}_proj.{kind}"] = part.clone()
            else:
                for ours, other in (("attn.", "self_attn."), ("ln_", "layer_norm"), ("c_fc", "fc1"), ("c_proj", "fc2")):
                    rest = rest.replace(ours, other)
                found[layer + rest] = value
    return found


@pytest.mark.parametrize("layout", ["open_clip", "towers", "transformers"])
def test_a_clip_of_any_layout_becomes_a_teacher(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = small_clip()
    state = peer.state_dict()
    written = {
        "open_clip": state,
        "towers": convert_to_custom_text_state_dict(dict(state)),
        "transformers": as_transformers(state),
    }[layout]
    save_file({name: value.contiguous() for name, value in written.items()}, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", out=str(tmp_path / "clip"))
    assert f"CLIP {NAME}" in capsys.readouterr().out
    model, teacher = load_clip(tmp_path / "clip")
    tokens, pixels = model.tokenize(["a cat"]), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.encode_tokens(tokens), peer.encode_text(tokens, normalize=True), atol=1e-5)
        assert torch.allclose(model.model.visual(pixels), peer.visual(pixels), atol=1e-5)
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert read_source(tmp_path / "clip") == f"model.safetensors sha256:{digest}"
    assert find_teacher("store", "photos", data="", teacher=str(tmp_path / "clip")) == str(tmp_path / "clip")
    assert teacher.startswith("clip:")
    run = dataclasses.replace(codet_configs.smoke(), teacher=str(tmp_path / "clip"))
    assert runs.released_source(run) == f"teacher model.safetensors sha256:{digest}"
    run = dataclasses.replace(run, teacher="", backbone_weights=str(tmp_path / "model.safetensors"))
    assert runs.released_source(run) == f"backbone_weights model.safetensors sha256:{digest}"
    assert runs.released_source(codet_configs.smoke()) == ""


def test_an_architecture_is_asked_for_if_several_fit(tmp_path: Path) -> None:
    add_architecture(tmp_path, f"{NAME}-quickgelu", {**SMALL, "quick_gelu": True})
    torch.save(small_clip().state_dict(), tmp_path / "a.pt")
    try:
        with pytest.raises(InputError, match=rf"--clip with one of {NAME}, {NAME}-quickgelu"):
            convert(tmp_path / "a.pt", out=str(tmp_path / "out"))
        convert(tmp_path / "a.pt", out=str(tmp_path / "out"), clip=f"{NAME}-quickgelu")
        assert load_clip(tmp_path / "out")[0].config.quick_gelu
        with pytest.raises(InputError, match="--clip RN50: not the architecture"):
            convert(tmp_path / "a.pt", dry_run=True, clip="RN50")
    finally:
        open_clip.factory._MODEL_CONFIGS.pop(f"{NAME}-quickgelu")


def test_a_sam_becomes_a_folder_that_ovsam_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sam = SamModel(SamConfig())
    torch.save(sam.sam.state_dict(), tmp_path / "sam.pth")
    with pytest.raises(InputError, match=r"shape \[1, 16, 16, 128\], expected one of SAM ViT-B, SAM ViT-L, SAM ViT-H"):
        convert(tmp_path / "sam.pth", out=str(tmp_path / "out"))
    monkeypatch.setattr(sam_importer, "PUBLISHED", {"SAM tiny": SamConfig()})
    convert(tmp_path / "sam.pth", dry_run=True)
    assert f"{len(sam.sam.state_dict())} tensors used, 0 ignored\nSAM tiny" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "sam.pth", out=str(tmp_path / "out"))
    assert sam_id(load_model(tmp_path / "out", SamModel)) == sam_id(sam)
    state = sam.sam.state_dict()
    for changed, message in (
        ({**state, "extra.weight": torch.zeros(2)}, "1 tensors are no part of the model, such as extra.weight"),
        ({k: v for k, v in state.items() if "iou_token" not in k}, "1 weights of the model are missing"),
    ):
        torch.save(changed, tmp_path / "sam.pth")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / "sam.pth", dry_run=True)


def test_backbones_and_tables_are_told_their_flags(
    lvis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "backbone.pth")
    convert(tmp_path / "backbone.pth")
    out = capsys.readouterr().out
    assert "100 tensors used, 22 ignored" in out
    assert f"backbone resnet18; a training takes the file as it is: --backbone-weights {tmp_path}" in out
    np.save(tmp_path / "clip_synonym_prompt.npy", np.eye(512, 2, dtype=np.float32))  # ViLD's form: a column a name
    convert(tmp_path / "clip_synonym_prompt.npy", names=str(lvis))
    assert "2 embedded names of width 512; a training takes the file as it is: --texts" in capsys.readouterr().out
    for file in ("backbone.pth", "clip_synonym_prompt.npy"):
        names = str(lvis) if file.endswith(".npy") else ""
        with pytest.raises(InputError, match="no model by itself"):
            convert(tmp_path / file, out=str(tmp_path / "out"), names=names)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_writes_nothing(lvis: Path, tmp_path: Path) -> None:
    good = tmp_path / "a.pt"
    torch.save(small_clip().state_dict(), good)
    half = tmp_path / "half.pt"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    renamed = tmp_path / "resnet50-0676ba61.pth"
    renamed.write_bytes(good.read_bytes())
    torch.save({"encoder.layers.0.weight": torch.zeros(3, 5), "b": torch.zeros(2)}, tmp_path / "foreign.pth")
    table, nested, huge = tmp_path / "rows.npy", tmp_path / "nested.json", tmp_path / "huge.npy"
    np.save(table, np.eye(3, 8))
    nested.write_text("[" * 100_000)
    huge.write_bytes(table.read_bytes().replace(b"(3, 8), }" + b" " * 10, b"(3000000000, 8), }" + b" " * 1))
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    out = str(tmp_path / "out")
    for files, flags, message in (
        ([], {}, "--weights: missing"),
        ([good], {}, "--out: missing"),
        ([tmp_path / "absent.pth"], {"out": out}, "absent.pth': cannot be read"),
        ([Path("nul\0.pth")], {"out": out}, "cannot be read"),
        ([half], {"out": out}, "half.pt: cannot be read safely"),
        ([renamed], {"out": out}, "published 0676ba61"),
        ([tmp_path / "foreign.pth"], {"out": out}, r"its 2 tensors are like encoder.layers.0.weight \[3, 5\]"),
        ([table], {"names": str(lvis)}, r"shape \[3, 8\], expected one row for each of 2"),
        ([good, good], {"out": out}, "expected one file, or the files of one OV-SAM"),
        ([good], {"out": out, "names": str(lvis)}, "is a clip, expected a detector or no names"),
        ([good], {"out": str(tmp_path / "full")}, "exists, expected a new or an empty folder"),
        ([good], {"out": str(good)}, "exists, expected a new or an empty folder"),
        ([good], {"out": "s3://bucket/clip"}, "expected a folder of this machine"),
        ([good], {"out": "nul\0"}, "expected a folder of this machine"),
        ([good], {"out": "long" * 100}, "no folder can be made there"),
        ([good], {"out": str(tmp_path / "file/out")}, "file is a file, expected a folder"),
        ([table], {"names": "nul\0"}, "no names"),
        ([table], {"names": str(nested)}, "nested.json: no names"),
        ([table], {"names": str(tmp_path)}, "no names"),
        ([huge], {"names": str(lvis)}, "huge.npy: cannot be read"),
        ([Path("nul\0.npy")], {"names": str(lvis)}, "cannot be read"),
        ([tmp_path], {"out": out}, "cannot be read"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            convert(*files, **flags)
        assert "\n" not in str(caught.value)
    assert not Path(out).exists()
    assert not list(tmp_path.glob(".*"))


def test_the_list_names_every_file_with_its_digest(capsys: pytest.CaptureFixture[str]) -> None:
    import_weights.print_list()
    listed = capsys.readouterr().out
    for text in ("CoDet_OVLVIS_EVA_4x.pth", "sam_vit_h_4b8939.pth", "RN50x16.pt", "resnet50-0676ba61.pth"):
        assert f"{text}\n" in listed
    digest = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    assert f"clip, sha256 {digest}, https://openaipublic" in listed


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
    ours, names = str(tmp_path / "ours"), tmp_path / "names.txt"
    if not text:
        names.write_text("only one")
        with pytest.raises(InputError, match="one row for each of 1"):
            convert(tmp_path / "released.pth", out=ours, names=str(names))
        names.write_text("\n".join(f"name {index}" for index in range(80)))
    convert(tmp_path / "released.pth", out=ours, names=str(names))
    detector = ovd_models.load(ours)
    pack = parity_packs.read(parity_packs.PACKS / "goldens/codet_full/ovcoco_r50c4.npz")
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


def test_an_imported_ovsam_segments_and_names(lvis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(sam_importer, "PUBLISHED", {"SAM tiny": sam.config})
    files = [tmp_path / name for name in ("adapter.pth", "head.pth", "sam.pth")]
    flags = {"clip": str(tmp_path / "clip"), "names": str(lvis)}
    convert(*files, out=str(tmp_path / "out"), **flags)
    segmenter = load_segmenter(tmp_path / "out")
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
    for wrong, message in (
        (files[::2], "Missing"),
        ([*files, tmp_path / "sam.safetensors"], "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            convert(*wrong, dry_run=True, **flags)
    with pytest.raises(InputError, match="no CLIP with both towers, expected its file too"):
        convert(*files, dry_run=True)

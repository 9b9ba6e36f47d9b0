import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import object_storage
import pytest
import timm
import torch
import torchvision

from data_prep import storage
from data_prep.embeddings.texts import read_matrix
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.errors import InputError
from ovd_models.importers.backbones import read_backbone
from workflows.common.starting_weights import (
    PublishedBackbone,
    check_file,
    check_given,
    digest_of,
    find_backbone,
    find_published,
)
from workflows.configs import codet, vild
from workflows.configs.detectors import EVA02_L, MIIL_RESNET50, RESNET50, RESNET152, SWIN_B

Find = Callable[..., str]


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of torch hub and Hugging Face; the folder of the first."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def find(
    published: PublishedBackbone, given: str = "auto", backbone: str = "resnet50", *, from_scratch: bool = False
) -> str:
    return find_backbone("name", given, published, backbone, from_scratch=from_scratch)


def test_an_earlier_download_is_used_and_said(caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_published(MIIL_RESNET50) == ""
    file = caches / MIIL_RESNET50.file
    file.touch()
    assert find(MIIL_RESNET50) == str(file)
    assert capsys.readouterr().out == f"backbone: {file} (ImageNet-21k)\n"
    assert find(MIIL_RESNET50, from_scratch=True) == ""


def test_half_a_download_is_refused(caches: Path) -> None:
    half = caches / RESNET50.file
    half.write_bytes(b"half")
    with pytest.raises(InputError, match=r"resnet50-0676ba61.pth: sha256 \w+, published 0676ba61...; expected the"):
        find(RESNET50)
    with pytest.raises(InputError, match=r"resnet50-0676ba61.pth: sha256"):
        check_given("", str(half), "")
    sam = caches / "sam_vit_b_01ec64.pth"
    sam.write_bytes(b"half")
    with pytest.raises(InputError, match=r"sam_vit_b_01ec64.pth: md5 \w+, published 01ec64...; expected the whole"):
        check_file("--sam", str(sam))


def test_a_copy_that_timm_downloaded_is_used(caches: Path) -> None:
    repository = caches.parent / "hub" / "models--timm--swin_base_patch4_window7_224.ms_in22k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    file = repository / "snapshots" / "abc" / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert find(SWIN_B, backbone="swin") == str(file)
    assert find_published(EVA02_L) == ""


def test_random_weights_are_said_with_the_file_that_would_replace_them(
    caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find(RESNET50) == ""
    assert capsys.readouterr().out == (
        "backbone: random weights; resnet50-0676ba61.pth from "
        "https://download.pytorch.org/models/resnet50-0676ba61.pth gives ImageNet's "
        "(docs/weights.md)\n"
    )
    (caches / "resnet50-0676ba61.pth").touch()
    assert find(RESNET50, backbone="resnet18") == ""  # the file is not one for it
    assert capsys.readouterr().out == "backbone: random weights\n"
    assert find(PublishedBackbone()) == find(RESNET50, from_scratch=True) == ""  # nothing to choose, or chosen
    assert capsys.readouterr().out == ""


def test_what_a_config_needs_it_asks_for_in_one_line(caches: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        find(MIIL_RESNET50)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"--config name: the backbone starts from resnet50_miil_21k.pth ({MIIL_RESNET50.url})")
    assert f"--box-model FILE (such as {MIIL_RESNET50.box_model_url}) or --from-scratch" in line
    assert find(MIIL_RESNET50, from_scratch=True) == ""
    given = tmp_path / "own.pth"
    with pytest.raises(InputError, match=r"own.pth: no such file"):
        find(MIIL_RESNET50, str(given))
    given.touch()
    assert find(MIIL_RESNET50, str(given)) == str(given)
    with pytest.raises(InputError, match=r"--from-scratch: contradicts --backbone-weights .*own.pth"):
        find(MIIL_RESNET50, str(given), from_scratch=True)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"1")
    assert digest_of(str(one)) == digest_of(str(two)) != digest_of("auto") == "random"


def test_published_files_are_where_torchvision_and_timm_say() -> None:
    models = torchvision.models
    assert RESNET50.url == models.ResNet50_Weights.IMAGENET1K_V1.url
    assert RESNET152.url == models.ResNet152_Weights.IMAGENET1K_V1.url
    for published in (RESNET50, RESNET152, SWIN_B):
        recorded = timm.get_pretrained_cfg(published.timm_name)
        assert recorded is not None
        assert recorded.url == published.url
    assert timm.get_pretrained_cfg(EVA02_L.timm_name) is not None


def test_configs_of_published_results_need_their_weights_and_short_ones_do_not() -> None:
    needed = {name: make().published_backbone for name, make in codet.CONFIGS.items()}
    assert {name: published.file for name, published in needed.items() if published.required} == {
        "coco_r50": "R-50.pkl",
        "lvis_r50": "resnet50_miil_21k.pth",
        "lvis_swin_b": "swin_base_patch4_window7_224_22k.pth",
        "lvis_eva": "eva02_L_pt_m38m_p14to16.pt",
    }
    runs = {name: make() for name, make in vild.CONFIGS.items()}
    assert not any(run.published_backbone.required for run in runs.values())
    assert {name for name, run in runs.items() if run.from_scratch} == {"coco_48_17", "lvis_r50", "lvis_r152"}
    assert {name: run.published_backbone.file for name, run in runs.items() if run.published_backbone.url} == {
        "photos": "resnet50-0676ba61.pth",
        "photos_laptop": "resnet50-0676ba61.pth",
        "photos_gpu": "resnet50-0676ba61.pth",
        "photos_8gpu": "resnet50-0676ba61.pth",
        "coco_48_17_short": "resnet50-0676ba61.pth",
        "lvis_r50_short": "resnet50-0676ba61.pth",
        "lvis_r152_short": "resnet152-394f9c45.pth",
    }
    for run in runs.values():  # batch norm is frozen where weights are expected
        assert run.model.detector.freeze_norm == bool(run.published_backbone.url)
        assert run.published_backbone.backbone in ("", run.model.detector.backbone)


def test_files_to_start_from_may_lie_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    np.save(tmp_path / "names.npy", np.eye(2, dtype=np.float32))
    with object_storage.s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        folder = "s3://bucket/weights"
        storage.upload_folder(tmp_path, folder)
        check_given(f"{folder}/names.npy", f"{folder}/resnet18.pth", "")
        assert find(RESNET50, f"{folder}/resnet18.pth") == f"{folder}/resnet18.pth"
        assert digest_of(f"{folder}/resnet18.pth") == digest_of(str(tmp_path / "resnet18.pth"))
        config = RCNNConfig(backbone="resnet18", backbone_options={})
        assert read_backbone(storage.local_file(f"{folder}/resnet18.pth"), config).state
        assert read_matrix(f"{folder}/names.npy", ("a", "b")).embeddings.tolist() == [[1, 0], [0, 1]]
        with pytest.raises(InputError, match=r"--backbone-weights s3://bucket/weights/gone\.pth: no such file"):
            check_given("", f"{folder}/gone.pth", "")

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck, ResNet

from ovd_models.detectors.c4 import C4, coco_r50_c4
from ovd_models.detectors.centernet import CenterNetConfig
from ovd_models.detectors.centernet2 import CenterNet2, CenterNet2Config
from ovd_models.detectors.eva import EvaConfig
from ovd_models.detectors.rcnn import RCNN, ProposalNetwork, RCNNConfig
from ovd_models.detectors.resizing import IMAGENET_MEAN, IMAGENET_STD
from ovd_models.errors import InputError
from ovd_models.importers.backbones import fit_config, load_backbone, read_backbone

State = dict[str, Tensor]
HEIGHT, WIDTH = 75, 109  # no multiple of any stride
SIZES = {"min_size": HEIGHT, "max_size": WIDTH, "freeze_norm": True}
SHORT: dict[str, Any] = {"layers": [1, 2, 1, 2]}
PYRAMID = RCNNConfig(
    backbone="resnet26", backbone_options=SHORT, strides=(4, 8, 16, 32), anchor_sizes=(16, 32, 64, 128), **SIZES
)
FOURTH = dataclasses.replace(coco_r50_c4(), backbone="resnet26", backbone_options=SHORT, **SIZES)
CENTRES = CenterNet2Config(
    backbone="resnet26",
    backbone_options=SHORT,
    pyramid_channels=32,
    proposals=CenterNetConfig(num_convs=0),
    head_width=16,
    mask_convs=0,
    **SIZES,
)


def picture(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """[1, 3, H, W] as a classifier takes it."""
    return ((image / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def randomise(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with statistics and scales that are not those of a new one."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model.eval()


def resnet() -> ResNet:
    """torchvision's ResNet with the detectors' depth."""
    model = randomise(ResNet(Bottleneck, SHORT["layers"]))
    assert isinstance(model, ResNet)
    return model


def resnet_maps(model: ResNet, x: Tensor) -> list[Tensor]:
    x, maps = model.maxpool(model.relu(model.bn1(model.conv1(x)))), []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def equal(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, where the expected map has values."""
    height, width = expected.shape[-2:]
    scale = float(expected.abs().max())
    return float((found[..., :height, :width] - expected).abs().max()) < 1e-4 * scale


def detector_of(
    path: Path, config: RCNNConfig | CenterNet2Config, kind: Callable[[Any], Any]
) -> ProposalNetwork | CenterNet2:
    """A new detector with the file's weights in its backbone."""
    weights = read_backbone(path, config)
    detector = kind(fit_config(config, weights)).eval()
    load_backbone(detector, weights)
    assert isinstance(detector, ProposalNetwork | CenterNet2)
    return detector


def maps_of(detector: ProposalNetwork | CenterNet2, image: Tensor) -> list[Tensor]:
    """The backbone's maps, those of C4's region head last."""
    pixels = detector.preprocess([image]).tensors
    if isinstance(detector, CenterNet2):
        return list(detector.pyramid.maps(pixels))  # type: ignore[operator, union-attr]
    maps = list(detector.backbone(pixels))
    return [*maps, detector.res5(maps[-1])] if isinstance(detector, C4) else maps


# ------------------------------------------------------------------------------------------------------- ResNets


def as_detectron2(state: State) -> State:
    """Names as detectron2's converters write them."""
    renamed = {}
    for name, value in state.items():
        new = name if "layer" in name else f"stem.{name}"
        for stage in range(1, 5):
            new = new.replace(f"layer{stage}", f"res{stage + 1}")
        for place in range(1, 4):
            new = new.replace(f"bn{place}", f"conv{place}.norm")
        renamed[new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value
    return renamed


def write_torch(path: Path, state: State) -> Path:
    torch.save(state, path)
    return path


def write_moco(path: Path, state: State) -> Path:
    own = {f"module.encoder_q.{name}": value for name, value in state.items()}
    other = {f"module.encoder_k.{name}": torch.zeros_like(value) for name, value in state.items()}
    torch.save({"epoch": 200, "state_dict": own | other | {"module.queue": torch.zeros(3)}}, path)
    return path


def write_soco(path: Path, state: State) -> Path:
    torch.save({"model": {f"module.encoder.{name}": value for name, value in state.items()}}, path)
    return path


def write_mmdetection(path: Path, state: State) -> Path:
    own = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"state_dict": own | {"neck.fpn_convs.0.conv.weight": torch.zeros(3)}, "meta": {}}, path)
    return path


def write_detectron2(path: Path, state: State) -> Path:
    arrays = {name: value.numpy() for name, value in as_detectron2(state).items()}
    path = path.with_suffix(".pkl")
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "MOCO", "matching_heuristics": True}))
    return path


@pytest.mark.parametrize("write", [write_torch, write_moco, write_soco, write_mmdetection, write_detectron2])
@pytest.mark.parametrize(("config", "kind"), [(PYRAMID, RCNN), (FOURTH, C4), (CENTRES, CenterNet2)])
def test_a_resnet_gives_torchvisions_features_in_every_detector(
    tmp_path: Path,
    write: Callable[[Path, State], Path],
    config: RCNNConfig | CenterNet2Config,
    kind: Callable[[Any], Any],
) -> None:
    classifier, image = resnet(), picture()
    detector = detector_of(write(tmp_path / "resnet.pth", classifier.state_dict()), config, kind)
    pixels = detector.preprocess([image]).tensors
    padding = (0, pixels.shape[-1] - WIDTH, 0, pixels.shape[-2] - HEIGHT)
    with torch.no_grad():
        maps = resnet_maps(classifier, F.pad(normalised(image), padding))
        expected = {RCNN: maps, C4: maps[2:], CenterNet2: maps[1:]}[kind]  # type: ignore[index]
        for found, level in zip(maps_of(detector, image), expected, strict=True):
            assert equal(found, level)


def caffe2_name(name: str) -> str:
    """MSRA's name of a ResNet's weight, as Detectron wrote it."""
    if name.startswith("conv1."):
        return "conv1_w"
    ending = {"weight": "s", "bias": "b"}[name.rsplit(".", 1)[1]]
    if name.startswith("bn1."):
        return f"res_conv1_bn_{ending}"
    layer, block, rest = name.split(".", 2)
    part = rest.rsplit(".", 1)[0]
    branch = {"downsample.0": "1", "downsample.1": "1_bn"}.get(part)
    if branch is None:
        branch = f"2{'abc'[int(part[-1]) - 1]}" + ("_bn" if part.startswith("bn") else "")
    return f"res{int(layer[5:]) + 1}_{block}_branch{branch}_{ending if branch.endswith('_bn') else 'w'}"


@pytest.mark.parametrize(("config", "kind"), [(PYRAMID, RCNN), (FOURTH, C4), (CENTRES, CenterNet2)])
def test_msras_resnet_takes_blue_first_and_has_its_strides_in_the_first_convolutions(
    tmp_path: Path, config: RCNNConfig | CenterNet2Config, kind: Callable[[Any], Any]
) -> None:
    classifier, image = resnet(), picture()
    for module in classifier.modules():
        if isinstance(module, Bottleneck) and module.stride != 1:
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)  # type: ignore[arg-type]
            nn.init.constant_(module.running_var, 1 - module.eps)  # type: ignore[arg-type]
    with torch.no_grad():
        classifier.conv1.weight /= 64  # its pixels are that much larger
    learned = {name: value for name, value in classifier.named_parameters() if not name.startswith("fc.")}
    blobs = {caffe2_name(name): value.detach().numpy() for name, value in learned.items()}
    assert {"res2_0_branch1_bn_s", "res5_1_branch2c_w", "res3_1_branch2b_bn_b"} < blobs.keys()
    path = tmp_path / "R-26.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs | {"conv1_b": torch.zeros(64).numpy()}}, protocol=2))

    detector = detector_of(path, config, kind)
    assert detector.config.bottleneck_stride == "1x1"
    pixels = detector.preprocess([image]).tensors
    raw = image.flip(0).float() - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    padded = F.pad(raw[None], (0, pixels.shape[-1] - WIDTH, 0, pixels.shape[-2] - HEIGHT))
    with torch.no_grad():
        maps = resnet_maps(classifier, padded)
        expected = {RCNN: maps, C4: maps[2:], CenterNet2: maps[1:]}[kind]  # type: ignore[index]
        for found, level in zip(maps_of(detector, image), expected, strict=True):
            assert equal(found, level)


def test_norms_are_trained_where_no_weights_are_given() -> None:
    for config in (PYRAMID, FOURTH, CENTRES):
        assert not fit_config(config, None).freeze_norm
    small = dataclasses.replace(
        CENTRES, backbone="resnet10t", backbone_options={"channels": [8, 8, 8, 8], "stem_width": 8}
    )
    trained = CenterNet2(fit_config(small, None)).pyramid
    assert any(isinstance(module, nn.BatchNorm2d) for module in trained.modules())


# ------------------------------------------------------------------------------------------------ ConvNeXt, Swin


def facebook_convnext(state: State) -> State:
    """Names of the released ConvNeXt."""
    renamed = {}
    for name, value in state.items():
        new = name.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        if new.startswith("stem."):
            new = new.replace("stem.", "downsample_layers.0.")
        if ".downsample." in new:
            new = new.replace("stages.", "downsample_layers.").replace(".downsample.", ".")
        renamed[new.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")] = value
    return renamed


@pytest.mark.parametrize("rename", [dict, facebook_convnext])
def test_convnext_gives_timms_features(tmp_path: Path, rename: Callable[[State], State]) -> None:
    options = {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 40]}
    classifier = randomise(timm.create_model("convnext_tiny.fb_in22k", num_classes=7, **options))
    path = write_torch(tmp_path / "convnext.pth", rename(classifier.state_dict()))
    config = dataclasses.replace(CENTRES, backbone="convnext_tiny.fb_in22k", backbone_options=options)
    detector, image = detector_of(path, config, CenterNet2), picture()
    size = detector.preprocess([image]).tensors.shape[-2:]
    with torch.no_grad():
        x = F.pad(normalised(image), (0, size[1] - WIDTH, 0, size[0] - HEIGHT))
        expected = classifier.forward_intermediates(x, intermediates_only=True)[1:]  # type: ignore[operator]
        for found, level in zip(maps_of(detector, image), expected, strict=True):
            assert equal(found, level)


WIDTHS = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}


def swin_config(height: int, width: int) -> CenterNet2Config:
    options = {"patch_size": [4, 4], "window_size": [7, 7], **WIDTHS}
    return dataclasses.replace(
        CENTRES, backbone="swin", backbone_options=options, min_size=min(height, width), max_size=max(height, width)
    )


def microsoft_swin(state: State) -> State:
    """Names of the released Swin: a stage ends with its merging of patches."""
    renamed = {}
    for name, value in state.items():
        stage = name.split(".")[1]
        if ".downsample." in name:
            name = name.replace(f"layers.{stage}.", f"layers.{int(stage) - 1}.")
        renamed[name.replace("head.fc.", "head.")] = value
    extra = {"layers.0.blocks.1.attn_mask": torch.zeros(3), "layers.0.blocks.0.attn.relative_position_index": state}
    return renamed | {name: torch.zeros(1) for name in extra}


@pytest.mark.parametrize("rename", [dict, microsoft_swin])
def test_swin_gives_timms_features(tmp_path: Path, rename: Callable[[State], State]) -> None:
    sizes = {"img_size": 448, "strict_img_size": False, **WIDTHS}
    classifier = randomise(timm.create_model("swin_base_patch4_window7_224", num_classes=7, **sizes))
    path = write_torch(tmp_path / "swin.pth", {"model": rename(classifier.state_dict())})  # type: ignore[dict-item]
    detector, image = detector_of(path, swin_config(448, 672), CenterNet2), picture(448, 672)
    norms = detector.pyramid.maps.norms  # type: ignore[union-attr]
    with torch.no_grad():
        features = classifier.forward_intermediates(normalised(image), intermediates_only=True, norm=False)  # type: ignore[operator]
        for found, level, norm in zip(maps_of(detector, image), features[1:], norms, strict=True):  # type: ignore[arg-type]
            assert equal(found, norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_swin_gives_torchvisions_features(tmp_path: Path) -> None:
    height, width = 300, 461
    options = {"patch_size": [4, 4], "window_size": [7, 7], **WIDTHS}
    classifier = randomise(torchvision.models.SwinTransformer(**options))
    path = write_torch(tmp_path / "swin.pth", classifier.state_dict())
    detector, image = detector_of(path, swin_config(height, width), CenterNet2), picture(height, width)
    size = detector.preprocess([image]).tensors.shape[-2:]
    norms = detector.pyramid.maps.norms  # type: ignore[union-attr]
    with torch.no_grad():
        x, found = F.pad(normalised(image), (0, size[1] - width, 0, size[0] - height)), maps_of(detector, image)
        for index, layer in enumerate(classifier.features):  # type: ignore[arg-type]
            x = layer(x)
            if index in (3, 5, 7):
                level = (index - 3) // 2
                assert equal(found[level], norms[level](x).permute(0, 3, 1, 2))  # type: ignore[operator]


# ----------------------------------------------------------------------------------------------------------- EVA

EVA = EvaConfig(width=32, depth=3, heads=2, hidden=85, trained_grid=8, rotary_grid=7, window_share=1.0)


def eva(patch: int, grid: int) -> Eva:
    """timm's EVA-02 with the sizes of `EVA`."""
    sizes = {"embed_dim": EVA.width, "depth": EVA.depth, "num_heads": EVA.heads, "mlp_ratio": 85.5 / 32}
    model = Eva(
        img_size=patch * grid, patch_size=patch, num_classes=0, qkv_fused=False, swiglu_mlp=True, scale_mlp=True,
        use_rot_pos_emb=True, ref_feat_shape=(EVA.rotary_grid, EVA.rotary_grid), dynamic_img_size=True, **sizes,
    )  # fmt: skip
    nn.init.normal_(model.pos_embed)  # type: ignore[arg-type]
    return model.eval()


def released_eva(state: State) -> State:
    """Names of the released EVA-02."""
    pairs = {
        "q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "fc1_g": "w1", "fc1_x": "w2", "mlp.fc2": "mlp.w3",
        "mlp.norm": "mlp.ffn_ln",
    }  # fmt: skip
    renamed = {}
    for name, value in state.items():
        for old, new in pairs.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed | {"mask_token": torch.zeros(1, 1, EVA.width), "rope.freqs_cos": torch.zeros(3)}


@pytest.mark.parametrize("rename", [dict, released_eva])
def test_eva_gives_timms_features(tmp_path: Path, rename: Callable[[State], State]) -> None:
    torch.manual_seed(0)
    classifier = eva(16, EVA.trained_grid)
    path = write_torch(tmp_path / "eva.pt", {"module": rename(classifier.state_dict())})  # type: ignore[dict-item]
    side = 16 * EVA.trained_grid
    config = dataclasses.replace(
        CENTRES, backbone="eva02", eva=EVA, strides=(4, 8, 16, 32), min_size=side, max_size=side
    )
    detector, image = detector_of(path, config, CenterNet2), picture(side, side)
    tokens: list[Tensor] = []
    handle = detector.pyramid.simple[2][0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))  # type: ignore[union-attr, index]
    with torch.no_grad():
        detector.features(detector.preprocess([image]))
        # Detectors have no class token, so the reference attends without it too.
        classifier.pos_embed = nn.Parameter(classifier.pos_embed[:, 1:])  # type: ignore[index]
        classifier.cls_token, classifier.num_prefix_tokens = None, 0
        for block in classifier.blocks:
            block.attn.num_prefix_tokens = 0  # type: ignore[union-attr]
        x = normalised(image, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        (expected,) = classifier.forward_intermediates(x, indices=[EVA.depth - 1], intermediates_only=True)
    handle.remove()
    assert expected.shape == (1, EVA.width, 8, 8)
    assert equal(tokens[0], expected)


def test_evas_patches_of_14_pixels_are_resampled_to_16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small, config = eva(14, 9), dataclasses.replace(CENTRES, backbone="eva02", eva=EVA, strides=(4, 8, 16, 32))
    weights = read_backbone(write_torch(tmp_path / "eva.pt", small.state_dict()), config)
    assert weights.state["patch_embed.proj.weight"].shape == (EVA.width, 3, 16, 16)
    assert weights.state["pos_embed"].shape == (1, 1 + EVA.trained_grid**2, EVA.width)


# ------------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_fit_is_named_with_its_file(tmp_path: Path) -> None:
    state, path = resnet().state_dict(), tmp_path / "resnet.pth"
    last = "layer4.1.conv3.weight"
    for config, kind in ((FOURTH, C4), (PYRAMID, RCNN), (CENTRES, CenterNet2)):
        write_torch(path, {name: value for name, value in state.items() if name != last})
        with pytest.raises(InputError, match=rf"resnet.pth: {last} is missing, expected \[2048, 512, 1, 1\]"):
            detector_of(path, config, kind)  # type: ignore[arg-type]
        write_torch(path, {**state, "conv1.weight": torch.zeros(1)})
        with pytest.raises(InputError, match=r"resnet.pth: conv1.weight has shape \[1\], expected \[64, 3, 7, 7\]"):
            detector_of(path, config, kind)  # type: ignore[arg-type]
    write_torch(path, as_detectron2({name: value for name, value in state.items() if name != last}))
    with pytest.raises(InputError, match=r"res5.1.conv3.weight is missing"):
        detector_of(path, FOURTH, C4)
    write_torch(path, {"roi_heads.box_head.fc1.weight": torch.zeros(1)})
    with pytest.raises(InputError, match=r"holds a whole detector, .* --box-model"):
        detector_of(path, FOURTH, C4)


@pytest.mark.parametrize("backbone", ["eva02", "swin", "convnext_tiny", "resnet26"])
def test_weights_of_another_family_are_refused_in_one_line(tmp_path: Path, backbone: str) -> None:
    options = swin_config(64, 64).backbone_options if backbone == "swin" else {}
    config = dataclasses.replace(CENTRES, backbone=backbone, backbone_options=options, eva=EVA)
    families = {
        "resnet26": resnet().state_dict(),
        "convnext_tiny": facebook_convnext(timm.create_model("convnext_tiny", dims=[8] * 4).state_dict()),
        "swin": microsoft_swin(timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24).state_dict()),
        "eva02": released_eva(eva(16, 4).state_dict()),
        "nothing": {"a": torch.zeros(2, 2)},
    }
    for family, state in families.items():
        if family != backbone:
            with pytest.raises(InputError, match=r"^[^\n]*weights.pth: [^\n]*$"):
                detector_of(write_torch(tmp_path / "weights.pth", state), config, CenterNet2)


def test_another_mean_is_refused_where_no_bias_can_take_it(tmp_path: Path) -> None:
    path = write_torch(tmp_path / "resnet.pth", resnet().state_dict())
    weights = dataclasses.replace(read_backbone(path, PYRAMID), mean=(0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="pixel mean"):
        load_backbone(RCNN(PYRAMID), weights)

"""Backbones from timm."""

from collections.abc import Mapping
from typing import Any, Literal, cast

import timm
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureInfo
from timm.models.resnet import Bottleneck
from torch import nn

from ovd_models.errors import InputError

BottleneckStride = Literal["default", "1x1", "3x3"]
"""The convolution of a ResNet's bottleneck that takes its stride: the first one in the original ResNet (MSRA's weights,
detectors released on them), the 3x3 one in torchvision and timm. `default` is 1x1 in `C4` and 3x3 elsewhere."""


def check_offline(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a timm model whose name or options open a file or a connection: a checkpoint's config is not trusted.

    Raises:
        InputError: it would.
    """
    if ":" in name or "/" in name:
        raise InputError(f"backbone {name!r}: an address, expected a name that timm knows")
    for option in options:
        if option.startswith("pretrained") or option in ("checkpoint_path", "cache_dir"):
            raise InputError(f"backbone_options: {option!r} loads weights, expected options of the architecture alone")


def build_backbone(
    name: str,
    options: dict[str, Any],
    strides: tuple[int, ...],
    *,
    freeze_norm: bool = False,
    stride: BottleneckStride = "default",
) -> nn.Module:
    """A timm feature extractor with maps of the given strides.

    Args:
        name: any timm model with feature maps.
        options: passed to timm.
        strides: of the maps, finest first.
        freeze_norm: whether batch norms keep their statistics and have no parameters.
        stride: the convolution of a bottleneck that takes its stride; `default` is timm's, 3x3.

    Raises:
        InputError: see `check_offline`.
    """
    check_offline(name, options)
    reductions = feature_info(timm.create_model(name, features_only=True, **options)).reduction()
    indices = tuple(reductions.index(reduction) for reduction in strides)
    backbone = timm.create_model(name, features_only=True, out_indices=indices, **options)
    return arrange(backbone, freeze_norm=freeze_norm, stride=stride)


def build_last_stage(name: str, options: dict[str, Any], *, freeze_norm: bool, stride: BottleneckStride) -> nn.Module:
    """The last stage of a ResNet; arguments as for `build_backbone`."""
    check_offline(name, options)
    classifier: Any = timm.create_model(name, num_classes=0, **options)
    return arrange(classifier.layer4, freeze_norm=freeze_norm, stride=stride)


def arrange(module: nn.Module, *, freeze_norm: bool, stride: BottleneckStride) -> nn.Module:
    """The module with frozen batch norms and the strides of its bottlenecks moved; timm has them in the 3x3 ones."""
    for block in module.modules():
        if stride == "1x1" and isinstance(block, Bottleneck) and block.conv2.stride != (1, 1):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return cast(nn.Module, freeze_batch_norm_2d(module)) if freeze_norm else module  # type: ignore[no-untyped-call]


def feature_info(backbone: nn.Module) -> FeatureInfo:
    """Timm's description of a feature extractor's maps."""
    return cast(FeatureInfo, backbone.feature_info)

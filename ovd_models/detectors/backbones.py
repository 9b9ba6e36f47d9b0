"""Backbones from timm, and pretrained weights for them."""

from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from ovd_models.weights import load_strict, read_state


def build_backbone(
    name: str, options: dict[str, Any], strides: tuple[int, ...], *, freeze_norm: bool = False
) -> nn.Module:
    """A timm feature extractor with maps of the given strides.

    Args:
        name: any timm model with feature maps.
        options: passed to timm.
        strides: of the maps, finest first.
        freeze_norm: whether batch norms keep their statistics and have no parameters.
    """
    reductions = feature_info(timm.create_model(name, features_only=True, **options)).reduction()
    indices = tuple(reductions.index(stride) for stride in strides)
    backbone = timm.create_model(name, features_only=True, out_indices=indices, **options)
    return freeze_norms(backbone) if freeze_norm else backbone


def freeze_norms(module: nn.Module) -> nn.Module:
    """The module with frozen batch norms."""
    return cast(nn.Module, freeze_batch_norm_2d(module))  # type: ignore[no-untyped-call]


def feature_info(backbone: nn.Module) -> FeatureInfo:
    """Timm's description of a feature extractor's maps."""
    return cast(FeatureInfo, backbone.feature_info)


def find_backbone_weights(backbone: str, weights: str) -> dict[str, Tensor] | None:
    """A pretrained state dict for a backbone.

    Args:
        backbone: its name.
        weights: `auto` (torchvision's file if an earlier download left it on this machine), `none`, or a file.

    Raises:
        InputError: the given file cannot be read as a state dict.
    """
    if weights == "none":
        return None
    if weights != "auto":
        return read_state(weights)
    if backbone not in torchvision.models.list_models(torchvision.models):
        return None
    file = torchvision.models.get_model_weights(backbone).DEFAULT.url.rsplit("/", 1)[-1]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    return read_state(path) if path.is_file() else None


def load_backbone(backbone: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a classifier's state dict into a backbone; the classifier's own weights are left out.

    Raises:
        InputError: a weight of the backbone is missing or of another shape.
    """
    own = backbone.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    load_strict(backbone, {name: value for name, value in (counters | state).items() if name in own}, "backbone")

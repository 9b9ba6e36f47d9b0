"""What a released file of weights is, told by the names of its tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ovd_models.detectors.c4 import C4, coco_r50_c4
from ovd_models.detectors.centernet2 import CenterNet2, CenterNet2Config
from ovd_models.detectors.rcnn import ProposalNetwork, RCNNConfig
from ovd_models.errors import InputError
from ovd_models.importers.backbones import account_backbone, backbone_of
from ovd_models.importers.clip import is_clip
from ovd_models.importers.codet import released_architectures
from ovd_models.importers.ovsam import SAM_MARKER, account_ovsam_tensors
from ovd_models.weights import TensorAccount

Kind = Literal["detector", "sam", "clip", "ovsam", "backbone"]
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")


def recognise(state: Mapping[str, Tensor]) -> Kind:
    """The kind of a file; `backbone` for one of no other kind, to be checked by `fitting_backbones`."""
    if any(name.startswith(("roi_heads.", "proposal_generator.")) for name in state):
        return "detector"
    if SAM_MARKER in state:
        return "sam"
    if is_clip(state):
        return "clip"
    return "ovsam" if len(account_ovsam_tensors(state).unaccounted) < len(state) else "backbone"


def describe_names(state: Mapping[str, Tensor], count: int = 3) -> str:
    """The number of tensors, and some of them with their shapes."""
    chosen = list(state)[:: max(1, len(state) // count)][:count]
    shown = ", ".join(f"{name[:80]} {list(state[name].shape)}" for name in chosen)
    return f"its {len(state)} tensors are like {shown}"


def backbones() -> dict[str, RCNNConfig | CenterNet2Config]:
    """Detectors with the backbones that configs use, by the backbone's name."""
    found: dict[str, RCNNConfig | CenterNet2Config] = {}
    for name in RESNETS:
        found[name] = replace(coco_r50_c4(), backbone=name)
    for name in CONVNEXTS:
        found[name] = RCNNConfig(backbone=name, backbone_options={}, strides=(4, 8, 16, 32), anchor_sizes=(32,) * 4)
    for release in released_architectures().values():
        if release.config.architecture == "centernet2" and release.config.centernet2.backbone in ("swin", "eva02"):
            found[release.config.centernet2.backbone] = release.config.centernet2
    return found


def build(config: RCNNConfig | CenterNet2Config) -> ProposalNetwork | CenterNet2:
    """The detector of one of `backbones`; R50-C4 uses the last stage of a ResNet too."""
    if isinstance(config, CenterNet2Config):
        return CenterNet2(config)
    return C4(config) if config.backbone in RESNETS else ProposalNetwork(config)


def fitting_backbones(state: Mapping[str, Tensor], origin: str) -> dict[str, TensorAccount]:
    """The backbones whose every weight the file holds, with the account of its tensors.

    Raises:
        InputError: there is none; the message shows some of the file's names.
    """
    found = {}
    for name, config in backbones().items():
        try:
            weights = backbone_of(dict(state), origin, config)
            with torch.device("meta"):
                own = build(config).state_dict()
            found[name] = account_backbone(own, weights, state)
        except InputError:
            continue
    if not found:
        raise InputError(
            f"{origin}: not recognised, {describe_names(state)}; expected a CoDet, Detic or OV-SAM file, a SAM, a CLIP "
            f"with both towers or a backbone ({', '.join(backbones())})"
        )
    return found

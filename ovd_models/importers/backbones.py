"""Released backbones in our detectors: their layouts of names, their pixels, and strict loading.

A detector's backbone has the names of timm's classifier, EVA-02 too; Swin has those of torchvision's.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models import eva
from torch import Tensor

from ovd_models.detectors.centernet2 import CenterNet2, CenterNet2Config
from ovd_models.detectors.rcnn import ProposalNetwork, RCNNConfig
from ovd_models.errors import InputError, as_input_error
from ovd_models.weights import TensorAccount, read_state

Rules = tuple[tuple[str, str], ...]
"""(pattern, replacement) pairs, applied in order."""
C = TypeVar("C", RCNNConfig, CenterNet2Config)

WRAPPERS = ("encoder_q.", "base_encoder.", "encoder.", "backbone.")
"""Prefixes of the backbone in files of self-supervised trainings: MoCo, MoCo v3, SoCo, and SoCo for mmdetection."""
NORM_EPS = 1e-5
"""Added to the variance by the batch norms of ResNets."""
PARTS: Rules = (
    (r"^(?:backbone|pyramid\.maps\.trunk)\.", ""),
    (r"^res5\.", "layer4."),
    (r"^pyramid\.maps\.layers\.", "features."),
    (r"^pyramid\.patches\.", "patch_embed.proj."),
    (r"^pyramid\.positions$", "pos_embed"),
    (r"^pyramid\.(blocks\.)", r"\1"),
)
"""From the names of a detector's backbone to those of the classifier; its other weights match no pattern."""
STAGES = range(1, 5)
DETECTRON2: Rules = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    *((rf"^layer{stage}\.", rf"res{stage + 1}.") for stage in STAGES),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
CAFFE2: Rules = (
    (r"^bn1\.", "res_conv1_bn_"),
    *((rf"^layer{stage}\.(\d+)\.", rf"res{stage + 1}_\1_") for stage in STAGES),
    (r"downsample\.0\.", "branch1_"),
    (r"downsample\.1\.", "branch1_bn_"),
    *((rf"_conv{place}\.", f"_branch2{letter}_") for place, letter in enumerate("abc", 1)),
    *((rf"_bn{place}\.", f"_branch2{letter}_bn_") for place, letter in enumerate("abc", 1)),
    (r"^conv1\.", "conv1_"),
    (r"bn_weight$", "bn_s"),
    (r"weight$", "w"),
    (r"bias$", "b"),
    (r"running_mean$", "rm"),
    (r"running_var$", "riv"),
)
SWIN: Rules = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * stage - 1}\.", f"layers.{stage - 1}.blocks.") for stage in STAGES),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
MERGE_LAST: Rules = tuple((rf"^features\.{2 * stage}\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3))
MERGE_FIRST: Rules = tuple((rf"^features\.{2 * stage}\.", f"layers.{stage}.downsample.") for stage in (1, 2, 3))
LAYOUTS: tuple[tuple[str, Rules], ...] = (
    ("res_conv1_bn_s", CAFFE2),
    ("stem.conv1.norm.weight", DETECTRON2),
    ("layers.0.downsample.reduction.weight", (*SWIN, *MERGE_LAST)),
    ("layers.1.downsample.reduction.weight", (*SWIN, *MERGE_FIRST)),
)
"""A name that only files of a layout have, and the rules from the classifier's names to the file's: Caffe2 (MSRA's
ResNets in Detectron), detectron2 (also SoCo's and MoCo's after conversion), Swin as released, Swin in timm. Files
without any of the names have the classifier's own."""
UNUSED: Rules = (
    (r"(^|\.)(fc|head|fc_norm|pred)\.|(^|\.)(fc1000|pred)_", "the classifier of the pretraining"),
    (r"(^|\.)norm\.(weight|bias)$", "the norm before the classifier"),
    (r"num_batches_tracked$", "a counter of the training"),
    (r"relative_position_index$|attn_mask$|rope|freqs_", "computed from the sizes"),
    (r"^(layers\.3|features\.7)\.downsample|mask_token|cls_token", "a part that maps of features do not need"),
    (r"encoder_k\.|momentum|queue|predictor|projector|_neck\.|_head\.", "a part of the self-supervised training"),
)
"""Patterns of names in a backbone's file that no detector uses, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class BackboneWeights:
    """Weights of a backbone, and how its training saw images."""

    origin: str
    """The file."""
    state: dict[str, Tensor]
    rules: Rules
    """From the classifier's names to those of `state`."""
    mean: tuple[float, ...]
    """Of red, green and blue in [0, 1], subtracted from pixels."""
    std: tuple[float, ...]
    """Divides pixels after that."""
    bgr: bool = False
    """Whether the first convolution takes blue first."""
    affine_norms: bool = False
    """Batch norms have no statistics: these are part of their scale and bias."""
    stride: Literal["1x1", "3x3"] = "3x3"
    """The convolution of a ResNet's bottleneck that takes its stride."""


def read_backbone(path: str | Path, config: RCNNConfig | CenterNet2Config) -> BackboneWeights:
    """Weights of a detector's backbone, from a file in any of the layouts of this module.

    ResNets without batch norm statistics are MSRA's: they take blue first, pixels of 0 to 255 less their mean, and have
    the stride of a block in its 1x1 convolution. Other files have timm's convention for the backbone.

    Raises:
        InputError: the file cannot be read safely, or holds a whole detector.
    """
    return backbone_of(read_state(path), str(path), config)


def backbone_of(state: dict[str, Tensor], origin: str, config: RCNNConfig | CenterNet2Config) -> BackboneWeights:
    """`read_backbone` for a file that is read."""
    if any(name.startswith(("roi_heads.", "proposal_generator.")) for name in state):
        raise InputError(f"{origin}: holds a whole detector, expected a backbone; CoDet starts from it by --box-model")
    for prefix in WRAPPERS:
        inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = inside or state
    rules = next((rules for marker, rules in LAYOUTS if marker in state), ())
    if rules in (CAFFE2, DETECTRON2) and not any(name.endswith(("running_mean", "_rm")) for name in state):
        return BackboneWeights(
            origin=origin,
            state=state,
            rules=rules,
            mean=IMAGENET_DEFAULT_MEAN,
            std=(1 / 255,) * 3,
            bgr=True,
            affine_norms=True,
            stride="1x1",
        )
    if not rules:
        with as_input_error(f"{origin}: expected weights of {config.backbone}, timm cannot read them"):
            state = in_timm_layout(state, config)
    mean, std = pixel_statistics(config.backbone)
    return BackboneWeights(origin=origin, state=state, rules=rules, mean=mean, std=std)


def in_timm_layout(state: dict[str, Tensor], config: RCNNConfig | CenterNet2Config) -> dict[str, Tensor]:
    """The state with timm's names; timm also resamples EVA's patches and positions to the config's sizes."""
    if isinstance(config, CenterNet2Config) and config.backbone == "eva02":
        c = config.eva
        side = c.patch * c.trained_grid
        with torch.device("meta"):
            target = eva.Eva(side, c.patch, embed_dim=c.width, depth=0, num_heads=c.heads, num_classes=0)
        return dict(eva.checkpoint_filter_fn(state, target))
    if config.backbone == "swin":
        return state
    module = sys.modules[timm.model_entrypoint(config.backbone).__module__]
    if not hasattr(module, "checkpoint_filter_fn"):
        return state
    with torch.device("meta"):
        model = timm.create_model(config.backbone, **config.backbone_options)
    return dict(module.checkpoint_filter_fn(state, model))


def pixel_statistics(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels in [0, 1] that a backbone was trained with, by timm's record of it."""
    if backbone == "eva02":
        return OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    recorded = timm.get_pretrained_cfg(backbone) if backbone != "swin" else None
    if recorded is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return recorded.mean, recorded.std


def fit_config(config: C, weights: BackboneWeights | None) -> C:
    """The config of a detector that starts from these weights: where its bottlenecks have their stride.

    Without weights its batch norm is trained, whatever the config says: frozen, it would never normalise.
    """
    if weights is None:
        return replace(config, freeze_norm=False)
    return replace(config, bottleneck_stride=weights.stride)


def adopt_config(config: C, given: C) -> C:
    """The config of a detector that starts from a trained one's weights: with its batch norm and strides."""
    return replace(config, freeze_norm=given.freeze_norm, bottleneck_stride=given.bottleneck_stride)


def load_backbone(detector: ProposalNetwork | CenterNet2, weights: BackboneWeights) -> None:
    """Load every weight of a detector's backbone, C4's region head included; its config is `fit_config`'s.

    The first convolution is scaled and shifted so that it takes the detector's pixels; features are those of the
    original on its own pixels.

    Raises:
        InputError: a weight is missing or of another shape.
    """
    own = detector.state_dict()
    found = translate_backbone(own, weights)
    first = next(name for name, value in found.items() if value.dim() == 4 and value.shape[1] == 3)
    take_pixels(found, first, detector, weights)
    detector.load_state_dict(own | found)


def translate_backbone(own: Mapping[str, Tensor], weights: BackboneWeights) -> dict[str, Tensor]:
    """The weights of a detector's backbone under the detector's names; `own` is the detector's state.

    Raises:
        InputError: a weight is missing or of another shape.
    """
    found = {}
    for ours, value in own.items():
        name = classifier_name(ours)
        if name is None or ours.endswith(("num_batches_tracked", "relative_position_index")):
            continue
        theirs = apply_rules(name, weights.rules)
        if weights.affine_norms and ours.endswith("running_mean"):
            tensor: Tensor | None = torch.zeros(value.shape)
        elif weights.affine_norms and ours.endswith("running_var"):
            tensor = torch.full(value.shape, 1 - NORM_EPS)
        else:
            tensor = weights.state.get(theirs)
        if tensor is None or tensor.shape != value.shape:
            shape = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise InputError(f"{weights.origin}: {theirs} {shape}, expected {list(value.shape)}")
        found[ours] = tensor.to(value.dtype)
    return found


def account_backbone(own: Mapping[str, Tensor], weights: BackboneWeights, state: Mapping[str, Tensor]) -> TensorAccount:
    """Account for the tensors of a backbone's file.

    Args:
        own: the state of a detector, whose tensors need no memory.
        weights: what `backbone_of` reads for the detector.
        state: the file's tensors.

    Raises:
        InputError: see `translate_backbone`.
    """
    translate_backbone(own, weights)
    wanted = {classifier_name(name): name for name in own}
    names = {apply_rules(name, weights.rules): ours for name, ours in wanted.items() if name is not None}
    used, ignored, unaccounted = {}, {}, []
    for name in state:
        bare = name
        for prefix in WRAPPERS:
            bare = bare.removeprefix(prefix)
        reason = next((reason for pattern, reason in UNUSED if re.search(pattern, name)), None)
        if bare in names:
            used[name] = names[bare]
        elif reason is not None:
            ignored[name] = reason
        elif not weights.rules and bare not in weights.state:
            used[name] = "under the name that timm gives it"
        else:
            unaccounted.append(name)
    return TensorAccount(used, ignored, tuple(unaccounted))


def classifier_name(name: str) -> str | None:
    """The classifier's name of a weight of a detector's backbone; None if the weight is not part of it."""
    for pattern, replacement in PARTS:
        if re.search(pattern, name):
            # timm's feature extractors have `stages_0.` where classifiers have `stages.0.`
            return re.sub(r"^([a-z_]+)_(\d+)\.", r"\1.\2.", re.sub(pattern, replacement, name))
    return None


def apply_rules(name: str, rules: Rules) -> str:
    """The name after all replacements."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def take_pixels(
    found: dict[str, Tensor], first: str, detector: ProposalNetwork | CenterNet2, weights: BackboneWeights
) -> None:
    """Change the first convolution, from the pixels of its training to the detector's.

    The training's pixels z are the detector's y after z = (y * our std + our mean - mean) / std.

    Raises:
        InputError: the means differ and the convolution has no bias.
    """
    mean_C, std_C = (torch.tensor(values, dtype=torch.float64) for values in (weights.mean, weights.std))
    our_mean_C, our_std_C = (
        torch.tensor(values, dtype=torch.float64)
        for values in (detector.transform.image_mean, detector.transform.image_std)
    )
    kernel_FCHW = found[first].double().flip(1) if weights.bgr else found[first].double()
    shift_C, bias = (our_mean_C - mean_C) / std_C, first.removesuffix("weight") + "bias"
    if bool(shift_C.abs().max() > 1e-6):
        if bias not in found:
            raise InputError(f"{weights.origin}: trained with pixel mean {weights.mean}, expected a bias to adapt it")
        found[bias] = (found[bias].double() + (kernel_FCHW.sum((2, 3)) @ shift_C)).to(found[bias].dtype)
    found[first] = (kernel_FCHW * (our_std_C / std_C)[:, None, None]).to(found[first].dtype)

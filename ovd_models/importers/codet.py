"""Released CoDet and Detic weights in our models: rules from our tensor names to theirs, and the tensors left out.

K names, C concepts, D embedding width.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovd_models.clip.model import ClipConfig, ClipTextEncoder, build_text_tower, weights_digest
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.c4 import coco_r50_c4
from ovd_models.detectors.centernet2 import CenterNet2Config
from ovd_models.errors import InputError
from ovd_models.weights import TensorAccount, load_strict, read_state

Rules = Sequence[tuple[str, str]]
"""(pattern, replacement) pairs that, applied in order, turn our name into the released one."""

CLASSIFIER: Rules = (
    (r"\.projection\.", r".cls_score.linear."),
    (r"\.box_deltas\.", r".bbox_pred."),
    (r"\.hidden\.", r".fc1."),
    (r"\.score\.", r".fc2."),
)
C4_RULES: Rules = (
    (r"^detector\.backbone\.(conv1\.|bn1\.)", r"backbone.stem.\1"),
    *((rf"^detector\.backbone\.layer{i}\.", rf"backbone.res{i + 1}.") for i in (1, 2, 3)),
    (r"^detector\.res5\.", r"roi_heads.res5."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", r".shortcut."),
    (r"\.downsample\.1\.", r".shortcut.norm."),
    (r"^detector\.rpn\.head\.conv\.0\.0\.", r"proposal_generator.rpn_head.conv."),
    (r"^detector\.rpn\.head\.cls_logits\.", r"proposal_generator.rpn_head.objectness_logits."),
    (r"^detector\.rpn\.head\.bbox_pred\.", r"proposal_generator.rpn_head.anchor_deltas."),
    (r"^detector\.(projection|box_deltas)\.", r"roi_heads.box_predictor.\1."),
    (r"^aggregations\.0\.", r"roi_heads.box_predictor."),
    *CLASSIFIER,
)
CENTERNET2_RULES: Rules = (
    (r"^detector\.stages\.(\d)\.head\.fc6\.", r"roi_heads.box_head.\1.fc1."),
    (r"^detector\.stages\.(\d)\.head\.fc7\.", r"roi_heads.box_head.\1.fc2."),
    (r"^(?:detector\.stages|aggregations)\.(\d)\.", r"roi_heads.box_predictor.\1."),
    *CLASSIFIER,
    (r"^detector\.proposals\.tower\.", r"proposal_generator.centernet_head.bbox_tower."),
    (r"^detector\.proposals\.distances\.", r"proposal_generator.centernet_head.bbox_pred."),
    (r"^detector\.proposals\.heat\.", r"proposal_generator.centernet_head.agn_hm."),
    (r"^detector\.proposals\.scales$", r"proposal_generator.centernet_head.scales.*.scale"),
    *((rf"^detector\.mask_head\.0\.{i}\.0\.", rf"roi_heads.mask_head.mask_fcn{i + 1}.") for i in range(4)),
    (r"^detector\.mask_head\.1\.conv5_mask\.", r"roi_heads.mask_head.deconv."),
    (r"^detector\.mask_head\.1\.mask_fcn_logits\.", r"roi_heads.mask_head.predictor."),
    (r"^detector\.pyramid\.pyramid\.extra_blocks\.", r"backbone.top_block."),
    *((rf"^detector\.pyramid\.pyramid\.inner_blocks\.{i}\.0\.", rf"backbone.fpn_lateral{i + 3}.") for i in range(3)),
    *((rf"^detector\.pyramid\.pyramid\.layer_blocks\.{i}\.0\.", rf"backbone.fpn_output{i + 3}.") for i in range(3)),
)
RESNET_RULES: Rules = (*CENTERNET2_RULES, (r"^detector\.pyramid\.maps\.trunk\.", r"backbone.bottom_up.base."))
SWIN_RULES: Rules = (
    *CENTERNET2_RULES,
    *((rf"^detector\.pyramid\.maps\.norms\.{i}\.", rf"backbone.bottom_up.norm{i + 1}.") for i in range(3)),
    (r"^detector\.pyramid\.maps\.layers\.0\.0\.", r"backbone.bottom_up.patch_embed.proj."),
    (r"^detector\.pyramid\.maps\.layers\.0\.2\.", r"backbone.bottom_up.patch_embed.norm."),
    *(
        (rf"^detector\.pyramid\.maps\.layers\.{2 * i + 1}\.", rf"backbone.bottom_up.layers.{i}.blocks.")
        for i in range(4)
    ),
    *(
        (rf"^detector\.pyramid\.maps\.layers\.{2 * i + 2}\.", rf"backbone.bottom_up.layers.{i}.downsample.")
        for i in range(3)
    ),
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.3\.", r".mlp.fc2."),
)

EVA_RULES: Rules = (
    *CENTERNET2_RULES,
    (r"^detector\.pyramid\.positions$", r"backbone.net.pos_embed"),
    (r"^detector\.pyramid\.patches\.", r"backbone.net.patch_embed.proj."),
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"^(detector\.pyramid\.blocks\.\d+\.mlp)\.fc1_g\.", r"\1.w1."),
    (r"^(detector\.pyramid\.blocks\.\d+\.mlp)\.fc1_x\.", r"\1.w2."),
    (r"^(detector\.pyramid\.blocks\.\d+\.mlp)\.fc2\.", r"\1.w3."),
    (r"^(detector\.pyramid\.blocks\.\d+\.mlp)\.norm\.", r"\1.ffn_ln."),
    (r"^detector\.pyramid\.blocks\.", r"backbone.net.blocks."),
    *((rf"^detector\.pyramid\.simple\.{i}\.", rf"backbone.simfp_{i + 2}.") for i in range(4)),
    (r"^detector\.pyramid\.(p[67])\.", r"backbone.top_block.\1."),
)

IGNORED: Sequence[tuple[str, str]] = (
    (r"\.cls_score\.zs_weight$", "text embeddings of the training concepts: a table given at run time"),
    (r"\.cls_score\.detection_weight$", "text embeddings of the evaluated names: a vocabulary, not weights"),
    (r"\.weight_transform\.[02]\.(weight|bias)$", "the same storage as fc1 and fc2 under a second name"),
    (r"(^|\.)base\.fc\.(weight|bias)$", "classifier of the ImageNet-21k pretraining, not used by detectors"),
    (r"\.attn\.relative_position_index$", "computed from the window size"),
    (r"\.freqs_(cos|sin)(_s)?$", "rotary angles, computed from the window size and the grid"),
)
"""Patterns of released names that our models do not use, each with the reason."""

COMPUTED = "relative_position_index"
"""Ending of the names of our tensors that their constructor fills."""
TEXT_PREFIX = "text_encoder."
TEXT_CONFIG: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}


@dataclass(frozen=True)
class Release:
    """One released architecture."""

    config: CoDetConfig
    """Without the aggregation and its sizes, which `recognise_release` adds."""
    rules: Rules
    marker: str
    """A pattern of tensor names that no other of these architectures has."""
    bgr: str = ""
    """Our name of the first convolution, if the released one takes images as BGR."""


def released_architectures() -> dict[str, Release]:
    """The architectures released by CoDet and Detic, by name."""
    coco = CoDetConfig(
        architecture="c4",
        detector=coco_r50_c4(),
        guidance="dimensions",
        centre_guidance=False,
        concept_weight=0.1,
        caption_weight=0.1,
    )
    lvis = CoDetConfig(architecture="centernet2", guidance="none", caption_weight=0.2)
    swin = CenterNet2Config(
        backbone="swin",
        backbone_options={
            **{"patch_size": [4, 4], "window_size": [7, 7], "stochastic_depth_prob": 0.3},
            **{"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
        },
        min_size=896,
        max_size=1493,
    )
    eva = CenterNet2Config(backbone="eva02", strides=(4, 8, 16, 32), min_size=1280, max_size=1280)
    return {
        "r50_c4": Release(coco, C4_RULES, r"(^|\.)res4\.0\.conv1\.weight$", bgr="detector.backbone.conv1.weight"),
        "centernet2_r50": Release(lvis, RESNET_RULES, r"(^|\.)base\.layer1\.0\.conv1\.weight$"),
        "centernet2_swin_b": Release(
            replace(lvis, centernet2=swin), SWIN_RULES, r"(^|\.)bottom_up\.patch_embed\.proj\.weight$"
        ),
        "centernet2_eva02_l": Release(
            replace(lvis, centernet2=eva), EVA_RULES, r"(^|\.)blocks\.0\.attn\.q_proj\.weight$"
        ),
    }


def released_names(name: str, release: Release) -> list[str]:
    """The released names of one of our tensors; several if ours concatenates them."""
    for pattern, replacement in release.rules:
        name = re.sub(pattern, replacement, name)
    return [name.replace("*", str(level)) for level in range(5)] if "*" in name else [name]


def recognise_release(shapes: Mapping[str, Sequence[int]], origin: str) -> Release:
    """The architecture of a released state dict, its config completed from the tensors' shapes.

    Raises:
        InputError: it is none of the released architectures.
    """
    known = released_architectures()
    for release in known.values():
        if any(re.search(release.marker, name) for name in shapes):
            hidden = find_name(shapes, "roi_heads.box_predictor.fc1.weight", "roi_heads.box_predictor.0.fc1.weight")
            if hidden is None:
                return release
            count, row = shapes[hidden]
            config = replace(release.config, aggregation="learned", num_proposals=count, group_size=row // count + 1)
            return replace(release, config=config)
    raise InputError(f"{origin}: holds no released detector, expected one of {', '.join(known)}")


def find_name(names: Mapping[str, Any], *wanted: str) -> str | None:
    """The file's longest name that is the end of a wanted name, as detectron2 matches them.

    The weights of the MLP may also be stored under the names of `weight_transform`.
    """
    for full in wanted:
        second = re.sub(r"\.fc([12])\.", lambda match: f".weight_transform.{2 * int(match[1]) - 2}.", full)
        for name in (full, second) if "box_predictor" in full else (full,):
            parts = name.split(".")
            for start in range(len(parts) - 1):
                if ".".join(parts[start:]) in names:
                    return ".".join(parts[start:])
    return None


def find_tensors(state: Mapping[str, Tensor], names: Sequence[str]) -> tuple[list[str], Tensor | None]:
    """The file's names for released ones, and their concatenated tensors; None if one is missing."""
    found = [name for name in (find_name(state, wanted) for wanted in names) if name is not None]
    if len(found) < len(names):
        return found, None
    return found, torch.cat([state[name] for name in found]) if len(found) > 1 else state[found[0]]


def translate_state(state: Mapping[str, Tensor], model: CoDet, release: Release, origin: str) -> dict[str, Tensor]:
    """A state dict of our model from a released one.

    Raises:
        InputError: a tensor is missing or of another shape.
    """
    translated: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        if ours.endswith(COMPUTED):
            translated[ours] = value
            continue
        names = released_names(ours, release)
        tensor = find_tensors(state, names)[1]
        if tensor is None or tensor.shape != value.shape:
            shape = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
            raise InputError(f"{origin}: {names[0]} {shape}, expected {list(value.shape)}")
        translated[ours] = tensor.flip(1) if ours == release.bgr else tensor
    return translated


def account_codet_tensors(shapes: Mapping[str, Sequence[int]], origin: str) -> TensorAccount:
    """Account for a released state dict by names and shapes alone, without weights.

    Raises:
        InputError: it is no released detector.
    """
    release = recognise_release(shapes, origin)
    with torch.device("meta"):
        state = {name: torch.empty(*shape) for name, shape in shapes.items()}
        own = CoDet(release.config).state_dict()
        tower = build_text_tower(text_config()).state_dict()
    wanted = {ours: released_names(ours, release) for ours in own if not ours.endswith(COMPUTED)}
    if any(name.startswith(TEXT_PREFIX) for name in shapes):
        own |= {TEXT_PREFIX + ours: value for ours, value in tower.items()}
        wanted |= {TEXT_PREFIX + ours: [TEXT_PREFIX + ours] for ours in tower}
    used, missing = dict[str, str](), []
    for ours, names in wanted.items():
        found, tensor = find_tensors(state, names)
        if tensor is not None and tensor.shape == own[ours].shape:
            used |= dict.fromkeys(found, ours)
        else:
            missing.append(ours)
    left = [name for name in shapes if name not in used]
    ignored = {name: reason for name in left for pattern, reason in IGNORED if re.search(pattern, name)}
    return TensorAccount(used, ignored, tuple(name for name in left if name not in ignored), tuple(missing))


@dataclass(frozen=True)
class ImportedDetector:
    """A released detector as our model."""

    model: CoDet
    encoder: ClipTextEncoder | None
    """The text tower of the file, if it holds one."""
    name_embeddings: Tensor | None
    """[K, D] unit embeddings of the evaluated names, in category order, if the file holds them."""


def load_codet_release(path: str | Path) -> ImportedDetector:
    """A released CoDet or Detic checkpoint, `.pth` or `.pkl`, bare or with `model` on top.

    Raises:
        InputError: the file cannot be read safely or holds no released detector.
    """
    return detector_of(read_state(path), str(path))


def detector_of(state: Mapping[str, Tensor], origin: str) -> ImportedDetector:
    """`load_codet_release` for a file that is read."""
    release = recognise_release({name: list(value.shape) for name, value in state.items()}, origin)
    model = CoDet(release.config)
    model.load_state_dict(translate_state(state, model, release, origin))
    text = {name.removeprefix(TEXT_PREFIX): value for name, value in state.items() if name.startswith(TEXT_PREFIX)}
    column = next((name for name in state if name.endswith("cls_score.detection_weight")), None)
    return ImportedDetector(
        model.eval(),
        import_text_encoder(text, origin) if text else None,
        F.normalize(state[column].float().T[:-1], dim=1) if column else None,
    )


def text_config() -> ClipConfig:
    """The text tower of CLIP ViT-B/32; prompts are "a" and the name."""
    return ClipConfig(embed_dim=512, text=TEXT_CONFIG, quick_gelu=True, prompt_set="name:a")


def import_text_encoder(state: dict[str, Tensor], origin: str) -> ClipTextEncoder:
    """The text encoder from the tensors of CLIP ViT-B/32's text tower.

    Raises:
        InputError: a tensor is missing, unknown or of another shape.
    """
    config = text_config()
    tower = build_text_tower(config)
    load_strict(tower, {name: value.float() for name, value in state.items()}, f"{origin}: text encoder")
    return ClipTextEncoder(config, tower, f"clip-vit-b-32:{weights_digest(tower.state_dict())}")

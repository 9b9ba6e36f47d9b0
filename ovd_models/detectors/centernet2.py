"""CenterNet2: proposals from a heat map of centres, then three stages that refine boxes and classify them by text.

The open-vocabulary LVIS detector of Detic and CoDet: class-agnostic boxes and masks, a text classifier in every stage,
and the federated loss. B images, R regions, N boxes of one image, K classes, D embedding width, F pyramid channels.
Boxes are xyxy in pixels of the resized image inside this file, of the original image at its borders.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import box_iou, clip_boxes_to_image, roi_align

from ovd_models.batches import Detections
from ovd_models.detectors.backbones import BottleneckStride, build_backbone
from ovd_models.detectors.centernet import (
    CenterNetConfig,
    CenterNetHead,
    centre_losses,
    centre_targets,
    decode_proposals,
    flatten_levels,
)
from ovd_models.detectors.encoded import EncodedRegions, split_images
from ovd_models.detectors.eva import EvaConfig, EvaPyramid
from ovd_models.detectors.feature_pyramid import Pyramid, SwinMaps, TimmMaps, pool_regions
from ovd_models.detectors.masks import with_masks
from ovd_models.detectors.rcnn import build_box_deltas, build_roi_heads, sample_regions
from ovd_models.detectors.resizing import ResizedImages, Selection, build_transform, resize_images
from ovd_models.losses import cosine_logits, federated_classes, sigmoid_loss
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class CenterNet2Config:
    """The detector; the defaults are the published ones with ResNet-50."""

    backbone: str = "resnet50"
    """Any timm model that gives feature maps, or `swin`, or `eva02`."""
    backbone_options: dict[str, Any] = field(default_factory=dict)
    """Passed to timm, or to torchvision's `SwinTransformer`."""
    freeze_norm: bool = True
    """Freeze the backbone's batch norm, as with the published pretrained weights."""
    bottleneck_stride: BottleneckStride = "default"
    """The convolution of a bottleneck that takes its stride; pretrained weights decide it."""
    eva: EvaConfig = field(default_factory=EvaConfig)
    """The transformer if `backbone` is `eva02`; regions are then also pooled from a level of stride 4."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Strides of the maps that enter the pyramid, and of the levels that regions are pooled from."""
    pyramid_channels: int = 256
    proposals: CenterNetConfig = field(default_factory=CenterNetConfig)
    head_width: int = 1024
    embed_dim: int = 512
    min_size: int = 800
    max_size: int = 1333
    rois_per_image: int = 512
    stage_ious: tuple[float, ...] = (0.6, 0.7, 0.8)
    """Least overlap with a true box of an object, for each stage."""
    stage_scales: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Factor of the box coding's weights (10, 10, 5, 5), for each stage: later stages code smaller displacements."""
    federated: int = 50
    """Classes per batch that the class loss is computed on; 0 for all."""
    mask_convs: int = 4
    """0 for no masks."""
    temperature: float = 50.0
    box_nms: float = 0.5


@dataclass(frozen=True)
class HeatProposals:
    """Output of the proposal generator for B images."""

    boxes: list[Tensor]
    """B tensors [N, 4], best first, not clipped to the image."""
    scores: list[Tensor]
    """B tensors [N] in [0, 1]."""
    heat: list[Tensor]
    """A map [B, 1, H, W] of logits for each level."""
    distances: list[Tensor]
    """A map [B, 4, H, W] for each level."""


@dataclass(frozen=True)
class StageOutput:
    """Output of one stage for the R regions of all images."""

    boxes: list[Tensor]
    """B tensors [N, 4]: the regions."""
    embeddings: Tensor
    """[R, D] in the text space."""
    deltas: Tensor
    """[R, 4] coded displacements."""


class CascadeStage(nn.Module):
    """Box head, projection into the text space and box refinement."""

    def __init__(self, config: CenterNet2Config, scale: float) -> None:
        super().__init__()
        width = config.head_width
        self.head = TwoMLPHead(config.pyramid_channels * 49, width)
        self.projection = nn.Linear(width, config.embed_dim)
        self.box_deltas = build_box_deltas(width)
        self.coder = BoxCoder((10.0 * scale, 10.0 * scale, 5.0 * scale, 5.0 * scale))

    def forward(self, pooled_RF77: Tensor) -> tuple[Tensor, Tensor]:
        """[R, F, 7, 7] -> [R, D] and [R, 4]."""
        region_RF = self.head(pooled_RF77)
        return self.projection(region_RF).float(), self.box_deltas(region_RF).float()

    def refined(self, output: StageOutput) -> list[Tensor]:
        """B tensors [N, 4]: the boxes after this stage, not clipped."""
        refined_R4 = self.coder.decode_single(output.deltas, torch.cat(output.boxes))
        return list(torch.split(refined_R4, [len(entry) for entry in output.boxes]))


class CenterNet2(nn.Module):
    """A multi-stage detector that classifies by any text embeddings."""

    def __init__(self, config: CenterNet2Config) -> None:
        super().__init__()
        self.config = c = config
        self.transform = build_transform(c.min_size, c.max_size, max(c.strides))
        self.pyramid = build_pyramid(config)
        self.proposals = CenterNetHead(c.pyramid_channels, len(c.proposals.strides), c.proposals.num_convs)
        self.stages = nn.ModuleList(CascadeStage(config, scale) for scale in c.stage_scales)
        if c.mask_convs:
            self.mask_head = nn.Sequential(
                MaskRCNNHeads(c.pyramid_channels, (c.pyramid_channels,) * c.mask_convs, 1),
                MaskRCNNPredictor(c.pyramid_channels, c.pyramid_channels, 1),
            )
        self.sampler = build_roi_heads(c.rois_per_image, iou=c.stage_ious[0])
        self.register_buffer("class_weight_K", None, persistent=False)

    def set_image_counts(self, count_K: Tensor | None) -> None:
        """Draw the federated loss's extra classes in proportion to the root of their numbers of training images [K].

        Classes without images are never drawn; with None, all are drawn evenly.
        """
        self.class_weight_K = None if count_K is None else count_K.float().sqrt().to(next(self.parameters()).device)

    def preprocess(self, images: Sequence[Tensor]) -> ResizedImages:
        """B uint8 images [3, H, W] as one batch."""
        return resize_images(images, self.transform, self.config.max_size)

    def features(self, images: ResizedImages) -> dict[str, Tensor]:
        """Pyramid levels `{"0": [B, F, H / stride, W / stride], ...}`."""
        return {str(index): level for index, level in enumerate(self.pyramid(images.tensors))}

    def propose(self, images: ResizedImages, features: dict[str, Tensor]) -> HeatProposals:
        """Class-agnostic proposals of every image."""
        levels = list(features.values())[-len(self.config.proposals.strides) :]
        heat, distances = self.proposals(levels)
        with torch.no_grad():
            boxes, scores = decode_proposals(heat, distances, self.config.proposals, training=self.training)
        return HeatProposals(boxes, scores, heat, distances)

    def cascade(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[StageOutput]:
        """Outputs of all stages, the first for `boxes`, B tensors [N, 4].

        The regions of every other stage are the boxes that the one before refined, clipped to the image sizes.
        """
        outputs: list[StageOutput] = []
        for stage in self.stages:
            pooled_RF77 = self._pool(features, boxes, 7)
            # Each stage contributes an equal share of the pyramid's gradient (Cascade R-CNN).
            shared = pooled_RF77.detach() + (pooled_RF77 - pooled_RF77.detach()) / len(self.stages)
            output = StageOutput(boxes, *stage(shared))
            outputs.append(output)
            refined = stage.refined(output)  # type: ignore[operator]
            boxes = [clip_boxes_to_image(entry.detach(), size) for entry, size in zip(refined, sizes, strict=True)]
        return outputs

    def stage_embeddings(self, features: dict[str, Tensor], boxes: list[Tensor], images: ResizedImages) -> list[Tensor]:
        """[R, D] embeddings of B tensors of boxes [N, 4] in every stage, images in order."""
        return [output.embeddings for output in self.cascade(features, boxes, images.image_sizes)]

    def mask_logits(self, features: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """[R, 28, 28] mask logits inside B tensors of boxes [N, 4], images in order."""
        return cast(Tensor, self.mask_head(self._pool(features, boxes, 14))[:, 0])

    def _pool(self, features: dict[str, Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        levels = list(features.values())[: len(self.config.strides)]
        return pool_regions(levels, self.config.strides, boxes, size)

    def detection_losses(
        self,
        images: ResizedImages,
        features: dict[str, Tensor],
        proposals: HeatProposals,
        targets: list[dict[str, Tensor]],
        text_KD: Tensor,
    ) -> dict[str, Tensor]:
        """Losses as of `RCNN.detection_losses`; targets may also hold `masks` [N, H, W] bool of the resized image."""
        count, config = len(targets), self.config
        shapes = [(int(level.shape[-2]), int(level.shape[-1])) for level in proposals.heat]
        point_targets = centre_targets([target["boxes"] for target in targets], shapes, config.proposals)
        heat_P = flatten_levels([level[:count] for level in proposals.heat])[:, 0]
        distance_P4 = flatten_levels([level[:count] for level in proposals.distances])
        losses = centre_losses(heat_P, distance_P4, point_targets, config.proposals)
        features, sizes = {name: level[:count] for name, level in features.items()}, images.image_sizes[:count]
        inside = [clip_boxes_to_image(box, size) for box, size in zip(proposals.boxes[:count], sizes, strict=True)]
        sample = sample_regions(self.sampler, inside, targets)
        for index, output in enumerate(self.cascade(features, sample.boxes, sizes)):
            for name, loss in self._stage_losses(index, output, targets, text_KD).items():
                losses[f"{name}_{index}"] = loss
        if config.mask_convs:
            losses["mask"] = self._mask_loss(features, sample.boxes, targets)
        return losses

    def _stage_losses(
        self, index: int, output: StageOutput, targets: list[dict[str, Tensor]], text_KD: Tensor
    ) -> dict[str, Tensor]:
        """Class and box losses of one stage."""
        pairs = [
            match_targets(box, target, self.config.stage_ious[index])
            for box, target in zip(output.boxes, targets, strict=True)
        ]
        label_R, matched_R4 = torch.cat([label for label, _ in pairs]), torch.cat([box for _, box in pairs])
        logits_RK = cosine_logits(output.embeddings, text_KD, self.config.temperature)
        counted_K = None
        if self.config.federated:
            weight_K = self.class_weight_K if self.class_weight_K is not None else text_KD.new_ones(len(text_KD))
            counted_K = federated_classes(label_R, weight_K, self.config.federated)
        objects_R1 = (label_R >= 0)[:, None]
        target_R4 = self.stages[index].coder.encode_single(matched_R4, torch.cat(output.boxes))  # type: ignore[operator, union-attr]
        target_R4 = torch.where(objects_R1, target_R4, output.deltas.detach())  # background has no error
        loss_box = F.l1_loss(output.deltas, target_R4, reduction="sum")
        return {"classes": sigmoid_loss(logits_RK, label_R, counted_K), "box": loss_box / max(1, len(label_R))}

    def _mask_loss(
        self, features: dict[str, Tensor], regions: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> Tensor:
        """Mean binary cross-entropy over the cells of the object regions' masks; 0 if no image has masks."""
        objects, true_masks = [], [regions[0].new_zeros((0, 28, 28), dtype=torch.bool)]
        for box_N4, target in zip(regions, targets, strict=True):
            matched_N = match_boxes(box_N4, target["boxes"], self.config.stage_ious[0])
            rows = (matched_N >= 0) & ("masks" in target)
            objects.append(box_N4[rows])
            if "masks" in target:
                region_N5 = torch.cat((matched_N[rows, None].to(box_N4.dtype), box_N4[rows]), dim=1)
                mask = target["masks"].to(box_N4.dtype)[:, None]
                true_masks.append(roi_align(mask, region_N5, 28, 1.0, sampling_ratio=-1, aligned=True)[:, 0] >= 0.5)
        target_RSS, logits_RSS = torch.cat(true_masks), self.mask_logits(features, objects)
        loss = F.binary_cross_entropy_with_logits(logits_RSS, target_RSS.to(logits_RSS.dtype), reduction="sum")
        return loss / max(1, target_RSS.numel())

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[EncodedRegions]:
        """Regions of uint8 images [3, H, W]; `find` searches them for any names without another forward pass."""
        resized = self.preprocess(images)
        features = self.features(resized)
        proposals = self.propose(resized, features)
        outputs = self.cascade(features, proposals.boxes, resized.image_sizes)
        refined = self.stages[-1].refined(outputs[-1])  # type: ignore[operator]
        stages = [each.embeddings for each in outputs]
        pooled = dict(list(features.items())[: len(self.config.strides)]) if self.config.mask_convs else None
        return split_images(resized, refined, stages, proposals.scores, pooled)

    @torch.no_grad()
    def find(
        self,
        encoded: EncodedRegions,
        vocabulary: Vocabulary,
        *,
        score_threshold: float,
        max_detections: int,
        distinct: bool = False,
        masks: bool = True,
    ) -> Detections:
        """Find the vocabulary's names in an encoded image, with masks if learned and wanted."""
        found, boxes = self.find_boxes(encoded, vocabulary, score_threshold, max_detections, distinct)
        if not (masks and self.config.mask_convs):
            return found
        return with_masks([found], self.mask_logits(encoded.features, [boxes]))[0]

    @torch.no_grad()
    def find_boxes(
        self,
        encoded: EncodedRegions,
        vocabulary: Vocabulary,
        score_threshold: float,
        max_detections: int,
        distinct: bool = False,
    ) -> tuple[Detections, Tensor]:
        """Detections without masks, and their boxes [N, 4] in pixels of the resized image.

        A score is the root of the mean class probability of all stages times the proposal's.
        """
        assert encoded.proposal_scores is not None
        logits_RS = [cosine_logits(each, vocabulary.embeddings, self.config.temperature) for each in encoded.stages]
        stage_SRK = torch.stack([vocabulary.strongest(logits).sigmoid() for logits in logits_RS])
        score_RK = combine_scores(stage_SRK, encoded.proposal_scores)
        selection = Selection(self.config.box_nms, score_threshold, max_detections, distinct)
        (found,), (boxes,) = encoded.sizes.detections([encoded.boxes], [score_RK], vocabulary.names, selection)
        return found, boxes

    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        *,
        score_threshold: float = 0.02,
        max_detections: int = 300,
    ) -> list[Detections]:
        """Find the vocabulary's names in uint8 images [3, H, W]; one `Detections` per image, with masks if learned."""
        return [
            self.find(each, vocabulary, score_threshold=score_threshold, max_detections=max_detections)
            for each in self.encode(images)
        ]


def build_pyramid(config: CenterNet2Config) -> nn.Module:
    """The config's backbone with its levels: P3 to P7, or P2 to P7 for EVA-02."""
    if config.backbone == "eva02":
        return EvaPyramid(config.eva, config.pyramid_channels)
    if config.backbone == "swin":
        return Pyramid(SwinMaps(config.backbone_options), config.pyramid_channels)
    c = config
    backbone = build_backbone(
        c.backbone, c.backbone_options, c.strides, freeze_norm=c.freeze_norm, stride=c.bottleneck_stride
    )
    return Pyramid(TimmMaps(backbone), c.pyramid_channels)


def combine_scores(stage_SRK: Tensor, proposal_R: Tensor) -> Tensor:
    """[S, R, K] class probabilities of S stages, [R] proposal scores -> [R, K]: sqrt(mean over stages * proposal)."""
    return (stage_SRK.mean(0) * proposal_R[:, None]).sqrt()


def match_boxes(box_N4: Tensor, true_M4: Tensor, iou: float) -> Tensor:
    """[N] int64: the true box with the largest overlap, -1 if that is below `iou`."""
    if not len(true_M4):
        return torch.full((len(box_N4),), -1, dtype=torch.int64, device=box_N4.device)
    matched_N: Tensor = Matcher(iou, iou)(box_iou(true_M4, box_N4))
    return matched_N


def match_targets(box_N4: Tensor, target: dict[str, Tensor], iou: float) -> tuple[Tensor, Tensor]:
    """Class [N] (-1: background) and true box [N, 4] of each region; the box is arbitrary for background."""
    matched_N = match_boxes(box_N4, target["boxes"], iou)
    if not len(target["boxes"]):
        return matched_N, box_N4
    rows = matched_N.clamp(min=0)
    return target["labels"][rows].where(matched_N >= 0, -1), target["boxes"][rows]

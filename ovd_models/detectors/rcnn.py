"""Faster and Mask R-CNN with a feature pyramid and a text-embedding classifier, on torchvision's operators.

B images, R regions, N boxes or proposals of one image, K classes, D embedding width, F pyramid channels.
Boxes are xyxy in pixels of the resized image inside this file, of the original image at its borders.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ovd_models.batches import DetectionBatch, Detections
from ovd_models.detectors.backbones import BottleneckStride, build_backbone, feature_info
from ovd_models.detectors.encoded import EncodedRegions, split_images
from ovd_models.detectors.masks import MaskHead
from ovd_models.detectors.region_pool import POOLED, RegionPool
from ovd_models.detectors.resizing import ResizedImages, Selection, annotated_targets, build_transform, resize_images
from ovd_models.detectors.sampling import best_boxes, overlaps, pad, sample_balanced
from ovd_models.errors import InputError
from ovd_models.losses import cosine_logits, sigmoid_loss
from ovd_models.vocabulary import Vocabulary

ASPECT_RATIOS = (0.5, 1.0, 2.0)
Objectness = Literal["label", "overlap"]


@dataclass(frozen=True, kw_only=True)
class RCNNConfig:
    """The detector; the defaults are a small one for 128 px images, trained from scratch."""

    backbone: str = "resnet10t"
    """Any timm model that gives feature maps."""
    backbone_options: dict[str, Any] = field(default_factory=lambda: {"channels": [32, 64, 96, 128], "stem_width": 16})
    """Passed to timm."""
    freeze_norm: bool = False
    """Freeze the backbone's batch norm, as is usual with pretrained weights and small batches."""
    bottleneck_stride: BottleneckStride = "default"
    """The convolution of a bottleneck that takes its stride; pretrained weights decide it."""
    strides: tuple[int, ...] = (4, 8, 16)
    """Strides of the feature maps that enter the pyramid."""
    anchor_sizes: tuple[int, ...] = (16, 32, 64)
    """Anchor side in pixels, one for each pyramid level; one more than `strides` adds a coarser level for proposals
    alone."""
    pyramid_channels: int = 64
    head_convs: int = 0
    """3x3 convolutions of a box head, before its two fully connected layers; with any, all of them have batch norm."""
    head_width: int = 256
    masks: bool = False
    """Predict class-agnostic masks."""
    embed_dim: int = 128
    min_size: int = 128
    """Shorter side of a resized image in pixels ..."""
    max_size: int = 256
    """... unless the longer side would then exceed this."""
    objectness: Objectness = "label"
    """What the proposals' score predicts: whether an anchor is an object (`label`), or how far it overlaps one
    (`overlap`). The latter is learned from anchors near annotated objects alone, so that no object is taken for
    background for want of an annotation (OLN, arXiv 2108.06753, section 3)."""
    rpn_batch_size: int = 128
    pre_nms: int = 300
    """Proposals per level before suppression."""
    post_nms: int = 150
    """Proposals per image after suppression."""
    rois_per_image: int = 64
    """Regions per image that the box and class losses are computed on."""
    roi_samples: int = 2
    """RoIAlign samples per bin and axis."""
    temperature: float = 50.0
    box_beta: float = 1 / 9
    """Transition of the smooth L1 box loss from quadratic to linear."""
    box_nms: float = 0.5

    def __post_init__(self) -> None:
        """Check what the proposals' score predicts."""
        if self.objectness not in get_args(Objectness):
            raise InputError(f"objectness: {self.objectness!r}, expected one of {', '.join(get_args(Objectness))}")


@dataclass(frozen=True)
class Proposals:
    """Output of the proposal network for B images."""

    boxes: list[Tensor]
    """B tensors [N, 4], best first."""
    scores: list[Tensor]
    """B tensors [N] of objectness in [0, 1]."""
    anchors: list[Tensor]
    objectness: Tensor
    """[B * anchors, 1] logits."""
    deltas: Tensor
    """[B * anchors, 4]."""


@dataclass(frozen=True)
class RegionSample:
    """Regions of B images sampled for the second stage, at most a quarter of them objects."""

    boxes: list[Tensor]
    """B tensors [R, 4]."""
    matched: list[Tensor]
    """B tensors [R] int64, the annotated box matched to each region; arbitrary for background."""
    labels: Tensor
    """[sum of R] int64, -1 for background."""
    deltas: Tensor
    """[sum of R, 4] regression targets of the box branch; zeros for background."""
    objects: list[int]
    """Number of objects of each image, which come first among its regions."""


class StridedAnchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors at every stride of pixels of each level, on images whose sides need not be multiples of it.

    torchvision divides the image's side by the map's, which the last partial cell makes smaller than the stride.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], strides: Sequence[int]) -> None:
        super().__init__(sizes, (ASPECT_RATIOS,) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, images: ResizedImages, maps: list[Tensor]) -> list[Tensor]:
        """B times the anchors [H * W * sizes * ratios, 4] of all levels [B, F, H, W]."""
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        steps = [[torch.tensor(stride, device=maps[0].device)] * 2 for stride in self.strides]
        anchors = self.grid_anchors([level.shape[-2:] for level in maps], steps)
        return [torch.cat(anchors)] * len(images.image_sizes)


class ProposalNetwork(nn.Module):
    """The first stage: class-agnostic proposals."""

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__()
        self.config = c = config
        self.transform = build_transform(c.min_size, c.max_size, max(c.strides))
        self.backbone = build_backbone(
            c.backbone,
            c.backbone_options,
            c.strides,
            freeze_norm=c.freeze_norm,
            stride=c.bottleneck_stride,
        )
        coarser = LastLevelMaxPool() if len(c.anchor_sizes) > len(c.strides) else None
        self.pyramid = FeaturePyramidNetwork(feature_info(self.backbone).channels(), c.pyramid_channels, coarser)
        coarser_strides = () if coarser is None else (2 * c.strides[-1],)
        anchors = StridedAnchors(tuple((size,) for size in c.anchor_sizes), (*c.strides, *coarser_strides))
        self.rpn = build_rpn(c, anchors, c.pyramid_channels)

    def preprocess(self, images: Sequence[Tensor]) -> ResizedImages:
        """B uint8 images [3, H, W] as one batch."""
        return resize_images(images, self.transform, self.config.max_size)

    def features(self, images: ResizedImages) -> dict[str, Tensor]:
        """Pyramid levels `{"0": [B, F, H / stride, W / stride], ...}`."""
        maps = self.backbone(images.tensors)
        pyramid = self.pyramid(OrderedDict((str(index), level) for index, level in enumerate(maps)))
        return cast(dict[str, Tensor], pyramid)

    def propose(self, images: ResizedImages, features: dict[str, Tensor]) -> Proposals:
        """Class-agnostic proposals of every image."""
        levels = list(features.values())
        objectness, deltas = self.rpn.head(levels)
        # Boxes are float32 also under autocast: bfloat16 would put them on a grid of pixels.
        anchors = self.rpn.anchor_generator(images, [level[:1, :1].float() for level in levels])
        per_level = [int(level[0].numel()) for level in objectness]
        objectness_flat, deltas_flat = (values.float() for values in concat_box_prediction_layers(objectness, deltas))
        decoded = self.rpn.box_coder.decode(deltas_flat.detach(), anchors).view(len(anchors), -1, 4)
        boxes, scores = self._best_proposals(decoded, objectness_flat.detach(), images, per_level)
        return Proposals(boxes, scores, anchors, objectness_flat, deltas_flat)

    def _best_proposals(
        self, box_BA4: Tensor, objectness: Tensor, images: ResizedImages, per_level: list[int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """B boxes [N, 4] and scores [N] of anchors' boxes and logits, as torchvision's `filter_proposals`."""
        rows, logits, numbers, start = [], [], [], 0
        for number, (part, count) in enumerate(
            zip(torch.split(objectness.view(len(box_BA4), -1), per_level, 1), per_level, strict=True)
        ):
            best = part.topk(min(self.rpn.pre_nms_top_n(), count), dim=1)
            rows.append(best.indices + start)
            logits.append(best.values)
            numbers += [number] * best.indices.shape[1]
            start += count
        limit_B14 = box_BA4.new_tensor([[width, height] * 2 for height, width in images.image_sizes])[:, None]
        box_BN4 = box_BA4.gather(1, torch.cat(rows, 1)[..., None].expand(-1, -1, 4)).clamp(min=0).minimum(limit_B14)
        large_BN = (box_BN4[..., 2:] - box_BN4[..., :2] >= self.rpn.min_size).all(-1)
        level_N = torch.tensor(numbers, device=box_BN4.device)
        score_BN = torch.cat(logits, 1).sigmoid()
        return best_boxes(box_BN4, score_BN, large_BN, level_N, self.rpn.nms_thresh, self.rpn.post_nms_top_n())

    def proposal_losses(self, proposals: Proposals, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of the first `len(targets)` images; targets hold `boxes` [N, 4] in resized pixels."""
        count, anchor_A4 = len(targets), proposals.anchors[0]
        true_BM4, real_BM = pad([target["boxes"] for target in targets])
        iou_BMA = overlaps(true_BM4, real_BM, anchor_A4.expand(count, -1, -1))
        best_BA, matched_BA = iou_BMA.max(1)
        # Each true box has at least one anchor: those of its largest overlap (Faster R-CNN, section 3.1.2).
        closest_BA = ((iou_BMA == iou_BMA.amax(2, keepdim=True)) & real_BM[..., None]).any(1)
        matcher, graded = self.rpn.proposal_matcher, self.config.objectness == "overlap"
        positive_BA = closest_BA | (best_BA >= (matcher.low_threshold if graded else matcher.high_threshold))
        negative_BA = ~positive_BA & (best_BA < matcher.low_threshold) & (not graded)
        row_BS, valid_BS = sample_balanced(positive_BA, negative_BA, self.config.rpn_batch_size, 1.0 if graded else 0.5)
        logit_BS = proposals.objectness.view(-1, len(anchor_A4))[:count].gather(1, row_BS)
        object_BS = positive_BA.gather(1, row_BS) & valid_BS
        score_BS = best_BA.gather(1, row_BS) if graded else object_BS.float()
        entropy_BS = F.binary_cross_entropy_with_logits(logit_BS, score_BS, valid_BS.float(), reduction="none")
        row_BS4 = row_BS[..., None].expand(-1, -1, 4)
        delta_R4 = proposals.deltas.view(-1, len(anchor_A4), 4)[:count].gather(1, row_BS4).flatten(0, 1)
        matched_BS4 = true_BM4.gather(1, matched_BA.gather(1, row_BS)[..., None].expand(-1, -1, 4))
        target_R4 = self.rpn.box_coder.encode_single(matched_BS4.flatten(0, 1), anchor_A4[row_BS].flatten(0, 1))
        target_R4 = torch.where(object_BS.flatten()[:, None], target_R4, delta_R4.detach())
        box_loss = F.smooth_l1_loss(delta_R4, target_R4, beta=1 / 9, reduction="sum")
        sampled = valid_BS.sum().clamp(min=1)
        return {"objectness": entropy_BS.sum() / sampled, "rpn_box": box_loss / sampled}

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Weighted losses of one step; labels are not used."""
        images = self.preprocess(batch.images)
        proposals = self.propose(images, self.features(images))
        return self.proposal_losses(proposals, annotated_targets(batch, images))

    @torch.no_grad()
    def find_proposals(self, images: Sequence[Tensor], limit: int) -> list[tuple[Tensor, Tensor]]:
        """Boxes [N, 4] in pixels of each uint8 image [3, H, W] and their objectness [N], the best `limit` at most."""
        resized = self.preprocess(images)
        proposals = self.propose(resized, self.features(resized))
        boxes = resized.original_boxes([entry[:limit] for entry in proposals.boxes])
        return [(box, scores[:limit]) for box, scores in zip(boxes, proposals.scores, strict=True)]


class RCNN(ProposalNetwork):
    """A two-stage detector that classifies by any text embeddings."""

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__(config)
        c = config
        box_head = build_box_head(c.pyramid_channels, c.head_width, c.head_convs)
        self.roi = build_roi_heads(c.rois_per_image, RegionPool(c.strides, POOLED, c.roi_samples), box_head)
        self.box_deltas = build_box_deltas(c.head_width)
        self.projection = nn.Linear(c.head_width, c.embed_dim)
        if c.masks:
            self.mask_head = MaskHead(c.pyramid_channels, c.strides, c.roi_samples)

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """[R, head_width] features of B tensors of boxes [N, 4], images in order."""
        return cast(Tensor, self.roi.box_head(self.roi.box_roi_pool(features, boxes)))

    def stage_embeddings(self, features: dict[str, Tensor], boxes: list[Tensor], _: ResizedImages) -> list[Tensor]:
        """[R, D] embeddings of B tensors of boxes [N, 4] in the only stage, images in order."""
        return [self.projection(self.region_features(features, boxes))]

    def detection_losses(
        self,
        images: ResizedImages,
        features: dict[str, Tensor],
        proposals: Proposals,
        targets: list[dict[str, Tensor]],
        text_KD: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the first `len(targets)` images of the batch, which are those with boxes.

        Args:
            images: the batch.
            features: pyramid levels of all images.
            proposals: of all images.
            targets: `boxes` [N, 4] in resized pixels and `labels` [N], rows of `text_KD`.
            text_KD: [K, D] unit rows of the annotated categories.
        """
        count = len(targets)
        losses = self.proposal_losses(proposals, targets)
        sample = sample_regions(self.roi, proposals.boxes[:count], targets)
        region_RF = self.region_features({name: level[:count] for name, level in features.items()}, sample.boxes)
        logits_RK = cosine_logits(self.projection(region_RF), text_KD, self.config.temperature)
        return losses | {"classes": sigmoid_loss(logits_RK, sample.labels), "box": self.box_loss(region_RF, sample)}

    def box_loss(self, region_RF: Tensor, sample: RegionSample) -> Tensor:
        """Smooth L1 of the class-agnostic box branch on objects, averaged over all regions."""
        predicted_R4, objects_R1 = self.box_deltas(region_RF).float(), (sample.labels >= 0)[:, None]
        target_R4 = torch.where(objects_R1, sample.deltas, predicted_R4.detach())  # background has no error
        loss = F.smooth_l1_loss(predicted_R4, target_R4, beta=self.config.box_beta, reduction="sum")
        return loss / max(1, len(sample.labels))

    def refine(self, region_RF: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        """The boxes of each image, refined by the box branch."""
        deltas_R4 = self.box_deltas(region_RF).float()  # bfloat16 has no pixels beyond 256
        refined = self.roi.box_coder.decode(deltas_R4, boxes).view(-1, 4)
        return list(torch.split(refined, [len(entry) for entry in boxes]))

    @torch.no_grad()
    def encode(self, images: Sequence[Tensor]) -> list[EncodedRegions]:
        """Regions of uint8 images [3, H, W]; `find` searches them for any names without another forward pass."""
        resized = self.preprocess(images)
        features = self.features(resized)
        boxes = self.propose(resized, features).boxes
        region_RF = self.region_features(features, boxes)
        return split_images(resized, self.refine(region_RF, boxes), [self.projection(region_RF)], None, None)

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
        """Find the vocabulary's names in an encoded image; there are no masks, wanted or not."""
        logits_RS = cosine_logits(encoded.stages[0], vocabulary.embeddings, self.config.temperature)
        scores_RK = vocabulary.strongest(logits_RS).sigmoid()
        selection = Selection(self.config.box_nms, score_threshold, max_detections, distinct)
        return encoded.sizes.detections([encoded.boxes], [scores_RK], vocabulary.names, selection)[0][0]

    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Find the vocabulary's names in uint8 images [3, H, W]; one `Detections` per image."""
        return [
            self.find(each, vocabulary, score_threshold=score_threshold, max_detections=max_detections)
            for each in self.encode(images)
        ]


def build_rpn(
    config: RCNNConfig, anchors: AnchorGenerator, channels: int, training_factor: int = 1
) -> RegionProposalNetwork:
    """Torchvision's proposal network, with `training_factor` times as many proposals in training."""
    pre_nms, post_nms = (
        {"training": training_factor * count, "testing": count} for count in (config.pre_nms, config.post_nms)
    )
    head = RPNHead(channels, anchors.num_anchors_per_location()[0])
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, config.rpn_batch_size, 0.5, pre_nms, post_nms, 0.7)


def build_roi_heads(
    rois_per_image: int, pool: nn.Module | None = None, box_head: nn.Module | None = None, iou: float = 0.5
) -> RoIHeads:
    """Torchvision's sampling of regions and box coding; classification and inference are ours."""
    return RoIHeads(pool, box_head, None, iou, iou, rois_per_image, 0.25, None, 0.0, 0.5, 100)


def sample_regions(heads: RoIHeads, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> RegionSample:
    """Sample regions of each image from its proposals [N, 4] and the annotated `boxes` and `labels` of `targets`."""
    true_BM4, real_BM = pad([target["boxes"] for target in targets])
    label_BM, _ = pad([target["labels"] for target in targets])
    pairs = zip(proposals, targets, strict=True)
    candidate_BN4, valid_BN = pad([torch.cat((boxes.detach(), target["boxes"])) for boxes, target in pairs])
    best_BN, matched_BN = overlaps(true_BM4, real_BM, candidate_BN4).max(1)
    object_BN = (best_BN >= heads.proposal_matcher.high_threshold) & valid_BN
    sampler = heads.fg_bg_sampler
    row_BS, used_BS = sample_balanced(
        object_BN, ~object_BN & valid_BN, sampler.batch_size_per_image, sampler.positive_fraction
    )
    box_BS4 = candidate_BN4.gather(1, row_BS[..., None].expand(-1, -1, 4))
    matched_BS, object_BS = matched_BN.gather(1, row_BS), object_BN.gather(1, row_BS)
    true_BS4 = true_BM4.gather(1, matched_BS[..., None].expand(-1, -1, 4))
    label_BS = torch.where(object_BS, label_BM.gather(1, matched_BS), -1)
    delta_R4 = heads.box_coder.encode_single(true_BS4.flatten(0, 1), box_BS4.flatten(0, 1))
    delta_BS4 = torch.where(object_BS[..., None], delta_R4.view_as(box_BS4), 0.0)
    counts, objects = torch.stack((used_BS.sum(1), (object_BS & used_BS).sum(1))).tolist()  # the only wait

    def used(values_BS: Tensor) -> list[Tensor]:
        return [row[:count] for row, count in zip(values_BS, counts, strict=True)]

    return RegionSample(used(box_BS4), used(matched_BS), torch.cat(used(label_BS)), torch.cat(used(delta_BS4)), objects)


def build_box_head(channels: int, width: int, convs: int) -> nn.Module:
    """[R, channels, 7, 7] -> [R, width]: any number of 3x3 convolutions, then two fully connected layers.

    With convolutions, every layer has batch norm, as in ViLD (4conv + 2FC).
    """
    if not convs:
        return cast(nn.Module, TwoMLPHead(channels * POOLED**2, width))
    layers: list[nn.Module] = [Conv2dNormActivation(channels, channels) for _ in range(convs)]
    layers.append(nn.Flatten())
    for inputs in (channels * POOLED**2, width):
        layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build_box_deltas(width: int) -> nn.Sequential:
    """[R, width] features -> [R, 4] class-agnostic box displacements."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

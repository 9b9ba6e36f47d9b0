"""Faster and Mask R-CNN with a feature pyramid and a text-embedding classifier, on torchvision's operators.

B images, R regions, N boxes or proposals of one image, K classes, D embedding width, F pyramid channels.
Boxes are xyxy in pixels of the resized image inside this file, of the original image at its borders.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torchvision
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, batched_nms, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ovd_models.batches import DetectionBatch, Detections
from ovd_models.detectors.heads import POOLED, MaskHead, build_box_head
from ovd_models.detectors.region_pool import RegionPool
from ovd_models.errors import InputError
from ovd_models.losses import cosine_logits, sigmoid_loss
from ovd_models.vocabulary import Vocabulary

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class RCNNConfig:
    """The detector; the defaults are a small one for 128 px images, trained from scratch."""

    backbone: str = "resnet10t"
    """Any timm model that gives feature maps."""
    backbone_options: dict[str, Any] = field(default_factory=lambda: {"channels": [32, 64, 96, 128], "stem_width": 16})
    """Passed to timm."""
    freeze_norm: bool = False
    """Freeze the backbone's batch norm, as is usual with pretrained weights and small batches."""
    strides: tuple[int, ...] = (4, 8, 16)
    """Feature maps that enter the pyramid."""
    anchor_sizes: tuple[int, ...] = (16, 32, 64)
    """Anchor side in pixels, one a pyramid level; one more than `strides` adds a coarser level for proposals alone."""
    pyramid_channels: int = 64
    head_convs: int = 0
    """3x3 convolutions of a box head, before its two fully connected layers; with any, all of them have batch norm."""
    head_width: int = 256
    masks: bool = False
    """Predict class-agnostic masks."""
    embed_dim: int = 128
    min_size: int = 128
    """Images are resized so that their shorter side has this many pixels ..."""
    max_size: int = 256
    """... but the longer one no more than this."""
    rpn_batch_size: int = 128
    pre_nms: int = 300
    """Proposals a level before suppression."""
    post_nms: int = 150
    """Proposals an image after it."""
    rois_per_image: int = 64
    """Regions of an image that the box and class losses are taken over."""
    roi_samples: int = 2
    """RoIAlign's samples a bin and axis."""
    temperature: float = 50.0
    box_beta: float = 1 / 9
    """Where the smooth L1 box loss turns linear."""
    box_nms: float = 0.5


@dataclass(frozen=True)
class Proposals:
    """What the proposal network says about B images."""

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
    """Regions of B images drawn for the second stage, a quarter of them objects."""

    boxes: list[Tensor]
    """B tensors [R, 4]."""
    matched: list[Tensor]
    """B tensors [R] int64, the annotated box that each region stands for; any where it is background."""
    labels: Tensor
    """[sum of R] int64, -1 for background."""
    deltas: Tensor
    """[sum of R, 4] what the box branch should answer."""


class ProposalNetwork(nn.Module):
    """The first stage: where things may be, whatever they are."""

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.transform = GeneralizedRCNNTransform(
            c.min_size, c.max_size, list(IMAGENET_MEAN), list(IMAGENET_STD), size_divisible=max(c.strides)
        )
        self.backbone = build_backbone(c)
        coarser = LastLevelMaxPool() if len(c.anchor_sizes) > len(c.strides) else None
        self.pyramid = FeaturePyramidNetwork(feature_info(self.backbone).channels(), c.pyramid_channels, coarser)
        anchors = AnchorGenerator(tuple((size,) for size in c.anchor_sizes), ((0.5, 1.0, 2.0),) * len(c.anchor_sizes))
        top_n = {"training": c.pre_nms, "testing": c.pre_nms}
        keep_n = {"training": c.post_nms, "testing": c.post_nms}
        head = RPNHead(c.pyramid_channels, anchors.num_anchors_per_location()[0])
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, c.rpn_batch_size, 0.5, top_n, keep_n, 0.7)

    def preprocess(self, images: Sequence[Tensor]) -> ImageList:
        """B uint8 images [3, H, W] -> one padded, normalised batch with the sizes before padding."""
        batch, _ = self.transform([image.float() / 255 for image in images])
        return batch

    def features(self, batch: ImageList) -> dict[str, Tensor]:
        """Pyramid levels `{"0": [B, F, H / stride, W / stride], ...}`."""
        maps = self.backbone(batch.tensors)
        pyramid = self.pyramid(OrderedDict((str(index), level) for index, level in enumerate(maps)))
        return cast(dict[str, Tensor], pyramid)

    def propose(self, batch: ImageList, features: dict[str, Tensor]) -> Proposals:
        """Class-agnostic proposals of every image."""
        levels = list(features.values())
        objectness, deltas = self.rpn.head(levels)
        # Boxes are float32 also under autocast: bfloat16 would put them on a grid of pixels.
        anchors = self.rpn.anchor_generator(batch, [level[:1, :1].float() for level in levels])
        per_level = [int(level[0].numel()) for level in objectness]
        objectness_flat, deltas_flat = (values.float() for values in concat_box_prediction_layers(objectness, deltas))
        decoded = self.rpn.box_coder.decode(deltas_flat.detach(), anchors).view(len(anchors), -1, 4)
        boxes, scores = self.rpn.filter_proposals(decoded, objectness_flat, batch.image_sizes, per_level)
        return Proposals(boxes, scores, anchors, objectness_flat, deltas_flat)

    def proposal_losses(self, proposals: Proposals, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Losses of the first `len(targets)` images, `boxes` [N, 4] of each in resized pixels."""
        count = len(targets)
        num_anchors = len(proposals.anchors[0])
        assigned, matched = self.rpn.assign_targets_to_anchors(proposals.anchors[:count], targets)
        regression = self.rpn.box_coder.encode(matched, proposals.anchors[:count])
        loss_objectness, loss_rpn_box = self.rpn.compute_loss(
            proposals.objectness[: count * num_anchors], proposals.deltas[: count * num_anchors], assigned, regression
        )
        return {"objectness": loss_objectness, "rpn_box": loss_rpn_box}

    def forward(self, batch: DetectionBatch) -> dict[str, Tensor]:
        """Weighted losses of one step; labels take no part."""
        images, targets = self.resized(batch)
        return self.proposal_losses(self.propose(images, self.features(images)), targets)

    def resized(self, batch: DetectionBatch) -> tuple[ImageList, list[dict[str, Tensor]]]:
        """The images as the backbone takes them, and their `boxes` and `labels` in resized pixels."""
        images = [widen(image, self.config.max_size) for image in batch.images]
        sized = self.preprocess(images)
        targets = [
            {"boxes": resize_boxes(box, list(image.shape[-2:]), list(size)), "labels": label}
            for image, box, label, size in zip(images, batch.boxes, batch.labels, sized.image_sizes, strict=True)
        ]
        return sized, targets

    @torch.no_grad()
    def find_proposals(self, images: Sequence[Tensor], limit: int) -> list[tuple[Tensor, Tensor]]:
        """Boxes [N, 4] in pixels of each uint8 image [3, H, W] and their objectness [N]: the best, at most `limit`."""
        padded = [widen(image, self.config.max_size) for image in images]
        batch = self.preprocess(padded)
        proposals = self.propose(batch, self.features(batch))
        return [
            (restore_boxes(boxes[:limit], image, wide, size), scores[:limit])
            for image, wide, size, boxes, scores in zip(
                images, padded, batch.image_sizes, proposals.boxes, proposals.scores, strict=True
            )
        ]


class RCNN(ProposalNetwork):
    """A two-stage detector whose classes are whatever text embeddings it is given."""

    def __init__(self, config: RCNNConfig) -> None:
        super().__init__(config)
        c = config
        pool = RegionPool(c.strides, POOLED, c.roi_samples)
        # RoIHeads gives the sampling of regions and the box coding; classification is ours, below.
        box_head = build_box_head(c.pyramid_channels, c.head_width, c.head_convs)
        self.roi = RoIHeads(
            pool, box_head, None, 0.5, 0.5, c.rois_per_image, 0.25, None, 0.0, c.box_nms, 100
        )  # fmt: skip
        self.box_deltas = nn.Sequential(nn.Linear(c.head_width, c.head_width), nn.ReLU(), nn.Linear(c.head_width, 4))
        self.projection = nn.Linear(c.head_width, c.embed_dim)
        if c.masks:
            self.mask_head = MaskHead(c.pyramid_channels, c.strides, c.roi_samples)

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor], batch: ImageList) -> Tensor:
        """[R, head_width] features of boxes of each image, images in order."""
        pooled = self.roi.box_roi_pool(features, boxes, batch.image_sizes)
        return cast(Tensor, self.roi.box_head(pooled))

    def detection_losses(
        self,
        batch: ImageList,
        features: dict[str, Tensor],
        proposals: Proposals,
        targets: list[dict[str, Tensor]],
        text_KD: Tensor,
    ) -> dict[str, Tensor]:
        """Losses of the first `len(targets)` images of the batch, which are those with boxes.

        Args:
            batch: all images.
            features: their pyramid.
            proposals: of all images.
            targets: `boxes` [N, 4] in resized pixels and `labels` [N], rows of `text_KD`.
            text_KD: [K, D] unit rows of the categories that boxes are annotated with.
        """
        count = len(targets)
        losses = self.proposal_losses(proposals, targets)
        sample = self.sample_regions(proposals.boxes[:count], targets)
        own = {name: level[:count] for name, level in features.items()}
        sizes = ImageList(batch.tensors[:count], batch.image_sizes[:count])
        region_RF = self.region_features(own, sample.boxes, sizes)
        logits_RK = cosine_logits(self.projection(region_RF), text_KD, self.config.temperature)
        return losses | {"classes": sigmoid_loss(logits_RK, sample.labels), "box": self.box_loss(region_RF, sample)}

    def sample_regions(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> RegionSample:
        """Draw regions of each image from its proposals and annotated boxes, `boxes` and `labels` of `targets`."""
        # RoIHeads counts background as class 0.
        shifted = [{"boxes": target["boxes"], "labels": target["labels"] + 1} for target in targets]
        boxes, matched, labels, deltas = self.roi.select_training_samples(list(proposals), shifted)
        return RegionSample(boxes, matched, torch.cat(labels) - 1, torch.cat(deltas))

    def box_loss(self, region_RF: Tensor, sample: RegionSample) -> Tensor:
        """Smooth L1 of the class-agnostic box branch on objects, averaged over all regions."""
        foreground = sample.labels >= 0
        loss = F.smooth_l1_loss(
            self.box_deltas(region_RF)[foreground],
            sample.deltas[foreground],
            beta=self.config.box_beta,
            reduction="sum",
        )
        return loss / max(1, len(sample.labels))

    def refine(self, region_RF: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        """The boxes of each image, moved by the box branch."""
        deltas_R4 = self.box_deltas(region_RF)
        moved = self.roi.box_coder.decode(deltas_R4, boxes).view(-1, 4)
        return list(torch.split(moved, [len(entry) for entry in boxes]))

    @torch.no_grad()
    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Find the vocabulary's names in uint8 images [3, H, W]; one `Detections` an image."""
        padded = [widen(image, self.config.max_size) for image in images]
        batch = self.preprocess(padded)
        features = self.features(batch)
        boxes = self.propose(batch, features).boxes
        counts = [len(entry) for entry in boxes]
        region_RF = self.region_features(features, boxes, batch)
        refined = self.refine(region_RF, boxes)
        logits_RS = cosine_logits(self.projection(region_RF), vocabulary.embeddings, self.config.temperature)
        logits_RK = vocabulary.strongest(logits_RS)
        found = []
        for image, wide, size, box_N4, score_NK in zip(
            images, padded, batch.image_sizes, refined, torch.split(logits_RK.sigmoid(), counts), strict=True
        ):
            kept_boxes, scores, labels = select_detections(
                clip_boxes_to_image(box_N4, size), score_NK, score_threshold, self.config.box_nms, max_detections
            )
            height, width = (int(side) for side in image.shape[-2:])
            restored = restore_boxes(kept_boxes, image, wide, size)
            found.append(Detections(restored, scores, labels, vocabulary.names, width, height))
        return found


def restore_boxes(box_N4: Tensor, image: Tensor, wide: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes of an image resized to `size` as pixels of the image itself, which `widen` made `wide` before that."""
    if len(box_N4):
        box_N4 = resize_boxes(box_N4, list(size), list(wide.shape[-2:]))
    height, width = (int(side) for side in image.shape[-2:])
    return cast(Tensor, clip_boxes_to_image(box_N4, (height, width)))


def widen(image: Tensor, max_size: int) -> Tensor:
    """Pad the shorter side of an extremely long image at its end, so that resizing leaves it at least one pixel."""
    height, width = image.shape[-2:]
    least = math.ceil(2 * max(height, width) / max_size)
    return F.pad(image, (0, max(0, least - width), 0, max(0, least - height)))


def build_backbone(config: RCNNConfig) -> nn.Module:
    """A timm feature extractor with the config's strides."""
    options = config.backbone_options
    everything = timm.create_model(config.backbone, features_only=True, **options)
    reductions = feature_info(everything).reduction()
    indices = tuple(reductions.index(stride) for stride in config.strides)
    backbone = timm.create_model(config.backbone, features_only=True, out_indices=indices, **options)
    return cast(nn.Module, freeze_batch_norm_2d(backbone)) if config.freeze_norm else backbone  # type: ignore[no-untyped-call]


def find_backbone_weights(backbone: str, weights: str) -> dict[str, Tensor] | None:
    """A pretrained state dict for a backbone.

    Args:
        backbone: its name.
        weights: `auto` (torchvision's file, when an earlier download left it on this machine), `none`, or a file.

    Raises:
        InputError: the given file cannot be read as a state dict.
    """
    if weights == "none":
        return None
    path = Path(weights)
    if weights == "auto":
        if backbone not in torchvision.models.list_models(torchvision.models):
            return None
        file = torchvision.models.get_model_weights(backbone).DEFAULT.url.rsplit("/", 1)[-1]
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        if not path.is_file():
            return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}), expected a state dict of {backbone}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected a state dict of {backbone}: names and tensors")
    return state


def load_backbone(detector: ProposalNetwork, state: dict[str, Tensor]) -> None:
    """Load a classifier's state dict into the backbone, its classifier left out.

    Raises:
        InputError: a weight of the backbone is missing or of another shape.
    """
    wanted = detector.backbone.state_dict()
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state or state[name].shape != value.shape:
            found = list(state[name].shape) if name in state else "nothing"
            raise InputError(f"backbone weight {name}: found {found}, expected shape {list(value.shape)}")
    detector.backbone.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)


def feature_info(backbone: nn.Module) -> FeatureInfo:
    """What timm says about a feature extractor's maps."""
    return cast(FeatureInfo, backbone.feature_info)


def select_detections(
    box_N4: Tensor, score_NK: Tensor, threshold: float, nms: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best (box, class) pairs after suppression within each class.

    Returns:
        Boxes [M, 4], scores [M] and classes [M], best first, at most `limit`.
    """
    region, label = torch.nonzero(score_NK > threshold, as_tuple=True)
    score = score_NK[region, label]
    if len(score) > 20 * limit:  # suppression is quadratic: hopeless candidates are dropped first
        best = score.topk(20 * limit).indices
        region, label, score = region[best], label[best], score[best]
    keep = batched_nms(box_N4[region], score, label, nms)[:limit]
    return box_N4[region[keep]], score[keep], label[keep]

"""Faster R-CNN on the backbone's fourth stage, the fifth as its head: R50-C4, CoDet's and Detic's OV-COCO detector.

B images, R regions, N boxes of one image, F channels of a region. Boxes are xyxy in pixels of the resized image.
"""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from ovd_models.detectors.feature_pyramid import pool_regions
from ovd_models.detectors.rcnn import IMAGENET_MEAN, RCNN, RCNNConfig, build_backbone, feature_info

ASPECT_RATIOS = (0.5, 1.0, 2.0)


def coco_r50_c4() -> RCNNConfig:
    """The published OV-COCO detector."""
    return RCNNConfig(
        backbone="resnet50",
        backbone_options={},
        freeze_norm=True,
        strides=(16,),
        anchor_sizes=(32, 64, 128, 256, 512),
        head_width=2048,
        embed_dim=512,
        min_size=800,
        max_size=1333,
        rpn_batch_size=256,
        pre_nms=6000,
        post_nms=1000,
        rois_per_image=512,
        box_beta=0.0,
    )


class C4(RCNN):
    """`RCNN` without a pyramid: one map of stride 16, anchors of all sizes on it, and the last stage as region head.

    Everything else, losses and detection included, is `RCNN`'s. The config's `strides` has one entry, `head_width` is
    the last stage's width, and in training there are twice as many proposals as its `pre_nms` and `post_nms`.
    """

    def __init__(self, config: RCNNConfig) -> None:
        nn.Module.__init__(self)  # none of RCNN's parts, but the same names for ours
        self.config = c = config
        # Pixels from 0 to 255 less their mean, as the ImageNet weights of this detector were trained.
        self.transform = GeneralizedRCNNTransform(c.min_size, c.max_size, list(IMAGENET_MEAN), [1 / 255] * 3, 1)
        self.backbone = build_backbone(config)
        self.res5 = last_stage(config)
        channels = feature_info(self.backbone).channels()[0]
        anchors = AnchorGenerator((c.anchor_sizes,), (ASPECT_RATIOS,))
        anchors.cell_anchors = [cell_anchors(c.anchor_sizes)]
        pre_nms = {"training": 2 * c.pre_nms, "testing": c.pre_nms}
        post_nms = {"training": 2 * c.post_nms, "testing": c.post_nms}
        head = RPNHead(channels, len(c.anchor_sizes) * len(ASPECT_RATIOS))
        self.rpn = RegionProposalNetwork(anchors, head, 0.7, 0.3, c.rpn_batch_size, 0.5, pre_nms, post_nms, 0.7)
        self.roi = RoIHeads(None, None, None, 0.5, 0.5, c.rois_per_image, 0.25, None, 0.0, c.box_nms, 100)
        self.box_deltas = nn.Sequential(nn.Linear(c.head_width, c.head_width), nn.ReLU(), nn.Linear(c.head_width, 4))
        self.projection = nn.Linear(c.head_width, c.embed_dim)
        for stage in (self.backbone, self.res5):
            stride_in_first_convolution(stage)

    def features(self, batch: ImageList) -> dict[str, Tensor]:
        """`{"0": [B, F, H / 16, W / 16]}`."""
        return {"0": self.backbone(batch.tensors)[0]}

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor], batch: ImageList) -> Tensor:
        """[R, head_width] features of boxes of each image, images in order."""
        pooled_RF14 = pool_regions([features["0"]], self.config.strides, boxes, 14)
        return torch.as_tensor(self.res5(pooled_RF14).mean((2, 3)))


def last_stage(config: RCNNConfig) -> nn.Module:
    """The stage of the config's ResNet that the region head is made of."""
    stage: Any = timm.create_model(config.backbone, num_classes=0, **config.backbone_options).layer4
    return freeze_batch_norm_2d(stage) if config.freeze_norm else stage  # type: ignore[no-untyped-call, no-any-return]


def stride_in_first_convolution(stage: nn.Module) -> None:
    """Let a bottleneck's 1 x 1 convolution take the stride, as in the original ResNet; timm has it in the 3 x 3."""
    for block in stage.modules():
        if isinstance(block, Bottleneck) and block.conv2.stride != (1, 1):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


def cell_anchors(sizes: Sequence[int]) -> Tensor:
    """[sizes * ratios, 4] anchors around the origin, size after size; torchvision rounds and orders them otherwise."""
    ratio_A = torch.tensor(ASPECT_RATIOS).repeat(len(sizes))
    size_A = torch.tensor(sizes, dtype=torch.float32).repeat_interleave(len(ASPECT_RATIOS))
    width_A = size_A / ratio_A.sqrt()
    half_A2 = torch.stack((width_A, width_A * ratio_A), dim=1) / 2
    return torch.cat((-half_A2, half_A2), dim=1)

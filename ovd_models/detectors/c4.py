"""Faster R-CNN on the backbone's fourth stage, with the fifth as head: R50-C4, CoDet's and Detic's OV-COCO detector.

B images, R regions, N boxes of one image, F channels of a region. Boxes are xyxy in pixels of the resized image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovd_models.detectors.backbones import BottleneckStride, build_backbone, build_last_stage, feature_info
from ovd_models.detectors.feature_pyramid import pool_regions
from ovd_models.detectors.rcnn import (
    ASPECT_RATIOS,
    RCNN,
    RCNNConfig,
    StridedAnchors,
    build_box_deltas,
    build_roi_heads,
    build_rpn,
)
from ovd_models.detectors.resizing import ResizedImages, build_transform


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
    the last stage's width, and training uses twice as many proposals as its `pre_nms` and `post_nms`.
    """

    def __init__(self, config: RCNNConfig) -> None:
        nn.Module.__init__(self)  # replaces all of RCNN's parts under the same names
        self.config = c = config
        # Pixels from 0 to 255 minus their mean, as released detectors of this kind take them.
        self.transform = build_transform(c.min_size, c.max_size, 1, std=(1 / 255,) * 3)
        stride: BottleneckStride = "1x1" if c.bottleneck_stride == "default" else c.bottleneck_stride
        self.backbone = build_backbone(
            c.backbone, c.backbone_options, c.strides, freeze_norm=c.freeze_norm, stride=stride
        )
        self.res5 = build_last_stage(c.backbone, c.backbone_options, freeze_norm=c.freeze_norm, stride=stride)
        anchors = StridedAnchors((tuple(c.anchor_sizes),), c.strides)
        anchors.cell_anchors = [cell_anchors(c.anchor_sizes)]
        self.rpn = build_rpn(c, anchors, feature_info(self.backbone).channels()[0], training_factor=2)
        self.roi = build_roi_heads(c.rois_per_image)
        self.box_deltas = build_box_deltas(c.head_width)
        self.projection = nn.Linear(c.head_width, c.embed_dim)

    def features(self, images: ResizedImages) -> dict[str, Tensor]:
        """`{"0": [B, F, H / 16, W / 16]}`."""
        return {"0": self.backbone(images.tensors)[0]}

    def region_features(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """[R, head_width] features of B tensors of boxes [N, 4], images in order."""
        pooled_RF14 = pool_regions([features["0"]], self.config.strides, boxes, 14)
        return torch.as_tensor(self.res5(pooled_RF14).mean((2, 3)))


def cell_anchors(sizes: Sequence[int]) -> Tensor:
    """[sizes * ratios, 4] anchors around the origin, by size, then by ratio; torchvision's are rounded and by ratio."""
    ratio_A = torch.tensor(ASPECT_RATIOS).repeat(len(sizes))
    size_A = torch.tensor(sizes, dtype=torch.float32).repeat_interleave(len(ASPECT_RATIOS))
    width_A = size_A / ratio_A.sqrt()
    half_A2 = torch.stack((width_A, width_A * ratio_A), dim=1) / 2
    return torch.cat((-half_A2, half_A2), dim=1)

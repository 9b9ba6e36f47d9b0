"""Detectors that configs of several methods share."""

from ovd_models.detectors.rcnn import RCNNConfig


def photo_detector() -> RCNNConfig:
    """A ResNet-50 with its batch norm frozen, for small photographs."""
    return RCNNConfig(
        backbone="resnet50",
        backbone_options={},
        strides=(4, 8, 16, 32),
        anchor_sizes=(32, 64, 128, 256),
        pyramid_channels=128,
        head_width=512,
        embed_dim=512,
        min_size=256,
        max_size=416,
        pre_nms=1000,
        post_nms=300,
    )

"""A CenterNet2 that a CPU runs in milliseconds, and whose sizes each test sets."""

from ovd_models.detectors.centernet import CenterNetConfig
from ovd_models.detectors.centernet2 import CenterNet2Config

TINY_CENTERNET2 = CenterNet2Config(
    backbone="resnet10t",
    backbone_options={"channels": [8, 16, 24, 32], "stem_width": 8},
    freeze_norm=False,
    pyramid_channels=64,
    proposals=CenterNetConfig(num_convs=1, pre_nms=(100, 60), post_nms=(50, 30)),
    head_width=32,
    mask_convs=1,
)

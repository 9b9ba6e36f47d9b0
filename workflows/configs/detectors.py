"""Detectors, and released backbones, that configs share."""

import dataclasses

from ovd_models.detectors.rcnn import RCNNConfig
from workflows.common.starting_weights import PublishedBackbone

RESNET50 = PublishedBackbone(
    # The first weights, which torchvision's own detectors start from too.
    url="https://download.pytorch.org/models/resnet50-0676ba61.pth",
    backbone="resnet50",
    trained_on="ImageNet",
    timm_name="resnet50.tv_in1k",
)
RESNET152 = PublishedBackbone(
    url="https://download.pytorch.org/models/resnet152-394f9c45.pth",
    backbone="resnet152",
    trained_on="ImageNet",
    timm_name="resnet152.tv_in1k",
)
DETIC = "https://dl.fbaipublicfiles.com/detic/"
MSRA_RESNET50 = PublishedBackbone(
    url="https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl",
    backbone="resnet50",
    trained_on="ImageNet",
    required=True,
    box_model_url=f"{DETIC}BoxSup_OVCOCO_CLIP_R50_1x.pth",
)
MIIL_RESNET50 = PublishedBackbone(
    url="https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ImageNet_21K_P/models/resnet50_miil_21k.pth",
    backbone="resnet50",
    trained_on="ImageNet-21k",
    required=True,
    box_model_url=f"{DETIC}BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth",
)
SWIN_B = PublishedBackbone(
    url="https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth",
    backbone="swin",
    trained_on="ImageNet-22k",
    timm_name="swin_base_patch4_window7_224.ms_in22k",
    required=True,
    box_model_url=f"{DETIC}BoxSup-C2_Lbase_CLIP_SwinB_896b32_4x.pth",
)
EVA02_L = PublishedBackbone(
    url="https://huggingface.co/Yuxin-CV/EVA-02/resolve/main/eva02/pt/eva02_L_pt_m38m_p14to16.pt",
    backbone="eva02",
    trained_on="masked image modelling",
    timm_name="eva02_large_patch14_224.mim_m38m",
    required=True,
)
SEGMENT_ANYTHING = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_VIT_B = PublishedBackbone(url=f"{SEGMENT_ANYTHING}sam_vit_b_01ec64.pth", trained_on="SA-1B")
SAM_VIT_H = PublishedBackbone(url=f"{SEGMENT_ANYTHING}sam_vit_h_4b8939.pth", trained_on="SA-1B", required=True)


def photo_detector() -> RCNNConfig:
    """A ResNet-50 for small photographs, with its batch norm frozen if it is pretrained."""
    return RCNNConfig(
        backbone="resnet50",
        backbone_options={},
        freeze_norm=True,
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


def large_photo_detector() -> RCNNConfig:
    """The same for photographs of 480 to 800 px on a GPU, with the widths of torchvision's Faster R-CNN."""
    return dataclasses.replace(
        photo_detector(),
        anchor_sizes=(32, 64, 128, 384),
        pyramid_channels=256,
        head_width=1024,
        min_size=480,
        max_size=800,
        pre_nms=2000,
        post_nms=1000,
    )

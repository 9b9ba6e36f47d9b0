import dataclasses

import pytest
import torch
from torchvision.ops import FrozenBatchNorm2d

from ovd_models.batches import DetectionBatch
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.backbones import BottleneckStride
from ovd_models.detectors.c4 import C4, cell_anchors, coco_r50_c4
from ovd_models.vocabulary import Vocabulary

TINY = dataclasses.replace(
    coco_r50_c4(),
    backbone="resnet26",
    backbone_options={"channels": [8, 8, 16, 16], "stem_width": 8},
    freeze_norm=False,
    anchor_sizes=(32, 64),
    head_width=64,
    embed_dim=16,
    min_size=64,
    max_size=128,
    rpn_batch_size=32,
    pre_nms=60,
    post_nms=20,
    rois_per_image=16,
)


def batch() -> DetectionBatch:
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = (torch.tensor([[8.0, 8, 40, 44]]), torch.zeros(0, 4))
    return DetectionBatch(tuple(images), boxes, (torch.tensor([1]), torch.zeros(0, dtype=torch.int64)))


def test_anchors_are_16_pixels_apart_where_the_image_ends_within_a_cell() -> None:
    model = C4(dataclasses.replace(TINY, freeze_norm=False)).eval()
    resized = model.preprocess([torch.zeros(3, 97, 200, dtype=torch.uint8)] * 2)
    features = model.features(resized)
    assert resized.image_sizes[0] == (62, 128)  # 97 x 128 / 200: the last of four rows of cells holds 14 pixels
    first, second = model.rpn.anchor_generator(resized, [features["0"]])
    centre_A2 = (first[:, :2] + first[:, 2:]) / 2
    expected = [[16.0 * column, 16.0 * row] for row in range(4) for column in range(8) for _ in range(6)]
    assert torch.allclose(centre_A2, torch.tensor(expected), atol=1e-4)
    assert torch.equal(first, second)


def test_anchors_are_exact_and_ordered_by_size_then_shape() -> None:
    anchors = cell_anchors((32, 64))
    assert anchors.shape == (6, 4)
    # 32 x 32 pixels as 1 : 2 is 45.25 wide and 22.63 high; torchvision would round.
    assert anchors[0].tolist() == pytest.approx([-22.627, -11.314, 22.627, 11.314], abs=1e-3)
    assert anchors[4].tolist() == [-32, -32, 32, 32]
    wide = anchors[:, 2:] - anchors[:, :2]
    assert wide.prod(1).tolist() == pytest.approx([1024] * 3 + [4096] * 3)


@pytest.mark.parametrize("stride", ["default", "1x1", "3x3"])
def test_the_config_says_which_convolution_of_a_block_takes_the_stride(stride: BottleneckStride) -> None:
    torch.manual_seed(0)
    model = C4(dataclasses.replace(TINY, bottleneck_stride=stride))
    blocks = [model.backbone.layer2[0], model.backbone.layer3[0], model.res5[0]]
    expected = ((1, 1), (2, 2)) if stride == "3x3" else ((2, 2), (1, 1))
    assert [(block.conv1.stride, block.conv2.stride) for block in blocks] == [expected] * 3
    image = torch.zeros(3, 64, 80, dtype=torch.uint8)
    assert model.features(model.preprocess([image]))["0"].shape == (1, 64, 4, 5)


def test_pixels_are_those_of_the_image_less_their_mean() -> None:
    pixels = C4(TINY).preprocess([torch.full((3, 64, 64), 100, dtype=torch.uint8)]).tensors
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([100 - 123.675, 100 - 116.28, 100 - 103.53], abs=1e-3)


def test_norms_are_frozen_where_the_config_says_so() -> None:
    frozen = C4(dataclasses.replace(TINY, freeze_norm=True))
    for stage in (frozen.backbone, frozen.res5):
        assert any(isinstance(layer, FrozenBatchNorm2d) for layer in stage.modules())
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in stage.modules())


def test_one_forward_gives_finite_losses_though_one_image_has_no_box() -> None:
    torch.manual_seed(0)
    model = CoDet(CoDetConfig(architecture="c4", detector=TINY))
    losses = model(batch(), None, torch.eye(16)[:2], None)
    assert list(losses) == ["objectness", "rpn_box", "classes", "box"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_detections_lie_inside_the_image() -> None:
    torch.manual_seed(0)
    model = CoDet(CoDetConfig(architecture="c4", detector=TINY)).eval()
    words = Vocabulary(("red", "blue"), torch.eye(16)[:2])
    image = torch.zeros(3, 40, 90, dtype=torch.uint8)
    (found,) = model.detect([image], words, score_threshold=0.0, max_detections=5)
    assert 0 < len(found) <= 5
    assert bool((found.boxes <= torch.tensor([90, 40, 90, 40])).all())
    assert len(model.detect([image], words, score_threshold=1.0)[0]) == 0

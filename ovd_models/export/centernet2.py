"""CenterNet2 as one traceable function, for CoDet's and Detic's detectors of LVIS.

R regions, K names, M detections, F pyramid channels. Boxes are xyxy in pixels of the resized image inside this file, of
the original image at its borders.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import _topk_min
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image, nms

from ovd_models.detectors.centernet import grid_points
from ovd_models.detectors.centernet2 import CenterNet2, combine_scores
from ovd_models.detectors.feature_pyramid import region_levels
from ovd_models.errors import InputError
from ovd_models.export.tracing import pool_traced, resize_traced, select_traced


class ExportedCenterNet2(nn.Module):
    """A CenterNet2 for tracing.

    Raises:
        InputError: its backbone is EVA-02, whose padding to a square a traced graph would freeze.
    """

    def __init__(self, detector: CenterNet2, max_detections: int) -> None:
        super().__init__()
        if detector.config.backbone == "eva02":
            raise InputError("a detector on EVA-02: not exported, expected another backbone")
        self.detector, self.max_detections = detector, max_detections

    @property
    def has_masks(self) -> bool:
        """Whether masks are an output."""
        return self.detector.config.mask_convs > 0

    def forward(self, image: Tensor, text: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        """As `ExportedDetector.forward`."""
        detector, config = self.detector, self.detector.config
        pixels_3HW = image.permute(2, 0, 1).float() / 255
        original = (pixels_3HW.shape[1], pixels_3HW.shape[2])
        images = resize_traced(detector.transform, pixels_3HW)
        size = images.image_sizes[0]
        levels = detector.pyramid(images.tensors)
        box_R4, proposal_R = self._propose(levels[-len(config.proposals.strides) :])
        probabilities: list[Tensor] = []
        for stage in detector.stages:
            box_R4 = clip_boxes_to_image(box_R4, size) if probabilities else box_R4
            embedding_RD, delta_R4 = stage(self._pool(levels, box_R4, 7))
            cosine_RK = F.normalize(embedding_RD, dim=-1) @ text.T
            probabilities.append((config.temperature * cosine_RK).sigmoid())
            box_R4 = stage.coder.decode_single(delta_R4, box_R4)  # type: ignore[operator, union-attr]
        score_RK = combine_scores(torch.stack(probabilities), proposal_R)
        selected = select_traced(
            clip_boxes_to_image(box_R4, size), score_RK, threshold, config.box_nms, self.max_detections
        )
        box_M4, score_M, label_M = selected
        found = clip_boxes_to_image(resize_boxes(box_M4, size, original), original), score_M, label_M
        if not self.has_masks:
            return found
        mask_M1SS = detector.mask_head(self._pool(levels, box_M4, 14))
        return *found, mask_M1SS[:, 0].sigmoid()

    def _pool(self, levels: Sequence[Tensor], box_R4: Tensor, size: int) -> Tensor:
        """[R, F, size, size] as `pool_regions`."""
        strides = self.detector.config.strides
        return pool_traced(levels[: len(strides)], strides, region_levels(box_R4, strides), box_R4, size)

    def _propose(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """[R, 4] proposals of the only image and their scores [R], as `decode_proposals` gives them at test time."""
        config = self.detector.config.proposals
        boxes, scores = [], []
        for heat_11HW, distance_14HW, stride in zip(*self.detector.proposals(levels), config.strides, strict=True):
            point_N2 = grid_points(heat_11HW.shape[-2], heat_11HW.shape[-1], stride, heat_11HW)
            side_N4 = distance_14HW[0].flatten(1).T * stride
            heat_N = heat_11HW.flatten().sigmoid()
            best = heat_N.topk(_topk_min(heat_N, config.pre_nms[1], 0))
            box_N4 = torch.cat((point_N2 - side_N4[:, :2], point_N2 + side_N4[:, 2:]), 1)
            boxes.append(box_N4[best.indices])
            scores.append(best.values)
        box_N4, score_N = torch.cat(boxes), torch.cat(scores)
        hot = torch.where(score_N > config.score_threshold)[0]
        box_N4, score_N = box_N4[hot], score_N[hot].sqrt()
        box_N4 = torch.cat((box_N4[:, :2], torch.maximum(box_N4[:, 2:], box_N4[:, :2] + 0.01)), 1)
        keep = nms(box_N4, score_N, config.nms)[: config.post_nms[1]]
        return box_N4[keep], score_N[keep]

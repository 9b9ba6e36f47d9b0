"""Faster R-CNN and R50-C4 as one traceable function: an image of any size and any embedded names in, boxes out.

The models' own inference keeps counts of regions as Python numbers, which a traced graph would freeze. torchvision's
parts do not, and both compute the same.

R regions, K names, D embedding width, M detections. Boxes are xyxy in pixels of the original image.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, roi_align

from ovd_models.codet.model import CoDet
from ovd_models.detectors.c4 import C4
from ovd_models.detectors.rcnn import RCNN
from ovd_models.detectors.region_pool import POOLED
from ovd_models.detectors.region_scores import geometric_mean
from ovd_models.errors import InputError
from ovd_models.export.tracing import resize_traced, select_traced
from ovd_models.vild.model import ViLD


class ExportedDetector(nn.Module):
    """A CoDet or ViLD detector for tracing.

    Raises:
        InputError: the detector is a closed classifier, or scores by objectness.
    """

    def __init__(self, model: CoDet | ViLD, max_detections: int) -> None:
        super().__init__()
        if not isinstance(model.detector, RCNN):
            raise TypeError("expected a Faster R-CNN or R50-C4")
        if isinstance(model, ViLD) and (model.config.variant == "supervised" or model.config.scoring.objectness):
            raise InputError("a ViLD with names of its own or with objectness: not exported, expected one without")
        self.model, self.detector, self.max_detections = model, model.detector, max_detections
        config = model.detector.config
        levels = [str(index) for index in range(len(config.strides))]
        self.pool = MultiScaleRoIAlign(levels, POOLED, config.roi_samples)
        self.mask_pool = MultiScaleRoIAlign(levels, 2 * POOLED, config.roi_samples)

    @property
    def has_image_head(self) -> bool:
        """Whether scores are fused with those of a distilled head, so that `image_weight` is an input."""
        return isinstance(self.model, ViLD) and self.model.config.variant == "ensemble"

    @property
    def has_masks(self) -> bool:
        """Whether masks are an output: CoDet on Faster R-CNN finds none."""
        return isinstance(self.model, ViLD) and self.model.config.detector.masks

    def forward(
        self, image: Tensor, text: Tensor, threshold: Tensor, image_weight: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Find names in an image.

        Args:
            image: [H, W, 3] uint8 RGB.
            text: [K, D] unit rows.
            threshold: detections score above this number.
            image_weight: [K] exponent of the distilled head's probability for each name, for ViLD's ensemble.

        Returns:
            [M, 4] boxes, [M] scores, [M] int64 rows of `text`, best first; with a mask head, [M, 28, 28] probabilities
            of the mask in the cells of each box.
        """
        detector = self.detector
        pixels_3HW = image.permute(2, 0, 1).float() / 255
        original = (pixels_3HW.shape[1], pixels_3HW.shape[2])
        images = resize_traced(detector.transform, pixels_3HW)
        features = self._features(images)
        (proposal_R4,), _ = detector.rpn(images, features)
        pooled = self._pool(features, proposal_R4, images)
        region_RF = self._head(pooled)
        size = images.image_sizes[0]
        box_R4 = detector.roi.box_coder.decode_single(detector.box_deltas(region_RF), proposal_R4).view(-1, 4)
        if isinstance(self.model, ViLD):  # whose boxes are suppressed in pixels of the original image
            box_R4 = clip_boxes_to_image(resize_boxes(box_R4, size, original), original)
            score_RK = self._probabilities(self.model, pooled, region_RF, text, image_weight)
            found = self._select(box_R4, score_RK, threshold)
            if not self.has_masks:
                return found
            return *found, self._masks(features, resize_boxes(found[0], original, size), images)
        embedding_RD = F.normalize(detector.projection(region_RF), dim=-1)
        score_RK = (detector.config.temperature * embedding_RD @ text.T).sigmoid()
        box_M4, score_M, label_M = self._select(clip_boxes_to_image(box_R4, size), score_RK, threshold)
        return clip_boxes_to_image(resize_boxes(box_M4, size, original), original), score_M, label_M

    def _features(self, images: ImageList) -> dict[str, Tensor]:
        maps = self.detector.backbone(images.tensors)
        if isinstance(self.detector, C4):
            return {"0": maps[0]}
        levels: dict[str, Tensor] = self.detector.pyramid(
            OrderedDict((str(index), level) for index, level in enumerate(maps))
        )
        return levels

    def _pool(self, features: dict[str, Tensor], box_R4: Tensor, images: ImageList) -> Tensor:
        """[R, F, P, P] of the regions of the only image."""
        if isinstance(self.detector, C4):
            (stride,) = self.detector.config.strides
            return torch.as_tensor(roi_align(features["0"], [box_R4], 14, 1 / stride, -1, aligned=True))
        return torch.as_tensor(self.pool(features, [box_R4], images.image_sizes))

    def _masks(self, features: dict[str, Tensor], box_M4: Tensor, images: ImageList) -> Tensor:
        """[M, 28, 28] probabilities inside boxes of the resized image."""
        head = self.detector.mask_head
        pooled = self.mask_pool(features, [box_M4], images.image_sizes)
        return torch.as_tensor(head.predictor(head.layers(pooled))[:, 0].sigmoid())

    def _head(self, pooled: Tensor) -> Tensor:
        if isinstance(self.detector, C4):
            return torch.as_tensor(self.detector.res5(pooled).mean((2, 3)))
        return torch.as_tensor(self.detector.roi.box_head(pooled))

    def _probabilities(
        self, model: ViLD, pooled: Tensor, region_RF: Tensor, text: Tensor, image_weight: Tensor | None
    ) -> Tensor:
        """[R, K] probabilities of ViLD's heads, fused as `class_probabilities` fuses them."""
        scoring = model.config.scoring
        first_RD = F.normalize(self.detector.projection(region_RF), dim=1)
        if model.config.variant == "image":
            return (scoring.image_temperature * first_RD @ text.T).softmax(1)
        every_K1D = torch.cat((text, F.normalize(model.background, dim=0)[None]))
        text_RK = (scoring.temperature * first_RD @ every_K1D.T).softmax(1)[:, :-1]
        if image_weight is None:
            return text_RK
        second_RD = F.normalize(model.image_projection(model.image_head(pooled)), dim=1)
        image_RK = (scoring.image_temperature * second_RD @ text.T).softmax(1)
        return geometric_mean(text_RK, image_RK, image_weight)

    def _select(self, box_R4: Tensor, score_RK: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return select_traced(box_R4, score_RK, threshold, self.detector.config.box_nms, self.max_detections)

"""Images of any size as one batch for a backbone, and boxes to and from its pixels.

B images, N boxes of one image. Boxes are xyxy in pixels; sizes are (height, width).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import clip_boxes_to_image

from ovd_models.batches import DetectionBatch, Detections
from ovd_models.detectors.sampling import suppress
from ovd_models.preprocess import add_edge

Size = tuple[int, int]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CANDIDATES = 20
"""Pairs of a box and a class that suppression takes for each detection, best first; more if too few survive it."""


@dataclass(frozen=True)
class Selection:
    """Which (box, class) pairs of an image are detections."""

    nms: float
    """Overlap above which the lower score of a class, or with `distinct` of any, is suppressed."""
    score_threshold: float
    max_detections: int
    distinct: bool = False
    """Whether each object gets its best class only, so that its other classes do not count as detections."""


@dataclass(frozen=True)
class ResizedImages:
    """B images resized, normalised and padded into one batch; serves torchvision as an `ImageList`."""

    tensors: Tensor
    """[B, 3, H, W]."""
    image_sizes: list[Size]
    """Sizes after resizing, before padding."""
    wide_sizes: list[Size]
    """Sizes after `add_edge`, before resizing."""
    original_sizes: list[Size]

    def __getitem__(self, rows: slice) -> "ResizedImages":
        return ResizedImages(
            self.tensors[rows], self.image_sizes[rows], self.wide_sizes[rows], self.original_sizes[rows]
        )

    def resized_boxes(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """B tensors [N, 4]: boxes of the original images in resized pixels."""
        return _scale_boxes(boxes, self.wide_sizes, self.image_sizes)

    def wide_boxes(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """B tensors [N, 4]: boxes of the resized images in pixels of the original ones, not clipped."""
        return _scale_boxes(boxes, self.image_sizes, self.wide_sizes)

    def original_boxes(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """B tensors [N, 4]: boxes of the resized images in pixels of the original ones, clipped to them."""
        wide = self.wide_boxes(boxes)
        return [clip_boxes_to_image(box, size) for box, size in zip(wide, self.original_sizes, strict=True)]

    def detections(
        self, boxes: Sequence[Tensor], scores: Sequence[Tensor], names: tuple[str, ...], selection: Selection
    ) -> tuple[list[Detections], list[Tensor]]:
        """Detections from boxes [N, 4] in resized pixels and scores [N, K], and their boxes in resized pixels."""
        inside = [clip_boxes_to_image(box, size) for box, size in zip(boxes, self.image_sizes, strict=True)]
        selected = [select_detections(*pair, selection) for pair in zip(inside, scores, strict=True)]
        resized = [box for box, _, _ in selected]
        return [
            Detections(box, score, label, names, width, height)
            for box, (_, score, label), (height, width) in zip(
                self.original_boxes(resized), selected, self.original_sizes, strict=True
            )
        ], resized


def _scale_boxes(boxes: Sequence[Tensor], old: Sequence[Size], new: Sequence[Size]) -> list[Tensor]:
    return [resize_boxes(box, list(a), list(b)) for box, a, b in zip(boxes, old, new, strict=True)]


def build_transform(
    min_size: int, max_size: int, divisible: int, std: Sequence[float] = IMAGENET_STD
) -> GeneralizedRCNNTransform:
    """Resizing, ImageNet normalisation of values in [0, 1] and padding to a multiple of `divisible` pixels."""
    return GeneralizedRCNNTransform(min_size, max_size, list(IMAGENET_MEAN), list(std), size_divisible=divisible)


def resize_images(images: Sequence[Tensor], transform: GeneralizedRCNNTransform, max_size: int) -> ResizedImages:
    """Batch B uint8 images [3, H, W] with a transform that resizes longer sides to at most `max_size` pixels."""
    wide = [add_edge(image, max_size, pixels=2) for image in images]
    batch, _ = transform([image.float() / 255 for image in wide])
    return ResizedImages(batch.tensors, batch.image_sizes, [_size(image) for image in wide], list(map(_size, images)))


def _size(image: Tensor) -> Size:
    height, width = image.shape[-2:]
    return int(height), int(width)


def annotated_targets(batch: DetectionBatch, images: ResizedImages, *, masks: bool = False) -> list[dict[str, Tensor]]:
    """`boxes` [N, 4], `labels` [N] and, if wanted and annotated, `masks` [N, H, W] of each image in resized pixels."""
    boxes = images.resized_boxes(batch.boxes)
    targets = [{"boxes": box, "labels": label} for box, label in zip(boxes, batch.labels, strict=True)]
    if masks and batch.masks is not None:
        for target, mask, wide, size in zip(targets, batch.masks, images.wide_sizes, images.image_sizes, strict=True):
            target["masks"] = resize_masks(mask, wide, size)
    return targets


def resize_masks(mask_NHW: Tensor, wide: Size, size: Size) -> Tensor:
    """[N, H, W] bool masks of an image that was widened to `wide` and then resized to `size`: [N, *size]."""
    wide_NHW = F.pad(mask_NHW, (0, wide[1] - mask_NHW.shape[2], 0, wide[0] - mask_NHW.shape[1]))
    if not len(wide_NHW):
        return wide_NHW.new_zeros((0, *size))
    return F.interpolate(wide_NHW[:, None].float(), size, mode="nearest-exact")[:, 0].bool()


def image_indices(boxes: Sequence[Tensor]) -> Tensor:
    """[R] int64: the image that each box of B tensors [N, 4] belongs to, images in order."""
    counts = [len(entry) for entry in boxes]
    # With the size of the output, a GPU need not tell it.
    return torch.repeat_interleave(torch.tensor(counts, device=boxes[0].device), output_size=sum(counts))


def by_level(level_R: Tensor, levels: int) -> tuple[Tensor, list[int]]:
    """[R] int64, the order that sorts regions by their level, and each level's number; the host waits once."""
    number_R = torch.arange(levels, device=level_R.device)
    return level_R.argsort(stable=True), (level_R[:, None] == number_R).sum(0).tolist()


def select_detections(box_N4: Tensor, score_NK: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """The best (box, class) pairs after suppression within each class, or across all with `distinct`.

    Boxes without an area are left out.

    Returns:
        Boxes [M, 4], scores [M] and classes [M], best first, at most `selection.max_detections`.
    """
    limit = selection.max_detections
    has_area_N = (box_N4[:, 2:] > box_N4[:, :2]).all(1)
    above_NK = (score_NK > selection.score_threshold) & has_area_N[:, None]
    if selection.distinct:  # the other classes of a box would be suppressed by its best one
        best_N1 = score_NK.topk(min(1, score_NK.shape[1]), dim=1).indices
        above_NK &= torch.zeros_like(above_NK).scatter(1, best_N1, True)
    candidates, count = torch.nonzero(above_NK), CANDIDATES * limit  # suppression is quadratic: the best ones first
    while True:
        region, label = candidates.unbind(1)
        score = score_NK[region, label]
        if cut := len(score) > count:
            best = score.topk(count).indices
            region, label, score = region[best], label[best], score[best]
        group = torch.zeros_like(label) if selection.distinct else label
        keep = suppress(box_N4[region], score, group, selection.nms)[:limit]
        if len(keep) == limit or not cut:
            return box_N4[region[keep]], score[keep], label[keep]
        count *= 4

"""Images that a detector has encoded once, to be searched for any number of vocabularies.

N regions of one image, D embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovd_models.batches import TensorRecord
from ovd_models.detectors.resizing import ResizedImages, Size


@dataclass(frozen=True)
class EncodedRegions(TensorRecord):
    """Regions of one image as a detector embeds them, independent of any names."""

    boxes: Tensor
    """[N, 4] float32 xyxy, refined, pixels of the resized image."""
    stages: tuple[Tensor, ...]
    """[N, D] embeddings of each stage."""
    proposal_scores: Tensor | None
    """[N] in [0, 1], where they are part of a detection's score."""
    levels: tuple[Tensor, ...]
    """Pyramid levels [1, F, H, W] from which masks are pooled; empty if the detector predicts none."""
    resized_size: Size
    wide_size: Size
    original_size: Size

    @property
    def sizes(self) -> ResizedImages:
        """The image's sizes, without its pixels."""
        no_pixels = self.boxes.new_zeros((1, 3, 0, 0))
        return ResizedImages(no_pixels, [self.resized_size], [self.wide_size], [self.original_size])

    @property
    def features(self) -> dict[str, Tensor]:
        """The pyramid levels in the form of the detectors' `features`."""
        return {str(index): level for index, level in enumerate(self.levels)}


def split_images(
    images: ResizedImages,
    boxes: Sequence[Tensor],
    stages: Sequence[Tensor],
    scores: Sequence[Tensor] | None,
    features: dict[str, Tensor] | None,
) -> list[EncodedRegions]:
    """The encoded images of a batch.

    Args:
        images: the batch of B images.
        boxes: B tensors [N, 4], pixels of the resized images.
        stages: [R, D] embeddings of each stage, images in order.
        scores: B tensors [N]; None if detections do not use them.
        features: pyramid levels of the batch; None without masks.
    """
    counts = [len(entry) for entry in boxes]
    parts = [torch.split(stage_RD, counts) for stage_RD in stages]
    return [
        EncodedRegions(
            boxes[index],
            tuple(part[index] for part in parts),
            None if scores is None else scores[index],
            () if features is None else tuple(level[index : index + 1] for level in features.values()),
            images.image_sizes[index],
            images.wide_sizes[index],
            images.original_sizes[index],
        )
        for index in range(len(counts))
    ]

"""CoDet: learn to classify regions from images whose captions share a concept (NeurIPS 2023, arXiv 2310.16667).

G groups, g images of a group, N proposals of an image, B = G * g images, D embedding width, C concepts, K categories
with boxes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import box_area, clip_boxes_to_image

from ovd_models.batches import ConceptBatch, DetectionBatch, Detections
from ovd_models.codet.alignment import (
    Aggregation,
    Alignment,
    Guidance,
    LearnedAggregation,
    align,
    guidance_weights,
    largest,
    nearest_to_text,
)
from ovd_models.detectors.c4 import C4
from ovd_models.detectors.centernet2 import CenterNet2, CenterNet2Config
from ovd_models.detectors.rcnn import RCNN, RCNNConfig, restore_boxes, widen
from ovd_models.errors import InputError
from ovd_models.losses import caption_loss, concept_loss, cosine_logits
from ovd_models.vocabulary import Vocabulary

Supervision = Literal["region_region", "region_text", "max_size", "captions", "boxes"]


@dataclass(frozen=True, kw_only=True)
class CoDetConfig:
    """The detector and the alignment of caption groups."""

    architecture: Literal["fpn", "c4", "centernet2"] = "fpn"
    """`fpn` and `c4` are built from `detector`, `centernet2` from `centernet2`."""
    detector: RCNNConfig = field(default_factory=RCNNConfig)
    centernet2: CenterNet2Config = field(default_factory=CenterNet2Config)
    caption_sizes: tuple[int, ...] = ()
    """Shorter and greatest longer side of captioned images, in pixels, if they differ from those of images with boxes;
    both kinds then go through the backbone one after the other."""
    num_proposals: int = 16
    """N: the best proposals of a captioned image that take part."""
    supervision: Supervision = "region_region"
    """Which proposal of a captioned image learns its concept: what the group shares (CoDet), the one most similar to
    the concept's name, the largest (Detic); or none (`captions`: the image-text loss alone; `boxes`: nothing)."""
    guidance: Guidance = "support"
    """How a concept's name chooses among what its group shares."""
    centre_guidance: bool = True
    """Take the mean over all concepts from a concept before it weighs dimensions; the released model does not."""
    aggregation: Aggregation = "maximum"
    """From similarities to attention: a rule of `align`, or the released perceptron, which fits one group size only."""
    top_k: int = 3
    """Similarities of a support that the aggregation `top_k` takes the mean of."""
    group_size: int = 0
    """Images of a group; only the learned aggregation needs to know."""
    attention_temperature: float = 0.05
    """Divides the similarity before the softmax over a query's proposals."""
    attention_gradient: bool = False
    """Let the region-word loss change what proposals have in common, as the released model does, and not only what the
    proposals that have something in common are called. The `learned` aggregation is always trained."""
    concept_weight: float = 0.2
    """Weight of the region-word loss."""
    caption_weight: float = 0.05
    """Weight of the image-text loss; it needs a teacher with a text tower."""


@dataclass(frozen=True)
class GroupAttention:
    """Where a model looks in the g images of a group."""

    boxes: list[Tensor]
    """g tensors [N, 4], the proposals, in pixels of the images."""
    attention: list[Tensor]
    """g tensors [N]."""
    similarity: Tensor
    """[M, M] between all proposals of the group, image after image."""


class CoDet(nn.Module):
    """A text-classifier detector that learns from boxes of base categories and from caption groups."""

    def __init__(self, config: CoDetConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = build_detector(config)
        self.caption_transform = copy.copy(self.detector.transform)
        if config.caption_sizes:
            if len(config.caption_sizes) != 2:
                raise InputError(f"caption_sizes: {config.caption_sizes}, expected a shorter and a longer side")
            self.caption_transform.min_size, self.caption_transform.max_size = (
                config.caption_sizes[:1],
                config.caption_sizes[1],
            )
        if config.aggregation == "learned" and config.supervision == "region_region":
            if config.group_size < 2:
                raise InputError(f"group_size: {config.group_size}, expected at least 2 for the learned aggregation")
            if config.guidance == "support":
                raise InputError('guidance: "support", expected "dimensions" or "none" for the learned aggregation')
            stages = len(config.centernet2.stage_ious) if config.architecture == "centernet2" else 1
            self.aggregations = nn.ModuleList(
                LearnedAggregation(config.group_size, config.num_proposals) for _ in range(stages)
            )

    def forward(
        self,
        detection: DetectionBatch | None,
        concepts: ConceptBatch | None,
        categories_KD: Tensor,
        concepts_CD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one step: both kinds of batch go through the backbone together.

        Args:
            detection: images with boxes; None for a step of captions alone.
            concepts: caption groups; None for box supervision alone.
            categories_KD: [K, D] unit rows that `detection.labels` count.
            concepts_CD: [C, D] unit rows that `concepts.concept_ids` count.
        """
        if concepts_CD is None or self.config.supervision == "boxes":
            concepts = None
        if self.config.caption_sizes and detection is not None and concepts is not None:
            losses = self._losses(detection, None, categories_KD, None)
            losses |= self._losses(None, concepts, categories_KD, concepts_CD)
        else:
            losses = self._losses(detection, concepts, categories_KD, concepts_CD)
        if detection is None:  # gradients of a caption step are gathered over ranks as those of any other
            unused = 0.0 * torch.stack([value.sum() for value in self.parameters()]).sum()
            losses["concept"] = losses["concept"] + unused if "concept" in losses else unused
        return losses

    def _losses(
        self,
        detection: DetectionBatch | None,
        concepts: ConceptBatch | None,
        categories_KD: Tensor,
        concepts_CD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Losses of what goes through the backbone together."""
        detector = self.detector
        annotated, captioned = (entry.images if entry is not None else () for entry in (detection, concepts))
        images = [widen(image, detector.config.max_size) for image in (*annotated, *captioned)]
        batch = detector.preprocess(images) if annotated else self._preprocess_captioned(images)
        features = detector.features(batch)
        proposals = detector.propose(batch, features)
        losses: dict[str, Tensor] = {}
        if detection is not None:
            targets = targets_of(detection, images, batch)
            losses = detector.detection_losses(batch, features, proposals, targets, categories_KD)  # type: ignore[arg-type]
        if concepts is not None and concepts_CD is not None:
            start = len(annotated)
            own = {name: level[start:] for name, level in features.items()}
            sizes = ImageList(batch.tensors[start:], batch.image_sizes[start:])
            losses |= self._group_losses(concepts, sizes, own, proposals.boxes[start:], concepts_CD)
        return losses

    def _preprocess_captioned(self, images: Sequence[Tensor]) -> ImageList:
        """B uint8 images [3, H, W] as the backbone takes captioned ones."""
        batch, _ = self.caption_transform([image.float() / 255 for image in images])
        return batch

    def _group_losses(
        self,
        concepts: ConceptBatch,
        batch: ImageList,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        concepts_CD: Tensor,
    ) -> dict[str, Tensor]:
        """Region-word and image-text losses of a batch of groups."""
        config, temperature = self.config, self.detector.config.temperature
        boxes = self._best(proposals, batch)
        losses: dict[str, Tensor] = {}
        for stage, rows in enumerate(self._embed_with_image(features, boxes, batch)):
            if config.supervision != "captions":
                aligned = self.align(stage, [entry[:-1] for entry in rows], boxes, concepts, concepts_CD)
                seen_B = aligned.attention.flatten(0, 1).any(-1)  # an image without proposals teaches nothing
                logits_BC = cosine_logits(aligned.prototype.flatten(0, 1)[seen_B], concepts_CD, temperature)
                concept_B = concepts.concept_ids.repeat_interleave(concepts.group_size)[seen_B]
                loss = config.concept_weight * concept_loss(logits_BC, concept_B, concepts.mentioned[seen_B])
                losses["concept"] = losses.get("concept", 0.0) + loss
            if config.caption_weight and concepts.caption_embeddings is not None:
                image_BD = torch.stack([entry[-1] for entry in rows])
                gathered = gather_captions(concepts.caption_embeddings)
                loss = config.caption_weight * caption_loss(image_BD, *gathered, temperature)
                losses["caption"] = losses.get("caption", 0.0) + loss
        return losses

    def _best(self, proposals: list[Tensor], batch: ImageList) -> list[Tensor]:
        """B tensors [N, 4]: the best proposals of each image, inside it."""
        return [
            clip_boxes_to_image(entry[: self.config.num_proposals].detach(), size)
            for entry, size in zip(proposals, batch.image_sizes, strict=True)
        ]

    def _embed_with_image(
        self, features: dict[str, Tensor], boxes: list[Tensor], batch: ImageList
    ) -> list[tuple[Tensor, ...]]:
        """For every stage B tensors [N + 1, D]: embeddings of each image's boxes and, last, of the whole image."""
        with_whole = [
            torch.cat((entry, entry.new_tensor([[0, 0, width, height]])))
            for entry, (height, width) in zip(boxes, batch.image_sizes, strict=True)
        ]
        if isinstance(self.detector, CenterNet2):
            stages = self.detector.region_embeddings(features, with_whole, batch)
        else:
            stages = [self.detector.projection(self.detector.region_features(features, with_whole, batch))]
        return [torch.split(region_RD, [len(entry) for entry in with_whole]) for region_RD in stages]

    def align(
        self, stage: int, regions: list[Tensor], boxes: list[Tensor], concepts: ConceptBatch, concepts_CD: Tensor
    ) -> Alignment:
        """Attention over the proposals of a batch of groups, as the config's `supervision` says.

        Args:
            stage: of the detector.
            regions: B tensors [N, D], embeddings of each image's proposals.
            boxes: B tensors [N, 4], the proposals.
            concepts: the batch.
            concepts_CD: [C, D] unit rows of all concepts.
        """
        config, shape = self.config, (len(concepts.concept_ids), concepts.group_size)
        region_BND = pad_sequence(regions, batch_first=True)
        if config.supervision == "region_region" and config.aggregation == "learned":
            region_BND = F.pad(region_BND, (0, 0, 0, config.num_proposals - region_BND.shape[1]))
            guidance_GD = self.guidance(concepts.concept_ids, concepts_CD)
            learned: Alignment = self.aggregations[stage](region_BND.view(*shape, *region_BND.shape[1:]), guidance_GD)
            return learned
        count_B1 = torch.tensor([[len(entry)] for entry in regions], device=region_BND.device)
        valid_BN = torch.arange(region_BND.shape[1], device=region_BND.device) < count_B1
        region_GgND, valid_GgN = region_BND.view(*shape, *region_BND.shape[1:]), valid_BN.view(*shape, -1)
        if config.supervision == "region_text":
            return nearest_to_text(region_GgND, valid_GgN, concepts_CD[concepts.concept_ids])
        if config.supervision == "max_size":
            area_BN = pad_sequence([box_area(entry) for entry in boxes], batch_first=True)
            return largest(region_GgND, valid_GgN, area_BN.view(*shape, -1))
        return align(
            region_GgND,
            valid_GgN,
            self.guidance(concepts.concept_ids, concepts_CD),
            config.attention_temperature,
            text_GD=concepts_CD[concepts.concept_ids] if config.guidance == "support" else None,
            aggregation=config.aggregation,
            top_k=config.top_k,
            gradient=config.attention_gradient,
        )

    def guidance(self, concept_G: Tensor, concepts_CD: Tensor) -> Tensor:
        """[G, D] weights of embedding dimensions for concepts [G]."""
        own_GD = concepts_CD[concept_G]
        if self.config.guidance != "dimensions":
            return torch.ones_like(own_GD)
        return guidance_weights(own_GD, concepts_CD.mean(0) * self.config.centre_guidance)

    @torch.no_grad()
    def explain(self, concepts: ConceptBatch, concepts_CD: Tensor) -> list[GroupAttention]:
        """Where the model looks in each group: proposals, attention and similarities, by its last stage."""
        training = self.training
        self.eval()
        detector, size = self.detector, concepts.group_size
        images = [widen(image, detector.config.max_size) for image in concepts.images]
        batch = self._preprocess_captioned(images)
        features = detector.features(batch)
        boxes = self._best(detector.propose(batch, features).boxes, batch)
        stages = self._embed_with_image(features, boxes, batch)
        regions = [entry[:-1] for entry in stages[-1]]
        attention_BN = self.align(len(stages) - 1, regions, boxes, concepts, concepts_CD).attention.flatten(0, 1)
        guidance_GD = self.guidance(concepts.concept_ids, concepts_CD)
        self.train(training)
        restored = [
            restore_boxes(box, image, wide, resized)
            for box, image, wide, resized in zip(boxes, concepts.images, images, batch.image_sizes, strict=True)
        ]
        found = []
        for group, guidance_D in enumerate(guidance_GD):
            rows = slice(group * size, (group + 1) * size)
            unit_MD = F.normalize(torch.cat(regions[rows]), dim=1)
            attention = [row[: len(box)] for row, box in zip(attention_BN[rows], boxes[rows], strict=True)]
            found.append(GroupAttention(restored[rows], attention, unit_MD * guidance_D @ unit_MD.T))
        return found

    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Find the vocabulary's names in uint8 images [3, H, W]; one `Detections` an image."""
        return self.detector.detect(images, vocabulary, score_threshold=score_threshold, max_detections=max_detections)


def build_detector(config: CoDetConfig) -> RCNN | CenterNet2:
    """The detector that the config names."""
    if config.architecture == "centernet2":
        return CenterNet2(config.centernet2)
    return C4(config.detector) if config.architecture == "c4" else RCNN(config.detector)


def targets_of(detection: DetectionBatch, images: Sequence[Tensor], batch: ImageList) -> list[dict[str, Tensor]]:
    """`boxes`, `labels` and perhaps `masks` of the images with boxes, which come first, in resized pixels."""
    targets = []
    for index, (boxes, labels) in enumerate(zip(detection.boxes, detection.labels, strict=True)):
        image, size = images[index], batch.image_sizes[index]
        target = {"boxes": resize_boxes(boxes, list(image.shape[-2:]), list(size)), "labels": labels}
        if detection.masks is not None:
            target["masks"] = resize_masks(detection.masks[index], image, size)
        targets.append(target)
    return targets


def resize_masks(mask_NHW: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, H, W] bool masks of a picture, which may have been widened to `image`, as those of the resized one."""
    height, width = image.shape[-2:]
    wide_NHW = F.pad(mask_NHW, (0, width - mask_NHW.shape[2], 0, height - mask_NHW.shape[1]))
    if not len(wide_NHW):
        return wide_NHW.new_zeros((0, *size))
    return F.interpolate(wide_NHW[:, None].float(), size, mode="nearest-exact")[:, 0].bool()


def gather_captions(caption_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Caption embeddings of all ranks.

    Args:
        caption_BD: [B, D], the same B on every rank.

    Returns:
        All rows [M, D], the row of each own caption [B], and which rows are this rank's [M].
    """
    count, device = len(caption_BD), caption_BD.device
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return caption_BD, torch.arange(count, device=device), torch.ones(count, dtype=torch.bool, device=device)
    world, rank = dist.get_world_size(), dist.get_rank()
    gathered = [torch.empty_like(caption_BD) for _ in range(world)]
    dist.all_gather(gathered, caption_BD.contiguous())
    own = torch.arange(rank * count, (rank + 1) * count, device=device)
    same_rank = torch.zeros(world * count, dtype=torch.bool, device=device)
    same_rank[own] = True
    return torch.cat(gathered), own, same_rank

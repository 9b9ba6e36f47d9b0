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
from torchvision.ops import box_area, clip_boxes_to_image

from ovd_models.batches import ConceptBatch, DetectionBatch, Detections
from ovd_models.codet.alignment import (
    Aggregation,
    Alignment,
    Guidance,
    LearnedAggregation,
    align,
    guidance_weights,
    largest_proposal,
    nearest_to_text,
)
from ovd_models.detectors.c4 import C4
from ovd_models.detectors.centernet2 import CenterNet2, CenterNet2Config
from ovd_models.detectors.encoded import EncodedRegions
from ovd_models.detectors.rcnn import RCNN, RCNNConfig
from ovd_models.detectors.resizing import ResizedImages, annotated_targets, resize_images
from ovd_models.errors import InputError
from ovd_models.losses import caption_loss, concept_loss, cosine_logits, sampled_concepts, zero_loss
from ovd_models.vocabulary import Vocabulary

Supervision = Literal["region_region", "region_text", "max_size", "captions", "boxes"]


@dataclass(frozen=True, kw_only=True)
class CoDetConfig:
    """The detector and the alignment of caption groups."""

    architecture: Literal["fpn", "c4", "centernet2"] = "fpn"
    """`fpn` and `c4` use the config `detector`, `centernet2` uses `centernet2`."""
    detector: RCNNConfig = field(default_factory=RCNNConfig)
    centernet2: CenterNet2Config = field(default_factory=CenterNet2Config)
    caption_sizes: tuple[int, ...] = ()
    """Shorter and greatest longer side of captioned images, in pixels, if they differ from those of images with boxes;
    the two kinds then go through the backbone separately."""
    num_proposals: int = 16
    """N: the number of best proposals used of a captioned image."""
    supervision: Supervision = "region_region"
    """Which proposal of a captioned image is trained with its concept: the one that the group shares (CoDet), the one
    most similar to the concept's name, the largest (Detic); or none (`captions`: the image-text loss alone; `boxes`: no
    captions at all)."""
    guidance: Guidance = "support"
    """How a concept's name selects among the objects that its group shares."""
    centre_guidance: bool = True
    """Subtract the mean over all concepts before a concept weights dimensions; the released model does not."""
    aggregation: Aggregation = "maximum"
    """From similarities to attention: a rule of `align`, or the released MLP, which fits one group size only."""
    top_k: int = 3
    """Number of a support's similarities that the aggregation `top_k` averages."""
    group_size: int = 0
    """Images per group; used by the learned aggregation alone."""
    attention_temperature: float = 0.05
    """Divides the similarity before the softmax over a query's proposals."""
    attention_gradient: bool = False
    """Let the gradient of the region-word loss flow through the similarities of proposals too, as in the released
    model, and not only through their mean. The `learned` aggregation is always trained."""
    concept_weight: float = 0.2
    """Weight of the region-word loss."""
    sampled_concepts: int = 0
    """Concepts in an image's region-word loss: those that its caption mentions and others drawn at random up to this
    number. 0: all."""
    mentioned_are_negatives: bool = False
    """Whether an image's other mentioned concepts are negatives, as in the released model, or ignored."""
    caption_weight: float = 0.05
    """Weight of the image-text loss; it needs a teacher with a text tower."""


@dataclass(frozen=True)
class GroupAttention:
    """A model's attention in the g images of a group."""

    boxes: list[Tensor]
    """g tensors [N, 4], the proposals, in pixels of the images."""
    attention: list[Tensor]
    """g tensors [N]."""
    similarity: Tensor
    """[M, M] between all proposals of the group, image after image."""


class CoDet(nn.Module):
    """A detector with a text classifier, trained with boxes of base categories and with caption groups."""

    def __init__(self, config: CoDetConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = build_detector(config)
        self.caption_transform = copy.copy(self.detector.transform)
        if config.caption_sizes:
            if len(config.caption_sizes) != 2:
                raise InputError(f"caption_sizes: {config.caption_sizes}, expected a shorter and a longer side")
            shorter, longer = config.caption_sizes
            self.caption_transform.min_size, self.caption_transform.max_size = (shorter,), longer
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
        """Weighted losses of one step; images of both kinds go through the backbone as one batch.

        Args:
            detection: images with boxes; None for a step of captions alone.
            concepts: caption groups; None for box supervision alone.
            categories_KD: [K, D] unit rows that `detection.labels` index.
            concepts_CD: [C, D] unit rows that `concepts.concept_ids` index.
        """
        if concepts_CD is None or self.config.supervision == "boxes":
            concepts = None
        separate = self.config.caption_sizes and detection is not None and concepts is not None
        losses: dict[str, Tensor] = {}
        for annotated, captioned in ((detection, None), (None, concepts)) if separate else ((detection, concepts),):
            losses |= self._losses(annotated, captioned, categories_KD, concepts_CD)
        # Data-parallel training averages every gradient over the ranks, so no parameter may be left out of a step.
        idle = list(self.parameters()) if detection is None else []
        if concepts is None and hasattr(self, "aggregations"):
            idle += self.aggregations.parameters()
        if idle:
            name = next(iter(losses), "concept")
            losses[name] = losses.get(name, 0.0) + zero_loss(idle)
        return losses

    def _losses(
        self,
        detection: DetectionBatch | None,
        concepts: ConceptBatch | None,
        categories_KD: Tensor,
        concepts_CD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Losses of images that go through the backbone as one batch."""
        detector = self.detector
        annotated, captioned = (entry.images if entry is not None else () for entry in (detection, concepts))
        images = detector.preprocess((*annotated, *captioned)) if annotated else self._preprocess_captioned(captioned)
        features = detector.features(images)
        proposals = detector.propose(images, features)
        losses: dict[str, Tensor] = {}
        start = len(annotated)
        if detection is not None:
            targets = annotated_targets(detection, images[:start], masks=True)
            losses = detector.detection_losses(images, features, proposals, targets, categories_KD)  # type: ignore[arg-type]
        if concepts is not None and concepts_CD is not None:
            own = {name: level[start:] for name, level in features.items()}
            losses |= self._group_losses(concepts, images[start:], own, proposals.boxes[start:], concepts_CD)
        return losses

    def _preprocess_captioned(self, images: Sequence[Tensor]) -> ResizedImages:
        """B uint8 images [3, H, W] as one batch in the size of captioned images."""
        return resize_images(images, self.caption_transform, self.caption_transform.max_size)

    def _group_losses(
        self,
        concepts: ConceptBatch,
        images: ResizedImages,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        concepts_CD: Tensor,
    ) -> dict[str, Tensor]:
        """Region-word and image-text losses of a batch of groups."""
        config, temperature = self.config, self.detector.config.temperature
        boxes = self._best_proposals(proposals, images)
        losses: dict[str, Tensor] = {}
        for stage, rows in enumerate(self._embed_with_image(features, boxes, images)):
            if config.supervision != "captions":
                aligned = self.align(stage, [entry[:-1] for entry in rows], boxes, concepts, concepts_CD)
                used_B = aligned.attention.flatten(0, 1).any(-1)  # images with a proposal
                logits_BC = cosine_logits(aligned.prototype.flatten(0, 1), concepts_CD, temperature)
                concept_B = concepts.concept_ids.repeat_interleave(concepts.group_size)
                ignored_BC = self._ignored_concepts(concepts.mentioned)
                loss = config.concept_weight * concept_loss(logits_BC, concept_B, ignored_BC, used_B)
                losses["concept"] = losses.get("concept", 0.0) + loss
            if config.caption_weight and concepts.caption_embeddings is not None:
                image_BD = torch.stack([entry[-1] for entry in rows])
                gathered = gather_captions(concepts.caption_embeddings)
                loss = config.caption_weight * caption_loss(image_BD, *gathered, temperature)
                losses["caption"] = losses.get("caption", 0.0) + loss
        return losses

    def _ignored_concepts(self, mentioned_BC: Tensor) -> Tensor:
        """[B, C] bool: the concepts that an image's region-word loss leaves out; its own is always counted."""
        ignored_BC = torch.zeros_like(mentioned_BC) if self.config.mentioned_are_negatives else mentioned_BC
        if self.config.sampled_concepts:
            ignored_BC = ignored_BC | ~sampled_concepts(mentioned_BC, self.config.sampled_concepts)
        return ignored_BC

    def _best_proposals(self, proposals: list[Tensor], images: ResizedImages) -> list[Tensor]:
        """B tensors [N, 4]: the best proposals of each image, clipped to it."""
        return [
            clip_boxes_to_image(entry[: self.config.num_proposals].detach(), size)
            for entry, size in zip(proposals, images.image_sizes, strict=True)
        ]

    def _embed_with_image(
        self, features: dict[str, Tensor], boxes: list[Tensor], images: ResizedImages
    ) -> list[tuple[Tensor, ...]]:
        """For every stage B tensors [N + 1, D]: embeddings of each image's boxes and, last, of the whole image."""
        with_whole = [
            torch.cat((entry, entry.new_tensor([[0, 0, width, height]])))
            for entry, (height, width) in zip(boxes, images.image_sizes, strict=True)
        ]
        stages = self.detector.stage_embeddings(features, with_whole, images)
        return [torch.split(region_RD, [len(entry) for entry in with_whole]) for region_RD in stages]

    def align(
        self, stage: int, regions: list[Tensor], boxes: list[Tensor], concepts: ConceptBatch, concepts_CD: Tensor
    ) -> Alignment:
        """Attention over the proposals of a batch of groups, according to the config's `supervision`.

        Args:
            stage: of the detector.
            regions: B tensors [N, D], embeddings of each image's proposals.
            boxes: B tensors [N, 4], the proposals.
            concepts: the batch.
            concepts_CD: [C, D] unit rows of all concepts.
        """
        with torch.autocast(concepts_CD.device.type, enabled=False):  # near-identical proposals tie in bfloat16
            return self._align(stage, [entry.float() for entry in regions], boxes, concepts, concepts_CD)

    def _align(
        self, stage: int, regions: list[Tensor], boxes: list[Tensor], concepts: ConceptBatch, concepts_CD: Tensor
    ) -> Alignment:
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
            return largest_proposal(region_GgND, valid_GgN, area_BN.view(*shape, -1))
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
        """Proposals, attention and similarities of each group, by the model's last stage."""
        training = self.training
        self.eval()
        detector, size = self.detector, concepts.group_size
        images = self._preprocess_captioned(concepts.images)
        features = detector.features(images)
        boxes = self._best_proposals(detector.propose(images, features).boxes, images)
        stages = self._embed_with_image(features, boxes, images)
        regions = [entry[:-1] for entry in stages[-1]]
        attention_BN = self.align(len(stages) - 1, regions, boxes, concepts, concepts_CD).attention.flatten(0, 1)
        guidance_GD = self.guidance(concepts.concept_ids, concepts_CD)
        self.train(training)
        original = images.original_boxes(boxes)
        groups = []
        for group, guidance_D in enumerate(guidance_GD):
            rows = slice(group * size, (group + 1) * size)
            unit_MD = F.normalize(torch.cat(regions[rows]), dim=1)
            attention = [row[: len(box)] for row, box in zip(attention_BN[rows], boxes[rows], strict=True)]
            groups.append(GroupAttention(original[rows], attention, unit_MD * guidance_D @ unit_MD.T))
        return groups

    def encode(self, images: Sequence[Tensor]) -> list[EncodedRegions]:
        """Regions of uint8 images [3, H, W]; `find` searches them for any names without another forward pass."""
        return self.detector.encode(images)

    def find(
        self,
        encoded: EncodedRegions,
        vocabulary: Vocabulary,
        *,
        score_threshold: float,
        max_detections: int,
        distinct: bool = False,
        masks: bool = True,
    ) -> Detections:
        """Find the vocabulary's names in an encoded image, with masks if learned and wanted."""
        return self.detector.find(
            encoded,
            vocabulary,
            score_threshold=score_threshold,
            max_detections=max_detections,
            distinct=distinct,
            masks=masks,
        )

    def detect(
        self,
        images: Sequence[Tensor],
        vocabulary: Vocabulary,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> list[Detections]:
        """Find the vocabulary's names in uint8 images [3, H, W]; one `Detections` per image."""
        return self.detector.detect(images, vocabulary, score_threshold=score_threshold, max_detections=max_detections)


def build_detector(config: CoDetConfig) -> RCNN | CenterNet2:
    """The detector that the config names."""
    if config.architecture == "centernet2":
        return CenterNet2(config.centernet2)
    return C4(config.detector) if config.architecture == "c4" else RCNN(config.detector)


def gather_captions(caption_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Captions of all ranks [M, D] (with equal B), the row of each own caption [B], and a mask [M] of own rows."""
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

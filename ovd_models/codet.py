"""CoDet: learn to classify regions from images whose captions share a concept (NeurIPS 2023, arXiv 2310.16667).

G groups, g images of a group, Q = g query images, S = g supports, N proposals of an image, B = G * g images,
D embedding width, C concepts, K categories with boxes.
"""

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
from torchvision.ops import clip_boxes_to_image

from ovd_models.batches import ConceptBatch, DetectionBatch, Detections
from ovd_models.c4 import C4
from ovd_models.cascade import CenterNet2, CenterNet2Config
from ovd_models.errors import InputError
from ovd_models.losses import caption_loss, concept_loss, cosine_logits
from ovd_models.rcnn import RCNN, RCNNConfig, widen
from ovd_models.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class CoDetConfig:
    """The detector and the alignment of caption groups."""

    architecture: Literal["fpn", "c4", "centernet2"] = "fpn"
    """`fpn` and `c4` are built from `detector`, `centernet2` from `centernet2`."""
    detector: RCNNConfig = field(default_factory=RCNNConfig)
    centernet2: CenterNet2Config = field(default_factory=CenterNet2Config)
    num_proposals: int = 16
    """N: the best proposals of a captioned image that take part."""
    text_guidance: bool = True
    centre_guidance: bool = True
    """Take the mean over all concepts from a concept before it guides; the released model does not."""
    aggregation: Literal["maximum", "learned"] = "maximum"
    """From similarities to attention: `align`, or the released perceptron, which fits one group size only."""
    group_size: int = 0
    """Images of a group; only the learned aggregation needs to know."""
    attention_temperature: float = 0.1
    """Divides the similarity before the softmax over a query's proposals."""
    concept_weight: float = 0.2
    """Weight of the region-word loss."""
    caption_weight: float = 0.05
    """Weight of the image-text loss; it needs a teacher with a text tower."""


@dataclass(frozen=True)
class Alignment:
    """How the proposals of each query image relate to those of its group."""

    attention: Tensor
    """[G, g, N] weights over an image's proposals; each row with a proposal sums to 1."""
    prototype: Tensor
    """[G, g, D] attention-weighted mean of the image's region features."""


def guidance_weights(text_GD: Tensor, centre_D: Tensor) -> Tensor:
    """[G, D] weights of embedding dimensions for each group's concept, averaging 1 (CoDet, text guidance).

    The absolute embedding, after the mean over all concepts is taken away: without that, a few large dimensions that
    all concepts share decide, and guidance hardly depends on the concept.
    """
    magnitude_GD = (text_GD - centre_D).abs()
    return magnitude_GD * text_GD.shape[1] / magnitude_GD.sum(1, keepdim=True).clamp(min=1e-12)


def align(region_GgND: Tensor, valid_GgN: Tensor, guidance_GD: Tensor, temperature: float) -> Alignment:
    """Find in every image what its group shares (CoDet, section 3.2; all queries at once).

    S[a, b] = sum_k w_k p_a[k] p_b[k] between unit features of a query's proposals a and a support's proposals b;
    for each a the maximum over a support's proposals, the mean over supports, and a softmax over a. So neither the
    order of images nor that of proposals matters, and padding takes no part.

    Args:
        region_GgND: [G, g, N, D] region features of any norm.
        valid_GgN: [G, g, N] bool, False where padded.
        guidance_GD: [G, D] weights of the dimensions.
        temperature: divides the similarity before the softmax.
    """
    group_size = region_GgND.shape[1]
    if not region_GgND.shape[2]:  # no image has a proposal
        return Alignment(region_GgND.new_zeros(valid_GgN.shape), region_GgND.sum(2))
    unit_GgND = F.normalize(region_GgND, dim=-1)
    guided_GgND = unit_GgND * guidance_GD[:, None, None, :]
    similarity_GQNSN = torch.einsum("gqad,gsbd->gqasb", guided_GgND, unit_GgND)
    hidden = torch.finfo(similarity_GQNSN.dtype).min
    best_GQNS = similarity_GQNSN.masked_fill(~valid_GgN[:, None, None], hidden).amax(-1)
    itself_QS = torch.eye(group_size, dtype=torch.bool, device=region_GgND.device)
    usable_GQS = valid_GgN.any(-1)[:, None, :] & ~itself_QS  # supports: the others, if they have a proposal
    weight_GQS = usable_GQS / usable_GQS.sum(-1, keepdim=True).clamp(min=1)
    shared_GQN = torch.where(usable_GQS[:, :, None], best_GQNS, 0.0).mul(weight_GQS[:, :, None]).sum(-1)
    attention_GgN = torch.softmax((shared_GQN / temperature).masked_fill(~valid_GgN, hidden), dim=-1) * valid_GgN
    return Alignment(attention_GgN, torch.einsum("gqa,gqad->gqd", attention_GgN, region_GgND))


class LearnedAggregation(nn.Module):
    """The released aggregation: a two-layer perceptron scores each row of the similarity matrix.

    Unlike `align`, it knows the ranks of proposals and the order of supports, fits one group size and one number of
    proposals only, and gives padding its share of the attention; it is here so that released weights give released
    results.

    Args:
        group_size: g.
        num_proposals: N, which images with fewer are padded to with zero features.
    """

    def __init__(self, group_size: int, num_proposals: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_proposals * (group_size - 1), num_proposals)
        self.score = nn.Linear(num_proposals, 1)
        nn.init.kaiming_uniform_(self.hidden.weight, a=1)
        nn.init.normal_(self.score.weight, std=1e-3)  # attention starts out even
        for layer in (self.hidden, self.score):
            nn.init.zeros_(layer.bias)

    def forward(self, region_GgND: Tensor, guidance_GD: Tensor) -> Alignment:
        """[G, g, N, D] region features, zero where padded, and [G, D] weights of the dimensions."""
        groups, size, count, _ = region_GgND.shape
        unit_GgND = F.normalize(region_GgND, dim=-1)
        similarity_GQNSN = torch.einsum("gqad,gsbd->gqasb", unit_GgND * guidance_GD[:, None, None, :], unit_GgND)
        others_QS = ~torch.eye(size, dtype=torch.bool, device=region_GgND.device)
        rows = similarity_GQNSN.transpose(2, 3)[:, others_QS].view(groups, size, size - 1, count, count)
        score_GgN = self.score(F.relu(self.hidden(rows.transpose(2, 3).flatten(3)))).squeeze(-1)
        attention_GgN = torch.softmax(score_GgN, dim=-1)
        return Alignment(attention_GgN, torch.einsum("gqa,gqad->gqd", attention_GgN, region_GgND))


class CoDet(nn.Module):
    """A text-classifier detector that learns from boxes of base categories and from caption groups."""

    def __init__(self, config: CoDetConfig) -> None:
        super().__init__()
        self.config = config
        self.detector = build_detector(config)
        if config.aggregation == "learned":
            if config.group_size < 2:
                raise InputError(f"group_size: {config.group_size}, expected at least 2 for the learned aggregation")
            stages = len(config.centernet2.stage_ious) if config.architecture == "centernet2" else 1
            self.aggregations = nn.ModuleList(
                LearnedAggregation(config.group_size, config.num_proposals) for _ in range(stages)
            )

    def forward(
        self,
        detection: DetectionBatch,
        concepts: ConceptBatch | None,
        categories_KD: Tensor,
        concepts_CD: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one step: both kinds of batch go through the backbone together.

        Args:
            detection: images with boxes.
            concepts: caption groups; None for box supervision alone.
            categories_KD: [K, D] unit rows that `detection.labels` count.
            concepts_CD: [C, D] unit rows that `concepts.concept_ids` count.
        """
        detector = self.detector
        captioned = concepts.images if concepts is not None else ()
        images = [widen(image, detector.config.max_size) for image in (*detection.images, *captioned)]
        batch = detector.preprocess(images)
        features = detector.features(batch)
        proposals = detector.propose(batch, features)
        targets = [
            {"boxes": resize_boxes(box, list(image.shape[-2:]), list(size)), "labels": label}
            for image, box, label, size in zip(
                images, detection.boxes, detection.labels, batch.image_sizes, strict=False
            )
        ]
        losses = detector.detection_losses(batch, features, proposals, targets, categories_KD)  # type: ignore[arg-type]
        if concepts is not None and concepts_CD is not None:
            start = detection.num_images
            own = {name: level[start:] for name, level in features.items()}
            sizes = ImageList(batch.tensors[start:], batch.image_sizes[start:])
            losses |= self._group_losses(concepts, sizes, own, proposals.boxes[start:], concepts_CD)
        return losses

    def _group_losses(
        self,
        concepts: ConceptBatch,
        batch: ImageList,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        concepts_CD: Tensor,
    ) -> dict[str, Tensor]:
        """Region-word and image-text losses of a batch of groups."""
        config = self.config
        boxes = [
            clip_boxes_to_image(entry[: config.num_proposals].detach(), size)
            for entry, size in zip(proposals, batch.image_sizes, strict=True)
        ]
        counts = [len(entry) for entry in boxes]
        losses: dict[str, Tensor] = {}
        for stage, region_RD in enumerate(self._embed_with_image(features, boxes, batch)):
            rows = torch.split(region_RD, [count + 1 for count in counts])
            prototype_BD = self._prototypes(stage, [entry[:-1] for entry in rows], concepts, concepts_CD)
            logits_BC = cosine_logits(prototype_BD, concepts_CD, self.detector.config.temperature)
            concept_B = concepts.concept_ids.repeat_interleave(concepts.group_size)
            loss = config.concept_weight * concept_loss(logits_BC, concept_B, concepts.mentioned)
            losses["concept"] = losses.get("concept", 0.0) + loss
            if config.caption_weight and concepts.caption_embeddings is not None:
                image_BD = torch.stack([entry[-1] for entry in rows])
                gathered = gather_captions(concepts.caption_embeddings)
                loss = config.caption_weight * caption_loss(image_BD, *gathered, self.detector.config.temperature)
                losses["caption"] = losses.get("caption", 0.0) + loss
        return losses

    def _embed_with_image(self, features: dict[str, Tensor], boxes: list[Tensor], batch: ImageList) -> list[Tensor]:
        """[R, D] embeddings in every stage of each image's boxes and, behind them, of the whole image."""
        with_whole = [
            torch.cat((entry, entry.new_tensor([[0, 0, width, height]])))
            for entry, (height, width) in zip(boxes, batch.image_sizes, strict=True)
        ]
        if isinstance(self.detector, CenterNet2):
            return self.detector.region_embeddings(features, with_whole, batch)
        return [self.detector.projection(self.detector.region_features(features, with_whole, batch))]

    def _prototypes(self, stage: int, regions: list[Tensor], concepts: ConceptBatch, concepts_CD: Tensor) -> Tensor:
        """[B, D] what each image shares with its group, from the embeddings [N, D] of its proposals."""
        config, shape = self.config, (len(concepts.concept_ids), concepts.group_size)
        own_GD = concepts_CD[concepts.concept_ids]
        centre_D = concepts_CD.mean(0) * config.centre_guidance
        guidance_GD = guidance_weights(own_GD, centre_D) if config.text_guidance else torch.ones_like(own_GD)
        region_BND = pad_sequence(regions, batch_first=True)
        if config.aggregation == "learned":
            missing = config.num_proposals - region_BND.shape[1]
            padded = F.pad(region_BND, (0, 0, 0, missing)).view(*shape, config.num_proposals, -1)
            aligned: Alignment = self.aggregations[stage](padded, guidance_GD)
        else:
            lengths_B = torch.tensor([len(entry) for entry in regions], device=region_BND.device)
            valid_BN = torch.arange(region_BND.shape[1], device=region_BND.device) < lengths_B[:, None]
            aligned = align(
                region_BND.view(*shape, *region_BND.shape[1:]),
                valid_BN.view(*shape, -1),
                guidance_GD,
                config.attention_temperature,
            )
        return aligned.prototype.flatten(0, 1)

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

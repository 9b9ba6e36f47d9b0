"""Training SAM itself: simulated interactive prompts and the losses (arXiv 2304.02643, appendix A).

B images, N objects of an image, P prompts of all images, n points of a prompt, K masks of a prompt, S side of the
model's square input, h embedding side, L = 4 h.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.images import fitted_size
from ovd_models.losses import zero_loss
from ovd_models.sam.model import SamConfig, SamModel, fit_on_device
from ovd_models.segments import OFF, ON, MaskBatch, boxes_of


@dataclass(frozen=True, kw_only=True)
class SamTrainingConfig:
    """How SAM is trained; the loss weights are the paper's."""

    prompts_per_image: int = 3
    """Objects of an image used as prompts, drawn with replacement."""
    clicks: int = 1
    """Rounds after the first that add a corrective click to the last mask."""
    repeats: int = 0
    """Rounds after these in which the last mask is the only new input."""
    box_jitter: float = 0.1
    """Standard deviation of a box's corners, relative to its sides."""
    max_jitter: float = 20.0
    """Maximum shift of a corner, in pixels of the model's input."""
    focal_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0


# ------------------------------------------------------------------------------------------------------- losses


def focal_loss(logits_PKN: Tensor, target_PKN: Tensor, gamma: float = 2.0) -> Tensor:
    """[P, K, N] logits and 0/1 targets -> [P, K] focal loss -(1 - p_t)^gamma log p_t, averaged over pixels."""
    entropy = F.binary_cross_entropy_with_logits(logits_PKN, target_PKN, reduction="none")
    return ((1 - torch.exp(-entropy)) ** gamma * entropy).mean(-1)


def dice_loss(logits_PKN: Tensor, target_PKN: Tensor) -> Tensor:
    """[P, K, N] logits and 0/1 targets -> [P, K]: 1 - (2 sum p t + 1) / (sum p + sum t + 1)."""
    probability = logits_PKN.sigmoid()
    overlap = 2 * (probability * target_PKN).sum(-1) + 1
    return 1 - overlap / (probability.sum(-1) + target_PKN.sum(-1) + 1)


def mask_ious(one: Tensor, two: Tensor) -> Tensor:
    """[..., N] bool masks -> [...] IoU; 1 for two empty masks."""
    union = (one | two).sum(-1)
    return torch.where(union > 0, (one & two).sum(-1) / union.clamp(min=1), 1.0)


def best_mask_weights(loss_PK: Tensor) -> Tensor:
    """[P, K] weights of the masks' losses: 1 for mask 0 and for the best of the others.

    The others can then specialise in different readings of a click. (The paper does not train mask 0 with single
    clicks; here it is, since OV-SAM keeps only that mask.)
    """
    weight_PK = torch.zeros_like(loss_PK)
    weight_PK[:, 0] = 1.0
    if loss_PK.shape[1] > 1:
        weight_PK.scatter_(1, loss_PK[:, 1:].argmin(1, keepdim=True) + 1, 1.0)
    return weight_PK


def prompt_losses(
    low_PKLL: Tensor, ious_PK: Tensor, target_PSS: Tensor, settings: SamTrainingConfig, *, ambiguous: bool
) -> dict[str, Tensor]:
    """Weighted losses `focal`, `dice` and `iou` of prompts of one kind.

    Args:
        low_PKLL: [P, K, L, L] logits.
        ious_PK: [P, K] predicted IoUs.
        target_PSS: [P, S, S] bool.
        settings: the weights.
        ambiguous: whether all masks are trained, or the first one alone.
    """
    masks = slice(None) if ambiguous else slice(1)
    size = target_PSS.shape[1:]
    logits_PKN = F.interpolate(low_PKLL[:, masks], size, mode="bilinear", align_corners=False).flatten(2)
    target_PKN = target_PSS.flatten(1)[:, None].expand_as(logits_PKN)
    focal_PK = settings.focal_weight * focal_loss(logits_PKN, target_PKN.float())
    dice_PK = settings.dice_weight * dice_loss(logits_PKN, target_PKN.float())
    weight_PK = best_mask_weights((focal_PK + dice_PK).detach())
    error_PK = (ious_PK[:, masks] - mask_ious(logits_PKN > 0, target_PKN)) ** 2
    return {
        "focal": (focal_PK * weight_PK).sum() / weight_PK.sum(),
        "dice": (dice_PK * weight_PK).sum() / weight_PK.sum(),
        "iou": settings.iou_weight * error_PK.mean(),
    }


# ------------------------------------------------------------------------------------------------------ prompts


def sample_pixels(masks_PHW: Tensor, generator: torch.Generator | None) -> Tensor:
    """[P, H, W] bool -> [P, 2] float32 xy of a pixel of each mask, all equally likely; any pixel if it is empty."""
    uniform_P = torch.rand(len(masks_PHW), dtype=torch.float64, generator=generator)
    return pixels_at(masks_PHW, uniform_P.to(masks_PHW.device, non_blocking=True))


def pixels_at(masks_PHW: Tensor, uniform_P: Tensor) -> Tensor:
    """[P, 2] float32 xy of a pixel of each mask: the one with index floor(n u) of its n pixels, row after row.

    Args:
        masks_PHW: [P, H, W] bool; an empty mask stands for the whole image.
        uniform_P: [P] float64 u, 0 <= u < 1.
    """
    masks_PN = masks_PHW.flatten(1)
    masks_PN = masks_PN | ~masks_PN.any(1, keepdim=True)
    count_PN = masks_PN.cumsum(1, dtype=torch.int32)  # the mask's pixels up to each pixel
    rank_P1 = (uniform_P[:, None] * count_PN[:, -1:]).to(torch.int32) + 1  # 1 to n
    chosen_P = torch.searchsorted(count_PN, rank_P1)[:, 0]
    width = masks_PHW.shape[2]
    return torch.stack([chosen_P % width, chosen_P // width], dim=1).float()


def corrective_clicks(
    predicted_PHW: Tensor, target_PHW: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """[P, 2] points drawn where the mask is wrong, with labels [P]: `ON` for missed pixels, `OFF` for surplus ones."""
    points_P2 = sample_pixels(predicted_PHW ^ target_PHW, generator)
    column, row = points_P2.long().unbind(1)
    missed_P = target_PHW[torch.arange(len(points_P2), device=points_P2.device), row, column]
    return points_P2, torch.where(missed_P, ON, OFF)


def jitter_boxes(boxes_P4: Tensor, share: float, limit: float, side: int, generator: torch.Generator | None) -> Tensor:
    """Boxes, each coordinate moved by a normal `share` of the side, at most `limit` pixels, clipped to the image."""
    sides_P4 = (boxes_P4[:, 2:] - boxes_P4[:, :2]).repeat(1, 2)
    noise_P4 = torch.randn(boxes_P4.shape, generator=generator).to(boxes_P4.device, non_blocking=True)
    shift_P4 = (noise_P4 * share * sides_P4).clamp(-limit, limit)
    moved_P4 = (boxes_P4 + shift_P4).clamp(0, side)
    first_P2, last_P2 = moved_P4[:, :2], moved_P4[:, 2:]
    return torch.cat([torch.minimum(first_P2, last_P2), torch.maximum(first_P2, last_P2)], dim=1)


@dataclass(frozen=True)
class SampledObjects:
    """P objects of a batch."""

    images: Tensor
    """[P] int64, index of each object's image."""
    masks: Tensor
    """[P, S, S] bool, in the model's input."""
    labels: Tensor
    """[P] int64."""
    boxes: Tensor
    """[P, 4] tight boxes."""

    def take(self, rows: Tensor) -> "SampledObjects":
        """The objects of these rows."""
        return SampledObjects(self.images[rows], self.masks[rows], self.labels[rows], self.boxes[rows])


def sample_objects(batch: MaskBatch, side: int, count: int, generator: torch.Generator | None) -> SampledObjects:
    """Draw `count` objects of each image that has any, with replacement, their masks resized to the model's input.

    Objects that vanish at that size are dropped.
    """
    device = batch.images[0].device if batch.images else torch.device("cpu")
    images = [torch.zeros(0, dtype=torch.int64, device=device)]
    labels, masks = [images[0]], [torch.zeros(0, side, side, dtype=torch.bool, device=device)]
    for index, (mask_NHW, label_N) in enumerate(zip(batch.masks, batch.labels, strict=True)):
        if not len(mask_NHW):
            continue
        rows = torch.randint(len(mask_NHW), (count,), generator=generator).to(mask_NHW.device, non_blocking=True)
        images.append(torch.full((count,), index, device=mask_NHW.device))
        masks.append(resize_masks_to_square(mask_NHW[rows], side))
        labels.append(label_N[rows])
    masks_PSS = torch.cat(masks)
    drawn = SampledObjects(torch.cat(images), masks_PSS, torch.cat(labels), boxes_of(masks_PSS))
    return drawn.take(torch.nonzero(masks_PSS.flatten(1).any(1)).flatten())


def resize_masks_to_square(masks_NHW: Tensor, side: int) -> Tensor:
    """[N, H, W] bool -> [N, S, S] bool: the longer side resized to S, the other padded."""
    height, width = masks_NHW.shape[1:]
    size = fitted_size(height, width, side)
    resized = masks_NHW.float()[:, None]
    if size != (height, width):
        resized = F.interpolate(resized, size, mode="bilinear", align_corners=False)
    return F.pad(resized[:, 0] >= 0.5, (0, side - size[1], 0, side - size[0]))


# ----------------------------------------------------------------------------------------------------- training


class SamTraining(nn.Module):
    """SAM with its training step."""

    def __init__(self, config: SamConfig, training: SamTrainingConfig) -> None:
        super().__init__()
        self.model = SamModel(config)
        self.settings = training
        if not training.clicks + training.repeats:  # no mask is a prompt, and DDP expects a gradient of each weight
            self.model.sam.prompt_encoder.mask_downscaling.requires_grad_(False)

    def forward(self, batch: MaskBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weighted losses `focal`, `dice` and `iou`: the mean over prompts and over rounds of prompting.

        The first round prompts half of the objects with a box, half with a click. `clicks` rounds add the last mask and
        a corrective click; `repeats` rounds add the last mask alone.
        """
        sam, side = self.model.sam, self.model.config.image_size
        images = torch.stack([sam.preprocess(fit_on_device(image, side)) for image in batch.images])
        embedding_BChw = sam.image_encoder(images)
        objects = sample_objects(batch, side, self.settings.prompts_per_image, generator)
        if not len(objects.labels):
            return dict.fromkeys(("focal", "dice", "iou"), zero_loss(self.parameters()))
        session = InteractiveSession(self, embedding_BChw[objects.images], objects, generator)
        losses = [session.first_round()]
        losses += [session.next_round(click=True) for _ in range(self.settings.clicks)]
        losses += [session.next_round(click=False) for _ in range(self.settings.repeats)]
        return {name: torch.stack([entry[name] for entry in losses]).mean() for name in losses[0]}


class InteractiveSession:
    """A simulated user's prompts for a batch of objects, and the model's last masks."""

    def __init__(
        self,
        training: SamTraining,
        embedding_PChw: Tensor,
        objects: SampledObjects,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.settings = training.model, training.settings
        self.embedding_PChw, self.objects, self.generator = embedding_PChw, objects, generator
        self.side, count = training.model.config.image_size, len(objects.labels)
        self.order = torch.randperm(count, generator=generator).to(embedding_PChw.device, non_blocking=True)
        self.boxed, self.clicked = self.order[: count // 2], self.order[count // 2 :]  # rows with a box, and without
        jitter, limit = self.settings.box_jitter, self.settings.max_jitter
        self.boxes_P4 = jitter_boxes(objects.boxes, jitter, limit, self.side, generator)
        self.points_Pn2 = sample_pixels(objects.masks, generator)[:, None]
        self.labels_Pn = torch.full_like(self.points_Pn2[..., 0], ON)
        self.low_PLL: Tensor | None = None  # logits of the last round's masks, those that a user would see

    def first_round(self) -> dict[str, Tensor]:
        """Losses of a box or a click for each object."""
        low_PKLL, ious_PK = self.model.decode(self.embedding_PChw, *self._embed_prompts())
        parts = [  # a single click is ambiguous, and the user is shown the best mask
            prompt_losses(
                low_PKLL[rows], ious_PK[rows], self.objects.masks[rows], self.settings, ambiguous=rows is self.clicked
            )
            for rows in (self.boxed, self.clicked)
            if len(rows)
        ]
        best_P = torch.zeros_like(self.order)
        best_P[self.clicked] = ious_PK[self.clicked, 1:].argmax(1) + 1
        self.low_PLL = low_PKLL.detach()[torch.arange(len(best_P), device=best_P.device), best_P]
        return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}

    def next_round(self, *, click: bool) -> dict[str, Tensor]:
        """Losses of the last masks as prompts, with a corrective click or without."""
        assert self.low_PLL is not None
        if click:
            size = (self.side, self.side)
            shown = F.interpolate(self.low_PLL[:, None], size, mode="bilinear", align_corners=False)[:, 0] > 0
            point_P2, label_P = corrective_clicks(shown, self.objects.masks, self.generator)
            self.points_Pn2 = torch.cat([self.points_Pn2, point_P2[:, None]], dim=1)
            self.labels_Pn = torch.cat([self.labels_Pn, label_P[:, None].to(self.labels_Pn)], dim=1)
        low_PKLL, ious_PK = self.model.decode(self.embedding_PChw, *self._embed_prompts())
        self.low_PLL = low_PKLL.detach()[:, 0]
        return prompt_losses(low_PKLL, ious_PK, self.objects.masks, self.settings, ambiguous=False)

    def _embed_prompts(self) -> tuple[Tensor, Tensor]:
        """Sparse and dense embeddings of the prompts.

        The first click is left out for prompts with a box: both kinds then have equally many tokens and fit one batch.
        """
        encoder, boxed, clicked = self.model.sam.prompt_encoder, self.boxed, self.clicked
        later = (self.points_Pn2[boxed, 1:], self.labels_Pn[boxed, 1:])
        boxed_PnC, _ = encoder(later, self.boxes_P4[boxed], None)
        clicked_PnC, _ = encoder((self.points_Pn2[clicked], self.labels_Pn[clicked]), None, None)
        sparse_PnC = torch.empty_like(torch.cat([boxed_PnC, clicked_PnC]))
        sparse_PnC[self.order] = torch.cat([boxed_PnC, clicked_PnC])
        if self.low_PLL is None:
            return sparse_PnC, encoder.no_mask_embed.weight[:, :, None, None]
        return sparse_PnC, encoder(None, None, self.low_PLL[:, None])[1]

"""Training SAM itself: prompts drawn from masks, corrected by clicks, and the losses (arXiv 2304.02643, appendix A).

B images, N objects of an image, P prompts of all images, n points of a prompt, K masks of a prompt, S side of the
model's square input, h embedding side, L = 4 h.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.sam.model import SamConfig, SamModel, fit_image, run_decoder
from ovd_models.segments import OFF, ON, MaskBatch, boxes_of


@dataclass(frozen=True, kw_only=True)
class SamTrainingConfig:
    """How SAM is trained; the weights of the losses are the paper's."""

    prompts_per_image: int = 3
    """Objects of an image that are asked for, drawn with replacement."""
    clicks: int = 1
    """Corrective clicks after the first answer, each beside the last mask."""
    repeats: int = 0
    """Rounds after them in which the last mask is all that is new."""
    box_jitter: float = 0.1
    """Standard deviation of a box's corners, relative to its sides."""
    max_jitter: float = 20.0
    """Largest shift of a corner, in pixels of the model's input."""
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
    """[..., N] bool masks -> [...] IoU; two empty masks agree."""
    union = (one | two).sum(-1)
    return torch.where(union > 0, (one & two).sum(-1) / union.clamp(min=1), 1.0)


def best_mask_weights(loss_PK: Tensor) -> Tensor:
    """[P, K] weights of the masks' losses: 1 for mask 0 and for the best of the others.

    So each of the others may stand for another reading of a click. (In the paper mask 0 is left out there; here it
    learns single clicks too, since OV-SAM keeps that mask alone.)
    """
    weight_PK = torch.zeros_like(loss_PK)
    weight_PK[:, 0] = 1.0
    if loss_PK.shape[1] > 1:
        weight_PK.scatter_(1, loss_PK[:, 1:].argmin(1, keepdim=True) + 1, 1.0)
    return weight_PK


def prompt_losses(
    low_PKLL: Tensor, ious_PK: Tensor, target_PSS: Tensor, settings: SamTrainingConfig, *, ambiguous: bool
) -> dict[str, Tensor]:
    """Weighted losses `focal`, `dice` and `iou` of prompts that are alike.

    Args:
        low_PKLL: [P, K, L, L] logits.
        ious_PK: [P, K] the qualities that the model predicts.
        target_PSS: [P, S, S] bool.
        settings: the weights.
        ambiguous: whether all masks count; else the first one alone.
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


def sample_pixels(weights_PHW: Tensor, generator: torch.Generator | None) -> Tensor:
    """[P, H, W] non-negative -> [P, 2] float32 xy of a pixel drawn by weight; any pixel where all are 0."""
    flat_PN = weights_PHW.flatten(1).float()
    flat_PN = torch.where(flat_PN.sum(1, keepdim=True) > 0, flat_PN, torch.ones_like(flat_PN))
    # The largest of exponential races: as multinomial, without its limit on the number of pixels.
    noise_PN = torch.rand(flat_PN.shape, generator=generator).to(flat_PN.device).clamp(1e-12, 1 - 1e-7)
    chosen_P = (torch.log(flat_PN) - torch.log(-torch.log(noise_PN))).argmax(1)
    width = weights_PHW.shape[2]
    return torch.stack([chosen_P % width, chosen_P // width], dim=1).float()


def corrective_clicks(
    predicted_PHW: Tensor, target_PHW: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """[P, 2] points drawn where the mask is wrong, and their labels [P]: `ON` where it lacks the thing, else `OFF`."""
    points_P2 = sample_pixels(predicted_PHW ^ target_PHW, generator)
    column, row = points_P2.long().unbind(1)
    on_thing = target_PHW[torch.arange(len(points_P2), device=points_P2.device), row, column]
    return points_P2, torch.where(on_thing, ON, OFF)


def jitter_boxes(boxes_P4: Tensor, share: float, limit: float, side: int, generator: torch.Generator | None) -> Tensor:
    """Boxes with each corner moved by a normal share of the side, by up to `limit` pixels, inside the image."""
    sides_P4 = (boxes_P4[:, 2:] - boxes_P4[:, :2]).repeat(1, 2)
    noise_P4 = torch.randn(boxes_P4.shape, generator=generator).to(boxes_P4.device) * share * sides_P4
    moved_P4 = (boxes_P4 + noise_P4.clamp(-limit, limit)).clamp(0, side)
    return torch.cat(
        [torch.minimum(moved_P4[:, :2], moved_P4[:, 2:]), torch.maximum(moved_P4[:, :2], moved_P4[:, 2:])], dim=1
    )


@dataclass(frozen=True)
class SampledObjects:
    """P objects of a batch."""

    images: Tensor
    """[P] int64, the image of each."""
    masks: Tensor
    """[P, S, S] bool, in the model's input."""
    labels: Tensor
    """[P] int64."""
    boxes: Tensor
    """[P, 4] tight boxes."""


def sample_objects(batch: MaskBatch, side: int, count: int, generator: torch.Generator | None) -> SampledObjects:
    """Draw `count` objects of each image that has any, with replacement, their masks brought to the model's input.

    Those of which nothing is left at that size are dropped.
    """
    images, masks, labels = [], [], []
    for index, (mask_NHW, label_N) in enumerate(zip(batch.masks, batch.labels, strict=True)):
        if not len(mask_NHW):
            continue
        rows = torch.randint(len(mask_NHW), (count,), generator=generator).to(mask_NHW.device)
        images.append(torch.full((count,), index, device=mask_NHW.device))
        masks.append(fit_masks(mask_NHW[rows], side))
        labels.append(label_N[rows])
    if not masks:
        device = batch.images[0].device if batch.images else torch.device("cpu")
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        empty = torch.zeros(0, side, side, dtype=torch.bool, device=device)
        return SampledObjects(nothing, empty, nothing, torch.zeros(0, 4, device=device))
    masks_PSS = torch.cat(masks)
    kept_P = masks_PSS.flatten(1).any(1)
    masks_PSS = masks_PSS[kept_P]
    return SampledObjects(torch.cat(images)[kept_P], masks_PSS, torch.cat(labels)[kept_P], boxes_of(masks_PSS))


def fit_masks(masks_NHW: Tensor, side: int) -> Tensor:
    """[N, H, W] bool -> [N, S, S] bool: the longer side brought to S, the rest empty."""
    height, width = masks_NHW.shape[1:]
    scale = side / max(height, width)
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    fitted = masks_NHW.float()[:, None]
    if size != (height, width):
        fitted = F.interpolate(fitted, size, mode="bilinear", align_corners=False)
    return F.pad(fitted[:, 0] >= 0.5, (0, side - size[1], 0, side - size[0]))


# ----------------------------------------------------------------------------------------------------- training


class SamTraining(nn.Module):
    """SAM with its training step."""

    def __init__(self, config: SamConfig, training: SamTrainingConfig) -> None:
        super().__init__()
        self.model = SamModel(config)
        self.settings = training
        if not training.clicks + training.repeats:  # no round has a mask before it, and workers expect gradients
            self.model.sam.prompt_encoder.mask_downscaling.requires_grad_(False)

    def forward(self, batch: MaskBatch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Weighted losses `focal`, `dice` and `iou`: the mean over prompts and over rounds of prompting.

        Half of the objects are asked for by a box, half by a click; then come `clicks` corrections, each with the last
        mask, and `repeats` rounds with the last mask but no new click.
        """
        sam, side = self.model.sam, self.model.config.image_size
        images = torch.stack([sam.preprocess(fit_image(image, side)[0]) for image in batch.images])
        embedding_BChw = sam.image_encoder(images)
        objects = sample_objects(batch, side, self.settings.prompts_per_image, generator)
        count = len(objects.labels)
        if not count:  # an image without objects teaches nothing, but every weight takes part in the step
            nothing = embedding_BChw.sum() * 0 + sum(weight.sum() for weight in self.parameters()) * 0
            return {"focal": nothing, "dice": nothing, "iou": nothing}
        rounds = _PromptRounds(self, embedding_BChw[objects.images], objects, generator)
        count = 1 + self.settings.clicks + self.settings.repeats
        losses = [rounds.ask(click=index <= self.settings.clicks) for index in range(count)]
        return {name: torch.stack([entry[name] for entry in losses]).mean() for name in losses[0]}


class _PromptRounds:
    """The conversation about one batch of objects: what was asked so far, and the last answer."""

    def __init__(
        self,
        training: SamTraining,
        embedding_PChw: Tensor,
        objects: SampledObjects,
        generator: torch.Generator | None,
    ) -> None:
        self.training, self.embedding_PChw, self.objects, self.generator = training, embedding_PChw, objects, generator
        config, side = training.settings, training.model.config.image_size
        self.by_box = len(objects.labels) // 2
        self.order = torch.randperm(len(objects.labels), generator=generator).to(embedding_PChw.device)
        self.boxes_P4 = jitter_boxes(objects.boxes, config.box_jitter, config.max_jitter, side, generator)
        self.points_Pn2 = sample_pixels(objects.masks, generator)[:, None]
        self.labels_Pn = torch.full_like(self.points_Pn2[..., 0], ON)
        self.answer: tuple[Tensor, Tensor] | None = None  # [P, L, L] logits and [P, S, S] mask

    def ask(self, *, click: bool) -> dict[str, Tensor]:
        """One round: ask, with a corrective click if `click` and there is an answer to correct; returns its losses."""
        first = self.answer is None
        if click and self.answer is not None:
            point_P2, label_P = corrective_clicks(self.answer[1], self.objects.masks, self.generator)
            self.points_Pn2 = torch.cat([self.points_Pn2, point_P2[:, None]], dim=1)
            self.labels_Pn = torch.cat([self.labels_Pn, label_P[:, None].to(self.labels_Pn)], dim=1)
        model = self.training.model
        sparse_PnC, dense = self._embed()
        decoder = model.sam.mask_decoder
        position = model.sam.prompt_encoder.get_dense_pe()
        hidden, low_PKLL = run_decoder(
            decoder, decoder.iou_token.weight, self.embedding_PChw, position, sparse_PnC, dense
        )
        ious_PK = decoder.iou_prediction_head(hidden[:, 0])
        masks_PSS = self.objects.masks
        with_box, without = self.order[: self.by_box], self.order[self.by_box :]
        best_P = torch.zeros_like(self.order)
        settings = self.training.settings
        if not first:
            losses = prompt_losses(low_PKLL, ious_PK, masks_PSS, settings, ambiguous=False)
        else:  # a lone click may mean several things, of which the user is shown the best
            parts = [
                prompt_losses(low_PKLL[rows], ious_PK[rows], masks_PSS[rows], settings, ambiguous=ambiguous)
                for rows, ambiguous in ((with_box, False), (without, True))
                if len(rows)
            ]
            losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
            best_P[without] = ious_PK[without, 1:].argmax(1) + 1
        self._remember(low_PKLL.detach(), best_P)
        return losses

    def _embed(self) -> tuple[Tensor, Tensor]:
        """Prompt embeddings; a box with clicks and clicks alone take equally many tokens, so that one batch holds both.

        The first click belongs to prompts without a box only.
        """
        encoder = self.training.model.sam.prompt_encoder
        masks = None if self.answer is None else self.answer[0][:, None]
        with_box, without = self.order[: self.by_box], self.order[self.by_box :]
        later = slice(1, None)
        boxed, _ = encoder(
            (self.points_Pn2[with_box, later], self.labels_Pn[with_box, later]), self.boxes_P4[with_box], None
        )
        clicked, _ = encoder((self.points_Pn2[without], self.labels_Pn[without]), None, None)
        sparse_PnC = torch.empty_like(torch.cat([boxed, clicked]))
        sparse_PnC[self.order] = torch.cat([boxed, clicked])
        if masks is None:
            return sparse_PnC, encoder.no_mask_embed.weight[:, :, None, None]
        return sparse_PnC, encoder(None, None, masks)[1]

    def _remember(self, low_PKLL: Tensor, best_P: Tensor) -> None:
        """Keep the answer that a user would see."""
        low_PLL = low_PKLL[torch.arange(len(best_P), device=best_P.device), best_P]
        side = self.training.model.config.image_size
        shown = F.interpolate(low_PLL[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
        self.answer = (low_PLL, shown > 0)

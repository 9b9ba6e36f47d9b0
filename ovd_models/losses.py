"""Losses on text-classifier logits: pure functions.

R regions, B images, K classes, C concepts, M distilled regions, D embedding width.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Distance = Literal["l1", "l2"]


def cosine_logits(feature_RD: Tensor, text_KD: Tensor, temperature: float) -> Tensor:
    """[R, D] features and [K, D] unit rows -> [R, K] cosines times `temperature`; a zero feature gives 0.

    In float32 even under autocast: bfloat16 would leave two digits of a cosine that is then multiplied by up to 100.
    """
    with torch.autocast(feature_RD.device.type, enabled=False):
        return temperature * F.normalize(feature_RD.float(), dim=-1) @ text_KD.float().T


def zero_loss(parameters: Iterable[nn.Parameter]) -> Tensor:
    """0 with a gradient of 0 for every trained parameter: data-parallel training expects one in each step."""
    return torch.stack([value.sum() for value in parameters if value.requires_grad]).sum() * 0


def sigmoid_loss(logits_RK: Tensor, labels_R: Tensor, counted_K: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, summed over classes and averaged over regions; 0 for no region.

    Args:
        logits_RK: [R, K].
        labels_R: [R] int64; the class, or -1 for background: target 0 everywhere.
        counted_K: [K] bool, the classes included in the loss; all if None.
    """
    target_RK = (labels_R[:, None] == torch.arange(logits_RK.shape[1], device=labels_R.device)).to(logits_RK.dtype)
    weight_K = None if counted_K is None else counted_K.to(logits_RK.dtype)
    loss = F.binary_cross_entropy_with_logits(logits_RK, target_RK, weight_K, reduction="sum")
    return loss / max(1, len(logits_RK))


def federated_classes(
    labels_R: Tensor, weight_K: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Classes included in a batch's class loss (federated loss, arXiv 2103.07461, section 4).

    All that occur, and others drawn without replacement in proportion to their weight until there are `count`.
    Background counts as one of them if it occurs, as in the released code.

    Args:
        labels_R: [R] int64 classes of the batch's regions; -1 for background.
        weight_K: [K] float; classes of weight 0 are never drawn.
        count: number of classes.
        generator: for the random draw, on the device of `weight_K`; torch's default if None.

    Returns:
        [K] bool.
    """
    present_K = torch.zeros(len(weight_K) + 1, dtype=torch.bool, device=weight_K.device)  # the last one is background
    present_K = present_K.scatter(0, labels_R % len(present_K), True)
    left_K = F.pad(weight_K, (0, 1)).masked_fill(present_K, 0.0)
    # Largest ratios to exponential noise: a multinomial draw whose number of classes stays on the device.
    order_K = (left_K / torch.empty_like(left_K).exponential_(generator=generator)).argsort(descending=True)
    rank_K = torch.empty_like(order_K).scatter(0, order_K, torch.arange(len(order_K), device=order_K.device))
    drawn_K = (rank_K < count - present_K.sum()) & (left_K > 0)
    return (present_K | drawn_K)[:-1]


def softmax_loss(logits_RK: Tensor, background_R: Tensor, labels_R: Tensor, trained_K: Tensor | None = None) -> Tensor:
    """Cross-entropy over all names and the background, averaged over regions or 0 (ViLD, equations 2 and 3).

    Names outside `trained_K` get a logit of minus infinity, so no probability. Multiplying their logits by zero would
    leave exp(0) in the denominator for each of them.

    Args:
        logits_RK: [R, K].
        background_R: [R] logits of the background.
        labels_R: [R] int64; the name, or -1 for background.
        trained_K: [K] bool, the names with boxes in training; all if None.
    """
    if trained_K is not None:
        logits_RK = logits_RK.masked_fill(~trained_K, -torch.inf)
    all_RK1 = torch.cat([logits_RK, background_R[:, None]], dim=1)
    target_R = torch.where(labels_R < 0, logits_RK.shape[1], labels_R)
    return F.cross_entropy(all_RK1, target_R, reduction="sum") / max(1, len(logits_RK))


def distillation_loss(student_MD: Tensor, teacher_MD: Tensor, valid_M: Tensor, distance: Distance = "l1") -> Tensor:
    """Distance of unit embeddings, summed over dimensions, averaged over valid regions or 0 (ViLD, equation 4).

    Args:
        student_MD: [M, D] of any norm; a zero row stays zero.
        teacher_MD: [M, D] of any norm.
        valid_M: [M] bool; other rows are ignored.
        distance: absolute differences, or squared ones, whose sum is twice the cosine distance.
    """
    with torch.autocast(student_MD.device.type, enabled=False):
        student_MD, teacher_MD = (F.normalize(rows.float(), dim=-1, eps=1e-6) for rows in (student_MD, teacher_MD))
        difference_MD = student_MD - teacher_MD
        distance_M = (difference_MD.abs() if distance == "l1" else difference_MD.square()).sum(-1)
        return torch.where(valid_M, distance_M, 0.0).sum() / valid_M.sum().clamp(min=1)


def concept_loss(logits_BC: Tensor, concept_B: Tensor, ignored_BC: Tensor, counted_B: Tensor | None = None) -> Tensor:
    """Region-word loss: binary cross-entropy with target 1 only at the image's concept (CoDet, section 2).

    Summed over concepts and averaged over the counted images.

    Args:
        logits_BC: [B, C] of the prototypes.
        concept_B: [B] int64, the concept of each image's group.
        ignored_BC: [B, C] bool; concepts that are neither positives nor negatives. The image's own is never ignored.
        counted_B: [B] bool, the images included in the loss; all if None.
    """
    target_BC = F.one_hot(concept_B, logits_BC.shape[1]).to(logits_BC.dtype)
    weight_BC = (~ignored_BC | target_BC.bool()).to(logits_BC.dtype)
    counted_B = torch.ones_like(concept_B, dtype=torch.bool) if counted_B is None else counted_B
    weight_BC = weight_BC * counted_B[:, None]
    loss = F.binary_cross_entropy_with_logits(logits_BC, target_BC, weight_BC, reduction="sum")
    return loss / counted_B.sum().clamp(min=1)


def sampled_concepts(mentioned_BC: Tensor, count: int) -> Tensor:
    """Concepts included in each image's region-word loss (CoDet's federated loss on LVIS).

    All that its caption mentions, and others drawn uniformly until there are `count`.

    Args:
        mentioned_BC: [B, C] bool.
        count: number of concepts.

    Returns:
        [B, C] bool.
    """
    order_BC = torch.rand(mentioned_BC.shape, device=mentioned_BC.device) + mentioned_BC
    drawn_BN = order_BC.topk(min(count, mentioned_BC.shape[1])).indices
    return mentioned_BC.scatter(1, drawn_BN, True)


def caption_loss(
    image_BD: Tensor,
    caption_MD: Tensor,
    own_B: Tensor,
    same_rank_M: Tensor,
    temperature: float,
    *,
    same_rank_weight: float = 0.125,
    other_rank_weight: float = 1.25,
) -> Tensor:
    """Image-text loss of whole-image features against frozen caption embeddings of all ranks.

    Summed over captions and averaged over images.

    Args:
        image_BD: [B, D] features of any norm.
        caption_MD: [M, D] unit rows of all ranks' captions.
        own_B: [B] int64, the row of each image's own caption.
        same_rank_M: [M] bool, the captions of this rank.
        temperature: multiplies cosines.
        same_rank_weight: weight of negatives from this rank, whose captions often mention the same objects.
        other_rank_weight: weight of negatives from other ranks.
    """
    logits_BM = cosine_logits(image_BD, caption_MD, temperature)
    target_BM = F.one_hot(own_B, len(caption_MD)).to(logits_BM.dtype)
    negative_M = torch.where(same_rank_M, same_rank_weight, other_rank_weight)
    weight_BM = torch.where(target_BM.bool(), 1.0, negative_M)
    loss = F.binary_cross_entropy_with_logits(logits_BM, target_BM, weight_BM, reduction="sum")
    return loss / max(1, len(image_BD))

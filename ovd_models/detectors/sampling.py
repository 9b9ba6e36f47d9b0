"""Proposals, matching and sampling of all images at once, so that the host seldom waits for a GPU.

B images, N boxes or candidates of an image, M true boxes of an image, S samples of an image; lists of boxes are padded.
Boxes are xyxy in pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, nms

APART = 2_000
"""Maximum boxes that a CPU compares with those of all groups; more are compared group by group."""


def suppress(box_N4: Tensor, score_N: Tensor, group_N: Tensor, iou: float) -> Tensor:
    """[kept] int64, rows that survive suppression within their group, best first; boxes may be anywhere."""
    box_N4, score_N = box_N4.double(), score_N.double()  # groups are moved apart, which rounds overlaps in float32
    if box_N4.device.type != "cpu" or len(box_N4) <= APART:
        apart_N1 = (group_N * (box_N4.max() - box_N4.min() + 1))[:, None] if len(box_N4) else group_N[:, None]
        return torch.as_tensor(nms(box_N4 + apart_N1, score_N, iou))
    order_N = group_N.argsort(stable=True)
    sizes = torch.unique_consecutive(group_N[order_N], return_counts=True)[1].tolist()
    kept = torch.cat([rows[nms(box_N4[rows], score_N[rows], iou)] for rows in torch.split(order_N, sizes)])
    kept = kept.sort().values  # equal scores in the order of rows, as `nms` has them
    return kept[score_N[kept].argsort(descending=True, stable=True)]


def best_boxes(
    box_BN4: Tensor, score_BN: Tensor, valid_BN: Tensor, level_N: Tensor, iou: float, limit: int
) -> tuple[list[Tensor], list[Tensor]]:
    """B boxes [kept, 4] and scores [kept] in [0, 1], best first, after suppression within each image and level."""
    images, count = score_BN.shape
    levels = 1 + level_N.max() if count else 1
    group_BN = level_N + levels * torch.arange(images, device=score_BN.device)[:, None]
    group_BN = torch.where(valid_BN, group_BN, levels * images)
    keep = suppress(box_BN4.flatten(0, 1), score_BN.flatten(), group_BN.flatten(), iou)
    kept_BN = torch.zeros_like(valid_BN).flatten().index_fill(0, keep, True).view_as(valid_BN) & valid_BN
    ranked = torch.where(kept_BN, score_BN, -1.0).sort(dim=1, descending=True, stable=True)
    row_BK, score_BK = ranked.indices[:, :limit], ranked.values[:, :limit]
    best_BK4 = box_BN4.gather(1, row_BK[..., None].expand(-1, -1, 4))
    counts = (score_BK >= 0).sum(1).tolist()
    return [box[:n] for box, n in zip(best_BK4, counts, strict=True)], [
        score[:n] for score, n in zip(score_BK, counts, strict=True)
    ]


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """B tensors [N, ...] as one [B, N, ...] of at least one row each, and [B, N] bool, False for padding."""
    counts = torch.tensor([len(entry) for entry in rows], device=rows[0].device)
    padded = pad_sequence([entry if len(entry) else entry.new_zeros(1, *entry.shape[1:]) for entry in rows], True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < counts[:, None]


def overlaps(true_BM4: Tensor, real_BM: Tensor, box_BN4: Tensor) -> Tensor:
    """[B, M, N] IoU; -1 for padded true boxes."""
    iou_BMN = torch.stack([box_iou(true, box) for true, box in zip(true_BM4, box_BN4, strict=True)])
    return torch.where(real_BM[..., None], iou_BMN, -1.0)


def sample_balanced(positive_BN: Tensor, negative_BN: Tensor, size: int, share: float) -> tuple[Tensor, Tensor]:
    """Draw candidates of each image, at most a `share` of `size` positive, as many negative as are then left.

    Returns:
        [B, S] int64 rows, positive ones first, then negative ones; and [B, S] bool, False for rows that fill up.
    """
    draw_BN = torch.rand(positive_BN.shape, device=positive_BN.device)
    count = positive_BN.shape[1]
    best = torch.where(positive_BN, draw_BN, -1.0).topk(min(int(size * share), count), dim=1)
    chosen_BN = torch.zeros_like(positive_BN).scatter(1, best.indices, best.values >= 0)
    rank_BN = torch.where(chosen_BN, draw_BN + 2, torch.where(negative_BN, draw_BN + 1, 0.0))
    sampled = rank_BN.topk(min(size, count), dim=1)
    return sampled.indices, sampled.values >= 1

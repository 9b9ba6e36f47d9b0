"""CLIP2SAM: the label branch, its losses, and the fusion of its scores with CLIP's own (arXiv 2401.02955).

B images, P prompts, R regions, C channels, D embedding width, K names, Y synonyms, N sampled points.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from ovd_models.detectors.feature_pyramid import pool_levels
from ovd_models.sam.training import dice_loss
from ovd_models.vocabulary import Vocabulary

LOGIT_SCALE = 4.6052
"""Log of CLIP's factor of cosines."""
ROI_SIDE = 12
FINEST_SCALE = 14
"""Side, in strides of the first level, from which regions are pooled from that level; twice it for the second."""


class RegionNamer(nn.Module):
    """The label branch: a feature pyramid over CLIP's levels, pooled in each region, projected to CLIP's space.

    Args:
        channels: of the levels.
        strides: of the levels, in pixels of the input.
        width: C, of the pyramid.
        embed_dim: D.
        hidden: width of the MLP from a convolved region to its embedding, as in the paper. With 0, as in the released
            weights, the embedding is the average of rectified projections, so it has no negative coordinate and does
            not depend on the order of the region's parts.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], width: int, embed_dim: int, hidden: int = 0
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.fpn = FeaturePyramidNetwork(list(channels), width)
        if hidden:
            self.roi_conv = nn.Conv2d(width, width, 3, padding=1)
            side = ROI_SIDE // 2
            mlp = nn.Linear(width * side * side, hidden), nn.ReLU(), nn.Linear(hidden, embed_dim)
            self.output = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *mlp)
        else:
            self.roi_conv = nn.Conv2d(width, embed_dim, 1, bias=False)
            self.output = nn.Sequential(nn.AvgPool2d(ROI_SIDE), nn.Flatten())

    def pyramid(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """CLIP's levels [B, C_i, H_i, W_i], of which the last ones are used -> as many of [B, C, H_i, W_i]."""
        own = levels[-len(self.strides) :]
        return list(self.fpn({str(index): level for index, level in enumerate(own)}).values())

    def forward(self, pyramid: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """[R, D] embeddings of any norm of regions [R, 5] (image index and xyxy, pixels of the input)."""
        return self.embed(self.pool(pyramid, rois_R5))

    def embed(self, pooled_RCpp: Tensor) -> Tensor:
        """[R, C, 12, 12] -> [R, D]."""
        embedding: Tensor = self.output(F.relu(self.roi_conv(pooled_RCpp)))
        return embedding

    def pool(self, pyramid: Sequence[Tensor], rois_R5: Tensor) -> Tensor:
        """[R, C, 12, 12] features, each region's from the level of its size."""
        level_R = region_levels(rois_R5, self.strides[0], len(pyramid))
        return pool_levels(pyramid, self.strides, level_R, rois_R5, ROI_SIDE).to(pyramid[0].dtype)


def region_levels(rois_R5: Tensor, first_stride: int, num_levels: int) -> Tensor:
    """[R] level of each region: floor(log2(sqrt(area) / (14 strides of the first))), inside the pyramid."""
    sides_R = ((rois_R5[:, 3] - rois_R5[:, 1]) * (rois_R5[:, 4] - rois_R5[:, 2])).clamp(min=0).sqrt()
    level_R = torch.floor(torch.log2(sides_R / (FINEST_SCALE * first_stride) + 1e-6))
    return level_R.clamp(0, num_levels - 1).long()


def name_logits(embedding_RD: Tensor, text_KYD: Tensor, log_scale: float = LOGIT_SCALE) -> Tensor:
    """[R, D] embeddings and [K, Y, D] unit rows -> [R, K + 1] scaled cosines with each name's best synonym.

    The last column is the background: a zero vector, whose logit is always 0. In float32 even under autocast.
    """
    with torch.autocast(embedding_RD.device.type, enabled=False):
        cosine_RKY = torch.einsum("rd,kyd->rky", F.normalize(embedding_RD.float(), dim=-1), text_KYD.float())
        return F.pad(cosine_RKY.amax(-1) * torch.tensor(log_scale).exp(), (0, 1))


# ------------------------------------------------------------------------------------------------------- losses


def label_loss(logits_RK: Tensor, labels_R: Tensor, background_weight: float = 0.1) -> Tensor:
    """Softmax cross-entropy over K names and background, averaged over all regions; label -1 adds 0.

    Args:
        logits_RK: [R, K + 1].
        labels_R: [R] int64.
        background_weight: of the last class.
    """
    weight_K = logits_RK.new_ones(logits_RK.shape[1])
    weight_K[-1] = background_weight
    total = F.cross_entropy(logits_RK, labels_R, weight_K, ignore_index=-1, reduction="sum")
    return total / max(1, len(logits_RK))


def mask_losses(logits_RN: Tensor, target_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of sampled points, averaged over masks; 0 without masks."""
    if not len(logits_RN):
        return logits_RN.sum(), logits_RN.sum()
    return F.binary_cross_entropy_with_logits(logits_RN, target_RN), dice_loss(logits_RN, target_RN).mean()


def read_points(maps_RHW: Tensor, points_RN2: Tensor) -> Tensor:
    """[R, H, W] maps at points [R, N, 2] (xy in 0 to 1), bilinear: [R, N]."""
    return F.grid_sample(maps_RHW[:, None], 2 * points_RN2[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


@torch.no_grad()
def uncertain_points(
    logits_RHW: Tensor,
    count: int,
    generator: torch.Generator | None,
    *,
    oversampling: float = 3.0,
    uncertain_share: float = 0.75,
) -> Tensor:
    """[R, N, 2] points in 0 to 1 for the mask losses, mostly where the mask is uncertain (PointRend, section 3.1).

    Args:
        logits_RHW: the predicted masks.
        count: N.
        generator: of the draws.
        oversampling: candidates for each point.
        uncertain_share: share of the points that are the most uncertain candidates; the rest is uniform.
    """
    regions, candidates = len(logits_RHW), int(count * oversampling)
    points_RM2 = torch.rand((regions, candidates, 2), generator=generator).to(logits_RHW.device, non_blocking=True)
    uncertain_RM = -read_points(logits_RHW, points_RM2).abs()
    num_uncertain = int(uncertain_share * count)
    chosen_RN = uncertain_RM.topk(num_uncertain, dim=1).indices
    chosen_RN2 = points_RM2.gather(1, chosen_RN[:, :, None].expand(-1, -1, 2))
    uniform = torch.rand((regions, count - num_uncertain, 2), generator=generator)
    return torch.cat([chosen_RN2, uniform.to(logits_RHW.device, non_blocking=True)], dim=1)


# ------------------------------------------------------------------------------------------------------- fusion


def fuse_scores(
    head_PK: Tensor,
    clip_PK: Tensor,
    is_base_K: Tensor | None,
    filled_P: Tensor | None = None,
    *,
    alpha: float = 0.1,
    beta: float = 0.9,
    novel_bias: float = 0.0,
) -> Tensor:
    """Log of the geometric mean of the label branch's and CLIP's probabilities.

    Base names: p_head^(1 - alpha) p_clip^alpha; novel ones: p_head^(1 - beta) p_clip^beta, times e^novel_bias. The
    background counts as base.

    Args:
        head_PK: [P, K + 1] logits.
        clip_PK: [P, K + 1] logits.
        is_base_K: [K] bool; None, if the split is unknown, takes every name as novel and `novel_bias` as 0.
        filled_P: [P] bool, False for empty masks, of which the label branch alone decides.
        alpha: CLIP's exponent for base names.
        beta: CLIP's exponent for novel names.
        novel_bias: added to the log scores of novel names, since the label branch was trained with base names
            (calibrated stacking, arXiv 1605.04253); 0 in the paper.

    Returns:
        [P, K + 1].
    """
    if is_base_K is None:
        is_base_K, novel_bias = torch.zeros(head_PK.shape[1] - 1, dtype=torch.bool, device=head_PK.device), 0.0
    weight_PK = F.pad(torch.where(is_base_K, alpha, beta), (0, 1), value=alpha).expand_as(head_PK)
    if filled_P is not None:
        weight_PK = weight_PK * filled_P[:, None]
    log_head, log_clip = head_PK.float().log_softmax(-1), clip_PK.float().log_softmax(-1)
    return (1 - weight_PK) * log_head + weight_PK * log_clip + F.pad(novel_bias * ~is_base_K, (0, 1))


def synonym_rows(vocabulary: Vocabulary) -> Tensor:
    """[K, Y, D] rows of a vocabulary for `name_logits`; names with fewer synonyms repeat their last."""
    if vocabulary.owners is None:
        return vocabulary.embeddings[:, None]
    counts_K = torch.bincount(vocabulary.owners, minlength=len(vocabulary))
    first_K, index_Y = counts_K.cumsum(0) - counts_K, torch.arange(int(counts_K.max()), device=counts_K.device)
    return vocabulary.embeddings[first_K[:, None] + torch.minimum(index_Y, counts_K[:, None] - 1)]

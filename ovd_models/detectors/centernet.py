"""Class-agnostic proposals from a heat map of object centres (CenterNet2, arXiv 2103.07461).

B images, N boxes of one image, L pyramid levels, M points of one image over all levels, P = B * M points of a batch:
level after level, within a level image after image. Boxes are xyxy in pixels of the resized image; a point predicts its
distances to the four sides (left, top, right, bottom), in units of its level's stride.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ovd_models.detectors.resizing import image_indices
from ovd_models.detectors.sampling import best_boxes

TINY_HEAT = 1e-4
"""Target heat below this is 0."""


@dataclass(frozen=True, kw_only=True)
class CenterNetConfig:
    """The proposal generator; the defaults are the published ones."""

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    sizes: tuple[int, ...] = (0, 64, 128, 256, 512)
    """Smallest half diagonal, in pixels, of the boxes assigned to each level."""
    largest: tuple[int, ...] = (80, 160, 320, 640, 10_000_000)
    """Largest half diagonal; the levels overlap."""
    num_convs: int = 4
    min_overlap: float = 0.8
    """Least overlap with its box of a box displaced within the heat's radius; sets the radius."""
    min_radius: float = 4.0
    """In pixels."""
    score_threshold: float = 1e-4
    pre_nms: tuple[int, int] = (4000, 1000)
    """Proposals per level before suppression: in training, and at test time."""
    post_nms: tuple[int, int] = (2000, 256)
    """Proposals per image after suppression: in training, and at test time."""
    nms: float = 0.9
    alpha: float = 0.25
    """Weight of centres in the heat's focal loss; all other points have 1 - alpha."""
    heat_weight: float = 0.5
    ignore_above: float = 0.85
    """Points with a higher heat that are no centre have no loss: they may be unannotated objects."""


class CenterNetHead(nn.Module):
    """Heat and box distances at every point of every level; each level has its own scale for the distances."""

    def __init__(self, channels: int, levels: int, num_convs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_convs):
            layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(32, channels), nn.ReLU()]
        self.tower = nn.Sequential(*layers)
        self.distances = nn.Conv2d(channels, 4, 3, 1, 1)
        self.heat = nn.Conv2d(channels, 1, 3, 1, 1)
        self.scales = nn.Parameter(torch.ones(levels))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.distances.bias, 8.0)  # type: ignore[arg-type]
        nn.init.constant_(self.heat.bias, -math.log(99.0))  # type: ignore[arg-type]  # a heat of 0.01 everywhere

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps [B, C, H, W] -> L maps of heat logits [B, 1, H, W] and of distances [B, 4, H, W]."""
        towers = [self.tower(level) for level in levels]
        distances = [F.relu(self.distances(tower) * scale) for tower, scale in zip(towers, self.scales, strict=True)]
        return [self.heat(tower) for tower in towers], distances


@dataclass(frozen=True)
class CentreTargets:
    """Training targets of the points of a batch."""

    heat: Tensor
    """[P] in [0, 1]."""
    distances: Tensor
    """[P, 4] in strides, valid where `regress` is set."""
    regress: Tensor
    """[P] bool: points with a box target, around the centres of boxes that fit their level."""
    centres: Tensor
    """[pairs of a box and a fitting level] int64, rows of the above."""


def grid_points(height: int, width: int, stride: int, like: Tensor) -> Tensor:
    """[height * width, 2] centres (x, y) in pixels of a level's cells, row after row, on the device of `like`."""
    x_W = (torch.arange(width, device=like.device, dtype=torch.float32) + 0.5) * stride
    y_H = (torch.arange(height, device=like.device, dtype=torch.float32) + 0.5) * stride
    return torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), dim=-1).reshape(-1, 2)


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """L maps [B, C, H, W] -> [P, C]."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(-1, level.shape[1]) for level in maps])


def centre_targets(
    boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], config: CenterNetConfig
) -> CentreTargets:
    """Targets of B tensors of boxes [N, 4] on level maps of `shapes` (height, width)."""
    like = boxes[0]
    points = [grid_points(*shape, stride, like) for shape, stride in zip(shapes, config.strides, strict=True)]
    counts = [len(entry) for entry in points]
    level_M = torch.repeat_interleave(torch.tensor(counts, device=like.device), output_size=sum(counts))
    point_M2 = torch.cat(points)
    images = [_image_targets(entry, point_M2, level_M, config) for entry in boxes]
    by_level = zip(*(torch.split(torch.column_stack(image), counts) for image in images), strict=True)
    stacked_P6 = torch.cat([row for level in by_level for row in level])
    centres = _centre_indices(boxes, shapes, config)
    return CentreTargets(stacked_P6[:, 0], stacked_P6[:, 2:], stacked_P6[:, 1] > 0, centres)


def _fits(box_N4: Tensor, config: CenterNetConfig) -> Tensor:
    """[N, L] bool: half of the box's diagonal lies in the level's range."""
    half_N1: Tensor = torch.linalg.vector_norm(box_N4[:, 2:] - box_N4[:, :2], dim=1, keepdim=True) / 2
    return (half_N1 >= half_N1.new_tensor(config.sizes)) & (half_N1 <= half_N1.new_tensor(config.largest))


def _image_targets(
    box_N4: Tensor, point_M2: Tensor, level_M: Tensor, config: CenterNetConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Heat [M], whether a point has a box target [M] and distances [M, 4] in strides, of one image."""
    if not len(box_N4):
        none_M = point_M2.new_zeros(len(point_M2))
        return none_M, none_M, point_M2.new_zeros(len(point_M2), 4)
    stride_M1 = point_M2.new_tensor(config.strides)[level_M, None]
    centre_N2 = (box_N4[:, :2] + box_N4[:, 2:]) / 2
    stride_M11 = stride_M1[:, None]
    cell_MN2 = (centre_N2 / stride_M11).floor() * stride_M11 + stride_M11 / 2
    to_cell_MN2 = (point_M2[:, None] - cell_MN2).abs()
    distance_MN4 = torch.cat((point_M2[:, None] - box_N4[:, :2], box_N4[:, 2:] - point_M2[:, None]), dim=-1)
    # A box is a target of the 3 x 3 cells around its centre whose points lie inside it.
    regress_MN = (to_cell_MN2 <= stride_M11).all(-1) & (distance_MN4.amin(-1) > 0) & _fits(box_N4, config).T[level_M]
    squared_MN = (point_M2[:, None] - centre_N2).square().sum(-1)
    squared_MN = squared_MN.masked_fill((to_cell_MN2 == 0).all(-1), 0.0)
    radius_factor = (1 - config.min_overlap) / (1 + config.min_overlap)  # relative to the root of twice the area
    area_N = (box_N4[:, 2:] - box_N4[:, :2]).prod(1)
    scaled_MN = squared_MN / (2 * radius_factor**2 * area_N).clamp(min=config.min_radius**2)
    heat_M = torch.exp(-scaled_MN.amin(1))
    nearest = scaled_MN.masked_fill(~regress_MN, torch.inf).min(1)
    chosen_M4 = distance_MN4[torch.arange(len(point_M2), device=point_M2.device), nearest.indices] / stride_M1
    return heat_M.where(heat_M >= TINY_HEAT, 0.0), nearest.values.isfinite().float(), chosen_M4


def _centre_indices(boxes: Sequence[Tensor], shapes: Sequence[tuple[int, int]], config: CenterNetConfig) -> Tensor:
    """[pairs of a box and a fitting level] int64: the point whose cell holds the box's centre."""
    box_N4, image_N = torch.cat(list(boxes)), image_indices(boxes)
    height_L, width_L = torch.tensor(shapes, device=box_N4.device).T
    before_L = (height_L * width_L).cumsum(0) - height_L * width_L
    centre_N12 = ((box_N4[:, :2] + box_N4[:, 2:]) / 2)[:, None]
    cell_NL2 = (centre_N12 / box_N4.new_tensor(config.strides)[:, None]).long()
    x_NL, y_NL = cell_NL2[..., 0].minimum(width_L - 1), cell_NL2[..., 1].minimum(height_L - 1)
    index_NL: Tensor = (before_L * len(boxes)) + image_N[:, None] * height_L * width_L + y_NL * width_L + x_NL
    return index_NL[_fits(box_N4, config)]


def centre_losses(
    heat_P: Tensor, distance_P4: Tensor, targets: CentreTargets, config: CenterNetConfig
) -> dict[str, Tensor]:
    """Focal loss of the heat at centres and elsewhere, and generalised IoU of the boxes (CenterNet2, section 4).

    `heat_P` are logits, and `distance_P4` are in strides. The sums are divided by the counts of centres and of points
    with a box, which are means over all workers, as in CenterNet2; in training, every worker calls this.
    """
    clamp = 1e-4
    heat = heat_P.float().sigmoid().clamp(clamp, 1 - clamp)  # half precision rounds 0.9999 to 1
    at_centres = heat[targets.centres]
    positive = -(at_centres.log() * (1 - at_centres).square()).sum()
    weight = (heat < config.ignore_above) * (1 - targets.heat).pow(4)
    negative = -((1 - heat).log() * heat.square() * weight).sum()
    counts_2 = torch.stack([targets.regress.sum(), torch.ones_like(targets.centres).sum()]).float()
    boxes, centres = mean_over_workers(counts_2).clamp(min=1)
    box_loss = distance_loss(distance_P4[targets.regress].float(), targets.distances[targets.regress])
    return {
        "centre_box": box_loss / boxes,
        "centre_positive": config.heat_weight * config.alpha * positive / centres,
        "centre_negative": config.heat_weight * (1 - config.alpha) * negative / centres,
    }


def mean_over_workers(values: Tensor) -> Tensor:
    """The mean of a tensor over the workers of a training, each of which calls this; the tensor itself without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def distance_loss(predicted_R4: Tensor, target_R4: Tensor) -> Tensor:
    """Sum of 1 - GIoU of boxes given by their distances [R, 4] from a shared point, which are not negative.

    As in the released code, 1 is added to both intersection and union.
    """
    shared_R4, around_R4 = torch.minimum(predicted_R4, target_R4), torch.maximum(predicted_R4, target_R4)

    def area(distance_R4: Tensor) -> Tensor:
        return (distance_R4[:, 0] + distance_R4[:, 2]) * (distance_R4[:, 1] + distance_R4[:, 3])

    intersection = area(shared_R4)
    union, hull = area(predicted_R4) + area(target_R4) - intersection, area(around_R4)
    return (1 - (intersection + 1) / (union + 1) + (hull - union) / hull).sum()


def decode_proposals(
    heat: Sequence[Tensor], distances: Sequence[Tensor], config: CenterNetConfig, *, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Proposals of every image, best first, from L maps of heat logits and L maps of distances in strides.

    Returns:
        B boxes [N, 4], not clipped to the image, and B scores [N], the roots of the heat.
    """
    pre_nms, post_nms = (pair[0 if training else 1] for pair in (config.pre_nms, config.post_nms))
    level_boxes, level_scores = [], []
    for heat_B1HW, distance_B4HW, stride in zip(heat, distances, config.strides, strict=True):
        point_M2 = grid_points(heat_B1HW.shape[-2], heat_B1HW.shape[-1], stride, heat_B1HW)
        side_BM4 = distance_B4HW.float().flatten(2).mT * stride
        corners_BM4 = torch.cat((point_M2 - side_BM4[..., :2], point_M2 + side_BM4[..., 2:]), dim=-1)
        score_BM = heat_B1HW.float().flatten(1).sigmoid()
        best = score_BM.topk(min(pre_nms, score_BM.shape[1]), dim=1)
        level_boxes.append(corners_BM4.gather(1, best.indices[..., None].expand(-1, -1, 4)))
        level_scores.append(best.values)
    box_BN4, score_BN = torch.cat(level_boxes, 1), torch.cat(level_scores, 1)
    hot_BN = score_BN > config.score_threshold
    last_BN2 = torch.maximum(box_BN4[..., 2:], box_BN4[..., :2] + 0.01)  # no box without an area
    box_BN4 = torch.cat((box_BN4[..., :2], last_BN2), dim=-1)
    level_N = torch.zeros(box_BN4.shape[1], dtype=torch.int64, device=box_BN4.device)  # levels suppress each other
    return best_boxes(box_BN4, score_BN.sqrt(), hot_BN, level_N, config.nms, post_nms)

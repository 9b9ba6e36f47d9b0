import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ovd_models.detectors.centernet import (
    CenterNetConfig,
    CenterNetHead,
    centre_losses,
    centre_targets,
    decode_proposals,
    distance_loss,
    flatten_levels,
    grid_points,
)

# Two levels over an image of 32 x 32: 4 x 4 cells of 8 pixels for half diagonals to 12, 2 x 2 of 16 from 10.
CONFIG = CenterNetConfig(
    strides=(8, 16), sizes=(0, 10), largest=(12, 1000), pre_nms=(20, 20), post_nms=(10, 5), min_radius=2.0
)
SHAPES = [(4, 4), (2, 2)]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_points_are_the_centres_of_cells() -> None:
    assert grid_points(1, 2, 8, torch.zeros(1)).tolist() == [[4, 4], [12, 4]]


def test_a_box_is_learned_around_its_centre_on_the_level_of_its_size() -> None:
    # Centre (11, 13) lies in cell (1, 1) of the fine level, half diagonal sqrt(10^2 + 14^2) / 2 = 8.6: fine only.
    box = torch.tensor([[6.0, 6.0, 16.0, 20.0]])
    targets = centre_targets([box], SHAPES, CONFIG)
    assert targets.centres.tolist() == [5]  # row 1, column 1 of 4
    # Of the 3 x 3 cells around it, those whose centres (4, 12, 20) lie inside the box: x = 12, y = 12.
    assert targets.regress.nonzero()[:, 0].tolist() == [5]
    # From (12, 12): left 6, top 6, right 4, bottom 8 pixels; in strides of 8.
    assert targets.distances[5].tolist() == [0.75, 0.75, 0.5, 1.0]


def test_heat_is_one_at_the_centre_and_falls_with_the_squared_distance() -> None:
    box = torch.tensor([[6.0, 6.0, 16.0, 20.0]])
    targets = centre_targets([box], SHAPES, CONFIG)
    assert targets.heat[5] == 1  # though (12, 12) is not exactly the centre (11, 13)
    # radius^2 = 2 * (0.2 / 1.8)^2 * 140 = 3.457, below which 2^2 = 4 is the least; to (20, 12): 81 + 1 = 82.
    assert targets.heat[6] == 0  # exp(-82 / 4) < 1e-4
    wide = centre_targets(
        [box], SHAPES, CenterNetConfig(strides=(8, 16), sizes=(0, 10), largest=(12, 1000), min_radius=9)
    )
    assert wide.heat[6].item() == pytest.approx(math.exp(-82 / 81), rel=1e-5)


def test_a_box_that_fits_two_levels_is_learned_on_both() -> None:
    # Half diagonal of 15 x 15 pixels: 10.6. Centre (15.5, 15.5): cell (1, 1) of the fine level, (0, 0) of the coarse.
    targets = centre_targets([torch.tensor([[8.0, 8.0, 23.0, 23.0]])], SHAPES, CONFIG)
    assert targets.centres.tolist() == [5, 16]


def test_a_point_of_two_boxes_learns_the_nearer_one() -> None:
    near, far = [7.0, 7.0, 17.0, 17.0], [4.0, 4.0, 20.0, 19.0]  # centres (12, 12) and (12, 11.5)
    targets = centre_targets(
        [torch.tensor([far, near])], SHAPES, CenterNetConfig(strides=(8, 16), sizes=(0, 90), largest=(80, 99))
    )
    # Both have their peak in the point (12, 12), where both distances count as 0: the first stays.
    assert (targets.distances[5] * 8).tolist() == [8, 8, 8, 7]
    # At (4, 12) only the wide one has the point inside: x from 4 is no distance above 0, so neither learns it.
    assert not bool(targets.regress[4])


def test_an_image_without_boxes_is_cold_beside_one_with_a_box() -> None:
    box = torch.tensor([[6.0, 6.0, 16.0, 20.0]])
    targets = centre_targets([torch.zeros(0, 4), box], SHAPES, CONFIG)
    assert targets.centres.tolist() == [16 + 5]  # the second image's points come second within a level
    assert targets.heat[:16].sum() == 0
    nothing = centre_targets([torch.zeros(0, 4)], SHAPES, CONFIG)
    assert len(nothing.centres) == 0
    assert not bool(nothing.regress.any())
    losses = centre_losses(torch.zeros(20), torch.ones(20, 4), nothing, CONFIG)
    assert losses["centre_box"] == losses["centre_positive"] == 0
    assert losses["centre_negative"] > 0


def test_heat_loss_by_hand() -> None:
    targets = centre_targets([torch.tensor([[6.0, 6.0, 16.0, 20.0]])], SHAPES, CONFIG)
    heat = torch.full((20,), -30.0)  # probability 1e-4 after clamping: next to no loss
    heat[5], heat[0], heat[1] = logit(0.6), logit(0.5), logit(0.9)
    losses = centre_losses(heat, torch.ones(20, 4), targets, CONFIG)
    # Centre: 0.5 * 0.25 * -log(0.6) * 0.4^2. Point 0: 0.5 * 0.75 * -log(0.5) * 0.5^2. Point 1 is above 0.85: ignored.
    assert losses["centre_positive"].item() == pytest.approx(0.125 * 0.16 * -math.log(0.6), rel=1e-5)
    assert losses["centre_negative"].item() == pytest.approx(0.375 * 0.25 * math.log(2), rel=1e-4)


def test_distance_loss_is_zero_for_equal_boxes_and_counts_the_empty_hull() -> None:
    equal = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert distance_loss(equal, equal).item() == pytest.approx(0, abs=1e-6)
    # 2 x 2 and 4 x 1 about the same point: overlap 2, union 6, hull 4 x 2 = 8: 1 - 3 / 7 + 2 / 8.
    loss = distance_loss(torch.ones(1, 4), torch.tensor([[2.0, 0.5, 2.0, 0.5]]))
    assert loss.item() == pytest.approx(1 - 3 / 7 + 2 / 8)
    assert distance_loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_hot_points_become_boxes_best_first() -> None:
    heat = [torch.full((1, 1, *shape), -20.0) for shape in SHAPES]
    heat[0][0, 0, 1, 1], heat[1][0, 0, 1, 1] = logit(0.25), logit(0.49)
    distances = [torch.ones(1, 4, *shape) for shape in SHAPES]
    (boxes,), (scores,) = decode_proposals(heat, distances, CONFIG, training=False)
    # The coarse point (24, 24) reaches 16 pixels each way, beyond the image; scores are roots of the heat.
    assert boxes.tolist() == [[8, 8, 40, 40], [4, 4, 20, 20]]
    assert scores.tolist() == pytest.approx([0.7, 0.5])


def test_the_hottest_of_equal_boxes_is_kept() -> None:
    heat = [torch.full((1, 1, *shape), -20.0) for shape in SHAPES]
    heat[0][0, 0, 1, 1], heat[0][0, 0, 1, 2] = logit(0.4), logit(0.5)
    distances = [torch.ones(1, 4, *shape) for shape in SHAPES]
    distances[0][0, :, 1, 1] = torch.tensor([1.0, 1.0, 2.0, 1.0])  # (4, 4, 28, 20) from (12, 12)
    distances[0][0, :, 1, 2] = torch.tensor([2.0, 1.0, 1.0, 1.0])  # the same from (20, 12)
    (boxes,), _ = decode_proposals(heat, distances, CONFIG, training=False)
    assert boxes.tolist() == [[4, 4, 28, 20]]


def test_training_keeps_more_proposals_than_testing() -> None:
    heat = [torch.zeros(2, 1, *shape) for shape in SHAPES]
    distances = [torch.full((2, 4, *shape), 0.4) for shape in SHAPES]
    for training, count in ((True, 10), (False, 5)):
        boxes, _ = decode_proposals(heat, distances, CONFIG, training=training)
        assert [len(entry) for entry in boxes] == [count, count]


def test_cold_points_give_no_proposals() -> None:
    heat = [torch.full((1, 1, *shape), -20.0) for shape in SHAPES]
    (boxes,), (scores,) = decode_proposals(heat, [torch.ones(1, 4, *shape) for shape in SHAPES], CONFIG, training=True)
    assert boxes.shape == (0, 4)
    assert len(scores) == 0


def test_a_point_predicts_no_negative_distance_and_starts_cold() -> None:
    torch.manual_seed(0)
    heat, distances = CenterNetHead(32, 2, 1)([torch.randn(1, 32, *shape) for shape in SHAPES])
    assert flatten_levels(heat).shape == (20, 1)
    assert bool((flatten_levels(distances) >= 0).all())
    assert bool((flatten_levels(heat).sigmoid() < 0.1).all())


CROWDED = [torch.tensor([[6.0, 6.0, 16.0, 20.0], [1.0, 1.0, 9.0, 12.0], [14.0, 2.0, 25.0, 11.0]])]
EMPTY = [torch.zeros(0, 4)]


def gradient_of(boxes: list[Tensor]) -> Tensor:
    """The gradient [20] of the losses by the heat of one image with boxes."""
    heat = torch.linspace(-3, 3, 20, requires_grad=True)
    losses = centre_losses(heat, torch.ones(20, 4), centre_targets(boxes, SHAPES, CONFIG), CONFIG)
    (gradient,) = torch.autograd.grad(losses["centre_positive"] + losses["centre_negative"], heat)
    return gradient


def gradient_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(gradient_of([CROWDED, EMPTY][rank]), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_boxes_count_equally_however_the_workers_share_them(tmp_path: Path) -> None:
    mp.spawn(gradient_on_rank, (str(tmp_path),), nprocs=2)
    crowded, empty = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    count = len(centre_targets(CROWDED, SHAPES, CONFIG).centres)
    assert count > 2
    # Alone, each divides by its own count, of at least 1; together, by half of the only boxes.
    assert torch.allclose(crowded, gradient_of(CROWDED) * 2)
    assert torch.allclose(empty, gradient_of(EMPTY) * 2 / count)

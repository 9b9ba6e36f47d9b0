from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ovd_models.detectors import region_pool
from ovd_models.detectors.region_pool import RegionPool, bin_weights, pool_level

STRIDES = (4, 8, 16)


def pyramid(side: int = 384, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        str(index): torch.randn(2, 3, side // stride, side // stride, dtype=dtype, generator=generator).requires_grad_()
        for index, stride in enumerate(STRIDES)
    }


def regions(side: float = 384.0) -> list[Tensor]:
    """Of every size and level, also at the edges, thinner than a cell, and beyond the map."""
    corner, extent = torch.rand(2, 40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * side
    drawn = torch.cat([corner, corner + extent], 1).clamp(max=side)
    edges = torch.tensor(
        [[0, 0, side, side], [side - 1, 0, side, side], [3, 3, 3, 3], [-9, -2, 5, 2 * side], [900, 900, 930, 940]]
    )
    return [drawn, edges.double()]


def test_pooled_regions_and_gradients_are_torchvisions() -> None:
    results = []
    theirs, ours = MultiScaleRoIAlign(["0", "1", "2"], 7, sampling_ratio=2), RegionPool(STRIDES, 7, 2)
    for pool, sizes in ((theirs, [[(384, 384), (384, 300)]]), (ours, [])):
        features = pyramid()
        pooled = pool(features, regions(), *sizes)
        (pooled * torch.linspace(-1, 1, pooled.numel(), dtype=pooled.dtype).view_as(pooled)).sum().backward()
        results.append((pooled.detach(), *(level.grad for level in features.values())))
    for expected, found in zip(*results, strict=True):
        assert expected is not None
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(found, expected)


def test_the_weights_of_a_bin_by_hand() -> None:
    # A region from 1 to 3 has two bins of one cell, each with one sample, at 1.5 and 2.5 on the grid of cells.
    weights = bin_weights(torch.tensor([1.0]), torch.tensor([3.0]), 4, 2, 1.0, 1)
    assert weights.tolist() == [[[0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]]]


@pytest.mark.parametrize("count", [0, 2])
def test_no_region_gives_no_rows_and_no_gradient(count: int) -> None:
    level = pyramid()["0"]
    assert pool_level(level, torch.zeros(count, 5, dtype=level.dtype), 7, 0.25, 2).shape == (count, 3, 7, 7)
    features = pyramid()
    pooled = RegionPool(STRIDES, 7, 2)(features, [torch.zeros(0, 4, dtype=torch.float64)] * 2)
    assert pooled.shape == (0, 3, 7, 7)


def test_large_maps_take_torchvisions_own_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def noted(level: Tensor, *settings: Any) -> Tensor:
        sides.append(level.shape[-1])
        return roi_align(level, *settings)

    monkeypatch.setattr(region_pool, "roi_align", noted)
    region = torch.tensor([[0.0, 0.0, 0.0, 40.0, 40.0]])
    for side, learns in ((100, True), (50, False), (50, True), (30, False)):
        level = torch.ones(1, 1, side, side, requires_grad=learns)
        pooled = pool_level(level, region, 2, 0.5, 2)
        assert float(pooled.sum()) == pytest.approx(4.0)
    assert sides == [100, 50]

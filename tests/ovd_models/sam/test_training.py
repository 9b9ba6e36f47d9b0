import pytest
import torch

from ovd_models.sam.training import pixels_at, sample_pixels


def test_every_pixel_of_a_mask_is_equally_likely() -> None:
    mask = torch.zeros(7, 9, dtype=torch.bool)
    mask[0, 0] = mask[1, 2:6] = mask[4, 3] = mask[5, 1:4] = mask[6, 8] = True
    draws = 10_000
    column, row = sample_pixels(mask.expand(draws, -1, -1), torch.Generator().manual_seed(0)).long().unbind(1)
    counts = torch.bincount(row * 9 + column, minlength=63).view(7, 9)
    assert counts[~mask].sum() == 0
    expected = draws / 10
    assert ((counts[mask] - expected) ** 2 / expected).sum() < 27.9  # 99.9 % of chi-square with 9 degrees of freedom


def test_a_given_number_picks_a_pixel() -> None:
    mask = torch.tensor([[True, False], [True, True]])  # pixels 0, 1 and 2 at xy (0, 0), (0, 1) and (1, 1)
    numbers = torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-53], dtype=torch.float64)
    assert pixels_at(mask.expand(6, -1, -1), numbers).tolist() == [[0, 0], [0, 0], [0, 1], [0, 1], [1, 1], [1, 1]]
    one = torch.zeros(1, 3, 4, dtype=torch.bool)
    one[0, 2, 1] = True
    assert pixels_at(one.expand(6, -1, -1), numbers).tolist() == [[1, 2]] * 6


def test_an_empty_mask_stands_for_the_whole_image() -> None:
    numbers = torch.tensor([0.0, 0.26, 0.5, 0.99], dtype=torch.float64)
    assert pixels_at(torch.zeros(4, 2, 2, dtype=torch.bool), numbers).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert sample_pixels(torch.zeros(0, 2, 2, dtype=torch.bool), None).shape == (0, 2)


@pytest.mark.parametrize("index", [0, 1 << 24, (1 << 24) + 1, 4096 * 4097 - 1])
def test_pixels_of_large_masks_are_counted_exactly(index: int) -> None:
    mask = torch.ones(1, 4097, 4096, dtype=torch.bool)  # float32 would count them wrongly
    number = torch.tensor([(index + 0.5) / mask.numel()], dtype=torch.float64)
    assert pixels_at(mask, number).tolist() == [[index % 4096, index // 4096]]

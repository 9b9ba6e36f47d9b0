import itertools

import pytest
import torch

from ovd_models.detectors.eva import EvaConfig, EvaPyramid, rotary_angles, run_block

SMALL = EvaConfig(width=32, depth=3, heads=2, hidden=40, patch=8, trained_grid=4, rotary_grid=4, drop_path=0.0)


def test_levels_have_the_strides_that_the_pyramid_promises() -> None:
    torch.manual_seed(0)
    levels = EvaPyramid(SMALL, 16)(torch.randn(2, 3, 80, 48))
    # A patch of 8 pixels: strides 2, 4, 8, 16, 32 and 64 of an image of 80 x 48.
    assert [tuple(level.shape[2:]) for level in levels] == [(40, 24), (20, 12), (10, 6), (5, 3), (3, 2), (2, 1)]


def test_attention_within_windows_equals_attention_over_each_window_alone() -> None:
    torch.manual_seed(0)
    block = EvaPyramid(SMALL, 16).blocks[0]
    angles = rotary_angles(4, SMALL, torch.zeros(1))
    tokens = torch.randn(1, 8, 4, 32)
    alone = [block(part.flatten(1, 2), rope=angles).view(1, 4, 4, 32) for part in tokens.split(4, dim=1)]
    assert torch.allclose(run_block(block, tokens, 4, angles), torch.cat(alone, dim=1), atol=1e-5)


def test_one_window_over_the_grid_equals_the_block_itself() -> None:
    torch.manual_seed(0)
    block, tokens = EvaPyramid(SMALL, 16).blocks[0], torch.randn(2, 5, 5, 32)
    angles = rotary_angles(5, SMALL, tokens)
    whole = block(tokens.flatten(1, 2), rope=angles).view_as(tokens)
    assert torch.allclose(run_block(block, tokens, 5, angles), whole, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 7), (4, 8), (3, 2), (9, 6)])
def test_windows_at_the_edge_of_a_grid_are_filled_with_zeros(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block, tokens = EvaPyramid(SMALL, 16).eval().blocks[0], torch.randn(2, *size, 32)
    angles = rotary_angles(4, SMALL, tokens)
    normed, attended = block.norm1(tokens), torch.zeros_like(tokens)
    for top, left in itertools.product(range(0, size[0], 4), range(0, size[1], 4)):
        place = (slice(None), slice(top, top + 4), slice(left, left + 4))
        window = torch.zeros(2, 4, 4, 32)
        height, width = normed[place].shape[1:3]
        window[:, :height, :width] = normed[place]
        attended[place] = block.attn(window.flatten(1, 2), rope=angles).view(2, 4, 4, 32)[:, :height, :width]
    hidden = tokens + attended
    expected = hidden + block.mlp(block.norm2(hidden))
    assert torch.allclose(run_block(block, tokens, 4, angles), expected, atol=1e-5)


def test_rotary_angles_stretch_the_grid_to_that_of_pretraining() -> None:
    # Token 4 of 8 sits where token 2 of 4 did: the same sines and cosines, row after row.
    fine, coarse = (rotary_angles(size, SMALL, torch.zeros(1)).view(size, size, -1) for size in (8, 4))
    assert torch.allclose(fine[4, 6], coarse[2, 3], atol=1e-6)
    assert not torch.allclose(fine[4, 6], fine[6, 4])

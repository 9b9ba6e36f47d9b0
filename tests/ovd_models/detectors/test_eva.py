import itertools

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from torch import Tensor
from torch.nn import functional as F

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


def timms_eva(ours: EvaPyramid) -> Eva:
    """timm's EVA-02 with the same weights."""
    peer = Eva(
        img_size=SMALL.patch * SMALL.trained_grid, patch_size=SMALL.patch, num_classes=0, embed_dim=SMALL.width,
        depth=SMALL.depth, num_heads=SMALL.heads, mlp_ratio=(SMALL.hidden + 0.5) / SMALL.width, qkv_fused=False,
        swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(SMALL.rotary_grid,) * 2,
        dynamic_img_size=True, class_token=False,
    )  # fmt: skip
    state = {name: value for name, value in ours.state_dict().items() if name.startswith("blocks.")}
    state |= {f"patch_embed.proj.{name}": value for name, value in ours.patches.state_dict().items()}
    state["pos_embed"] = ours.positions[:, 1:]
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert all(name.startswith(("norm.", "fc_norm.", "rope.")) for name in missing)
    assert unexpected == []
    return peer.eval()


@pytest.mark.parametrize("size", [(80, 48), (75, 109), (33, 17), (160, 101), (9, 250)])
def test_the_backbone_equals_timms_blocks_on_images_that_windows_do_not_divide(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = EvaPyramid(SMALL, 16).eval()
    torch.nn.init.normal_(ours.positions)
    peer, image, last = timms_eva(ours), torch.randn(1, 3, *size), list[Tensor]()
    ours.simple[2][0].register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))  # type: ignore[index]
    grid = 2 * -(-max(size) // (2 * SMALL.patch))
    window = round(SMALL.window_share * grid)
    with torch.no_grad():
        ours(image)
        padded = F.pad(image, (0, grid * SMALL.patch - size[1], 0, grid * SMALL.patch - size[0]))
        tokens = peer.patch_embed(padded).flatten(1, 2)
        # As in the released code; timm's default smooths, also where it enlarges.
        places = resample_abs_pos_embed(
            peer.pos_embed, [grid, grid], [SMALL.trained_grid] * 2, num_prefix_tokens=0, antialias=False
        )
        tokens = tokens + places
        for index, block in enumerate(peer.blocks):
            if (index + 1) % SMALL.global_every == 0:
                tokens = block(tokens, rope=peer.rope.get_embed(shape=[grid, grid]))
                continue
            attended = attend_within_windows(block, block.norm1(tokens).view(1, grid, grid, -1), window, peer)
            tokens = tokens + attended.flatten(1, 2)
            tokens = tokens + block.mlp(block.norm2(tokens))
    assert grid % window or max(size) % SMALL.patch
    assert torch.allclose(last[0].permute(0, 2, 3, 1).flatten(1, 2), tokens, atol=1e-4)


def attend_within_windows(block: torch.nn.Module, normed: Tensor, window: int, peer: Eva) -> Tensor:
    """timm's attention on one window at a time, filled with zeros at the edge of the grid."""
    attended, (height, width) = torch.zeros_like(normed), normed.shape[1:3]
    angles = peer.rope.get_embed(shape=[window, window])  # type: ignore[union-attr, operator]
    for top, left in itertools.product(range(0, height, window), range(0, width, window)):
        place = (slice(None), slice(top, top + window), slice(left, left + window))
        rows, columns = normed[place].shape[1:3]
        filled = F.pad(normed[place], (0, 0, 0, window - columns, 0, window - rows))
        found = block.attn(filled.flatten(1, 2), rope=angles)  # type: ignore[operator]
        attended[place] = found.view_as(filled)[:, :rows, :columns]
    return attended


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

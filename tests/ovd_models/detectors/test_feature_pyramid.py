import itertools
import math

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention

from ovd_models.detectors.backbones import build_backbone
from ovd_models.detectors.feature_pyramid import Pyramid, ShiftedWindows, SwinMaps, TimmMaps

SIZES = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 2, 4]}
SWIN = {"patch_size": [4, 4], "window_size": [7, 7], **SIZES}


def test_levels_have_strides_of_eight_to_a_hundred_and_twenty_eight() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 128, 256)
    for maps in (
        TimmMaps(build_backbone("resnet10t", {"channels": [32, 64, 96, 128], "stem_width": 16}, (8, 16, 32))),
        SwinMaps(SWIN),
    ):
        levels = Pyramid(maps, 16)(image)
        assert [tuple(level.shape) for level in levels] == [(2, 16, 128 // s, 256 // s) for s in (8, 16, 32, 64, 128)]


def timm_name(name: str) -> str:
    """torchvision's name of a Swin tensor in timm's words."""
    layer, rest = name.split(".", 1)
    if layer == "0":
        return rest.replace("0.", "patch_embed.proj.", 1).replace("2.", "patch_embed.norm.", 1)
    stage, merging = divmod(int(layer), 2)
    if not merging:
        return f"layers_{stage}.downsample.{rest}"
    return f"layers_{stage}.blocks.{rest}".replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")


def test_swin_equals_an_independent_one_where_windows_fill_the_maps() -> None:
    torch.manual_seed(0)
    ours = SwinMaps(SWIN).eval()
    sizes = {"img_size": 448, "strict_img_size": False, **SIZES}
    peer = timm.create_model("swin_base_patch4_window7_224", features_only=True, out_indices=(1, 2, 3), **sizes).eval()
    state = {timm_name(name): value for name, value in ours.layers.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("index")}
    assert sorted(state) == sorted(peer.state_dict())
    peer.load_state_dict(state)
    image = torch.randn(1, 3, 448, 672)
    with torch.no_grad():
        for level, theirs, norm in zip(ours(image), peer(image), ours.norms, strict=True):
            assert torch.allclose(level, norm(theirs).permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize("size", [(68, 116), (224, 300), (96, 32), (260, 388), (12, 412)])
def test_swin_equals_timms_blocks_on_images_that_windows_do_not_divide(size: tuple[int, int]) -> None:
    """timm pads a map after it shifted the windows, the released model before: here its blocks get padded maps."""
    torch.manual_seed(0)
    ours = SwinMaps(SWIN).eval()
    for name, value in ours.layers.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(value)
    options = {"strict_img_size": False, "always_partition": True, "num_classes": 0, **SIZES}
    peer = timm.create_model("swin_base_patch4_window7_224", **options).eval()
    state = {
        timm_name(name).replace("layers_", "layers."): value
        for name, value in ours.layers.state_dict().items()
        if not name.endswith("index")
    }
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["norm.weight", "norm.bias"], [])
    image, maps = torch.randn(2, 3, *size), []
    with torch.no_grad():
        tokens = peer.patch_embed(image)
        for stage in peer.layers:
            tokens = stage.downsample(tokens)
            for block in stage.blocks:
                height, width = tokens.shape[1:3]
                padded = F.pad(block.norm1(tokens), (0, 0, 0, -width % 7, 0, -height % 7))
                tokens = tokens + block._attn(padded)[:, :height, :width]
                tokens = tokens + block.mlp(block.norm2(tokens))
            maps.append(tokens)
        for level, theirs, norm in zip(ours(image), maps[1:], ours.norms, strict=True):
            assert torch.allclose(level, norm(theirs).permute(0, 3, 1, 2), atol=1e-4)


def test_padding_to_whole_windows_comes_before_they_are_shifted() -> None:
    torch.manual_seed(0)
    ours = SwinMaps(SWIN).eval()
    block = ours.layers[1][1].attn  # the first shifted one
    tokens = torch.randn(1, 10, 12, 16)
    padded = F.pad(tokens, (0, 0, 0, 2, 0, 4))
    assert torch.allclose(block(tokens), block(padded)[:, :10, :12], atol=1e-6)


def slow_windows(block: ShiftedWindows, tokens_HWE: Tensor) -> Tensor:
    """Swin's shifted-window attention, token by token.

    A token attends to those in its window of the shifted map that did not come around the opposite edge.
    """
    (rows, columns), (down, right) = block.window_size, block.shift_size
    height, width, channels = tokens_HWE.shape
    high, wide = math.ceil(height / rows) * rows, math.ceil(width / columns) * columns
    padded = torch.zeros(high, wide, channels)
    padded[:height, :width] = tokens_HWE
    query, key, value = block.qkv(padded).view(high, wide, 3, block.num_heads, -1).unbind(2)
    result = torch.zeros(high, wide, channels)

    def place(y: int, x: int) -> tuple[int, int, bool, bool]:
        """Position in the shifted map, and whether the token came around an edge."""
        return (y - down) % high, (x - right) % wide, y < down, x < right

    for y, x in itertools.product(range(high), range(wide)):
        own_y, own_x, *own_edges = place(y, x)
        scores, values = [], []
        for other_y, other_x in itertools.product(range(high), range(wide)):
            shifted_y, shifted_x, *edges = place(other_y, other_x)
            if (shifted_y // rows, shifted_x // columns) != (own_y // rows, own_x // columns) or edges != own_edges:
                continue
            offset = (own_y - shifted_y + rows - 1) * (2 * columns - 1) + own_x - shifted_x + columns - 1
            product = (query[y, x] * key[other_y, other_x]).sum(-1) * query.shape[-1] ** -0.5
            scores.append(product + block.relative_position_bias_table[offset])
            values.append(value[other_y, other_x])
        weights = torch.stack(scores).softmax(0)
        result[y, x] = (weights[:, :, None] * torch.stack(values)).sum(0).flatten()
    return block.proj(result)[:height, :width]


@pytest.mark.parametrize("size", [(2, 3), (4, 4), (3, 9), (5, 4), (8, 12), (7, 10)])
@pytest.mark.parametrize("shift", [[0, 0], [2, 2]])
def test_shifted_windows_equal_a_slow_loop_on_maps_of_any_size(size: tuple[int, int], shift: list[int]) -> None:
    torch.manual_seed(0)
    block = ShiftedWindows(6, [4, 4], shift, num_heads=2).eval()
    tokens = torch.randn(2, *size, 6)
    with torch.no_grad():
        block.relative_position_bias_table.normal_()
        found = block(tokens)
        assert torch.allclose(found, torch.stack([slow_windows(block, entry) for entry in tokens]), atol=1e-5)


def test_every_block_of_swin_has_such_windows() -> None:
    blocks = [module for module in SwinMaps(SWIN).modules() if isinstance(module, ShiftedWindowAttention)]
    assert len(blocks) == 8
    assert all(isinstance(block, ShiftedWindows) for block in blocks)
    assert [max(block.shift_size) for block in blocks] == [0, 3] * 4

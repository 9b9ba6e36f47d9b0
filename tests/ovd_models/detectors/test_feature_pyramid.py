import timm
import torch

from ovd_models.detectors.backbones import build_backbone
from ovd_models.detectors.feature_pyramid import Pyramid, SwinMaps, TimmMaps

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


def test_padding_to_whole_windows_comes_before_they_are_shifted() -> None:
    torch.manual_seed(0)
    ours = SwinMaps(SWIN).eval()
    block = ours.layers[1][1].attn  # the first shifted one
    tokens = torch.randn(1, 10, 12, 16)
    padded = torch.nn.functional.pad(tokens, (0, 0, 0, 2, 0, 4))
    assert torch.allclose(block(tokens), block(padded)[:, :10, :12], atol=1e-6)

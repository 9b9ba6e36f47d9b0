import torch
from torchvision.models.swin_transformer import SwinTransformer

from ovd_models.pyramids import TimmPyramid
from ovd_models.rcnn import RCNNConfig

SIZES = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}


def test_levels_have_strides_of_eight_to_a_hundred_and_twenty_eight() -> None:
    torch.manual_seed(0)
    config = RCNNConfig(strides=(8, 16, 32), pyramid_channels=16)
    levels = TimmPyramid(config, norm_maps=False)(torch.randn(2, 3, 128, 192))
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 128 // stride, max(1, round(192 / stride + 0.01))) for stride in (8, 16, 32, 64, 128)
    ]


def torchvision_name(name: str) -> str:
    """timm's name of a Swin tensor in torchvision's words."""
    stage, rest = name.removeprefix("layers_").split(".", 1) if name.startswith("layers_") else ("", name)
    if not stage:
        return name.replace("patch_embed.proj", "features.0.0").replace("patch_embed.norm", "features.0.2")
    if rest.startswith("downsample"):
        return f"features.{2 * int(stage)}.{rest.removeprefix('downsample.')}"
    rest = rest.removeprefix("blocks.").replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
    return f"features.{2 * int(stage) + 1}.{rest}"


def test_swin_looks_through_the_same_windows_as_an_independent_one_at_any_size() -> None:
    torch.manual_seed(0)
    options = {"img_size": 896, "strict_img_size": False, **SIZES}
    config = RCNNConfig(backbone="swin_base_patch4_window7_224", backbone_options=options, strides=(8, 16, 32))
    trunk = TimmPyramid(config, norm_maps=True).trunk.eval()
    peer = SwinTransformer(
        [4, 4], SIZES["embed_dim"], list(SIZES["depths"]), list(SIZES["num_heads"]), [7, 7], num_classes=1
    ).eval()
    state = {torchvision_name(name): value for name, value in trunk.state_dict().items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {name.split(".")[-1] for name in missing} <= {"relative_position_index", "weight", "bias"}
    assert all(name.startswith(("norm.", "head.")) or name.endswith("index") for name in missing)
    image = torch.randn(1, 3, 352, 288)  # maps of 44 x 36, 22 x 18 and 11 x 9 tokens: no multiples of 7
    with torch.no_grad():
        maps, peers, x = trunk(image), [], image
        for index, layer in enumerate(peer.features):
            x = layer(x)
            if index in (3, 5, 7):
                peers.append(x)
    for ours, theirs in zip(maps, peers, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)

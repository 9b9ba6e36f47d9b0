import copy
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from ovd_models.clip.model import Clip, ClipConfig
from ovd_models.clip.towers import FlatConvNet, fold_norms, image_features, text_features

VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 3}
TEXT: dict[str, Any] = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}


def model(vision: dict[str, Any] = VISION, text: dict[str, Any] = TEXT, *, quick_gelu: bool = False) -> CustomTextCLIP:
    torch.manual_seed(0)
    built = CustomTextCLIP(16, dict(vision), dict(text), quick_gelu=quick_gelu)
    for value in built.parameters():  # open_clip's start is so small that all inputs look alike
        if value.ndim > 1:
            value.data.mul_(3)
    return built.eval()


def pixels(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return Clip(ClipConfig(text=TEXT)).tokenize(["a cat", "", "a red umbrella and an anchor", "x " * 40])


@pytest.mark.parametrize("side", [32, 64, 96])
def test_the_small_image_tower_keeps_place(side: int) -> None:
    tower = FlatConvNet(side)
    assert tower(torch.zeros(2, 3, side, side)).shape == (2, tower.num_features)


def test_folded_norms_change_nothing_in_evaluation() -> None:
    torch.manual_seed(0)
    tower = FlatConvNet(32)
    for _ in range(3):
        tower(5 * torch.randn(8, 3, 32, 32) + 1)  # the norms learn statistics that are not their first ones
    images, folded = pixels(4), copy.deepcopy(tower.eval())
    fold_norms(folded)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert torch.allclose(folded(images), tower(images), atol=1e-5)


@pytest.mark.parametrize(
    "vision",
    [
        VISION,
        {**VISION, "layers": 1},
        {**VISION, "final_ln_after_pool": True},
        {**VISION, "ls_init_value": 0.5},
        {**VISION, "pool_type": "avg"},
        {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
        {**VISION, "qk_norm": True, "block_type": "custom"},
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    ],
)
def test_image_features_are_those_of_the_whole_tower(vision: dict[str, Any]) -> None:
    tower = model(vision).visual
    for count in (3, 1):
        with torch.no_grad():
            assert torch.allclose(image_features(tower, pixels(count)), tower(pixels(count)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        {**TEXT, "layers": 1},
        {**TEXT, "ls_init_value": 0.5},
        {**TEXT, "proj_bias": True},
        {**TEXT, "embed_cls": True},
        {**TEXT, "no_causal_mask": True, "pool_type": "last"},
        {**TEXT, "qk_norm": True, "block_type": "custom"},
    ],
)
def test_text_features_are_those_of_the_whole_tower(text: dict[str, Any]) -> None:
    tower = model(text=text).text
    for rows in (tokens(), tokens()[:1], tokens()[1:2]):
        with torch.no_grad():
            assert torch.allclose(text_features(tower, rows), tower(rows), atol=1e-5, rtol=1e-4)


def test_the_other_activation_is_kept() -> None:
    quick, plain = model(quick_gelu=True), model()
    with torch.no_grad():
        found = image_features(quick.visual, pixels(2))
        assert torch.allclose(found, quick.visual(pixels(2)), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, image_features(plain.visual, pixels(2)), atol=1e-3)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def test_short_cuts_have_the_gradients_of_the_whole_towers() -> None:
    built = model().train()
    for tower, short, given in (
        (built.visual, image_features, pixels(3)),
        (built.text, text_features, tokens()),
    ):
        expected = gradients(tower, tower(given).sin().sum())
        found = gradients(tower, short(tower, given).sin().sum())
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, atol=1e-4, rtol=1e-3), name

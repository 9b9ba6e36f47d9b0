"""The forward passes of the four stages that `workflows/ovsam.py` trains."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import WINDOWS, TextToMask, TextToMaskConfig, TextToMaskModelConfig
from ovd_models.ovsam.training import Clip2SamConfig, Clip2SamTraining, FeatureBatch, Sam2ClipTraining
from ovd_models.sam.model import SamConfig
from ovd_models.sam.training import SamTraining, SamTrainingConfig
from ovd_models.segments import MaskBatch

SAM = SamConfig(image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_width=32)
OVSAM = OvSamConfig(sam=SAM, pyramid_width=16, label_hidden=32)
Losses = Callable[[MaskBatch], Mapping[str, Tensor]]


def sam() -> Losses:
    training = SamTraining(SAM, SamTrainingConfig(prompts_per_image=3, clicks=2))
    return lambda batch: training(batch, torch.Generator().manual_seed(0))


def sam2clip() -> Losses:
    training = Sam2ClipTraining(OvSam(OVSAM))
    return lambda batch: training(FeatureBatch(batch.images, torch.zeros(2, 32, 8, 8)))


def clip2sam() -> Losses:
    training = Clip2SamTraining(OvSam(OVSAM), Clip2SamConfig(prompts_per_image=3, num_points=8))
    text = F.normalize(torch.randn(2, 1, 128), dim=-1)
    return lambda batch: training(batch, text, torch.Generator().manual_seed(0))


def text_to_mask() -> Losses:
    training = TextToMask(TextToMaskModelConfig(sam=SAM, text=TextToMaskConfig(windows=WINDOWS)))
    return lambda batch: training(batch, torch.Generator().manual_seed(0))


STAGES = (sam, sam2clip, clip2sam, text_to_mask)


def batch_of(height: int, width: int) -> MaskBatch:
    """Two images with one object each."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, height // 4 : height // 2, width // 4 :] = True
    image = (mask.expand(3, -1, -1) * 160 + 40).to(torch.uint8)
    return MaskBatch((image,) * 2, (mask,) * 2, (torch.tensor([0]), torch.tensor([1])))


class CountDraws(TorchDispatchMode):
    """Counts the random numbers that operators draw."""

    numbers = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in operator.tags:
            self.numbers += result.numel()
        return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("height", "width"), [(48, 64), (150, 200)])  # of the model's size, and of another
def test_no_stage_resizes_with_pillow(
    stage: Callable[[], Losses], height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("Pillow resizes on the CPU")

    torch.manual_seed(0)
    losses = stage()
    monkeypatch.setattr(Image.Image, "resize", refuse)
    assert all(torch.isfinite(value) for value in losses(batch_of(height, width)).values())


# Object, place in the order, box corners, first click and two corrective ones; object, box corners, click, place in the
# order, and xy of 24 candidates and 2 further points; object, blank or not, margin, xy of its point.
@pytest.mark.parametrize(
    ("stage", "limit"), [(sam, 1 + 1 + 4 + 3), (sam2clip, 0), (clip2sam, 1 + 4 + 1 + 1 + 2 * 26), (text_to_mask, 5)]
)
def test_the_random_numbers_of_a_prompt_do_not_grow_with_the_image(stage: Callable[[], Losses], limit: int) -> None:
    torch.manual_seed(0)
    losses = stage()
    with CountDraws() as draws:
        losses(batch_of(48, 64))
    assert draws.numbers <= 6 * limit  # two images, three prompts each

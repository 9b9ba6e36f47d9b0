"""CLIPs of the pictogram world that differ in their image tower, trained with equally many operations."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ovd_models.clip.model import Clip, ClipConfig
from workflows.configs import clip as clip_configs

TOWERS: dict[str, dict[str, Any]] = {
    "flat convnet": ClipConfig().vision,
    "ResNet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "ConvNeXt": {
        "timm_model_name": "convnext_zepto_rms_ols",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 64,
    },
    "ViT": {"image_size": 64, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32},
}
"""open_clip's `vision_cfg` by tower; the first one is that of `clip.py`."""


def multiply_adds(config: ClipConfig) -> int:
    """Multiply-adds of a pair, an image and its caption, in the forward pass."""
    model = Clip(config).eval()
    side = config.image_size
    # With gradients, since the fused attention that torch uses without them is not counted.
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, dtype=torch.uint8), model.tokenize(["a red umbrella and an anchor"]))
    return int(counter.get_total_flops()) // 2


def tower_run(tower: str, base_steps: int) -> clip_configs.Run:
    """`clip.py --config pictograms` with another tower, in the driver.

    Args:
        tower: a name of `TOWERS`.
        base_steps: steps of the flat convnet; this tower gets as many as take equally many operations.
    """
    default = clip_configs.pictograms()
    config = replace(default.model, vision=TOWERS[tower])
    steps = max(5, round(base_steps * multiply_adds(ClipConfig()) / multiply_adds(config)))
    return replace(default, model=config, optimisation=replace(default.optimisation, steps=steps, workers=0))

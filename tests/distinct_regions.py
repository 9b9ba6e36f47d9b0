"""Untrained detectors whose regions differ: freshly initialised ones score all alike, and ties have no order."""

from typing import TypeVar

import torch

from ovd_models.codet.model import CoDet
from ovd_models.vild.model import ViLD

PARTS = ("rpn.head", "roi.box_head", "projection", "box_deltas", "proposals.heat")
M = TypeVar("M", CoDet, ViLD)


def spread_out(model: M) -> M:
    """The model in evaluation mode, its heads' weights enlarged."""
    with torch.no_grad():
        for name, value in model.detector.named_parameters():
            if value.ndim > 1 and (name.startswith(PARTS) or ".projection." in name):
                value.mul_(10 if name.startswith(("rpn.head.cls_logits", "proposals.heat")) else 3)
    return model.eval()

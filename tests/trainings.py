"""The four trainings: their functions, the settings of their stages, and the weights they leave."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from workflows import clip, codet, ovsam, vild
from workflows.common import runs

TRAIN: dict[str, Callable[[Any], runs.Trained[Any]]] = {
    "clip": clip.train,
    "vild": vild.train,
    "codet": codet.train,
    "ovsam": ovsam.train,
}
STAGES = {
    "clip": ("optimisation",),
    "vild": ("rpn_stage", "detector_stage"),
    "codet": ("box_stage", "joint_stage"),
    "ovsam": ("sam_stage", "sam2clip_stage", "clip2sam_stage", "text_stage"),
}
"""Fields of a method's `Run`."""
LAST = {"clip": "train", "vild": "detector", "codet": "joint", "ovsam": "clip2sam"}
"""Folder of a method's last stage; OV-SAM's text head, where it is trained, comes after it."""


def weights_of(model: str) -> dict[str, Tensor]:
    """Weights of a checkpoint folder."""
    (path,) = [
        path for path in Path(model).glob("*.safetensors") if path.name in ("model.safetensors", "clip.safetensors")
    ]
    return load_file(path)


def largest_difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    """Largest absolute difference between equal names."""
    assert one.keys() == two.keys()
    return max(float((value.double() - two[name].double()).abs().max()) for name, value in one.items() if value.numel())

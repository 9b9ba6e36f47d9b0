"""The four trainings: their functions, the settings of their stages, short runs, and the weights they leave."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from workflows import clip, codet, ovsam, prepare_pairs, vild
from workflows.common import runs
from workflows.common.optimisation import Optimisation
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.configs import ovsam as ovsam_configs
from workflows.configs import vild as vild_configs

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


def smoke(method: str, storage: str, shuffle: str = "") -> Any:
    """The smoke config of a method with its tables, 10 steps a stage and a checkpoint after 5."""
    if method == "clip":
        order: Any = {"shuffle": shuffle, "buffer_pairs": 50} if shuffle else {}
        run: Any = dataclasses.replace(clip_configs.smoke(), storage=storage, eval_every=0, **order)
        prepare_pairs.prepare_smoke(storage)
    elif method == "vild":
        run = vild.prepare_data(dataclasses.replace(vild_configs.smoke(), storage=storage))
    elif method == "codet":
        run = codet.prepare_data(dataclasses.replace(codet_configs.smoke(), storage=storage))
    else:
        run = ovsam.prepare_data(dataclasses.replace(ovsam_configs.smoke(), storage=storage, text_to_mask=False))
    stages = {name: in_two_parts(getattr(run, name)) for name in STAGES[method]}
    return dataclasses.replace(run, **stages)


def in_two_parts(stage: Optimisation, workers: int = 0) -> Optimisation:
    return dataclasses.replace(stage, steps=10, checkpoint_every=5, log_every=1, workers=workers)


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

"""The four trainings: their functions, the settings of their stages, short runs, and the weights they leave."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
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
CONFIGS: dict[str, Callable[[], Any]] = {
    "clip": clip_configs.smoke,
    "vild": vild_configs.smoke,
    "codet": codet_configs.smoke,
    "ovsam": ovsam_configs.smoke,
}
PREPARE: dict[str, Callable[[Any], Any]] = {
    "vild": vild.prepare_data,
    "codet": codet.prepare_data,
    "ovsam": ovsam.prepare_data,
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


def prepared(method: str, storage: str) -> Any:
    """The smoke config of a method, in a storage with the session's tables, or with those of a run that began there."""
    if not Path(storage, "runs").exists():
        shutil.copytree(_prepared(method), storage, dirs_exist_ok=True)
    run = dataclasses.replace(CONFIGS[method](), storage=storage)
    return PREPARE[method](run) if method in PREPARE else run


@functools.cache
def _prepared(method: str) -> str:
    folder = tempfile.TemporaryDirectory(prefix=f"{method}-smoke-")
    atexit.register(folder.cleanup)
    run = dataclasses.replace(CONFIGS[method](), storage=folder.name)
    if method in PREPARE:
        PREPARE[method](run)
    else:
        prepare_pairs.prepare_smoke(run.storage)
    return folder.name


def smoke(method: str, storage: str, shuffle: str = "") -> Any:
    """The smoke config of a method with its tables, 10 steps a stage and a checkpoint after 5."""
    run = prepared(method, storage)
    if method == "clip":
        order: Any = {"shuffle": shuffle, "buffer_pairs": 50} if shuffle else {}
        run = dataclasses.replace(run, validate_every=0, **order)
    elif method == "ovsam":
        run = dataclasses.replace(run, text_to_mask=False)
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

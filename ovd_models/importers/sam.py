"""Released files of segment-anything: which of the published models they are, and what is in them."""

from collections.abc import Mapping, Sequence

import torch

from ovd_models.errors import InputError
from ovd_models.importers.ovsam import SAM_MARKER
from ovd_models.sam.model import VIT_B, VIT_H, VIT_L, SamConfig, build_sam
from ovd_models.weights import TensorAccount

PUBLISHED: Mapping[str, SamConfig] = {"SAM ViT-B": VIT_B, "SAM ViT-L": VIT_L, "SAM ViT-H": VIT_H}


def recognise_sam(shapes: Mapping[str, Sequence[int]], origin: str) -> tuple[str, SamConfig]:
    """Name and config of the published SAM whose image embedding has these sizes.

    Raises:
        InputError: it is none of them.
    """
    place = list(shapes[SAM_MARKER])
    for name, config in PUBLISHED.items():
        if place == [1, config.embedding_side, config.embedding_side, config.width]:
            return name, config
    raise InputError(f"{origin}: a SAM whose {SAM_MARKER} has shape {place}, expected one of {', '.join(PUBLISHED)}")


def account_sam(shapes: Mapping[str, Sequence[int]], config: SamConfig) -> TensorAccount:
    """Account for the tensors of a SAM of this config."""
    with torch.device("meta"):
        own = build_sam(config).state_dict()
    used = {name: name for name, shape in shapes.items() if name in own and list(own[name].shape) == list(shape)}
    left = tuple(name for name in shapes if name not in used)
    return TensorAccount(used, {}, left, tuple(name for name in own if name not in used))

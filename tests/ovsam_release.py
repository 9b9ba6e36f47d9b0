"""An OV-SAM's weights under the names of the released files."""

import torch
from torch import Tensor

from ovd_models.ovsam.model import OvSam

PUBLISHED = {
    "clip.tower.attnpool.": "backbone.head.",
    "clip.tower.conv1.": "backbone.stem.0.",
    "clip.tower.bn1.": "backbone.stem.1.",
    "clip.tower.conv2.": "backbone.stem.3.",
    "clip.tower.bn2.": "backbone.stem.4.",
    "clip.tower.conv3.": "backbone.stem.6.",
    "clip.tower.bn3.": "backbone.stem.7.",
    "clip.tower.": "backbone.",
    "adapter.": "neck.",
    "prompt_encoder.": "pe.",
    "mask_decoder.": "mask_decoder.mask_decoder.",
    "label_token.": "mask_decoder.label_token.",
    "namer.roi_conv.": "mask_decoder.roi_conv.0.conv.",
}
"""Our prefix -> theirs."""


def published_form(model: OvSam) -> dict[str, Tensor]:
    """The weights of a model that `published` describes; one tensor more, as in the released files, has no effect."""
    found = {"mask_decoder.label_mlp.layers.0.weight": torch.zeros(2)}
    for name, value in model.state_dict().items():
        ours = next((prefix for prefix in PUBLISHED if name.startswith(prefix)), "")
        if ours:
            found[PUBLISHED[ours] + name.removeprefix(ours)] = value
        else:
            kind, number, _, rest = name.removeprefix("namer.fpn.").split(".", 3)
            found[f"fpn_neck.{'lateral' if kind == 'inner_blocks' else 'fpn'}_convs.{number}.conv.{rest}"] = value
    return found

"""Released weights of OV-SAM, SAM and CLIP's ResNets under our names.

OV-SAM's files hold `{'meta', 'state_dict'}` or a bare state dict: the adapter alone (`neck_student.`), the naming head
(`mask_decoder.`, `fpn_neck.`), or the whole model.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ovd_models.errors import InputError
from ovd_models.ovsam.model import OvSam
from ovd_models.weights import TensorAccount, load_strict, read_state

STEM = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}
RULES: tuple[tuple[str, str], ...] = (
    (r"(?:backbone|backbone_student)\.stem\.(\d+)\.", "clip.tower.{stem}."),
    (r"(?:backbone|backbone_student)\.head\.", "clip.tower.attnpool."),
    (r"(?:backbone|backbone_student)\.", "clip.tower."),
    (r"(?:neck|neck_student)\.", "adapter."),
    (r"pe\.", "prompt_encoder."),
    (r"mask_decoder\.mask_decoder\.", "mask_decoder."),
    (r"mask_decoder\.label_token\.", "label_token."),
    (r"mask_decoder\.roi_conv\.0\.conv\.", "namer.roi_conv."),
    (r"fpn_neck\.lateral_convs\.(\d+)\.conv\.", "namer.fpn.inner_blocks.{0}.0."),
    (r"fpn_neck\.fpn_convs\.(\d+)\.conv\.", "namer.fpn.layer_blocks.{0}.0."),
)
"""Prefix of a released name -> prefix of ours."""
IGNORED: tuple[tuple[str, str], ...] = (
    (r"mask_decoder\.label_mlp\.", "its output is multiplied by zero in the released model"),
)
"""Released tensors without effect, with the reason."""
SAM_MARKER = "image_encoder.pos_embed"
"""A tensor that files of a whole SAM have."""
UNUSED = "a part that OV-SAM does not have: SAM's image encoder and IoU head, or CLIP's text tower, which is kept apart"


def account_ovsam_tensors(names: Iterable[str]) -> TensorAccount:
    """Account for the tensor names of a released OV-SAM file; our missing tensors are not checked."""
    used, ignored, unaccounted = {}, {}, []
    for name in names:
        reason = next((reason for pattern, reason in IGNORED if re.match(pattern, name)), None)
        if reason is not None:
            ignored[name] = reason
        elif (ours := our_name(name)) is not None:
            used[name] = ours
        else:
            unaccounted.append(name)
    return TensorAccount(used, ignored, tuple(unaccounted))


def our_name(name: str) -> str | None:
    """Our name of a released tensor; None if there is none."""
    for pattern, prefix in RULES:
        found = re.match(pattern, name)
        if found is not None:
            number = next(iter(found.groups()), "")
            return prefix.format(number, stem=STEM.get(number, "")) + name[found.end() :]
    return None


def load_ovsam(model: OvSam, *paths: str | Path, tower: Mapping[str, Tensor] | None = None) -> None:
    """Load a model from released files; together they must hold every weight.

    Args:
        model: with the sizes of the released model.
        paths: later files override earlier ones: SAM, CLIP, the adapter, then the naming head.
        tower: weights of CLIP's image tower under open_clip's names; the files override them.

    Raises:
        InputError: a file is unreadable or holds an unknown tensor, or no file holds some weight of the model.
    """
    join_ovsam(model, {str(path): read_state(path) for path in paths}, tower)


def join_ovsam(
    model: OvSam, files: Mapping[str, Mapping[str, Tensor]], tower: Mapping[str, Tensor] | None = None
) -> dict[str, TensorAccount]:
    """`load_ovsam` for files that are read; returns the account of each."""
    wanted = model.state_dict()
    state = {f"clip.tower.{name}": value for name, value in (tower or {}).items()}
    accounts = {}
    for path, raw in files.items():
        own, accounts[path] = part_of_ovsam(raw, wanted)
        if accounts[path].unaccounted:
            unknown = accounts[path].unaccounted[0]
            raise InputError(f"{path}: tensor {unknown!r}, expected those of a whole SAM, a CLIP or an OV-SAM file")
        state |= own
    load_strict(model, {name: value for name, value in state.items() if name in wanted}, ", ".join(files))
    return accounts


def part_of_ovsam(raw: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], TensorAccount]:
    """The weights of a model that a file holds, under our names, and the account of its tensors."""
    if SAM_MARKER in raw:
        state = from_sam(raw, wanted)
        names = {name: "adapter.pos_embed" if name == SAM_MARKER else name for name in raw}
    elif any(name.startswith(("visual.", "attnpool.")) for name in raw):
        state = from_clip(raw)
        names = {name: f"clip.tower.{name.removeprefix('visual.')}" for name in raw}
    else:
        account = account_ovsam_tensors(raw)
        return {ours: raw[name] for name, ours in account.used.items()}, account
    used = {name: ours for name, ours in names.items() if ours in state and ours in wanted}
    return state, TensorAccount(used, dict.fromkeys((name for name in raw if name not in used), UNUSED), ())


def from_sam(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of SAM in an OV-SAM: position embedding, prompt encoder, and the decoder for the first mask."""
    found = {"adapter.pos_embed": state["image_encoder.pos_embed"]}
    for name, value in state.items():
        if name.startswith(("prompt_encoder.", "mask_decoder.")) and name in wanted:
            found[name] = value[: len(wanted[name])] if wanted[name].dim() else value
    return found


def from_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of a CLIP ResNet under OpenAI's or open_clip's names, without the text tower."""
    prefix = "visual." if any(name.startswith("visual.") for name in state) else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {f"clip.tower.{name}": value.float() if value.is_floating_point() else value for name, value in own.items()}

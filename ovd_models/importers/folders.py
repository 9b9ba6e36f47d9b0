"""Released files as checkpoint folders: what each becomes, and the account of its tensors.

A plan is made before anything is written, so that a dry run shows all that a conversion does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import (
    Clip,
    ClipConfig,
    ClipTextEncoder,
    SkipInitialisation,
    load_clip,
    save_clip,
    weights_digest,
)
from ovd_models.clip.pretrained import published_pixels
from ovd_models.errors import InputError
from ovd_models.importers.clip import choose_architecture, clip_state
from ovd_models.importers.codet import account_codet_tensors, detector_of
from ovd_models.importers.ovsam import join_ovsam
from ovd_models.importers.sam import account_sam, recognise_sam
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.sam.model import VIT_H, SamModel
from ovd_models.vocabulary import EmbeddingTable, TextEncoder
from ovd_models.weights import TensorAccount, load_strict


@dataclass(frozen=True)
class ReadFile:
    """A file of weights in memory."""

    path: str
    sha256: str
    state: dict[str, Tensor]
    script: bool
    """Whether it is a TorchScript file, as OpenAI's are."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the tensors."""
        return {name: list(value.shape) for name, value in self.state.items()}


@dataclass(frozen=True)
class Names:
    """The names that a detector or segmenter is to have, and their table if one is given."""

    splits: dict[str, str]
    """`base`, `novel`, or "" if a name is embedded but not used by default."""
    table: EmbeddingTable | None = None

    @property
    def default(self) -> dict[str, str]:
        """The default vocabulary."""
        return {name: split for name, split in self.splits.items() if split}


@dataclass(frozen=True)
class Plan:
    """What a conversion does."""

    title: str
    accounts: dict[str, TensorAccount]
    """By file."""
    save: Callable[[Path], None] | None
    """Writes the folder; None if there is nothing to convert."""


def plan_detector(file: ReadFile, names: Names, run: Mapping[str, Any]) -> Plan:
    """A CoDet, Detic or BoxSup detector.

    Raises:
        InputError: a tensor is missing, of another shape or unknown, or the names have no embeddings.
    """
    account = check_account(account_codet_tensors(file.shapes, file.path), file.path)
    imported = detector_of(file.state, file.path)
    encoder: TextEncoder
    if names.table is not None:
        encoder = names.table
    elif imported.encoder is not None:
        encoder = imported.encoder
    elif imported.name_embeddings is not None:
        encoder = EmbeddingTable.from_array(tuple(names.splits), imported.name_embeddings.numpy(), file.path)
    else:
        raise InputError(f"{file.path}: holds no text encoder and no embedded names, expected --names and --table")
    config = imported.model.config
    backbone = (config.centernet2 if config.architecture == "centernet2" else config.detector).backbone
    return Plan(
        f"detector {config.architecture} with {backbone}",
        {file.path: account},
        lambda folder: save_checkpoint(imported.model, encoder, folder, splits=names.default, run=run),
    )


def plan_sam(file: ReadFile, run: Mapping[str, Any]) -> Plan:
    """One of the published SAMs."""
    title, config = recognise_sam(file.shapes, file.path)
    account = check_account(account_sam(file.shapes, config), file.path)

    def save(folder: Path) -> None:
        model = SamModel(config)
        load_strict(model.sam, file.state, file.path)
        save_checkpoint(model, None, folder, splits={}, run=run)

    return Plan(title, {file.path: account}, save)


def plan_clip(file: ReadFile, given: str) -> Plan:
    """A CLIP; `given` is its architecture, if the file fits several."""
    model, account = clip_of(file, given)
    gelu = ", QuickGELU" if model.config.quick_gelu else ""
    title = f"CLIP {model.config.name}{gelu}, images resized by {model.config.resize_mode!r}"
    return Plan(title, {file.path: account}, lambda folder: _save_clip(model, folder))


def _save_clip(model: Clip, folder: Path) -> None:
    save_clip(model, folder)


def clip_of(file: ReadFile, given: str) -> tuple[Clip, TensorAccount]:
    """The CLIP of a file and the account of its tensors.

    Raises:
        InputError: no architecture of open_clip has these tensors, or several do.
    """
    state, account = clip_state(file.state)
    name = choose_architecture(state, given, file.path, quick_gelu=file.script)
    with SkipInitialisation():
        model = Clip(ClipConfig(name=name, quick_gelu=file.script, **published_pixels(name)))
    load_strict(model.model, state, file.path)
    return model.eval(), account


def plan_ovsam(
    files: Sequence[ReadFile],
    kinds: Sequence[str],
    names: Names,
    run: Mapping[str, Any],
    *,
    clip: str,
    pretrained: str,
) -> Plan:
    """An OV-SAM from its own files, SAM's, and CLIP's; a later file overrides an earlier one.

    Args:
        files: all files.
        kinds: of the files, `ovsam`, `sam` and at most one `clip`.
        names: the default vocabulary.
        run: recorded in the checkpoint.
        clip: without a file of kind `clip`, an architecture of open_clip or one of our checkpoint folders; with one,
            its architecture if it fits several.
        pretrained: the architecture's weights.
    """
    order = sorted(zip(files, kinds, strict=True), key=lambda pair: ("sam", "clip", "ovsam").index(pair[1]))
    towers = [file for file, kind in order if kind == "clip"]
    accounts: dict[str, TensorAccount] = {}
    if towers:
        model, accounts[towers[0].path] = clip_of(towers[0], clip)
        teacher = f"clip:{weights_digest(model.model.state_dict())}"
    elif clip:
        model, teacher = load_clip(clip, pretrained)
    else:
        raise InputError(
            "--weights: no CLIP with both towers, expected its file too, or --clip RN50x16 --pretrained openai"
        )
    sams = [recognise_sam(file.shapes, file.path)[1] for file, kind in order if kind == "sam"]
    whole = OvSam(published(TowerConfig.of(model.config), sams[0] if sams else VIT_H))
    parts = {file.path: file.state for file, kind in order if kind != "clip"}
    accounts |= join_ovsam(whole, parts, tower=model.model.visual.state_dict())
    encoder = ClipTextEncoder(replace(model.config, prompt_set="ovsam"), model.model.text, teacher)
    return Plan(
        f"OV-SAM on CLIP {model.config.name or clip}",
        accounts,
        lambda folder: save_checkpoint(whole, encoder, folder, splits=names.default, run=run),
    )


def check_account(account: TensorAccount, origin: str) -> TensorAccount:
    """The account, if every tensor of the file has a use or a reason, and every weight of the model is filled.

    Raises:
        InputError: not so.
    """
    if account.missing:
        raise InputError(
            f"{origin}: {len(account.missing)} weights of the model are missing or of another shape, such as "
            f"{account.missing[0]}; expected a whole file"
        )
    if account.unaccounted:
        raise InputError(
            f"{origin}: {len(account.unaccounted)} tensors are no part of the model, such as "
            f"{account.unaccounted[0]}; expected a file of this model alone"
        )
    return account

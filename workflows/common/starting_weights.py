"""The weights that a detector's backbone starts from: a given file, the config's published one, or none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import timm
import torch
import tyro
from huggingface_hub import try_to_load_from_cache

from data_prep import storage
from ovd_models.errors import InputError
from ovd_models.importers.released import check_released
from ovd_models.prompts import find_prompt_set
from workflows.common import cli


@dataclass(frozen=True, kw_only=True)
class PublishedBackbone:
    """The released weights that a config's backbone starts from; without a URL there are none."""

    url: str = ""
    backbone: str = ""
    """The detector's backbone that they fit."""
    trained_on: str = ""
    """What they were trained on, such as `ImageNet`."""
    timm_name: str = ""
    """Their name in timm, whose cached copy is used too."""
    required: bool = False
    """Whether the config refuses to train without weights."""
    box_model_url: str = ""
    """The released detector that replaces backbone and box stage by `--box-model`."""

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


Published = Annotated[PublishedBackbone, tyro.conf.Suppress]
"""A config's own field, without a flag."""


def check_file(flag: str, path: str) -> None:
    """Raise InputError unless a flag's file or URI is there and, if it has a released name, is what was published."""
    cli.check_file(flag, path)
    check_released(storage.local_file(path))


def check_given(texts: str, backbone_weights: str, prompt_set: str) -> None:
    """Check that what a detector is told to start from is there, before any work.

    Raises:
        InputError: a file is not there or not what its name says, or the prompt set is unknown.
    """
    if texts:
        cli.check_file("--texts", texts)
    if backbone_weights != "auto":
        check_file("--backbone-weights", backbone_weights)
    if prompt_set:
        find_prompt_set(prompt_set)


def find_backbone(config: str, given: str, published: PublishedBackbone, backbone: str, *, from_scratch: bool) -> str:
    """The file that the backbone starts from; empty for random weights, which a printed line says if there is a choice.

    Args:
        config: name of the config.
        given: `--backbone-weights`: a file or its URI, or `auto` for the published one if it is on this machine.
        published: the config's.
        backbone: name of the detector's backbone.
        from_scratch: `--from-scratch`.

    Raises:
        InputError: the file does not exist, or nothing is found where the config requires weights.
    """
    if given != "auto":
        if from_scratch:
            raise InputError(f"--from-scratch: contradicts --backbone-weights {given}, expected one of them")
        cli.check_file("--backbone-weights", given)
        print(f"backbone: {given}", flush=True)
        return given
    if from_scratch or not published.url:
        return ""
    found = find_published(published) if published.backbone == backbone else ""
    if not found and published.required:
        released = f", --box-model FILE (such as {published.box_model_url})" if published.box_model_url else ""
        raise InputError(
            f"--config {config}: the backbone starts from {published.file} ({published.url}), not found here; "
            f"expected --backbone-weights FILE{released} or --from-scratch; "
            "`python workflows/import_weights.py --list` names all released files"
        )
    if found:
        print(f"backbone: {found} ({published.trained_on})", flush=True)
    else:
        hint = f"; {published.file} from {published.url} gives {published.trained_on}'s (docs/weights.md)"
        print(f"backbone: random weights{hint if published.backbone == backbone else ''}", flush=True)
    return found


def find_published(published: PublishedBackbone) -> str:
    """The published file in the cache of torch hub or, by its name in timm, of Hugging Face; empty if in neither.

    Raises:
        InputError: what lies in torch hub's cache is not what was published.
    """
    local = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    if local.is_file():
        check_released(local)
        return str(local)
    recorded = timm.get_pretrained_cfg(published.timm_name) if published.timm_name else None
    if recorded is None or not recorded.hf_hub_id:
        return ""
    cached = try_to_load_from_cache(recorded.hf_hub_id, "model.safetensors")
    return cached if isinstance(cached, str) else ""


def digest_of(backbone_weights: str) -> str:
    """Identifies the content of a resolved `--backbone-weights`: `auto`, then for random weights, or a file."""
    if backbone_weights == "auto":
        return "random"
    return storage.file_sha256(storage.local_file(backbone_weights))[:16]

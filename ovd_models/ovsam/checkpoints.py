"""Checkpoint folders of SAM and OV-SAM, and the segmenter that one opens.

model.safetensors     the weights
config.json           method, model config, resolved run, names; written last
text/                 the text encoder, or a table of embedded names; SAM has none
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ovd_models.checkpoints import (
    FORMAT,
    CheckpointInfo,
    LoadedModel,
    as_picture,
    from_json,
    load_encoder,
    read_info,
    save_encoder,
)
from ovd_models.clip.model import weights_digest
from ovd_models.errors import InputError
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig, build_tower
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskConfig
from ovd_models.preprocess import ImageLike
from ovd_models.sam.model import EverythingConfig, SamConfig, SamModel
from ovd_models.segments import Prompts, Segments
from ovd_models.vocabulary import TextEncoder, Vocabulary, build_vocabulary, clean_names


def _save(model: nn.Module, folder: str | Path, info: dict[str, Any]) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"format": FORMAT, **info}, indent=1, default=str))


def save_sam(model: SamModel, folder: str | Path, *, run: dict[str, Any]) -> str:
    """Write a SAM's checkpoint folder; returns its id."""
    info = {"method": "sam", "model": asdict(model.config), "vocabulary": [], "splits": {}, "run": run}
    _save(model, folder, info)
    return sam_id(model)


def sam_id(model: SamModel) -> str:
    """Identifies a SAM's numbers and weights."""
    config = torch.frombuffer(bytearray(json.dumps(asdict(model.config), sort_keys=True).encode()), dtype=torch.uint8)
    return f"sam:{weights_digest({**model.state_dict(), 'config': config})}"


def load_sam_folder(folder: str | Path) -> tuple[SamModel, str]:
    """The SAM of a checkpoint folder, in evaluation mode, and its id.

    Raises:
        InputError: there is no such checkpoint, it is another method's, or broken.
    """
    info = _info_of(folder, "sam")
    try:
        model = SamModel(from_json(SamConfig, info.model))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (RuntimeError, TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable sam checkpoint ({_last_line(error)})") from error
    return model.eval(), sam_id(model)


def save_text_to_mask(
    model: TextToMask, encoder: TextEncoder, folder: str | Path, *, splits: dict[str, str], run: dict[str, Any]
) -> None:
    """Write a complete checkpoint folder of a SAM that takes names as prompts; `splits` as for `save_ovsam`."""
    save_encoder(encoder, Path(folder) / "text")
    parts = {"sam": asdict(model.sam.config), "tower": asdict(model.tower), "text": asdict(model.settings)}
    info = {"method": "text_to_mask", "model": parts, "vocabulary": list(splits), "splits": splits, "run": run}
    _save(model, folder, info)


def load_text_to_mask(folder: str | Path) -> tuple[TextToMask, CheckpointInfo]:
    """The text-to-mask model of a checkpoint folder, in evaluation mode.

    Raises:
        InputError: there is no such checkpoint, it is another method's, or broken.
    """
    info = _info_of(folder, "text_to_mask")
    try:
        sam, tower = from_json(SamConfig, info.model["sam"]), from_json(TowerConfig, info.model["tower"])
        clip = ClipPyramid(build_tower(tower, sam.image_size))
        model = TextToMask(SamModel(sam), clip, tower, from_json(TextToMaskConfig, info.model["text"]))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (RuntimeError, TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable text_to_mask checkpoint ({_last_line(error)})") from error
    return model.eval(), info


def save_ovsam(
    model: OvSam, encoder: TextEncoder, folder: str | Path, *, splits: dict[str, str], run: dict[str, Any]
) -> None:
    """Write a complete checkpoint folder: `splits` are the default names and whether they are base or novel."""
    save_encoder(encoder, Path(folder) / "text")
    info = {"method": "ovsam", "model": asdict(model.config), "vocabulary": list(splits), "splits": splits, "run": run}
    _save(model, folder, info)


def load_ovsam_folder(folder: str | Path) -> tuple[OvSam, CheckpointInfo]:
    """The OV-SAM of a checkpoint folder, in evaluation mode.

    Raises:
        InputError: there is no such checkpoint, it is another method's, or broken.
    """
    info = _info_of(folder, "ovsam")
    try:
        model = OvSam(from_json(OvSamConfig, info.model))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    except (RuntimeError, TypeError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable ovsam checkpoint ({_last_line(error)})") from error
    return model.eval(), info


def _info_of(folder: str | Path, method: str) -> CheckpointInfo:
    info = read_info(folder)
    if info.method != method:
        raise InputError(f"{folder}: checkpoint of method {info.method!r}, expected {method!r}")
    return info


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


class Segmenter(LoadedModel[OvSam]):
    """A trained OV-SAM: prompts and names in, named masks out."""

    def names(self, names: Sequence[str] | None = None) -> Vocabulary:
        """Embedded names, those that had masks in training marked as base; the default ones if None.

        Where the checkpoint knows none of them, nothing is marked, and `novel_bias` raises none above the background.
        """
        chosen = clean_names(names if names is not None else self.vocabulary)
        known = self.info.splits if any(name in self.info.splits for name in chosen) else None
        return build_vocabulary(self.encoder, chosen, known).to(self.device)

    def segment(self, image: ImageLike, prompts: Prompts, names: Sequence[str] | None = None) -> Segments:
        """Masks and names of what the prompts point at.

        Args:
            image: a path, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB).
            prompts: in pixels of the image.
            names: any names; the default vocabulary if None.

        Raises:
            InputError: the image cannot be read, the prompts do not fit it, or a name cannot be embedded.
        """
        tensor = self.read(image)
        return _with_picture(self.model.segment(tensor, prompts, self.names(names)), tensor)

    def everything(
        self, image: ImageLike, names: Sequence[str] | None = None, settings: EverythingConfig | None = None
    ) -> Segments:
        """Masks and names of the whole picture, best first.

        Raises:
            InputError: the image cannot be read, or a name cannot be embedded.
        """
        tensor = self.read(image)
        return _with_picture(self.model.everything(tensor, self.names(names), settings), tensor)


def load_segmenter(folder: str | Path, device: str = "cpu") -> Segmenter:
    """The segmenter of a checkpoint folder.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    model, info = load_ovsam_folder(folder)
    return Segmenter(model, load_encoder(Path(folder) / "text"), info, device)


class TextSegmenter(LoadedModel[TextToMask]):
    """A trained text-to-mask model: names in, masks out."""

    def segment(self, image: ImageLike, names: Sequence[str] | None = None) -> Segments:
        """One mask a name; its score is the model's own estimate of the mask.

        It is learnt from things that are there: of a name that nothing bears it makes a mask too.

        Args:
            image: a path, PIL image, array [H, W, 3] or tensor [3, H, W] (uint8 RGB).
            names: any names; those of the checkpoint if None.

        Raises:
            InputError: the image cannot be read, or a name cannot be embedded.
        """
        tensor = self.read(image)
        chosen = names if names is not None else self.vocabulary
        vocabulary = build_vocabulary(self.encoder, chosen, self.info.splits).to(self.device)
        found = self.model.segment_text(tensor, vocabulary.embeddings)
        labels = torch.arange(len(vocabulary), device=self.device)
        return _with_picture(replace(found, labels=labels, scores=found.ious, names=vocabulary.names), tensor)


def load_text_segmenter(folder: str | Path, device: str = "cpu") -> TextSegmenter:
    """The text-to-mask model of a checkpoint folder, with its text encoder.

    Raises:
        InputError: there is no such checkpoint, or it is broken.
    """
    model, info = load_text_to_mask(folder)
    return TextSegmenter(model, load_encoder(Path(folder) / "text"), info, device)


def _with_picture(found: Segments, tensor: torch.Tensor) -> Segments:
    """Segments on the CPU, with the picture that they are of."""
    return replace(found.to(torch.device("cpu")), image=as_picture(tensor))

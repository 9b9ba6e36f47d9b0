"""Convert released CoDet, Detic or OV-SAM weights to a checkpoint folder.

.pth or .pkl --translate, name by name--> model.safetensors, config.json, text/

python workflows/import_weights.py --weights CoDet_OVLVIS_R5021k_4x_ft4x.pth --out runs/codet_lvis --names lvis_v1.json
python workflows/import_weights.py --config ovsam --clip RN50x16 --pretrained openai --sam sam_vit_h_4b8939.pth \
    --adapter sam2clip_vith_rn50x16.pth --head clip2sam_coco_rn50x16.pth --out runs/ovsam_coco --names coco.json
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "weights out names table")

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.boxes.coco import coco_splits
from ovd_models.checkpoints import save_checkpoint
from ovd_models.clip.model import ClipTextEncoder, load_clip
from ovd_models.errors import InputError
from ovd_models.importers.codet import ImportedDetector, load_codet_release
from ovd_models.importers.ovsam import load_ovsam
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.prompts import clean_name
from ovd_models.sam.model import VIT_H, SamConfig
from ovd_models.vocabulary import EmbeddingTable, TextEncoder
from workflows.common import cli


@dataclass(frozen=True, kw_only=True)
class Run:
    """A released CoDet or Detic file; requires `--weights` and `--out`."""

    weights: str = ""
    """The file; no code in it is executed."""
    out: str = ""
    """Checkpoint folder to write."""
    names: str = ""
    """Default vocabulary: a text file with one name per line, or COCO's or LVIS's json, sorted by id as in released
    tables. COCO's 15 names that are neither base nor novel are embedded but not in the default vocabulary."""
    table: str = ""
    """A .npy of raw embeddings, one row per name in `names`; if empty, names are embedded by the file's own text
    encoder or, if it has none, looked up in the file's table."""


@dataclass(frozen=True, kw_only=True)
class OvSamRun:
    """The released files of one OV-SAM; if a file holds several parts, the flags of the others may be empty."""

    clip: str = "RN50x16"
    """CLIP's name in open_clip, or one of our checkpoint folders: the image tower, and the text tower for names."""
    pretrained: str = "openai"
    """CLIP's weights: an open_clip tag or a file; empty for a checkpoint folder."""
    sam: str = ""
    """SAM's file, for the parts that OV-SAM shares with it."""
    sam_model: SamConfig = VIT_H
    adapter: str = ""
    """SAM2CLIP's file."""
    head: str = ""
    """CLIP2SAM's file."""
    out: str = ""
    """Checkpoint folder to write."""
    names: str = ""
    """Default vocabulary, as for `codet`."""


CONFIGS: dict[str, Callable[[], Run | OvSamRun]] = {"codet": Run, "ovsam": OvSamRun}


def read_released_names(path: str) -> dict[str, str]:
    """Read names in the order of released tables, each with its split: `base`, `novel`, or "" if unused.

    LVIS's rare names are novel, and COCO's names have the usual split. Other names count as novel, since their
    supervision is unknown.

    Raises:
        InputError: the file cannot be read or has another format.
    """
    if not path:
        return {}
    try:
        text = Path(path).read_text()
        if not path.endswith(".json"):
            names = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            raw: Any = json.loads(text)
            categories = sorted(raw["categories"] if isinstance(raw, dict) else raw, key=lambda entry: int(entry["id"]))
            names = [clean_name(str(entry["name"])) for entry in categories]
            frequencies = [entry.get("frequency") for entry in categories]
            if any(frequencies):
                return {name: "novel" if f == "r" else "base" for name, f in zip(names, frequencies, strict=True)}
        splits = coco_splits(names) or dict.fromkeys(names, "novel")
        return {name: splits[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "a name a line, or COCO's or LVIS's json"
        raise InputError(f"{path}: no names ({type(error).__name__}), expected {expected}") from error


def choose_encoder(run: Run, imported: ImportedDetector, names: tuple[str, ...]) -> TextEncoder:
    """Choose the text encoder: `run.table`, the file's own encoder, or the file's table, in this order.

    Raises:
        InputError: the table does not fit the names, or there is no encoder.
    """
    if run.table:
        try:
            rows = np.load(run.table, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{run.table}: not a .npy of embeddings ({type(error).__name__})") from error
        return EmbeddingTable.from_array(names, rows, run.table)
    if imported.encoder is not None:
        return imported.encoder
    if imported.name_embeddings is None:
        raise InputError(f"{run.weights}: holds no text encoder and no embedded names, expected --names and --table")
    return EmbeddingTable.from_array(names, imported.name_embeddings.numpy(), run.weights)


def convert_detector(run: Run) -> None:
    """Write the checkpoint folder of a CoDet or Detic detector.

    Raises:
        InputError: a flag is missing, or a file has unexpected content.
    """
    if not run.weights or not run.out:
        raise InputError(f"--{'out' if run.weights else 'weights'}: missing, expected a path")
    names = read_released_names(run.names)
    imported = load_codet_release(run.weights)
    encoder = choose_encoder(run, imported, tuple(names))
    splits = {name: split for name, split in names.items() if split}
    save_checkpoint(imported.model, encoder, run.out, splits=splits, run=asdict(run))
    print(f"{run.out}: {imported.model.config.architecture} with {len(splits)} default names")


def convert_ovsam(run: OvSamRun) -> None:
    """Write the checkpoint folder of an OV-SAM.

    Raises:
        InputError: a flag is missing, or a file has unexpected content.
    """
    files = [path for path in (run.sam, run.adapter, run.head) if path]
    if not files or not run.out:
        raise InputError(f"--{'out' if files else 'head'}: missing, expected a path")
    splits = {name: split for name, split in read_released_names(run.names).items() if split}
    clip, teacher = load_clip(run.clip, run.pretrained)
    model = OvSam(published(TowerConfig.of(clip.config), run.sam_model))
    load_ovsam(model, *files, tower=clip.model.visual.state_dict())
    encoder = ClipTextEncoder(replace(clip.config, prompt_set="ovsam"), clip.model.text, teacher)
    save_checkpoint(model, encoder, run.out, splits=splits, run=asdict(run))
    print(f"{run.out}: OV-SAM with {len(splits)} default names")


def main() -> None:
    """Convert one release."""
    run = cli.parse(CONFIGS, __doc__)
    if isinstance(run, OvSamRun):
        convert_ovsam(run)
    else:
        convert_detector(run)


if __name__ == "__main__":
    cli.execute(main)

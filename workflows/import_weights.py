"""Released CoDet, Detic and OV-SAM weights as a checkpoint folder of ours.

.pth or .pkl --translate, name by name--> model.safetensors, config.json, text/

python workflows/import_weights.py --weights CoDet_OVLVIS_R5021k_4x_ft4x.pth --out runs/codet_lvis --names lvis_v1.json
python workflows/import_weights.py --config ovsam --clip RN50x16 --pretrained openai --sam sam_vit_h_4b8939.pth \
    --adapter sam2clip_vith_rn50x16.pth --head clip2sam_coco_rn50x16.pth --out runs/ovsam_coco --names coco.json
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.boxes.annotations import coco_splits
from ovd_models.checkpoints import save_detector
from ovd_models.clip.model import ClipTextEncoder, load_clip
from ovd_models.errors import InputError
from ovd_models.importers.codet import ImportedDetector, load_codet_release
from ovd_models.importers.ovsam import load_ovsam
from ovd_models.ovsam.checkpoints import save_ovsam
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, published
from ovd_models.prompts import clean_name
from ovd_models.sam.model import VIT_H, SamConfig
from ovd_models.vocabulary import EmbeddingTable, TextEncoder
from workflows.common import cli


@dataclass(frozen=True, kw_only=True)
class Run:
    """One released file."""

    weights: str = ""
    """The file; nothing in it is executed."""
    out: str = ""
    """Folder of the checkpoint."""
    names: str = ""
    """The default vocabulary: a text file with a name a line, or COCO's or LVIS's json, sorted by id as released tables
    are. COCO's 15 names that are neither base nor novel are embedded, but not asked for by default."""
    table: str = ""
    """A .npy of raw embeddings, one row for each of `names`; where it is missing, names are embedded by the file's own
    text encoder or, if it has none, looked up in the file's table."""


@dataclass(frozen=True, kw_only=True)
class OvSamRun:
    """The released files of one OV-SAM; where one holds several parts, the others may be left out."""

    clip: str = "RN50x16"
    """CLIP as open_clip calls it, or a checkpoint folder of ours: the image tower, and the text tower for names."""
    pretrained: str = "openai"
    """Its weights: a tag of open_clip's, or a file; empty for a folder of ours."""
    sam: str = ""
    """SAM's file, for what OV-SAM takes over from it."""
    sam_model: SamConfig = VIT_H
    adapter: str = ""
    """SAM2CLIP's file."""
    head: str = ""
    """CLIP2SAM's file."""
    out: str = ""
    """Folder of the checkpoint."""
    names: str = ""
    """The default vocabulary, as for `codet`."""


def codet() -> Run:
    """A released CoDet or Detic detector; give it `--weights` and `--out`."""
    return Run()


def ovsam() -> OvSamRun:
    """A released OV-SAM; give it `--sam`, `--adapter`, `--head` and `--out`."""
    return OvSamRun()


CONFIGS: dict[str, Callable[[], Run | OvSamRun]] = {"codet": codet, "ovsam": ovsam}


def read_names(path: str) -> dict[str, str]:
    """Names in the order of released tables, each `base`, `novel` or "", which takes no part.

    LVIS's rare names are novel, COCO's those of the usual split; of others nobody knows what taught them, so they count
    as novel.

    Raises:
        InputError: the file cannot be read, or has another form.
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
            if any("frequency" in entry for entry in categories):
                rare = [entry.get("frequency") == "r" for entry in categories]
                return {name: "novel" if novel else "base" for name, novel in zip(names, rare, strict=True)}
        splits = coco_splits(names) or dict.fromkeys(names, "novel")
        return {name: splits[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "a name a line, or COCO's or LVIS's json"
        raise InputError(f"{path}: no names ({type(error).__name__}), expected {expected}") from error


def choose_encoder(run: Run, imported: ImportedDetector, names: tuple[str, ...]) -> TextEncoder:
    """What turns names into embeddings.

    Raises:
        InputError: the table does not fit the names, or there is nothing to embed names with.
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


def convert(run: Run) -> None:
    """Write the checkpoint folder.

    Raises:
        InputError: a flag is missing, or a file does not hold what it should.
    """
    if not run.weights or not run.out:
        raise InputError(f"--{'out' if run.weights else 'weights'}: missing, expected a path")
    splits = read_names(run.names)
    imported = load_codet_release(run.weights)
    encoder = choose_encoder(run, imported, tuple(splits))
    taking_part = {name: split for name, split in splits.items() if split}
    save_detector(imported.model, encoder, run.out, splits=taking_part, run=asdict(run))
    print(f"{run.out}: {imported.model.config.architecture} with {len(taking_part)} default names")


def convert_ovsam(run: OvSamRun) -> None:
    """Write the checkpoint folder.

    Raises:
        InputError: a flag is missing, or the files do not hold what they should.
    """
    files = [path for path in (run.sam, run.adapter, run.head) if path]
    if not files or not run.out:
        raise InputError(f"--{'out' if files else 'head'}: missing, expected a path")
    splits = {name: split for name, split in read_names(run.names).items() if split}
    clip, teacher = load_clip(run.clip, run.pretrained)
    model = OvSam(published(TowerConfig.of(clip.config), run.sam_model))
    load_ovsam(model, *files, tower=clip.model.visual.state_dict())
    encoder = ClipTextEncoder(replace(clip.config, prompt_set="ovsam"), clip.model.text, teacher)
    save_ovsam(model, encoder, run.out, splits=splits, run=asdict(run))
    print(f"{run.out}: OV-SAM with {len(splits)} default names")


def main() -> None:
    """Convert one release."""
    run = cli.parse(CONFIGS, __doc__)
    if isinstance(run, OvSamRun):
        convert_ovsam(run)
    else:
        convert(run)


if __name__ == "__main__":
    cli.execute(main)

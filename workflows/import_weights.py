"""Released CoDet and Detic weights as a checkpoint folder of ours.

.pth or .pkl --translate, name by name--> model.safetensors, config.json, text/

python workflows/import_weights.py --weights CoDet_OVLVIS_R5021k_4x_ft4x.pth --out runs/codet_lvis --names lvis_v1.json
"""

import workflows.startup

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovd_models.checkpoints import save_detector
from ovd_models.errors import InputError
from ovd_models.importers import Imported, load_codet_release
from ovd_models.vocabulary import EmbeddingTable, TextEncoder
from workflows import cli


@dataclass(frozen=True, kw_only=True)
class Run:
    """One released file."""

    weights: str = ""
    """The file; nothing in it is executed."""
    out: str = ""
    """Folder of the checkpoint."""
    names: str = ""
    """The default vocabulary: a text file with a name a line, or COCO's or LVIS's json, sorted by id as released tables
    are."""
    table: str = ""
    """A .npy of raw embeddings, one row for each of `names`; where it is missing, names are embedded by the file's own
    text encoder or, if it has none, looked up in the file's table."""


def codet() -> Run:
    """A released CoDet or Detic detector; give it `--weights` and `--out`."""
    return Run()


CONFIGS: dict[str, Callable[[], Run]] = {"codet": codet}


def read_names(path: str) -> dict[str, str]:
    """Names in the order of released tables, each `base` or, where the json calls it rare, `novel`.

    Raises:
        InputError: the file cannot be read, or has another form.
    """
    if not path:
        return {}
    try:
        text = Path(path).read_text()
        if not path.endswith(".json"):
            return {line.strip(): "base" for line in text.splitlines() if line.strip()}
        raw: Any = json.loads(text)
        categories = sorted(raw["categories"] if isinstance(raw, dict) else raw, key=lambda entry: int(entry["id"]))
        return {
            str(entry["name"]).replace("_", " "): "novel" if entry.get("frequency") == "r" else "base"
            for entry in categories
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no names ({type(error).__name__}), expected a name a line or LVIS's json") from error


def choose_encoder(run: Run, imported: Imported, names: tuple[str, ...]) -> TextEncoder:
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
    save_detector(imported.model, encoder, run.out, splits=splits, run=asdict(run))
    print(f"{run.out}: {imported.model.config.architecture} with {len(splits)} default names")


def main() -> None:
    """Convert one file."""
    convert(cli.parse(CONFIGS, __doc__))


if __name__ == "__main__":
    cli.execute(main)

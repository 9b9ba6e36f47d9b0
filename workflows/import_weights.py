"""Convert released weights to a checkpoint folder that serving, evaluation and training take.

.pth, .pt, .pkl, .safetensors --recognised by their tensors--> account --> model.safetensors, config.json, ...

python workflows/import_weights.py --weights CoDet_OVLVIS_R5021k_4x_ft4x.pth --names lvis_v1_val.json --out store/codet
python workflows/import_weights.py --weights ViT-B-32.pt --out store/clip
python workflows/import_weights.py --weights sam2clip.pth clip2sam.pth sam_vit_h_4b8939.pth RN50x16.pt --out store/ovsam
python workflows/import_weights.py --weights FILE --dry-run      # says what the file is and what becomes of each tensor
python workflows/import_weights.py --list                        # released files: where from, what for, digest
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "weights out names table clip pretrained dry_run list")

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep import storage
from data_prep.boxes.coco import coco_splits
from data_prep.embeddings.texts import read_matrix
from data_prep.progress import working
from ovd_models.checkpoint_info import SOURCE
from ovd_models.errors import InputError
from ovd_models.importers.folders import Names, Plan, ReadFile, plan_clip, plan_detector, plan_ovsam, plan_sam
from ovd_models.importers.recognise import fitting_backbones, recognise
from ovd_models.importers.released import check_released, released_files
from ovd_models.prompts import clean_name
from ovd_models.torchscript import is_torchscript
from ovd_models.weights import TensorAccount, read_state
from workflows.common import cli, output


@dataclass(frozen=True, kw_only=True)
class Run:
    """Released files of one model."""

    weights: tuple[str, ...] = ()
    """The file, or the files of an OV-SAM; no code in them is run."""
    names: str = ""
    """Default vocabulary: a text file with one name per line, or COCO's or LVIS's json, sorted by id as in released
    tables. COCO's 15 names that are neither base nor novel are embedded but not in the default vocabulary."""
    table: str = ""
    """A .npy of embeddings, one row or column per name in `names`; if empty, a detector's names are embedded by the
    file's own text encoder or, if it has none, looked up in the file's table."""
    clip: str = ""
    """The architecture of a CLIP that fits several; or an OV-SAM's CLIP: an architecture of open_clip with
    `pretrained`, or one of our checkpoint folders."""
    pretrained: str = ""
    """Weights of `clip`: a tag of open_clip, such as `openai`, or a file."""
    out: str = ""
    """Checkpoint folder to write; it must not exist, or be empty."""
    dry_run: bool = False
    """Only say what the files are and what becomes of their tensors."""
    list: bool = False
    """Only list released files."""


CONFIGS = {"released": Run}
TAKEN_BY = {
    "detector": "trainings continue from it by --box-model",
    "sam": "ovsam.py takes it by --sam",
    "clip": "trainings, embed.py and search.py take it by --teacher",
    "ovsam": "predict.py and evaluate.py take it by --model",
}
"""Kind of a folder -> what takes it, besides the endpoint."""


def read_released_names(path: str) -> dict[str, str]:
    """Read names in the order of released tables, each with its split: `base`, `novel`, or "" if unused.

    LVIS's rare names are novel, and COCO's names have the usual split. Other names count as novel, since their
    supervision is unknown.

    Raises:
        InputError: the file cannot be read, has another format, or repeats a name.
    """
    if not path:
        return {}
    frequencies: list[Any] = []
    try:
        text = storage.read_text(path)
        if not storage.base_name(path).endswith(".json"):
            names = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            raw: Any = json.loads(text)
            categories = sorted(raw["categories"] if isinstance(raw, dict) else raw, key=lambda entry: int(entry["id"]))
            names = [clean_name(str(entry["name"])) for entry in categories]
            frequencies = [entry.get("frequency") for entry in categories]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "a name a line, or COCO's or LVIS's json"
        raise InputError(f"{path}: no names ({type(error).__name__}), expected {expected}") from error
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: {repeated!r} is there twice, expected a name for each row of the released table")
    if any(frequencies):
        return {name: "novel" if f == "r" else "base" for name, f in zip(names, frequencies, strict=True)}
    splits = coco_splits(names) or dict.fromkeys(names, "novel")
    return {name: splits[name] for name in names}


def read_file(path: str) -> ReadFile:
    """A file in memory, after a check that it is what was published under its name, if that is a released one.

    Raises:
        InputError: it cannot be read safely, or is not what was published under its name.
    """
    source = Path(path)
    try:
        digest = storage.file_sha256(source)
        script = is_torchscript(source)
    except (OSError, ValueError) as error:
        raise InputError(f"--weights {path!r}: cannot be read ({type(error).__name__}), expected a file") from error
    check_released(source, digest)
    return ReadFile(path, digest, read_state(source), script)


def read_names(run: Run) -> Names:
    """The names of the run and, if one is given, their table.

    Raises:
        InputError: a file cannot be read, or the table does not fit the names.
    """
    splits = read_released_names(run.names)
    if run.table and not splits:
        raise InputError(f"--table {run.table}: expected --names with a name for each row")
    return Names(splits, read_matrix(run.table, tuple(splits)) if run.table else None)


def make_plan(run: Run, files: Sequence[ReadFile]) -> tuple[str, Plan]:
    """The kind of model that the files are, and what its conversion does.

    Raises:
        InputError: a file is not recognised or broken, or the files do not belong together.
    """
    kinds = [recognise(file.state) for file in files]
    record = asdict(run)
    if "ovsam" in kinds and set(kinds) <= {"ovsam", "sam", "clip"} and kinds.count("clip") < 2:
        return "ovsam", plan_ovsam(files, kinds, read_names(run), record, clip=run.clip, pretrained=run.pretrained)
    if len(files) > 1:
        found = ", ".join(f"{file.path} ({kind})" for file, kind in zip(files, kinds, strict=True))
        raise InputError(f"--weights: {found}, expected one file, or the files of one OV-SAM")
    (file,), (kind,) = files, kinds
    if run.names and kind != "detector":
        raise InputError(f"--names {run.names}: {file.path} is a {kind}, expected a detector or no names")
    if kind == "detector":
        return kind, plan_detector(file, read_names(run), record)
    if kind == "sam":
        return kind, plan_sam(file, record)
    if kind == "clip":
        return kind, plan_clip(file, run.clip)
    accounts = fitting_backbones(file.state, file.path)
    use = f"a training takes the file as it is: --backbone-weights {file.path}"
    return kind, Plan(f"backbone {' or '.join(accounts)}; {use}", {file.path: next(iter(accounts.values()))}, None)


def print_account(path: str, account: TensorAccount) -> None:
    """Print how many tensors of a file are used, and why the others are not."""
    print(f"{path}: {len(account.used)} tensors used, {len(account.ignored)} ignored")
    for reason, count in Counter(account.ignored.values()).items():
        print(f"  {count:5} {reason}")
    for name in account.unaccounted:
        print(f"        {name}: of unknown use")


def convert(run: Run) -> None:
    """Recognise the files, print the account, and write the folder unless it is a dry run.

    Raises:
        InputError: a flag is missing, a file is broken or not recognised, or the folder exists.
    """
    if not run.weights:
        raise InputError("--weights: missing, expected a file; --list shows the released ones")
    if run.out:
        output.check_folder(run.out)
    digests: dict[str, str] = {}
    if storage.base_name(run.weights[0]).endswith(".npy"):
        kind, plan = "texts", plan_texts(run)
    else:
        with working("reading"):
            files = [read_file(path) for path in run.weights]
            kind, plan = make_plan(run, files)
        digests = {Path(file.path).name: file.sha256 for file in files}
    for path, account in plan.accounts.items():
        print_account(path, account)
    print(plan.title)
    if plan.save is None:
        if run.out:
            raise InputError(f"--out {run.out}: {run.weights[0]} is no model by itself, expected no --out")
    elif not run.dry_run:
        if not run.out:
            raise InputError("--out: missing, expected a folder to write, or --dry-run")
        save = plan.save

        def save_with_digests(folder: Path) -> None:
            (folder / SOURCE).write_text(json.dumps(digests, indent=1))
            save(folder)

        output.write_folder(save_with_digests, Path(run.out))
        print(f"{run.out}: written; {TAKEN_BY[kind]}")
        training = ("ovsam", "--config", "photos_laptop", "--sam", run.out, "--teacher", "CLIP", "--data", "PHOTOS")
        print("next:", cli.script_command(*(training if kind == "sam" else ("serve", "--model", run.out))))


def plan_texts(run: Run) -> Plan:
    """A table of embedded names, such as ViLD's: there is nothing to convert.

    Raises:
        InputError: it does not fit the names.
    """
    (path, *others), splits = run.weights, read_released_names(run.names)
    if others or not splits:
        raise InputError(f"--weights {path}: a table of embedded names, expected it alone and --names in its order")
    table = read_matrix(path, tuple(splits))
    count, width = table.embeddings.shape
    return Plan(
        f"{count} embedded names of width {width}; a training takes the file as it is: --texts {path}, the conversion "
        f"of a detector: --table {path}, and the store: python workflows/embed_texts.py --matrix {path} --categories "
        f"{run.names}",
        {},
        None,
    )


def print_list() -> None:
    """Print the released files: where each is from, what its conversion needs, its digest and its published results."""
    for entry in released_files():
        sha256 = f"sha256 {entry.sha256}{'...' if len(entry.sha256) < 64 else ''}" if entry.sha256 else ""
        digest = sha256 or (f"md5 {entry.md5}..." if entry.md5 else "no digest")
        print(f"{entry.file}\n    {entry.kind}, {digest}, {entry.url}")
        for line in filter(None, (entry.needs and f"needs {entry.needs}", entry.results)):
            print(f"    {line}")
    print("\nEach file may lie anywhere: --weights PATH; a backbone: --backbone-weights PATH of a training.")


def main() -> None:
    """Convert one release, or list the released files."""
    run = cli.parse(CONFIGS, __doc__)
    if run.list:
        print_list()
    else:
        convert(run)


if __name__ == "__main__":
    cli.execute(main)

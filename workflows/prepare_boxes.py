r"""Boxes: an annotated set with a base/novel split, for training (base boxes only) and for evaluation (all boxes).

annotations, or the pictogram world --read or draw--> boxes, categories --strip novel boxes--> boxes for training

python workflows/prepare_boxes.py --config pictograms
python workflows/prepare_boxes.py --config coco --data photos/    # photos/instances.json, photos/images/
python workflows/prepare_boxes.py --config coco --data coco128.yaml    # Ultralytics' and Roboflow's folders, too
python workflows/prepare_boxes.py --config coco --name lvis --data lvis_v1_train.json --eval-data lvis_v1_val.json \
    --images coco/                                                # with train2017/ and val2017/; a URI for a cluster
python workflows/prepare_boxes.py --config coco --name coco --data instances_train2017.json \
    --eval-data instances_val2017.json --images coco/ --captions captions_train2017.json    # pairs and groups, too
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage name data split novel eval_data images captions strict")

import atexit
import dataclasses
import functools
import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray

from data_prep import locks, storage, tables
from data_prep.boxes import annotations, folders, layouts
from data_prep.boxes.cleaning import Account
from data_prep.boxes.coco import (
    BoxSet,
    box_set,
    file_digest,
    flat_categories,
    in_ids_of,
    read_annotations,
    read_names,
    strip_novel,
    with_split,
)
from data_prep.boxes.pictures import add_pictures
from data_prep.boxes.splits import frequency_split, named_split
from data_prep.pairs.dedup import CorpusConfig
from data_prep.pairs.filters import FilterConfig
from data_prep.pictograms.world import STYLES, World
from data_prep.progress import watched
from ovd_models.errors import InputError, as_input_error
from workflows import prepare_pairs
from workflows.common import cli, cluster
from workflows.configs import pairs as pairs_configs
from workflows.configs.boxes import CONFIGS, Run, coco, smoke

PRODUCER = "workflows/prepare_boxes.py"
SCENES_PER_TASK = 100
PUBLISHED = ("coco_", "lvis_")
"""How the names of published configs start."""
MIN_IMAGES = 2
"""Images of a concept in folders for other configs."""
ALL_IMAGES = FilterConfig(
    min_side=1, max_aspect=math.inf, min_contrast=0, min_caption=1, max_caption=10_000, min_letters=0
)
"""Annotated images were chosen by people."""

MOST_HELD_OUT = 20
"""Images held out of a folder of any size, unless a number is given."""


def hash_settings(settings: Mapping[str, object], digests: Sequence[str]) -> str:
    """What tables are told apart by: settings and the digests of files."""
    return storage.sha256(" ".join([json.dumps(settings, indent=1), *digests]).encode())[:16]


@locks.exclusive("boxes", "categories")
def prepare(run: Run) -> None:
    """Publish `categories`, `boxes` for training and `boxes` for evaluation.

    Raises:
        InputError: an annotation file is unreadable, the captions are malformed or of other images, or the names hold
            tables of another config.
    """
    if not run.data and (run.eval_data or run.captions or not run.train_images):
        raise InputError("--data: missing, expected a folder with instances.json and images/")
    settings = dataclasses.asdict(dataclasses.replace(run, storage=""))
    # The digests of annotation files count instead of their names.
    for other in ("eval_data", "captions", "min_images", "wordnet", "strict"):
        del settings[other]
    for name, default in (("split", "published"), ("novel", ""), ("style", "first")):
        if settings[name] == default:  # tables from before these settings stay those of the same config
            del settings[name]
    digests = [file_digest(annotation_file(part)) for part in parts_of(run)]
    if run.novel:
        with as_input_error(f"--novel {run.novel}"):
            digests.append(storage.sha256(storage.read_bytes(run.novel)))
    settings |= {name: storage.absolute(settings[name].rstrip("/")) for name in ("data", "images") if settings[name]}
    config_hash = hash_settings(settings, digests)
    done = tables.find_manifest(run.storage, "boxes", f"{run.name}-eval")
    if done is not None:
        uri = tables.table_uri(run.storage, "boxes", f"{run.name}-eval")
        if done.config_hash != config_hash:
            changed = tables.changed_settings(done, settings)
            differs = f" (other {', '.join(changed)})" if changed else ""
            expected = "a new --name (of a training: --boxes) or an empty place"
            raise InputError(f"{uri}: made from another config{differs}, expected {expected}")
        if run.strict and done.details.get("account"):
            raise InputError(f"{uri}: --strict: something was mended or left out, see `account` in its manifest")
        return
    accounts = accounts_of(run)
    train, evaluation = read_folder(run, accounts) if run.data else draw_pictograms(run)
    check_sets(run, accounts, train, evaluation)
    base_only = strip_novel(train.boxes, train.categories)
    found = [row for account in accounts for row in account.to_rows()]
    details = {"settings": settings} | ({"account": found} if found else {})
    publish_rows(run, "categories", run.name, train.categories, config_hash, details)
    publish_rows(run, "boxes", f"{run.name}-train", base_only, config_hash, details)
    publish_rows(run, "boxes", f"{run.name}-eval", evaluation.boxes, config_hash, details)
    if run.data:
        from workflows.reports.boxes import write_boxes_report  # imported here: it draws

        print(f"report: {write_boxes_report(run.storage, run.name)}")
    splits, used = Counter(train.categories["split"].to_pylist()), len(np.unique(flat_categories(base_only)[0]))
    print(
        f"boxes: {train.boxes.num_rows:,} images for training, {used:,} of them with base boxes, and "
        f"{evaluation.boxes.num_rows:,} for evaluation; "
        f"names: {splits['base']} base, {splits['novel']} novel, {splits['']} in neither"
    )


def parts_of(run: Run) -> list[layouts.Part]:
    """The training part of `data` and, if there is one, the set for evaluation: `eval_data`, or that part of `data`."""
    if not run.data:
        return []
    train, *evaluation = layouts.find_parts(run.data, run.images)
    return [train, *(layouts.find_parts(run.eval_data, run.images)[-1:] if run.eval_data else evaluation)]


def accounts_of(run: Run) -> list[Account]:
    """An account for each of `parts_of`."""
    return [Account(part.origin) for part in parts_of(run)]


def check_sets(run: Run, accounts: Sequence[Account], train: BoxSet, evaluation: BoxSet) -> None:
    """Print what is odd about a box set.

    Raises:
        InputError: there is no training box of a base category, or, with `run.strict`, anything is odd.
    """
    if not accounts:
        return
    shared = set(train.boxes["image_id"].to_pylist()) & set(evaluation.boxes["image_id"].to_pylist())
    for row in evaluation.boxes.select(["image_id", "uri"]).to_pylist() if shared else ():
        if row["image_id"] in shared:
            accounts[-1].add("noted", "pictures for evaluation that are also trained on", row["uri"])
    for account in accounts:
        account.print()
        if run.strict:
            account.check_strict()
    if not strip_novel(train.boxes, train.categories)["category_ids"].combine_chunks().flatten():
        raise InputError(f"{accounts[0].origin}: no boxes of base categories for training, expected at least one")


def publish_rows(
    run: Run,
    table: tables.TableName,
    name: str,
    rows: pa.Table,
    config_hash: str,
    details: dict[str, Any] | None = None,
) -> None:
    """Publish a table of one part; details are its settings and the account of what was odd in its files."""
    part = tables.write_part(run.storage, table, name, "part-00000.parquet", rows)
    tables.publish(
        run.storage, table, name, [part], producer=PRODUCER, config_hash=config_hash, details=dict(details or {})
    )


@locks.exclusive("boxes", "categories")
def prepare_full(run: Run) -> None:
    """Publish `boxes/<name>-full`, training images with boxes of base and novel categories, and `boxes/<name>-mixed`.

    The first is for comparisons with supervised training; the second has the same images with base boxes only.

    Raises:
        InputError: the annotation file is unreadable, or the names hold tables of another config.
    """
    prepare(run)
    if tables.find_manifest(run.storage, "boxes", f"{run.name}-mixed") is not None:
        return
    if run.data:
        full = read_folder(run, accounts_of(run))[0].boxes  # what is odd, `prepare` has said
    else:
        full = draw_in_parallel(run, "full", run.train_images, seed=run.seed + 1, base_only=False)
    mixed = strip_novel(full, tables.read_table(run.storage, "categories", run.name))
    config_hash = tables.read_manifest(run.storage, "boxes", f"{run.name}-train").config_hash
    publish_rows(run, "boxes", f"{run.name}-full", full, config_hash)
    publish_rows(run, "boxes", f"{run.name}-mixed", mixed, config_hash)
    print(f"boxes: {full.num_rows:,} images with novel objects, annotated (-full) and not (-mixed)")


@functools.cache
def annotation_file(part: layouts.Part) -> Path:
    """The annotation file of a part: its own, or a converted copy of other formats."""
    if part.convert is None:
        return Path(part.origin)
    folder = tempfile.mkdtemp(prefix="ovd-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    converted = Path(folder, "instances.json")
    converted.write_text(json.dumps(part.convert()))
    return converted


def split_categories(run: Run, categories: list[dict[str, Any]], rows: pa.Table) -> list[dict[str, Any]]:
    """Rows of `categories` with the split that the run asks for; `rows` are those of all training images."""
    if run.novel:
        return named_split(categories, run.novel)
    if run.split == "none":
        return [{**row, "split": "base"} for row in categories]
    return frequency_split(categories, rows) if run.split == "frequency" else categories


def read_folder(run: Run, accounts: Sequence[Account]) -> tuple[BoxSet, BoxSet]:
    """The training and the evaluation set of annotated pictures.

    Without a set for evaluation, some images are held out (`split_rows`). Of such a set, OV-COCO's images are used, see
    `with_split`. What is odd goes into the accounts, those of `parts_of`.
    """
    pairs = list(zip(parts_of(run), accounts, strict=True))
    read = [read_annotations(annotation_file(part), part.pictures, account) for part, account in pairs]
    split = split_categories(run, *read[0])
    rows = [in_ids_of(split, *each, account.origin) for each, account in zip(read, accounts, strict=True)]
    kept, held_out = rows[0], rows[0][:0]
    if len(rows) == 1:
        kept, held_out = (rows[0].take(pa.array(numbers)) for numbers in split_rows(run, kept.num_rows))
    if run.captions:  # before any picture is read
        annotations.read_captions([Path(run.captions)], kept["file_name"].to_pylist())
    *evaluation, whole = [  # the few pictures of the evaluation first, so that a wrong folder is noticed early
        box_set(split, add_pictures(own, part.pictures, account.origin, account))
        for own, (part, account) in reversed(list(zip(rows, pairs, strict=True)))
    ]
    if evaluation:
        return whole, BoxSet(evaluation[0].categories, with_split(evaluation[0].boxes, whole.categories))
    sets = [whole.boxes.filter(pc.is_in(whole.boxes["source_id"], part["source_id"])) for part in (kept, held_out)]
    return BoxSet(whole.categories, sets[0]), BoxSet(whole.categories, sets[1])


def split_rows(run: Run, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of the images of `data` are for training, and which are held out for evaluation: the last by the seed."""
    size = run.eval_images or max(1, min(MOST_HELD_OUT, count // 5))
    if not 0 < size < count:
        flag = f"--held-out {size} (of prepare_boxes.py: --eval-images)"
        raise InputError(f"{flag}: expected 1 to {count - 1} of the {count} images")
    order = np.random.default_rng(run.seed).permutation(count)
    kept, held_out = np.split(order, [count - size])
    return np.sort(kept), np.sort(held_out)


def draw_pictograms(run: Run) -> tuple[BoxSet, BoxSet]:
    """Scenes of the pictogram world: base categories along the long tail, and all of them uniformly."""
    train = draw_in_parallel(run, "train", run.train_images, seed=run.seed + 1, base_only=True)
    evaluation = draw_in_parallel(run, "eval", run.eval_images, seed=run.seed + 2, base_only=False)
    base_set = box_set(annotations.pictogram_categories(World.create(run.seed)), train)
    return base_set, BoxSet(base_set.categories, evaluation)


def draw_in_parallel(run: Run, part: str, count: int, *, seed: int, base_only: bool) -> pa.Table:
    """Scenes 0 to `count` as rows of `boxes`, in the order of their numbers."""
    uri, name, world = storage.absolute(run.storage), f"{run.name}-{part}", World.create(run.seed)
    style = STYLES[run.style]
    storage.remove_temporary(storage.join(uri, "images", name))

    def draw(numbers: range) -> pa.Table:
        rows = list(annotations.draw_scenes(uri, name, world, numbers, seed=seed, base_only=base_only, style=style))
        return pa.Table.from_pylist(rows, schema=tables.SCHEMAS["boxes"])

    if count <= SCENES_PER_TASK:  # faster than starting a process
        return draw(range(count))
    cluster.start_ray()
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(draw)
    parts = [range(count)[start : start + SCENES_PER_TASK] for start in range(0, count, SCENES_PER_TASK)]
    drawn = (ray.get(part) for part in [task.remote(numbers) for numbers in parts])
    return pa.concat_tables(watched(drawn, f"boxes/{name}", "hundreds of scenes", len(parts)))


def check_captions(run: Run, name: str, config: str) -> None:
    """Check that a published config does not have to make captions up.

    Raises:
        InputError: neither the folder nor the storage has captions.
    """
    given = caption_files(run) or tables.find_manifest(run.storage, "pairs", name)
    if config.startswith(PUBLISHED) and not given:
        raise InputError(
            f"--data {run.data}: no captions, expected captions.tsv or COCO's captions_*.json in it, or --pairs with "
            "the name of published tables"
        )


def caption_files(run: Run) -> list[Path]:
    """The captions of a run: those that it names, or those in its folder, if any."""
    return [Path(run.captions)] if run.captions else annotations.find_captions(run.data)


def prepare_captions(run: Run, name: str, config: str = "") -> None:
    """Publish the training images of an annotated set as pairs and concept groups; publishes its boxes first.

    Concepts are the nouns of `caption_files`, of all captions of an image; with `run.captions` and for published
    configs those with at least `run.min_images` images. Without such files the published configs use tables that are
    there already, and others make captions of the names of each image's base boxes, which are then the concepts.

    Raises:
        InputError: the captions are malformed or missing, or the name holds tables of another config.
    """
    check_captions(run, name, config)
    files, published = caption_files(run), config.startswith(PUBLISHED)
    if published and not files:
        return
    prepare(run)
    # Without novel boxes: a novel name in a caption would be the label of a box that no training may see.
    boxes = tables.read_table(run.storage, "boxes", f"{run.name}-train")
    uris, names = boxes["uri"].to_pylist(), tuple[str, ...]()
    if files:
        name_of = read_names(annotation_file(parts_of(run)[0]))
        captions = annotations.read_captions(files, [name_of[key] for key in boxes["source_id"].to_pylist()])
    else:
        print(
            f"captions: none in {run.data}; made of the names of each image's base boxes, so no novel name is learned"
        )
        categories = tables.read_table(run.storage, "categories", run.name)
        captions = annotations.category_captions(boxes, categories)
        names = tuple(row["name"] for row in categories.to_pylist() if row["split"] == "base")
    crawl = pairs_configs.Run(
        storage=run.storage,
        name=name,
        names=names,
        wordnet=run.wordnet,
        filters=ALL_IMAGES,
        corpus=CorpusConfig(near_bits=None),
        rows_per_shard=500,
        min_images=run.min_images if published or run.captions else MIN_IMAGES,
    )
    found = prepare_pairs.prepare_local(crawl, pa.table({"url": uris, "caption": captions}))
    print(f"pairs: {found.kept:,} of {found.input:,} images with captions kept, {found.concepts:,} concepts")


def check_concepts(run: Run) -> None:
    """Check that the captions of a run have given groups to train on.

    Raises:
        InputError: no concept has enough images.
    """
    if not tables.read_table(run.storage, "concepts", run.name, ["concept_id"]).num_rows:
        few = f"no name is in the captions of {run.min_images} images"
        raise InputError(f"--captions {run.captions}: {few}, expected more captions or a lower --min-images")


def prepare_images(storage_uri: str, name: str, folder: str) -> None:
    """Publish the images of a folder or URI, without boxes, as `boxes/<name>`.

    Raises:
        InputError: there are no images, or the name holds the table of another folder.
    """
    paths = folders.list_images(folder)
    config_hash = storage.sha256("\n".join([storage.absolute(folder), *paths]).encode())[:16]
    done = tables.find_manifest(storage_uri, "boxes", name)
    if done is not None:
        if done.config_hash != config_hash:
            uri = tables.table_uri(storage_uri, "boxes", name)
            raise InputError(f"{uri}: made of other images than those of {folder}, expected another --storage")
        return
    rows, skipped = folders.read_images(folder, paths)
    publish_rows(Run(name=name, storage=storage_uri), "boxes", name, rows, config_hash)
    print(f"boxes/{name}: {rows.num_rows:,} images without boxes" + (f"; left out: {skipped}" if skipped else ""))


def prepare_for_training(storage_uri: str, config: str, boxes: str, data: str, held_out: int) -> None:
    """Publish the tables of a training's `data` folder under the name `boxes`, or those of its `smoke` config.

    Other configs train on tables published before.
    """
    if data:
        split: Literal["none", "published"] = "none" if config == "finetune" else "published"
        prepare(
            dataclasses.replace(coco(), storage=storage_uri, name=boxes, data=data, split=split, eval_images=held_out)
        )
    elif config == "smoke":
        prepare(dataclasses.replace(smoke(), storage=storage_uri))


def next_command(run: Run) -> str:
    """The training of a detector on these boxes, with pairs and a CLIP that may have to be made first."""
    config = "photos_laptop" if run.data else "smoke" if run.name == "smoke" else "pictograms"
    pairs = "PAIRS" if run.data and not run.captions else run.name
    inputs = ("--boxes", run.name, "--pairs", pairs, "--teacher", "CLIP")
    return cli.script_command("codet", "--config", config, *inputs, "--storage", run.storage)


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    prepare(run)
    if run.captions:
        prepare_captions(run, run.name)
        check_concepts(run)
    print("next:", next_command(run))


if __name__ == "__main__":
    cli.execute(main)

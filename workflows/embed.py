"""Embed: a CLIP teacher's embeddings of regions and of image-text pairs, computed once and kept.

boxes --given boxes, or a detector's proposals--> crops at 1x and 1.5x -> regions
pairs --> images and captions ------------------------------------------> embeddings

python workflows/embed.py --config smoke
python workflows/embed.py --config pictograms --teacher store/runs/clip/RUN/model
python workflows/embed.py --config photos --teacher ViT-B-32 --pretrained openai
python workflows/embed.py --config lvis --teacher CLIP --detector DETECTOR --storage s3://bucket/ovd --embed.gpus 1
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage name teacher pretrained boxes detector pairs fit")

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from data_prep import locks, storage, tables
from data_prep.embeddings import stores, teachers
from data_prep.embeddings.crops import FITS, CropConfig, Fit
from data_prep.embeddings.stores import ArrayTable, EmbeddingJob, SavedShard
from data_prep.embeddings.teachers import (
    GPU_SHARDS,
    EmbedConfig,
    ImageTable,
    PairStage,
    RegionStage,
    Shard,
    ShardWorker,
)
from data_prep.parts import Pool, run_parts
from data_prep.progress import Progress
from data_prep.tables import Manifest
from ovd_models.checkpoint_info import read_info
from ovd_models.errors import InputError
from workflows.common import cli, cluster
from workflows.configs import boxes as boxes_configs

PRODUCER = "workflows/embed.py"
CORES_PER_ACTOR = 8
"""Without a GPU: few processes, since each holds torch and the teacher's working memory."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The teacher, and the tables that it embeds."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    teacher: str
    """Folder or URI of a CLIP checkpoint, or with `pretrained` an open_clip architecture such as `ViT-B-32`."""
    pretrained: str = ""
    """Released weights of that architecture: a tag (`openai`), or the path or URI of a file; stored in
    `<storage>/teachers`."""
    name: str
    """Name of the tables `regions` and `embeddings`."""
    boxes: str = ""
    """Name of the `boxes` table whose images get region embeddings; none if empty."""
    detector: str = ""
    """Checkpoint of a detector that proposes boxes; if empty, the table's boxes are used."""
    max_proposals: int = 300
    """Number of proposals of an image (M), best first."""
    crops: CropConfig = field(default_factory=CropConfig)
    pairs: str = ""
    """Name of the `pairs` table whose images and captions are embedded; none if empty."""
    fit: Fit | None = None
    """How the image of a pair becomes a square; None: as in the teacher's training."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.boxes and not self.pairs:
            raise InputError("--boxes, --pairs: both empty, expected the name of a table")
        if self.max_proposals < 1:
            raise InputError(f"--max-proposals {self.max_proposals}: expected 1 or more")


def smoke() -> Run:
    """Seconds; makes its own boxes, pairs and untrained teacher."""
    return Run(teacher="", name="smoke", boxes="smoke-train", pairs="smoke")


def pictograms() -> Run:
    """The pictogram world; give it `--teacher`."""
    return Run(teacher="", name="pictograms", boxes="pictograms-train", pairs="pictograms")


def photos() -> Run:
    """The photographs of `prepare_boxes.py --config coco`; give it `--teacher`."""
    return Run(teacher="", name="photos", boxes="photos-train")


def lvis() -> Run:
    """ViLD's: up to 300 proposals of a detector trained on base categories only; give it both checkpoints."""
    return Run(teacher="", name="lvis", boxes="lvis-train", embed=EmbedConfig(batch_size=256, threads=4))


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "photos": photos, "lvis": lvis}


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher's description, read without its weights."""

    id: str
    side: int
    """Side of its square input in pixels."""
    fit: Fit
    """How images became squares in its training."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingTask:
    """One table to make."""

    table: ArrayTable
    source: tuple[ImageTable, str]
    """Table and name of the images."""
    provenance: dict[str, Any]
    """What the embeddings depend on, which readers check."""
    columns: tuple[str, ...]
    """Columns to read from the source."""
    load: Callable[[pa.Table], pa.Table]
    """Maps rows of the source to rows with pixels."""
    stage: type[RegionStage] | type[PairStage]
    arguments: tuple[Any, ...]
    """Arguments of the stage."""


@locks.exclusive("regions", "embeddings")
def embed(run: Run) -> list[Manifest]:
    """Publish `regions/<name>` if the run has boxes, and `embeddings/<name>` if it has pairs.

    Raises:
        InputError: a table or checkpoint is missing, no image can be read, or the name is that of a table with another
            provenance.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint; `python workflows/clip.py` makes one")
    run = dataclasses.replace(run, storage=storage.absolute(run.storage))
    if run.pretrained:
        checkpoint = teachers.store_released(run.storage, run.teacher, run.pretrained)
    else:
        checkpoint = storage.absolute(run.teacher)
    run = dataclasses.replace(run, teacher=checkpoint)
    teacher = read_teacher_info(run.teacher)
    tasks = []
    if run.boxes:
        tasks.append(region_task(run, teacher))
    if run.pairs:
        tasks.append(pair_task(run, teacher))
    checked = [(task, check_task(run, task)) for task in tasks]  # all of them before the hours of the first
    return [make_table(run, task, provenance) for task, provenance in checked]


def read_teacher_info(checkpoint: str) -> TeacherInfo:
    """Read the description of a CLIP checkpoint; only actors load its weights.

    Raises:
        InputError: there is no checkpoint, or its description is broken.
    """
    path = storage.join(checkpoint, "clip.json")
    if not storage.exists(path):
        raise InputError(
            f"{checkpoint}: no CLIP checkpoint (clip.json); `python workflows/clip.py` makes one, and --pretrained "
            "uses released weights of an architecture"
        )
    try:
        info = json.loads(storage.read_bytes(path))
        config = info["config"]
        fit = FITS[config.get("resize_mode", "squash")]
        return TeacherInfo(id=str(info["teacher"]), side=int(config["vision"]["image_size"]), fit=fit)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the description of a CLIP checkpoint ({error!r})") from error


def region_task(run: Run, teacher: TeacherInfo) -> EmbeddingTask:
    """The crops of boxes."""
    proposals, detector = "given", ""
    if run.detector:
        detector = storage.absolute(run.detector)
        folder = storage.local_folder(detector)
        method = read_info(folder).method
        proposals = f"{method}:{storage.file_sha256(folder / 'model.safetensors')[:16]}, {run.max_proposals}"
    return EmbeddingTask(
        table="regions",
        source=("boxes", run.boxes),
        provenance={"teacher": teacher.id, "crops": dataclasses.asdict(run.crops), "proposals": proposals},
        columns=("image_id", "uri", "boxes"),
        load=partial(teachers.load_pictures, root=run.storage),
        stage=RegionStage,
        arguments=(run.teacher, run.embed, run.crops, detector, run.max_proposals),
    )


def pair_task(run: Run, teacher: TeacherInfo) -> EmbeddingTask:
    """Whole images and their captions."""
    root, fit = tables.table_uri(run.storage, "pairs", run.pairs), run.fit or teacher.fit
    return EmbeddingTask(
        table="embeddings",
        source=("pairs", run.pairs),
        provenance={"teacher": teacher.id, "fit": fit},
        columns=("image_id", "caption", "shard", "offset", "size"),
        load=partial(teachers.load_squares, root=root, side=teacher.side, fit=fit),
        stage=PairStage,
        arguments=(run.teacher, run.embed),
    )


def check_task(run: Run, task: EmbeddingTask) -> dict[str, Any]:
    """The provenance of a table, with that of its source.

    Raises:
        InputError: the source is missing or empty, or the name has embeddings with other settings.
    """
    table, name = task.source
    manifest = tables.read_manifest(run.storage, table, name)
    if not manifest.rows:
        raise InputError(f"{table}/{name}: no images, expected at least one")
    provenance = {**task.provenance, "source": f"{table}/{name}", "source_digest": manifest.digest}
    published = tables.find_manifest(run.storage, task.table, run.name)
    if published is not None:
        stores.check_provenance(published, tables.table_uri(run.storage, task.table, run.name), provenance)
    return provenance


def make_table(run: Run, task: EmbeddingTask, provenance: dict[str, Any]) -> Manifest:
    """Embed the shards of a table that are missing and publish it, unless it is published."""
    table, name = task.source
    published = tables.find_manifest(run.storage, task.table, run.name)
    if published is not None:
        uri = tables.table_uri(run.storage, task.table, run.name)
        print(f"{task.table}: {uri} is there already, from the same config")
        return published
    config_hash = storage.sha256(repr((task.provenance, task.source, provenance["source_digest"])).encode())[:16]
    numbers = f"{run.embed.images_per_shard} {run.embed.batch_size}{' bfloat16' if run.embed.half else ''}"
    layout = storage.sha256(f"{config_hash} {numbers}".encode())[:8]
    staging = storage.join(run.storage, "staging", task.table, run.name, layout)
    job = EmbeddingJob(storage=run.storage, table=task.table, name=run.name, staging=staging)
    shards = teachers.cut_shards(run.storage, table, name, run.embed.images_per_shard, prefix=f"{layout}-")
    run_shards(run.embed, task, job, shards)
    saved = stores.saved_shards(staging)
    report_unreadable(f"{table}/{name}", list(saved.values()))
    return stores.publish_embeddings(
        job,
        [saved[shard.name] for shard in shards],
        producer=PRODUCER,
        config_hash=config_hash,
        provenance={**provenance, "checkpoint": storage.relative(run.teacher, run.storage)},
    )


def report_unreadable(source: str, saved: Sequence[SavedShard]) -> None:
    """Print how many images cannot be read, which have no embeddings.

    Raises:
        InputError: none can be read.
    """
    reasons = [reason for shard in saved for reason in shard.unreadable]
    if not reasons:
        return
    images = sum(shard.images for shard in saved)
    message = f"{source}: {len(reasons):,} of {images:,} images cannot be read, such as {reasons[0]}"
    if len(reasons) == images:
        raise InputError(message)
    print(message, flush=True)


def run_shards(config: EmbedConfig, task: EmbeddingTask, job: EmbeddingJob, shards: list[Shard]) -> None:
    """Embed and save the shards that are not yet on disk."""
    done = stores.saved_shards(job.staging)
    missing = [shard for shard in shards if shard.name not in done]
    if done:
        print(f"{job.table}: {len(done):,} of {len(shards):,} shards done by an earlier run", flush=True)
    if not missing:
        return
    pool = embedder_pool(config)
    stage = partial(task.stage, *task.arguments)
    read = partial(teachers.read_shard, columns=task.columns, load=task.load)
    make_worker = partial(ShardWorker, read, stage, job, shares_cores=pool.workers > 0)
    progress, rows = Progress(job.table, "images", sum(shard.stop - shard.start for shard in missing)), 0
    for _, saved in run_parts(make_worker, missing, pool):
        rows += saved.rows
        progress.add(saved.images, f"{rows:,} rows")
    progress.close(f"{rows:,} rows")


def embedder_pool(config: EmbedConfig) -> Pool:
    """The processes that hold the teacher; if there are any, starts Ray.

    On a GPU, shards are read, cut and saved during the passes of others; on CPUs, each core has a shard of its own.
    """
    if config.actors == 0:
        return Pool(workers=0)
    cluster.start_ray()
    actors = count_actors(config)
    calls = config.threads + GPU_SHARDS if config.gpus else max(1, cluster.cores() // actors)
    # A pool that grows starts more actors wherever they fit, so on CPUs each takes its share of them.
    cpus = 0.5 if config.gpus else max(0.5, cluster.resources().get("CPU", 1) / actors - 0.5)
    return Pool(workers=actors, grows=config.actors is None, parts_at_a_time=calls, cpus=cpus, gpus=config.gpus)


def count_actors(config: EmbedConfig) -> int:
    """The number of processes that hold the teacher.

    Raises:
        InputError: it depends on the GPUs, and there are too few.
    """
    if config.actors is not None:
        return config.actors
    if not config.gpus:
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        return max(1, int(sum(math.ceil(cpus / CORES_PER_ACTOR) for cpus in machines)))
    gpus = float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if gpus < config.gpus:
        raise InputError(f"--embed.gpus {config.gpus:g}: found {gpus:g}, expected more or --embed.actors")
    return int(gpus / config.gpus)


def make_smoke_tables(run: Run) -> Run:
    """Make the tables and the untrained teacher of a smoke run if missing; returns the run with the teacher."""
    from workflows import prepare_boxes, prepare_pairs  # here, so that the driver stays small
    from workflows.common.teacher import untrained_teacher

    prepare_boxes.prepare(dataclasses.replace(boxes_configs.smoke(), storage=run.storage))
    prepare_pairs.prepare_smoke(run.storage)
    return dataclasses.replace(run, teacher=untrained_teacher(run.storage))


def next_command(run: Run) -> str:
    """A search for a text among the regions, or else among the captions."""
    over = () if run.boxes else ("--over", "captions")
    return cli.script_command("search", "--name", run.name, "--storage", run.storage, *over, "--text", "red umbrella")


def main() -> None:
    """Run the script."""
    run = cli.parse(CONFIGS, __doc__)
    if run.name == "smoke" and not run.teacher:
        run = make_smoke_tables(run)
    for manifest in embed(run):
        details = manifest.details
        print(
            f"{manifest.table}/{manifest.name}: {details['rows']:,} rows of width {details['width']} "
            f"for {details['images']:,} images, teacher {details['teacher']}"
        )
    print("next:", next_command(run))


if __name__ == "__main__":
    cli.execute(main)

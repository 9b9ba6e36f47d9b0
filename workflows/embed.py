"""Embed: what a CLIP teacher sees in regions, and in image-text pairs, computed once and kept.

boxes --given boxes, or a detector's proposals--> crops at 1x and 1.5x -> regions
pairs --> images and captions ------------------------------------------> embeddings

python workflows/embed.py --config smoke
python workflows/embed.py --config pictograms --teacher store/runs/clip/RUN/model
python workflows/embed.py --config photos --teacher ViT-B-32 --pretrained openai
python workflows/embed.py --config lvis --teacher CLIP --detector DETECTOR --storage s3://bucket/ovd --embed.gpus 1
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError

from data_prep import storage, tables
from data_prep.embeddings import stores as embeddings
from data_prep.embeddings import teachers
from data_prep.embeddings.crops import Colour, CropConfig, Fit
from data_prep.embeddings.stores import EmbeddingJob, save_shard
from data_prep.embeddings.teachers import EmbedConfig, PairStage, RegionStage, Shards, ShardWorker
from data_prep.pace import ExecutorPause
from data_prep.tables import Manifest
from ovd_models.errors import InputError
from workflows.common import cli, cluster

PRODUCER = "workflows/embed.py"
PROGRESS_SECONDS = 5.0
CORES_OF_AN_ACTOR = 8
"""Without a GPU: few processes, since each holds the teacher's working memory, and torch."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Which tables one teacher looks at."""

    storage: str = "store"
    """Folder or URI that holds all tables."""
    teacher: str
    """Folder or URI of a CLIP checkpoint, or with `pretrained` an architecture of open_clip, such as `ViT-B-32`."""
    pretrained: str = ""
    """Released weights of that architecture: a tag (`openai`), or a file; kept in `<storage>/teachers`."""
    name: str
    """Name of the tables `regions` and `embeddings`."""
    boxes: str = ""
    """Name of the `boxes` table whose images get region embeddings; none if empty."""
    detector: str = ""
    """Checkpoint of a detector that proposes the boxes; those of the table are taken if empty."""
    max_proposals: int = 300
    """The best of an image (M)."""
    crops: CropConfig = field(default_factory=CropConfig)
    pairs: str = ""
    """Name of the `pairs` table whose images and captions are embedded; none if empty."""
    fit: Fit = "centre"
    """How the image of a pair becomes the teacher's square: as in its training."""
    embed: EmbedConfig = field(default_factory=EmbedConfig)

    def __post_init__(self) -> None:
        """Check that there is something to do."""
        if not self.boxes and not self.pairs:
            raise InputError("--boxes, --pairs: both empty, expected the name of a table")
        if self.max_proposals < 1:
            raise InputError(f"--max-proposals {self.max_proposals}: expected 1 or more")


def smoke() -> Run:
    """Seconds; builds its own boxes, pairs and teacher, which has not learnt anything."""
    return Run(teacher="", name="smoke", boxes="smoke-train", pairs="smoke", fit="warp")


def pictograms() -> Run:
    """The pictogram world; give it `--teacher`."""
    return Run(teacher="", name="pictograms", boxes="pictograms-train", pairs="pictograms", fit="warp")


def photos() -> Run:
    """The photographs of `prepare_boxes.py --config coco`; give it `--teacher`."""
    return Run(teacher="", name="photos", boxes="photos-train")


def lvis() -> Run:
    """ViLD's: up to 300 proposals of a detector that has seen base categories alone; give it both checkpoints."""
    return Run(teacher="", name="lvis", boxes="lvis-train", embed=EmbedConfig(batch_size=256, threads=4))


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "photos": photos, "lvis": lvis}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One table to be made."""

    table: str
    source: tuple[str, str]
    """Table and name of the images."""
    made_of: dict[str, Any]
    """What readers check, and what the table was made from."""
    columns: tuple[str, ...]
    """Of the source."""
    load: Callable[[pa.Table], pa.Table]
    """Rows of the source -> rows with pixels."""
    stage: type[RegionStage] | type[PairStage]
    arguments: tuple[Any, ...]
    """Of the stage."""


def embed(run: Run) -> list[Manifest]:
    """Publish `regions/<name>` and `embeddings/<name>`, as far as the run asks for them.

    Raises:
        InputError: a table or checkpoint is missing, an image cannot be read, or the name holds a table that was
            made of something else.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint; `python workflows/clip.py` makes one")
    run = dataclasses.replace(run, storage=storage.absolute(run.storage))
    run = dataclasses.replace(run, teacher=bring_in(run) if run.pretrained else storage.absolute(run.teacher))
    teacher, side, margin = look_at_teacher(run.teacher)
    tasks = []
    if run.boxes:
        tasks.append(region_task(run, teacher))
    if run.pairs:
        tasks.append(pair_task(run, teacher, side, margin))
    return [publish(run, task) for task in tasks]


def bring_in(run: Run) -> str:
    """Released weights as a checkpoint of ours in the storage; returns where it is.

    Raises:
        InputError: there is no such architecture, or there are no such weights.
    """
    file = Path(run.pretrained)
    tag = f"{file.stem}-{storage.sha256(file.read_bytes())[:8]}" if file.is_file() else run.pretrained
    checkpoint = storage.join(run.storage, "teachers", f"{run.teacher}-{tag}")
    if not storage.exists(storage.join(checkpoint, "clip.json")):
        from ovd_models.clip.model import ClipConfig, open_clip_model  # here, so that the driver stays small

        teachers.store_checkpoint(open_clip_model(ClipConfig(name=run.teacher), run.pretrained), checkpoint)
    return checkpoint


def look_at_teacher(checkpoint: str) -> tuple[str, int, Colour]:
    """A teacher's id, the side of its input and the colour that it sees as nothing; its weights are left to actors.

    Raises:
        InputError: there is no checkpoint, or its description is broken.
    """
    path = storage.join(checkpoint, "clip.json")
    if not storage.exists(path):
        raise InputError(
            f"{checkpoint}: no CLIP checkpoint (clip.json); `python workflows/clip.py` makes one, and --pretrained "
            "takes released weights of an architecture"
        )
    try:
        told = json.loads(storage.read_bytes(path))
        config = told["config"]
        return str(told["teacher"]), int(config["vision"]["image_size"]), teachers.margin_of(config["mean"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the description of a CLIP checkpoint ({error!r})") from error


def region_task(run: Run, teacher: str) -> Task:
    """The crops of boxes."""
    proposals = "given"
    if run.detector:
        run = dataclasses.replace(run, detector=storage.absolute(run.detector))
        from ovd_models.checkpoints import read_info  # here, so that the driver stays small

        folder = storage.local_folder(run.detector)
        method = read_info(folder).method
        proposals = f"{method}:{storage.sha256((folder / 'model.safetensors').read_bytes())[:16]}, {run.max_proposals}"
    return Task(
        table="regions",
        source=("boxes", run.boxes),
        made_of={"teacher": teacher, "crops": dataclasses.asdict(run.crops), "proposals": proposals},
        columns=("image_id", "uri", "boxes"),
        load=partial(teachers.load_pictures, root=run.storage),
        stage=RegionStage,
        arguments=(run.teacher, run.embed, run.crops, run.detector, run.max_proposals),
    )


def pair_task(run: Run, teacher: str, side: int, margin: Colour) -> Task:
    """Whole images and their captions."""
    load = partial(
        teachers.load_squares,
        root=tables.table_uri(run.storage, "pairs", run.pairs),
        side=side,
        fit=run.fit,
        margin=margin,
    )
    return Task(
        table="embeddings",
        source=("pairs", run.pairs),
        made_of={"teacher": teacher, "fit": run.fit},
        columns=("image_id", "caption", "shard", "offset", "size"),
        load=load,
        stage=PairStage,
        arguments=(run.teacher, run.embed),
    )


def publish(run: Run, task: Task) -> Manifest:
    """Embed what is not yet done of a table and publish it, or find it published.

    Raises:
        InputError: as `embed`.
    """
    table, name = task.source
    digest = tables.read_manifest(run.storage, table, name).digest
    made_of = {**task.made_of, "source": f"{table}/{name}", "source_digest": digest, "checkpoint": run.teacher}
    config_hash = storage.sha256(repr((task.made_of, task.source, digest)).encode())[:16]
    uri = tables.table_uri(run.storage, task.table, run.name)
    published = tables.find_manifest(run.storage, task.table, run.name)
    if published is not None:
        embeddings.check_made_of(
            published, uri, {key: made_of[key] for key in (*task.made_of, "source", "source_digest")}
        )
        print(f"{task.table}: {uri} is there already, from the same config")
        return published
    layout = storage.sha256(f"{config_hash} {run.embed.images_per_shard} {run.embed.batch_size}".encode())[:8]
    staging = storage.join(run.storage, "staging", task.table, run.name, layout)
    job = EmbeddingJob(storage=run.storage, table=task.table, name=run.name, staging=staging)
    shards = teachers.cut_shards(run.storage, table, name, run.embed.images_per_shard, prefix=f"{layout}-")
    run_shards(run, task, job, shards)
    saved = embeddings.saved_shards(staging)
    return embeddings.publish(
        job, [saved[shard.name] for shard in shards], producer=PRODUCER, config_hash=config_hash, made_of=made_of
    )


def run_shards(run: Run, task: Task, job: EmbeddingJob, shards: list[teachers.Shard]) -> None:
    """Embed and save the shards that are not yet on disk."""
    done = embeddings.saved_shards(job.staging)
    missing = [shard for shard in shards if shard.name not in done]
    if done:
        print(f"{job.table}: {len(done):,} of {len(shards):,} shards done by an earlier run", flush=True)
    if not missing:
        return
    config = run.embed
    if config.actors == 0:
        stage = task.stage(*task.arguments)
        read = (rows for shard in missing for rows in teachers.read_shard(task.columns, task.load, shard))
        show_progress(job.table, (save_shard(stage(rows), job) for rows in read), len(missing))
        return
    cluster.start_ray()
    actors = count_actors(config)
    cores = cluster.cores()
    # Two shards at a time on a GPU: one is cut or written beside the passes of another. Without one, one for each core,
    # and half as many processes decode, which is far less work.
    calls, decoders = (2, cores) if config.gpus else (max(1, cores // actors), max(1, cores // 2))
    rows = ray.data.read_datasource(
        Shards(missing, task.columns, task.load),
        override_num_blocks=len(missing),
        compute=ray.data.TaskPoolStrategy(size=decoders),
        num_cpus=0.5,
    ).map_batches(
        ShardWorker,
        fn_constructor_args=(task.stage, task.arguments, job),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(
            size=min(actors, len(missing)), max_concurrent_calls_per_actor=calls, enable_true_multi_threading=True
        ),
        num_gpus=config.gpus,
        num_cpus=0.5 if config.gpus else 0.5 * calls,
    )
    rows.context.target_max_block_size = None  # a shard stays whole
    limits = ray.data.ExecutionResources.for_limits(object_store_memory=config.waiting_bytes * actors)
    rows.context.execution_options.resource_limits = limits
    rows.context.custom_execution_callback_classes = [ExecutorPause]
    try:
        saved = rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        show_progress(job.table, saved, len(missing))
    except RayTaskError as error:
        if isinstance(error.cause, InputError):  # of a task; Ray adds lines of its own
            raise InputError(str(error.cause).splitlines()[0]) from None
        raise


def count_actors(config: EmbedConfig) -> int:
    """Processes that hold the teacher.

    Raises:
        InputError: they are to be as many as the GPUs allow, and there is none.
    """
    if config.actors is not None:
        return config.actors
    if not config.gpus:
        machines = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        return max(1, int(sum(math.ceil(cpus / CORES_OF_AN_ACTOR) for cpus in machines)))
    gpus = float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    if gpus < config.gpus:
        raise InputError(f"--embed.gpus {config.gpus:g}: found {gpus:g}, expected more or --embed.actors")
    return int(gpus / config.gpus)


def show_progress(table: str, saved: Iterable[pa.Table], total: int) -> None:
    """Run the work, with a line every few seconds."""
    started = shown = time.monotonic()
    shards, images, count = 0, 0, 0
    for batch in saved:
        shards, images = shards + batch.num_rows, images + sum(batch["images"].to_pylist())
        count += sum(batch["rows"].to_pylist())
        now = time.monotonic()
        if now - shown >= PROGRESS_SECONDS or shards == total:
            shown, rate = now, images / (now - started)
            print(
                f"{table}: {shards:,} of {total:,} shards, {images:,} images, {count:,} rows, {rate:,.1f} images/s",
                flush=True,
            )


def make_smoke_tables(run: Run) -> Run:
    """The run with tables of its own and a teacher that has not learnt anything, made where they are missing."""
    from workflows import prepare_boxes, prepare_pairs  # here, so that the driver stays small
    from workflows.common.teacher import untrained_teacher

    prepare_boxes.prepare(dataclasses.replace(prepare_boxes.smoke(), storage=run.storage))
    if tables.find_manifest(run.storage, "pairs", run.pairs) is None:
        prepare_pairs.prepare_smoke(run.storage)
    return dataclasses.replace(run, teacher=untrained_teacher(run.storage))


def main() -> None:
    """The script."""
    run = cli.parse(CONFIGS, __doc__)
    if run.name == "smoke" and not run.teacher:
        run = make_smoke_tables(run)
    for manifest in embed(run):
        details = manifest.details
        print(
            f"{manifest.table}/{manifest.name}: {details['rows']:,} rows of width {details['width']} "
            f"for {details['images']:,} images, teacher {details['teacher']}"
        )
    print(f"next: python workflows/search.py --storage {run.storage} --name {run.name} --text 'red umbrella'")


if __name__ == "__main__":
    cli.execute(main)

"""CoDet: learn to detect from boxes of some categories and from captions that share a concept.

boxes (base categories) --> DetectionBatch --+
                                             +-> train -> AP50 of base and novel names -> runs/codet/<run>/model
groups (captioned images) -> ConceptBatch ---+
                             teacher (clip.py) embeds names and captions

First `boxes`: box supervision alone. Then `joint`, continued from it: every step takes both kinds of batch.

python workflows/codet.py --config smoke
python workflows/codet.py --config pictograms --teacher runs/runs/clip/<run>/model
python workflows/codet.py --config photos --data photos/ --texts names.npy
ray job submit --working-dir . -- python workflows/codet.py --config smoke --storage s3://bucket/ovd
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ray.data
import ray.train
import torch
from torch import Tensor

from data_prep import storage, tables
from data_prep.augmentation import Augmentation
from data_prep.batching import StreamShape, group_loader, stream
from data_prep.box_stream import detection_loader
from data_prep.collate import DetectionCollate, GroupCollate
from ovd_models.checkpoints import load_encoder, save_detector
from ovd_models.clip import Clip, ClipConfig, save_clip
from ovd_models.codet import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.rcnn import RCNN, find_backbone_weights, load_backbone
from ovd_models.vocabulary import TextEncoder
from workflows import cli, cluster, evaluate, prepare_boxes, prepare_pairs, tracking, training
from workflows.teacher import Names, open_encoder, read_names
from workflows.tracking import MetricLogger, TrackedRun
from workflows.training import Meter, Optimisation, Session


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of CoDet."""

    storage: str = "runs"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config, for tracking."""
    boxes: str
    """Name of the box set: tables `boxes/<name>-train`, `boxes/<name>-eval`, `categories/<name>`."""
    pairs: str
    """Name of the tables `pairs`, `concepts` and `groups`."""
    teacher: str = ""
    """Folder or URI of a CLIP checkpoint that embeds names and captions."""
    texts: str = ""
    """Instead of a teacher: a .npy file with an embedding for each category of the data, in category-id order."""
    data: str = ""
    """A folder with `instances.json` and `images/` (and `captions.tsv`, if there are captions), read first."""
    backbone_weights: str = "auto"
    """`auto` (torchvision's, when they are on this machine), `none`, or a file with a state dict."""
    model: CoDetConfig = field(default_factory=CoDetConfig)
    detection_batch: int = 8
    """Images with boxes in a step, over all workers."""
    groups_per_step: int = 4
    """Caption groups in a step, over all workers."""
    group_size: int = 4
    """Images of a group."""
    min_group_side: int = 0
    """Captioned images with a shorter side below this take no part, in pixels."""
    flip_probability: float = 0.0
    """How often an image with boxes is mirrored."""
    box_stage: Optimisation
    joint_stage: Optimisation
    resume: str = ""
    """Continue this run instead of starting a new one."""

    def __post_init__(self) -> None:
        """Check that batches can be shared among the workers."""
        for stage in (self.box_stage, self.joint_stage):
            training.check_shared("detection_batch", self.detection_batch, stage.workers)
            training.check_shared("groups_per_step", self.groups_per_step, stage.workers)
        if self.group_size < 2:
            raise InputError(f"group_size: {self.group_size}, expected at least 2")


def smoke() -> Run:
    """Seconds; builds its own tables and an untrained teacher."""
    quick = Optimisation(steps=5, learning_rate=1e-3, checkpoint_every=5, log_every=5, workers=0)
    return Run(
        config="smoke",
        boxes="smoke",
        pairs="smoke",
        detection_batch=2,
        groups_per_step=2,
        group_size=2,
        min_group_side=100,
        box_stage=quick,
        joint_stage=quick,
    )


def pictograms() -> Run:
    """The pictogram world: 128 px scenes, a detector of 1.7 M parameters, minutes on two cores."""
    return Run(
        config="pictograms",
        boxes="pictograms",
        pairs="pictograms",
        min_group_side=100,
        groups_per_step=2,
        # RoIAlign's backward runs on one core: two processes of one thread are faster than one of two.
        box_stage=Optimisation(steps=300, learning_rate=2e-3, workers=2),
        joint_stage=Optimisation(steps=500, learning_rate=2e-3, workers=2),
    )


def photos() -> Run:
    """Photographs in COCO's form, a ResNet-50 with its batch norm frozen, short enough for a laptop."""
    detector = dataclasses.replace(
        CoDetConfig().detector,
        backbone="resnet50",
        backbone_options={},
        strides=(4, 8, 16, 32),
        anchor_sizes=(32, 64, 128, 256),
        pyramid_channels=128,
        head_width=512,
        embed_dim=512,
        min_size=256,
        max_size=416,
        pre_nms=1000,
        post_nms=300,
    )
    return Run(
        config="photos",
        boxes="photos",
        pairs="photos",
        model=CoDetConfig(detector=detector, num_proposals=32),
        detection_batch=2,
        groups_per_step=1,
        flip_probability=0.5,
        box_stage=Optimisation(steps=20, learning_rate=2e-4, checkpoint_every=20, log_every=5),
        joint_stage=Optimisation(steps=20, learning_rate=1e-4, checkpoint_every=20, log_every=5),
    )


CONFIGS: dict[str, Callable[[], Run]] = {"smoke": smoke, "pictograms": pictograms, "photos": photos}


@dataclass(frozen=True)
class Stage:
    """A part of the training with a schedule of its own."""

    name: str
    settings: Optimisation
    joint: bool
    """Whether caption groups take part."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training."""

    model: str
    """Folder or URI of the checkpoint."""
    boxes_model: str
    """The one after box supervision alone."""
    box_supervised: DetectionMetrics
    codet: DetectionMetrics
    box_seconds: float
    joint_seconds: float
    eval_seconds: float
    run_id: str


def train_worker(
    run: Run,
    stage: Stage,
    names: Names,
    encoder_folder: str,
    start: dict[str, Tensor],
    stage_dir: str,
    logger: MetricLogger,
) -> None:
    """The loop of both stages: batches -> losses -> step."""
    device = training.prepare_worker(stage.settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    model = CoDet(run.model)
    model.load_state_dict(start)
    session = Session(model, stage.settings, device, stage_dir)
    base_KD, concepts_CD = names.base_embeddings.to(device), names.concept_embeddings.to(device)

    meter = Meter()
    detections = ray.train.get_dataset_shard("boxes").iter_torch_batches(
        batch_size=run.detection_batch // world, collate_fn=DetectionCollate(), prefetch_batches=2
    )
    groups = iter(())
    if stage.joint:
        encoder = load_encoder(storage.local_folder(encoder_folder))
        collate = GroupCollate(len(concepts_CD), encoder if run.model.caption_weight else None)
        shard = ray.train.get_dataset_shard("groups")
        groups = iter(
            shard.iter_torch_batches(batch_size=run.groups_per_step // world, collate_fn=collate, prefetch_batches=2)
        )
    for detection in meter.waiting(detections):
        concepts = next(meter.waiting(groups)).to(device) if stage.joint else None
        with session.autocast():
            losses = session.model(detection.to(device), concepts, base_KD, concepts_CD)
        session.update(torch.stack(list(losses.values())).sum())
        meter.add(losses, run.detection_batch + (run.groups_per_step * run.group_size if stage.joint else 0))
        if rank == 0 and session.step % stage.settings.log_every == 0:
            metrics = meter.collect()
            logger.log({f"{stage.name}/{key}": value for key, value in metrics.items()}, session.step)
            training.print_progress(f"codet {stage.name}", session.step, stage.settings.steps, metrics)
        if session.due:
            session.checkpoint({})
            logger.flush()
        if session.done:
            break
    logger.flush(wait=True)


def train_stage(
    run: Run,
    stage: Stage,
    names: Names,
    encoder_folder: str,
    start: dict[str, Tensor],
    run_dir: str,
    logger: MetricLogger,
) -> dict[str, Tensor]:
    """Feed the streams of one stage to the loop; returns the final weights."""
    settings, workers = stage.settings, max(1, stage.settings.workers)
    boxes = detection_loader(
        run.storage,
        f"{run.boxes}-train",
        names.base_ids,
        seed=settings.seed,
        augmentation=Augmentation(flip_probability=run.flip_probability),
    )
    box_shape = StreamShape(rows_per_step=run.detection_batch, workers=workers)
    streams: dict[str, Callable[[int], ray.data.Dataset]] = {
        "boxes": lambda step: stream(boxes, box_shape, step, settings.steps)
    }
    if stage.joint:
        groups = group_loader(
            run.storage, run.pairs, seed=settings.seed, group_size=run.group_size, min_side=run.min_group_side
        )
        group_shape = StreamShape(rows_per_step=run.groups_per_step, workers=workers)
        streams["groups"] = lambda step: stream(groups, group_shape, step, settings.steps)
    stage_dir = storage.join(run_dir, stage.name)
    loop = partial(train_worker, run, stage, names, encoder_folder, start, stage_dir, logger)
    training.fit(loop, settings, stage_dir, streams)
    return training.final_weights(stage_dir)


def train(run: Run) -> Trained:
    """Box supervision, then joint training; both are evaluated and saved.

    Raises:
        InputError: a table, the teacher or the embeddings are missing or do not fit.
    """
    run_dir = training.open_run(run.storage, "codet", run.config, run.resume)
    encoder_folder, encoder = open_encoder(run.storage, run.boxes, run_dir, teacher=run.teacher, texts=run.texts)
    names = read_names(run.storage, run.boxes, run.pairs, encoder)
    cluster.start_ray()
    run, weights = initial_weights(run, names.base_embeddings.shape[1])
    tags = {table: tables.read_manifest(run.storage, table, entry).digest for table, entry in inputs_of(run).items()}
    results: dict[str, tuple[str, DetectionMetrics, float, float]] = {}
    with tracking.run(run.storage, experiment="codet", name=run.config, params=cli.flatten(run), tags=tags) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        for stage in (Stage("boxes", run.box_stage, joint=False), Stage("joint", run.joint_stage, joint=True)):
            started = time.perf_counter()
            weights = train_stage(run, stage, names, encoder_folder, weights, run_dir, tracked.logger())
            trained = time.perf_counter()
            model, metrics = finish_stage(run, stage, names, encoder, weights, run_dir, tracked)
            results[stage.name] = (model, metrics, trained - started, time.perf_counter() - trained)
    boxes_model, box_metrics, box_seconds, box_eval = results["boxes"]
    model, metrics, joint_seconds, joint_eval = results["joint"]
    return Trained(
        model=model,
        boxes_model=boxes_model,
        box_supervised=box_metrics,
        codet=metrics,
        box_seconds=box_seconds,
        joint_seconds=joint_seconds,
        eval_seconds=box_eval + joint_eval,
        run_id=tracked.run_id,
    )


def finish_stage(
    run: Run,
    stage: Stage,
    names: Names,
    encoder: TextEncoder,
    weights: dict[str, Tensor],
    run_dir: str,
    tracked: TrackedRun,
) -> tuple[str, DetectionMetrics]:
    """Save the checkpoint folder, evaluate it, and log metrics, pictures and the per-class table."""
    model = CoDet(run.model)
    model.load_state_dict(weights)
    target = storage.join(run_dir, "model" if stage.joint else "boxes_model")
    with tempfile.TemporaryDirectory() as folder:
        save_detector(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))
        storage.upload_folder(Path(folder), target)
        metrics, pictures = evaluate.evaluate(
            evaluate.Run(storage=run.storage, model=folder, boxes=f"{run.boxes}-eval")
        )
        prefix = f"eval/{run.boxes}" if stage.joint else f"eval/{run.boxes}/box_supervised"
        evaluate.log(tracked, metrics, pictures, prefix, stage.settings.steps)
        if stage.joint:
            value = metrics.summary()["ap50_novel"]
            tracking.register(
                tracked, Path(folder), name=f"ovd-codet-{run.boxes}", metric=f"{prefix}/ap50_novel", value=value
            )
    return target, metrics


def inputs_of(run: Run) -> dict[str, str]:
    """The tables that a run reads."""
    return {"boxes": f"{run.boxes}-train", "categories": run.boxes, "concepts": run.pairs, "groups": run.pairs}


def initial_weights(run: Run, embed_dim: int) -> tuple[Run, dict[str, Tensor]]:
    """Weights to start from, and the run with the embedding width and batch norm that go with them."""
    torch.manual_seed(run.box_stage.seed)
    state = find_backbone_weights(run.model.detector.backbone, run.backbone_weights)
    detector = dataclasses.replace(run.model.detector, embed_dim=embed_dim, freeze_norm=state is not None)
    centernet2 = dataclasses.replace(run.model.centernet2, embed_dim=embed_dim)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, detector=detector, centernet2=centernet2))
    model = CoDet(run.model)
    if state is not None and isinstance(model.detector, RCNN):
        load_backbone(model.detector, state)
    return run, model.state_dict()


def prepare_data(run: Run) -> Run:
    """Publish the tables of `--data`, or those of `smoke`, unless they are there; other configs have theirs."""
    if run.config == "smoke" and not run.data:
        prepare_boxes.prepare(dataclasses.replace(prepare_boxes.smoke(), storage=run.storage))
        with prepare_pairs.site_of(dataclasses.replace(prepare_pairs.smoke(), storage=run.storage)) as crawl:
            prepare_pairs.prepare(crawl)
        if not run.teacher:
            folder = Path(tempfile.mkdtemp(prefix="ovd-"))
            save_clip(Clip(ClipConfig()), folder)
            run = dataclasses.replace(run, teacher=str(folder))
    elif run.data:
        boxes = dataclasses.replace(prepare_boxes.coco(), storage=run.storage, name=run.boxes, data=run.data)
        prepare_boxes.prepare(boxes)
        prepare_boxes.prepare_captions(boxes, run.pairs)
    return run


def main() -> None:
    """Read -> train -> evaluate; prints the table and what comes next."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    run = prepare_data(run)
    trained = train(run)
    print(f"{'AP50':16}{'base':>8}{'novel':>8}{'all':>8}")
    for label, metrics in (("box supervision", trained.box_supervised), ("CoDet", trained.codet)):
        row = metrics.summary()
        print(f"{label:16}{row['ap50_base']:8.3f}{row['ap50_novel']:8.3f}{row['ap50_all']:8.3f}")
    print(f"model: {trained.model}")
    print(f"next:  python workflows/serve.py --model {trained.model}")


if __name__ == "__main__":
    cli.execute(main)

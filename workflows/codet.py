"""CoDet: learn to detect from boxes of some categories and from captions that share a concept.

boxes (base categories) --> DetectionBatch --+
                                             +-> train -> AP50 of base and novel names -> runs/codet/<run>/model
groups (captioned images) -> ConceptBatch ---+
                             teacher (clip.py) embeds names and captions

First `boxes`: box supervision alone. Then `joint`, continued from it: every step takes both kinds of batch.

python workflows/codet.py --config smoke
python workflows/codet.py --config pictograms --teacher store/runs/clip/<run>/model
python workflows/codet.py --config photos --data photos/ --texts names.npy
ray job submit --working-dir . -- python workflows/codet.py --config smoke --storage s3://bucket/ovd
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray.train
import torch
from torch import Tensor, nn

from data_prep import storage, tables
from data_prep.streams.box_loader import detection_loader
from data_prep.streams.collate import DetectionCollate, GroupCollate
from data_prep.streams.group_loader import group_loader
from data_prep.streams.plans import Stream, StreamShape, stream
from ovd_models.batches import ConceptBatch
from ovd_models.checkpoints import load_codet, load_encoder, save_detector
from ovd_models.codet.drawing import draw_attention, draw_similarity
from ovd_models.codet.model import CoDet
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.detectors.rcnn import RCNN, find_backbone_weights, load_backbone
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.vocabulary import TextEncoder
from workflows import evaluate, prepare_boxes, prepare_pairs
from workflows.common import cli, tracking, training
from workflows.common.teacher import Names, open_encoder, read_names, share_encoder, untrained_teacher
from workflows.common.tracking import MetricLogger, TrackedRun
from workflows.common.training import Meter, Optimisation, Session
from workflows.configs.codet import CONFIGS, Run


@dataclass(frozen=True)
class Stage:
    """A part of the training with a schedule of its own."""

    name: str
    settings: Optimisation
    joint: bool
    """Whether it is the last one, in which caption groups take part."""


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
    if isinstance(model.detector, CenterNet2):
        model.detector.set_image_counts(torch.tensor(names.base_image_counts))
    base_KD, concepts_CD = names.base_embeddings.to(device), names.concept_embeddings.to(device)

    meter = Meter()
    detections = meter.waiting(
        ray.train.get_dataset_shard("boxes").iter_torch_batches(
            batch_size=run.detection_batch // world, collate_fn=DetectionCollate(), prefetch_batches=2
        )
    )
    groups: Iterator[ConceptBatch] = iter(())
    if uses_captions(run, stage):
        encoder = load_encoder(storage.local_folder(encoder_folder))
        collate = GroupCollate(len(concepts_CD), encoder if run.model.caption_weight else None)
        shard = ray.train.get_dataset_shard("groups")
        groups = meter.waiting(
            shard.iter_torch_batches(batch_size=run.groups_per_step // world, collate_fn=collate, prefetch_batches=2)
        )
    replaced = 0
    while not session.done:
        takes_boxes, takes_captions = kinds_of_step(run, stage, session.step)
        detection = next(detections).to(device) if takes_boxes else None
        concepts = next(groups).to(device) if takes_captions else None
        with session.autocast():
            losses = session.model(detection, concepts, base_KD, concepts_CD)
        session.update(torch.stack(list(losses.values())).sum())
        images = run.detection_batch * takes_boxes + run.groups_per_step * run.group_size * takes_captions
        meter.add(losses, images)
        if concepts is not None and concepts.unreadable:
            if not replaced:
                print(
                    f"codet {stage.name}: replaced an image that cannot be read: {concepts.unreadable[0]}", flush=True
                )
            replaced += len(concepts.unreadable)
        if rank == 0 and session.step % stage.settings.log_every == 0:
            metrics = meter.collect()
            logged = {**metrics, "train/replaced_images": replaced} if replaced else metrics
            logger.log({f"{stage.name}/{key}": value for key, value in logged.items()}, session.step)
            training.print_progress(f"codet {stage.name}", session.step, stage.settings.steps, metrics)
        if session.due:
            with meter.timing("checkpoint"):
                session.checkpoint({})
            if rank == 0 and concepts is not None:
                log_attention(session.module, concepts, names, session.step, logger)
            logger.flush()
    logger.flush(wait=True)


def kinds_of_step(run: Run, stage: Stage, step: int) -> tuple[bool, bool]:
    """Whether a step takes boxes, and whether it takes captions: the same on every worker."""
    captions = uses_captions(run, stage)
    if captions and run.alternate:
        return step % 2 == 0, step % 2 == 1
    return True, captions


def log_attention(model: nn.Module, concepts: ConceptBatch, names: Names, step: int, logger: MetricLogger) -> None:
    """Pictures of the first group: attention over its proposals, and their similarities."""
    assert isinstance(model, CoDet)
    size, device = concepts.group_size, concepts.concept_ids.device
    images = concepts.images[:size]
    first = ConceptBatch(images, concepts.concept_ids[:1], concepts.mentioned[:size], concepts.captions[:size])
    (group,) = model.explain(first, names.concept_embeddings.to(device))
    title = f"step {step}: {names.concepts[int(first.concept_ids)]}"
    logger.log_image(draw_attention(images, group.boxes, group.attention, title, first.captions), "attention", step)
    counts = [len(box) for box in group.boxes]
    logger.log_image(draw_similarity(group.similarity, counts), "similarity", step)


def uses_captions(run: Run, stage: Stage) -> bool:
    """Whether a stage reads caption groups."""
    return stage.joint and run.model.supervision != "boxes"


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
    settings = stage.settings
    boxes = detection_loader(
        run.storage,
        f"{run.boxes}-train",
        names.base_ids,
        seed=settings.seed,
        augmentation=run.augmentation,
        masks=run.model.architecture == "centernet2" and run.model.centernet2.mask_convs > 0,
        repeat_threshold=run.repeat_threshold,
    )
    box_shape = StreamShape(rows_per_step=run.detection_batch, workers=settings.workers)
    pace = 2 if run.alternate and uses_captions(run, stage) else 1  # steps from one batch of a kind to the next
    last = -(-settings.steps // pace)
    streams: dict[str, Callable[[int], Stream]] = {"boxes": lambda step: stream(boxes, box_shape, step // pace, last)}
    if uses_captions(run, stage):
        groups = group_loader(
            run.storage, run.pairs, seed=settings.seed, group_size=run.group_size, sampling=run.sampling
        )
        group_shape = StreamShape(rows_per_step=run.groups_per_step, workers=settings.workers)
        streams["groups"] = lambda step: stream(groups, group_shape, step // pace, last)
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
    encoder = open_encoder(run.storage, run.boxes, teacher=run.teacher, texts=run.texts)
    names = read_names(run.storage, run.boxes, run.pairs, encoder)
    training.start_ray_for(run.box_stage, run.joint_stage)
    run, weights = initial_weights(run, names.base_embeddings.shape[1])
    tags = {table: tables.read_manifest(run.storage, table, entry).digest for table, entry in inputs_of(run).items()}
    training.hold_to_inputs(run_dir, {**tags, "teacher": encoder.teacher})
    encoder_folder = share_encoder(encoder, run_dir)
    results: dict[str, tuple[str, DetectionMetrics, float, float]] = {}
    with tracking.run(run.storage, experiment="codet", name=run.config, params=cli.flatten(run), tags=tags) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        stages = [Stage("boxes", run.box_stage, joint=False), Stage("joint", run.joint_stage, joint=True)]
        if run.box_model:
            stages, (weights, results["boxes"]) = stages[1:], given_boxes(run, weights)
        for stage in stages:
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


def given_boxes(
    run: Run, start: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, DetectionMetrics, float, float]]:
    """Weights of the detector that `--box-model` names, and its results as a box stage that took no time.

    Raises:
        InputError: it is no detector of this architecture.
    """
    started = time.perf_counter()
    folder = storage.local_folder(run.box_model)
    given = load_codet(folder).state_dict()
    for name, value in start.items():
        found = list(given[name].shape) if name in given else "nothing"
        if found != list(value.shape) and not name.startswith("aggregations."):
            raise InputError(f"--box-model {run.box_model}: {name}: found {found}, expected {list(value.shape)}")
    same = {name for name, value in start.items() if name in given and given[name].shape == value.shape}
    weights = {name: given[name] if name in same else value for name, value in start.items()}
    metrics, _ = evaluate.evaluate(evaluate.Run(storage=run.storage, model=str(folder), boxes=f"{run.boxes}-eval"))
    return weights, (run.box_model, metrics, 0.0, time.perf_counter() - started)


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
            evaluate.Run(
                storage=run.storage,
                model=folder,
                boxes=f"{run.boxes}-eval",
                device=training.device_of(run.joint_stage),
            )
        )
        prefix = f"eval/{run.boxes}" if stage.joint else f"eval/{run.boxes}/box_supervised"
        evaluate.log(tracked, metrics, pictures, prefix, stage.settings.steps)
        if stage.joint:
            tracking.register(
                tracked,
                Path(folder),
                name=f"ovd-codet-{run.boxes}",
                metric=f"{prefix}/{metrics.headline}",
                value=metrics.summary()[metrics.headline],
            )
    return target, metrics


def inputs_of(run: Run) -> dict[str, str]:
    """The tables that a run reads."""
    return {"boxes": f"{run.boxes}-train", "categories": run.boxes, "concepts": run.pairs, "groups": run.pairs}


def initial_weights(run: Run, embed_dim: int) -> tuple[Run, dict[str, Tensor]]:
    """Weights to start from, and the run with the embedding width and batch norm that go with them."""
    torch.manual_seed(run.box_stage.seed)
    state = find_backbone_weights(run.model.detector.backbone, run.backbone_weights)
    frozen = state is not None or (bool(run.box_model) and run.model.detector.freeze_norm)
    detector = dataclasses.replace(run.model.detector, embed_dim=embed_dim, freeze_norm=frozen)
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
        prepare_pairs.prepare_smoke(run.storage)
        if not run.teacher:
            run = dataclasses.replace(run, teacher=untrained_teacher(run.storage))
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

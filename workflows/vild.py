"""ViLD: distil an image-text teacher into a detector that has seen boxes of some categories only.

boxes (novel ones stripped) --> rpn --> proposals checkpoint
                                           | its best proposals of every image -> crops -> teacher (embed.py)
                                           v
boxes, regions --> DetectionBatch --> detector -> AP50 of base and novel names -> runs/vild/<run>/model

python workflows/vild.py --config smoke
python workflows/vild.py --config pictograms --teacher store/runs/clip/<run>/model
python workflows/vild.py --config pictograms --model.variant text --teacher ... --proposals runs/.../proposals
python workflows/vild.py --config lvis_r50 --storage s3://bucket/ovd --teacher s3://bucket/clip
"""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray.train
import torch
from torch import Tensor, nn

from data_prep import storage, tables
from data_prep.streams.box_loader import RegionSource, detection_loader
from data_prep.streams.collate import DetectionCollate
from data_prep.streams.plans import StreamShape, stream
from ovd_models.checkpoints import load_vild, read_info, save_detector
from ovd_models.detectors.rcnn import ProposalNetwork, find_backbone_weights, load_backbone
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import TextEncoder, Vocabulary, build_vocabulary
from workflows import embed, evaluate, prepare_boxes
from workflows.common import cli, tracking, training
from workflows.common.teacher import open_encoder, read_categories, untrained_teacher
from workflows.common.tracking import MetricLogger, TrackedRun
from workflows.common.training import Meter, Optimisation, Session
from workflows.configs.vild import CONFIGS, Run


@dataclass(frozen=True)
class Names:
    """The names of a box set: those that are trained with come first."""

    ids: list[int]
    """Category ids of those that are trained with."""
    splits: dict[str, str]
    """`base` or `novel` by name."""
    vocabulary: Vocabulary
    """All of them."""

    @property
    def trained(self) -> Tensor:
        """[K] bool: the names that carry boxes in training."""
        return torch.arange(len(self.vocabulary)) < len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training."""

    model: str
    """Folder or URI of the checkpoint."""
    proposals: str
    """The one of the proposal network."""
    regions: str
    """Name of the `regions` table; empty without distillation."""
    metrics: DetectionMetrics
    seconds: dict[str, float]
    """By stage."""
    run_id: str


# --------------------------------------------------------------------------------------------------------- training


def train_worker(
    run: Run,
    stage: Optimisation,
    stage_dir: str,
    start: dict[str, Tensor],
    text_KD: Tensor,
    trained_K: Tensor,
    logger: MetricLogger,
) -> None:
    """The loop of both stages: batches -> losses -> step."""
    device = training.prepare_worker(stage)
    context = ray.train.get_context()
    rank, world, name = context.get_world_rank(), context.get_world_size(), stage_dir.rsplit("/", 1)[-1]
    model = build_model(run, name)
    model.load_state_dict(start)
    if device.type == "cuda" and world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    session = Session(model, stage, device, stage_dir)
    names = (text_KD.to(device), trained_K.to(device)) if isinstance(model, ViLD) else ()

    meter = Meter()
    batches = ray.train.get_dataset_shard("boxes").iter_torch_batches(
        batch_size=run.detection_batch // world, collate_fn=DetectionCollate(), prefetch_batches=2
    )
    for batch in meter.waiting(batches):
        with session.autocast():
            losses = session.model(batch.to(device), *names)
        session.update(torch.stack(list(losses.values())).sum())
        meter.add(losses, run.detection_batch)
        if rank == 0 and session.step % stage.log_every == 0:
            metrics = meter.collect()
            logger.log({f"{name}/{key}": value for key, value in metrics.items()}, session.step)
            training.print_progress(f"vild {name}", session.step, stage.steps, metrics)
        if session.due:
            with meter.timing("checkpoint"):
                session.checkpoint({})
            logger.flush()
        if session.done:
            break
    logger.flush(wait=True)


def build_model(run: Run, stage: str) -> ProposalNetwork | ViLD:
    """What a stage trains."""
    return ProposalNetwork(run.model.detector) if stage == "rpn" else ViLD(run.model)


def train_stage(
    run: Run,
    name: str,
    names: Names,
    start: dict[str, Tensor],
    run_dir: str,
    regions: RegionSource | None,
    tracked: TrackedRun,
) -> dict[str, Tensor]:
    """Feed the stream of a stage (`rpn` or `detector`) to the loop; returns the final weights."""
    stage = run.rpn_stage if name == "rpn" else run.detector_stage
    loader = detection_loader(
        run.storage,
        run.train_table,
        names.ids,
        seed=stage.seed,
        augmentation=run.augmentation,
        masks=run.model.detector.masks and name == "detector",
        repeat_threshold=run.repeat_threshold,
        regions=regions,
    )
    shape = StreamShape(rows_per_step=run.detection_batch, workers=stage.workers)
    stage_dir = storage.join(run_dir, name)
    loop = partial(
        train_worker, run, stage, stage_dir, start, names.vocabulary.embeddings, names.trained, tracked.logger()
    )
    training.fit(loop, stage, stage_dir, {"boxes": lambda step: stream(loader, shape, step, stage.steps)})
    return training.final_weights(stage_dir)


def train(run: Run) -> Trained:
    """Proposals, their embeddings, the detector; which is evaluated and saved.

    Raises:
        InputError: a table, the teacher or the embeddings are missing or do not fit.
    """
    run, run_dir, names, encoder = begin(run)
    tags = {"boxes": run.train_table, "categories": run.boxes}
    tags = {table: tables.read_manifest(run.storage, table, entry).digest for table, entry in tags.items()}
    training.hold_to_inputs(run_dir, {**tags, "teacher": encoder.teacher})
    if run.proposals:
        check_proposals(run)
    seconds, clock = {}, time.perf_counter
    with tracking.run(run.storage, experiment="vild", name=run.config, params=cli.flatten(run), tags=tags) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        started = clock()
        proposals = run.proposals or train_proposals(run, names, encoder, run_dir, tracked)
        seconds["rpn"], started = clock() - started, clock()
        regions = embed_proposals(run, encoder, proposals) if run.model.distils else None
        if regions:
            training.hold_to_inputs(run_dir, {"regions": regions.name})
        seconds["embed"], started = clock() - started, clock()
        start = detector_start(run, proposals)
        weights = train_stage(run, "detector", names, start, run_dir, regions, tracked)
        seconds["detector"], started = clock() - started, clock()
        model, metrics = finish(run, names, encoder, weights, run_dir, tracked)
        seconds["evaluate"] = clock() - started
    return Trained(
        model=model,
        proposals=proposals,
        regions=regions.name if regions else "",
        metrics=metrics,
        seconds=seconds,
        run_id=tracked.run_id,
    )


def begin(run: Run) -> tuple[Run, str, Names, TextEncoder]:
    """What both stages need: the run with what follows from its data, its folder, the names and what embeds them."""
    run_dir = training.open_run(run.storage, "vild", run.config, run.resume)
    encoder = open_encoder(run.storage, run.boxes, teacher=run.teacher, texts=run.texts)
    names = read_names(run, encoder)
    training.start_ray_for(run.rpn_stage, run.detector_stage)
    return complete(run, names), run_dir, names, encoder


def train_rpn(run: Run) -> str:
    """The first stage alone; returns its checkpoint.

    Raises:
        InputError: a table or the teacher is missing.
    """
    run, run_dir, names, encoder = begin(run)
    with tracking.run(run.storage, experiment="vild", name=run.config, params=cli.flatten(run)) as tracked:
        return train_proposals(run, names, encoder, run_dir, tracked)


def train_proposals(run: Run, names: Names, encoder: TextEncoder, run_dir: str, tracked: TrackedRun) -> str:
    """Train the proposal network on the training boxes, whatever their category; returns its checkpoint.

    A checkpoint is a whole detector: this one's box head has learnt nothing yet, only its proposals are of use.
    """
    torch.manual_seed(run.rpn_stage.seed)
    network = ProposalNetwork(run.model.detector)
    state = find_backbone_weights(run.model.detector.backbone, run.backbone_weights)
    if state is not None:
        load_backbone(network, state)
    weights = train_stage(run, "rpn", names, network.state_dict(), run_dir, None, tracked)
    torch.manual_seed(run.rpn_stage.seed)  # a resumed run gives the same checkpoint, and so the same embeddings
    model = ViLD(dataclasses.replace(run.model, variant="text", supervised_names=()))
    model.detector.load_state_dict(weights, strict=False)
    target = storage.join(run_dir, "proposals")
    save(run, model, encoder, names, target)
    return target


def check_proposals(run: Run) -> None:
    """Whether the given proposals are of this detector's first stage, and have seen no box that this run must not.

    Raises:
        InputError: they do not fit.
    """
    folder = storage.local_folder(run.proposals)
    theirs, ours = load_vild(folder).config.detector, run.model.detector
    for name in ("backbone", "backbone_options", "freeze_norm", "strides", "anchor_sizes", "pyramid_channels"):
        if getattr(theirs, name) != getattr(ours, name):
            found, expected = getattr(theirs, name), getattr(ours, name)
            raise InputError(f"--proposals {run.proposals}: {name} is {found!r}, expected {expected!r}")
    if read_info(folder).run.get("novel_boxes") and not run.novel_boxes:
        raise InputError(f"--proposals {run.proposals}: learnt from novel boxes, expected proposals of base boxes")


def embed_proposals(run: Run, encoder: TextEncoder, proposals: str) -> RegionSource:
    """The stored embeddings of the best proposals of every training image; computed where they are not there yet.

    Raises:
        InputError: `regions` names a table of another teacher or other crops.
    """
    crops, name = dataclasses.asdict(run.crops), run.regions
    if not name:
        weights = (storage.local_folder(proposals) / "model.safetensors").read_bytes()
        made_of = (storage.sha256(weights), encoder.teacher, crops, run.max_proposals, run.train_table)
        name = f"{run.train_table}-{storage.sha256(repr(made_of).encode())[:8]}"
        embed.embed(
            embed.Run(
                storage=run.storage,
                teacher=run.teacher,
                name=name,
                boxes=run.train_table,
                detector=proposals,
                max_proposals=run.max_proposals,
                crops=run.crops,
                embed=run.embed,
            )
        )
    return RegionSource(
        name=name, teacher=encoder.teacher, crops=crops, most=run.max_proposals, per_step=run.regions_per_step
    )


def detector_start(run: Run, proposals: str) -> dict[str, Tensor]:
    """Weights that the detector starts from: the proposal network's, or none but the backbone's."""
    torch.manual_seed(run.detector_stage.seed)
    model = ViLD(run.model)
    if run.start_from_proposals:
        trained = load_vild(storage.local_folder(proposals)).detector.state_dict()
        first_stage = ProposalNetwork(run.model.detector).state_dict()
        model.detector.load_state_dict({name: trained[name] for name in first_stage}, strict=False)
    else:
        state = find_backbone_weights(run.model.detector.backbone, run.backbone_weights)
        if state is not None:
            load_backbone(model.detector, state)
    return model.state_dict()


def finish(
    run: Run, names: Names, encoder: TextEncoder, weights: dict[str, Tensor], run_dir: str, tracked: TrackedRun
) -> tuple[str, DetectionMetrics]:
    """Save the checkpoint folder, evaluate it, and log metrics, pictures and the per-class table."""
    model = ViLD(run.model)
    model.load_state_dict(weights)
    target = storage.join(run_dir, "model")
    save(run, model, encoder, names, target)
    metrics, pictures = evaluate.evaluate(
        evaluate.Run(
            storage=run.storage,
            model=target,
            boxes=f"{run.boxes}-eval",
            score_threshold=run.score_threshold,
            max_detections=run.max_detections,
            masks=run.measure_masks,
            device=training.device_of(run.detector_stage),
        )
    )
    prefix = f"eval/{run.boxes}"
    evaluate.log(tracked, metrics, pictures, prefix, run.detector_stage.steps)
    tracking.register(
        tracked,
        storage.local_folder(target),
        name=f"ovd-vild-{run.boxes}",
        metric=f"{prefix}/{metrics.headline}",
        value=metrics.summary()[metrics.headline],
    )
    return target, metrics


def save(run: Run, model: ViLD, encoder: TextEncoder, names: Names, target: str) -> None:
    """Write a complete checkpoint folder to the storage."""
    with tempfile.TemporaryDirectory() as folder:
        save_detector(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))
        storage.upload_folder(Path(folder), target)


# ------------------------------------------------------------------------------------------------------------ input


def read_names(run: Run, encoder: TextEncoder) -> Names:
    """Embed the names of the box set; categories without a split take no part, and are named."""
    categories, splits = read_categories(run.storage, run.boxes)
    rows = tables.read_table(run.storage, "categories", run.boxes, ["name", "split"]).to_pylist()
    without = [row["name"] for row in rows if not row["split"]]
    if without:
        print(f"categories/{run.boxes}: {len(without)} without a split take no part: {', '.join(without[:20])}")
    trained = [key for key, name in categories.items() if run.novel_boxes or splits[name] == "base"]
    others = [key for key in categories if key not in set(trained)]
    ordered = [categories[key] for key in (*trained, *others)]
    return Names(trained, splits, build_vocabulary(encoder, ordered, splits))


def complete(run: Run, names: Names) -> Run:
    """The run with what follows from its data: embedding width, frozen batch norm, names of a supervised classifier."""
    pretrained = find_backbone_weights(run.model.detector.backbone, run.backbone_weights) is not None
    detector = dataclasses.replace(
        run.model.detector, embed_dim=names.vocabulary.embeddings.shape[1], freeze_norm=pretrained
    )
    supervised = names.vocabulary.names[: len(names.ids)] if run.model.variant == "supervised" else ()
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, detector=detector, supervised_names=supervised)
    )


def prepare_data(run: Run) -> Run:
    """Publish the tables of `--data`, or those of `smoke`, unless they are there; other configs have theirs."""
    if run.config == "smoke" and not run.data:
        prepare_boxes.prepare(dataclasses.replace(prepare_boxes.smoke(), storage=run.storage))
        if not run.teacher:
            run = dataclasses.replace(run, teacher=untrained_teacher(run.storage))
    elif run.data:
        prepare_boxes.prepare(
            dataclasses.replace(prepare_boxes.coco(), storage=run.storage, name=run.boxes, data=run.data)
        )
    return run


def main() -> None:
    """Read -> train -> evaluate; prints the table and what comes next."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    run = prepare_data(run)
    trained = train(run)
    row = trained.metrics.summary()
    print(f"{'AP50':16}{'base':>8}{'novel':>8}{'all':>8}")
    print(f"{run.model.variant:16}{row['ap50_base']:8.3f}{row['ap50_novel']:8.3f}{row['ap50_all']:8.3f}")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in trained.seconds.items()))
    print(f"model: {trained.model}\nproposals: {trained.proposals}  regions: {trained.regions or 'none'}")
    print(f"next:  python workflows/serve.py --model {trained.model}")


if __name__ == "__main__":
    cli.execute(main)

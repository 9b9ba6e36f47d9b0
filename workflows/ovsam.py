"""OV-SAM: one frozen CLIP that learns to segment like SAM and to name what it segments.

boxes with masks --> sam: a SAM of its own (or --sam, a trained one) --> cache: its embeddings, float16
                                                                           |
teacher (clip.py) --> sam2clip: CLIP's levels -> SAM's embedding <---------+
                        |
                      clip2sam: mask decoder and label branch, base names --> evaluate: IoU and accuracy of
                                                                              base, novel, all names
      with --text-to-mask also: SAM learns to be prompted by CLIP's embeddings, so by names

python workflows/ovsam.py --config smoke
python workflows/ovsam.py --config pictograms --teacher store/runs/clip/<run>/model
python workflows/ovsam.py --config pictograms --teacher ... --sam store/runs/ovsam/<run>/sam_model
ray job submit --working-dir . -- python workflows/ovsam.py --config smoke --storage s3://bucket/ovd
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor, nn

from data_prep import storage, tables
from data_prep.embeddings import features
from data_prep.embeddings.texts import StoredEncoder, TextStore
from data_prep.streams.collate import FeatureCollate, MaskCollate
from data_prep.streams.mask_loader import feature_loader, mask_loader
from data_prep.streams.plans import StreamShape, stream
from ovd_models.clip.model import Clip, ClipTextEncoder, load_clip
from ovd_models.errors import InputError
from ovd_models.ovsam.checkpoints import load_sam_folder, sam_id, save_ovsam, save_sam, save_text_to_mask
from ovd_models.ovsam.clip_pyramid import ClipPyramid, TowerConfig, build_tower
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskConfig
from ovd_models.ovsam.training import Clip2SamConfig, Clip2SamTraining, Sam2ClipTraining
from ovd_models.sam.model import SamConfig, SamModel, load_sam
from ovd_models.sam.training import SamTraining
from ovd_models.vocabulary import Vocabulary, build_vocabulary
from workflows import prepare_boxes
from workflows.common import cli, tracking, training
from workflows.common.teacher import read_categories, untrained_teacher
from workflows.common.tracking import MetricLogger, TrackedRun
from workflows.common.training import Meter, Optimisation, Session
from workflows.configs.ovsam import CONFIGS, Run
from workflows.reports import pointing as pointing_report


@dataclass(frozen=True)
class Stage:
    """A part of the training with a schedule of its own."""

    name: str
    settings: Optimisation
    build: Callable[[], nn.Module]
    """Makes the module that is trained, with any weights."""
    extra: tuple[Tensor, ...]
    """What its `forward` takes after the batch."""
    seeded: bool
    """Whether its `forward` draws at random, and so takes a generator last."""
    collate: ArrowBatchCollateFn


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training."""

    model: str
    """Folder or URI of the checkpoint."""
    sam: str
    """Folder or URI of the SAM it learnt from."""
    report: pointing_report.Report
    seconds: dict[str, float]
    """Of each stage."""
    run_id: str


def train_worker(stage: Stage, batch_size: int, start: dict[str, Tensor], stage_dir: str, logger: MetricLogger) -> None:
    """The loop of every stage: batches -> losses -> step."""
    device = training.prepare_worker(stage.settings)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    module = stage.build()
    module.load_state_dict(start)
    session = Session(module, stage.settings, device, stage_dir)
    extra = [value.to(device) for value in stage.extra]
    batches = ray.train.get_dataset_shard("images").iter_torch_batches(
        batch_size=batch_size // world, collate_fn=stage.collate, prefetch_batches=2
    )
    meter = Meter()
    for batch in meter.waiting(batches):
        drawn: list[Any] = []
        if stage.seeded:  # by step, so that a resumed run draws as an undisturbed one
            drawn.append(torch.Generator().manual_seed((stage.settings.seed << 32) + session.step * world + rank))
        with session.autocast():
            losses = session.model(batch.to(device), *extra, *drawn)
        session.update(torch.stack(list(losses.values())).sum())
        meter.add(losses, batch_size)
        if rank == 0 and session.step % stage.settings.log_every == 0:
            metrics = meter.collect()
            logger.log({f"{stage.name}/{key}": value for key, value in metrics.items()}, session.step)
            training.print_progress(f"ovsam {stage.name}", session.step, stage.settings.steps, metrics)
        if session.due:
            with meter.timing("checkpoint"):
                session.checkpoint({})
            logger.flush()
        if session.done:
            break
    logger.flush(wait=True)


def train_stage(
    run: Run, stage: Stage, load: Callable[[Any], Any], run_dir: str, start: dict[str, Tensor], logger: MetricLogger
) -> dict[str, Tensor]:
    """Feed a stream to the loop; returns the final weights."""
    settings, stage_dir = stage.settings, storage.join(run_dir, stage.name)
    shape = StreamShape(rows_per_step=run.batch_size, workers=settings.workers)
    streams = {"images": lambda step: stream(load, shape, step, settings.steps)}
    training.fit(partial(train_worker, stage, run.batch_size, start, stage_dir, logger), settings, stage_dir, streams)
    return training.final_weights(stage_dir)


def train_sam(run: Run, run_dir: str, logger: MetricLogger) -> str:
    """Train a SAM on the masks of base categories; returns its checkpoint folder."""
    target = storage.join(run_dir, "sam_model")
    if storage.exists(storage.join(target, "config.json")):
        return target
    build = partial(SamTraining, run.sam_model, run.sam_training)
    stage = Stage("sam", run.sam_stage, build, (), True, MaskCollate())
    seed, flip = run.sam_stage.seed, run.flip_probability
    load = mask_loader(run.storage, f"{run.boxes}-train", [], seed=seed, flip_probability=flip)
    torch.manual_seed(seed)
    module = build()
    module.load_state_dict(train_stage(run, stage, load, run_dir, module.state_dict(), logger))
    return store_sam(run, module.model, target)


def store_sam(run: Run, sam: SamModel, target: str) -> str:
    """Write a SAM's checkpoint folder to the storage; returns it."""
    with tempfile.TemporaryDirectory() as folder:
        save_sam(sam, folder, run=dataclasses.asdict(run))
        storage.upload_folder(Path(folder), target)
    return target


def teach_sam(run: Run) -> str:
    """Train a SAM in a run of its own, for several OV-SAMs to learn from; returns its checkpoint folder.

    Raises:
        InputError: the table of masks is missing.
    """
    run_dir = training.open_run(run.storage, "ovsam", run.config, run.resume)
    tags = {"boxes": tables.read_manifest(run.storage, "boxes", f"{run.boxes}-train").digest}
    training.start_ray_for(run.sam_stage)
    with tracking.run(run.storage, experiment="ovsam", name=run.config, params=cli.flatten(run), tags=tags) as tracked:
        return train_sam(run, run_dir, tracked.logger())


def open_sam(run: Run) -> tuple[SamModel, str]:
    """The SAM that `--sam` gives, and its id.

    Raises:
        InputError: there is none, or the file is not a SAM of `sam_model`.
    """
    if not run.sam.endswith(".pth"):
        return load_sam_folder(storage.local_folder(run.sam))
    sam = load_sam(run.sam, run.sam_model)
    return sam, sam_id(sam)


def share_sam(run: Run, sam: SamModel, run_dir: str) -> str:
    """The folder of the given SAM, for other processes; a published file is brought into that form."""
    if not run.sam.endswith(".pth"):
        return storage.absolute(run.sam)  # actors of the cache have other working folders
    return store_sam(run, sam, storage.join(run_dir, "sam_model"))


def train_adapter(run: Run, model: OvSam, sam: str, sam_name: str, run_dir: str, logger: MetricLogger) -> None:
    """Cache the SAM's embeddings, then teach the adapter to make them from CLIP's levels."""
    settings, name = run.sam2clip_stage, f"{run.boxes}-train"
    features.cache_features(
        run.storage,
        name,
        sam,
        sam_name,
        model.config.sam,
        rows_per_shard=run.rows_per_shard,
        workers=settings.workers,
        gpus=float(settings.use_gpu),
    )
    cache = features.cache_name(run.storage, name, sam_name)
    load = feature_loader(run.storage, name, cache, sam_name, seed=run.sam2clip_stage.seed)
    build = partial(build_adapter_training, model.config)
    stage = Stage("sam2clip", run.sam2clip_stage, build, (), False, FeatureCollate(load.shape))
    module = Sam2ClipTraining(model)
    module.load_state_dict(train_stage(run, stage, load, run_dir, module.state_dict(), logger))


def build_adapter_training(config: OvSamConfig) -> nn.Module:
    """The second stage's module."""
    return Sam2ClipTraining(OvSam(config))


def build_head_training(config: OvSamConfig, settings: Clip2SamConfig) -> nn.Module:
    """The third stage's module."""
    return Clip2SamTraining(OvSam(config), settings)


def train_head(
    run: Run, model: OvSam, base: Vocabulary, base_ids: list[int], run_dir: str, logger: MetricLogger
) -> None:
    """Teach mask decoder and label branch the base categories."""
    settings = run.clip2sam_stage
    load = mask_loader(
        run.storage, f"{run.boxes}-train", base_ids, seed=settings.seed, flip_probability=run.flip_probability
    )
    build = partial(build_head_training, model.config, run.clip2sam)
    stage = Stage("clip2sam", settings, build, (base.embeddings[:, None],), True, MaskCollate())
    module = Clip2SamTraining(model, run.clip2sam)
    module.load_state_dict(train_stage(run, stage, load, run_dir, module.state_dict(), logger))


def build_text_training(sam: SamConfig, tower: TowerConfig, settings: TextToMaskConfig) -> nn.Module:
    """The module that learns names as prompts."""
    clip = ClipPyramid(build_tower(tower, sam.image_size))
    return TextToMask(SamModel(sam), clip, tower, settings)


def train_text(
    run: Run, config: OvSamConfig, sam: SamModel, clip: Clip, names: "Names", run_dir: str, logger: MetricLogger
) -> TextToMask:
    """Teach a copy of the SAM to take CLIP's embeddings as prompts."""
    settings = run.text_stage
    load = mask_loader(run.storage, f"{run.boxes}-train", [], seed=settings.seed, flip_probability=0.0)
    torch.manual_seed(settings.seed)
    build = partial(build_text_training, config.sam, config.tower, run.text)
    module = build()
    assert isinstance(module, TextToMask)
    module.sam.load_state_dict(sam.state_dict())
    module.clip.load_tower(clip.model.visual.state_dict())
    stage = Stage("text", settings, build, (), True, MaskCollate())
    module.load_state_dict(train_stage(run, stage, load, run_dir, module.state_dict(), logger))
    module.set_text_centre(names.base.embeddings)
    return module.eval()


@dataclass(frozen=True)
class Names:
    """The names of a box set."""

    ids: dict[str, int]
    """Category id by name, those with a split."""
    splits: dict[str, str]
    """`base` or `novel` by name."""
    vocabulary: Vocabulary
    """All of them, base ones marked."""
    base: Vocabulary
    """Those that training masks carry."""


def read_names(run: Run, encoder: ClipTextEncoder) -> Names:
    """Embed the names of `categories/<boxes>`, or read them from the teacher's `texts`.

    Raises:
        InputError: see `read_categories`.
    """
    categories, splits = read_categories(run.storage, run.boxes)
    base = [name for name, split in splits.items() if split == "base"]
    stored = StoredEncoder(encoder, TextStore.of(run.storage, encoder.teacher))
    return Names(
        {name: category_id for category_id, name in categories.items()},
        splits,
        build_vocabulary(stored, list(splits), splits),
        build_vocabulary(stored, base, splits),
    )


def open_clip_teacher(run: Run) -> tuple[Clip, ClipTextEncoder]:
    """The CLIP whose image tower becomes OV-SAM's.

    Raises:
        InputError: none is given, or it is broken.
    """
    if not run.teacher:
        raise InputError("--teacher: missing, expected a CLIP checkpoint (`python workflows/clip.py`)")
    clip, teacher = load_clip(storage.local_folder(run.teacher))
    return clip, ClipTextEncoder(clip.config, clip.model.text, teacher)


def model_config(run: Run, sam: SamConfig, clip: Clip) -> OvSamConfig:
    """The OV-SAM of a SAM and a CLIP, whose cosines count as much as that CLIP learnt."""
    log_scale = float(clip.model.logit_scale.detach())
    return OvSamConfig(
        sam=sam,
        tower=TowerConfig.of(clip.config),
        adapter_depth=run.adapter_depth,
        pyramid_width=run.pyramid_width,
        label_hidden=run.label_hidden,
        alpha=run.alpha,
        beta=run.beta,
        novel_bias=run.novel_bias,
        log_scale=log_scale,
        clip_view=run.clip_view,
    )


def train(run: Run) -> Trained:
    """All stages, then the evaluation beside SAM and the baselines.

    Raises:
        InputError: a table or the teacher is missing or does not fit.
    """
    if run.needs_sam and not run.sam:
        raise InputError("--sam: missing, expected a SAM checkpoint, since this config trains none")
    run_dir = training.open_run(run.storage, "ovsam", run.config, run.resume)
    clip, encoder = open_clip_teacher(run)
    names = read_names(run, encoder)
    if run.text_to_mask and len(names.base) < 2:
        raise InputError(f"categories/{run.boxes}: {len(names.base)} base names, expected at least 2 for text prompts")
    inputs = {"boxes": f"{run.boxes}-train", "categories": run.boxes}
    tags = {table: tables.read_manifest(run.storage, table, name).digest for table, name in inputs.items()}
    pointing_report.read_rows(run.storage, f"{run.boxes}-eval", names.ids, run.eval_images)  # before days of training
    given = open_sam(run) if run.sam else None
    training.hold_to_inputs(run_dir, {**tags, "teacher": encoder.teacher, "sam": given[1] if given else "its own"})
    training.start_ray_for(run.sam_stage, run.sam2clip_stage, run.clip2sam_stage, run.text_stage)
    seconds: dict[str, float] = {}
    with tracking.run(run.storage, experiment="ovsam", name=run.config, params=cli.flatten(run), tags=tags) as tracked:
        tracked.log_text(cli.to_json(run), "run.json")
        logger, started = tracked.logger(), time.perf_counter()
        sam_folder = share_sam(run, given[0], run_dir) if given else train_sam(run, run_dir, logger)
        seconds["sam"] = time.perf_counter() - started
        sam, sam_name = given or load_sam_folder(storage.local_folder(sam_folder))
        torch.manual_seed(run.sam2clip_stage.seed)
        model = OvSam(model_config(run, sam.config, clip))
        model.adopt(sam, clip.model.visual)
        train_adapter(run, model, sam_folder, sam_name, run_dir, logger)
        seconds["sam2clip"] = time.perf_counter() - started - sum(seconds.values())
        base_ids = [names.ids[name] for name in names.base.names]
        train_head(run, model, names.base, base_ids, run_dir, logger)
        seconds["clip2sam"] = time.perf_counter() - started - sum(seconds.values())
        text = None
        if run.text_to_mask:
            text = train_text(run, model.config, sam, clip, names, run_dir, logger)
            with tempfile.TemporaryDirectory() as folder:
                save_text_to_mask(text, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))
                storage.upload_folder(Path(folder), storage.join(run_dir, "text_model"))
            seconds["text"] = time.perf_counter() - started - sum(seconds.values())
        target, report = finish(run, model.eval(), sam, text, encoder, names, run_dir, tracked)
        seconds["evaluate"] = time.perf_counter() - started - sum(seconds.values())
    return Trained(model=target, sam=sam_folder, report=report, seconds=seconds, run_id=tracked.run_id)


def finish(
    run: Run,
    model: OvSam,
    sam: SamModel,
    text: TextToMask | None,
    encoder: ClipTextEncoder,
    names: Names,
    run_dir: str,
    tracked: TrackedRun,
) -> tuple[str, pointing_report.Report]:
    """Save the checkpoint folder, evaluate it beside SAM and the baselines, and log metrics and pictures."""
    target = storage.join(run_dir, "model")
    with tempfile.TemporaryDirectory() as folder:
        save_ovsam(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))
        storage.upload_folder(Path(folder), target)
        report = pointing_report.evaluate(
            run.storage,
            f"{run.boxes}-eval",
            names.ids,
            names.vocabulary,
            model,
            sam,
            text,
            limit=run.eval_images,
            device=training.device_of(run.clip2sam_stage),
        )
        report.log(tracked, f"eval/{run.boxes}", run.clip2sam_stage.steps)
        headline = "accuracy_novel" if "novel" in names.splits.values() else "accuracy_all"
        tracking.register(
            tracked,
            Path(folder),
            name=f"ovd-ovsam-{run.boxes}",
            metric=f"eval/{run.boxes}/ovsam/box/{headline}",
            value=report.rows["ovsam", "box"][headline],
        )
    return target, report


def prepare_data(run: Run) -> Run:
    """Publish the tables of `--data`, or those of `smoke`, unless they are there; other configs have theirs."""
    if run.config == "smoke" and not run.data:
        prepare_boxes.prepare(dataclasses.replace(prepare_boxes.smoke(), storage=run.storage))
        if not run.teacher:
            run = dataclasses.replace(run, teacher=untrained_teacher(run.storage))
    elif run.data:
        boxes = dataclasses.replace(prepare_boxes.coco(), storage=run.storage, name=run.boxes, data=run.data)
        prepare_boxes.prepare(boxes)
    return run


def main() -> None:
    """Read -> train -> evaluate; prints the table and what comes next."""
    run = cli.parse(CONFIGS, __doc__)
    tracking.tracking_uri(run.storage)
    run = prepare_data(run)
    trained = train(run)
    print(trained.report.table())
    print("  ".join(f"{name} {value:.0f} s" for name, value in trained.seconds.items()))
    print(f"sam:   {trained.sam}")
    print(f"model: {trained.model}")


if __name__ == "__main__":
    cli.execute(main)

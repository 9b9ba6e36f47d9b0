"""OV-SAM: one frozen CLIP that learns to segment like SAM and to name what it segments.

boxes with masks --> sam: a SAM of its own (or --sam, a trained one) --> cache: its embeddings, float16
                                                                           |
teacher (clip.py) --> sam2clip: CLIP's levels -> SAM's embedding <---------+
                        |
                      clip2sam: mask decoder and label branch, base names --> evaluate: IoU and accuracy of
                                                                              base, novel, all names
      with --text-to-mask also: SAM is trained to take CLIP's embeddings, and so names, as prompts

python workflows/ovsam.py --config smoke
python workflows/ovsam.py --config pictograms --teacher store/runs/clip/NAME/model
python workflows/ovsam.py --config pictograms --teacher CLIP --sam store/runs/ovsam/NAME/sam_model
ray job submit --working-dir . -- python workflows/ovsam.py --config smoke --storage s3://bucket/ovd
"""

from workflows.common import brief_help

brief_help.answer(
    __name__,
    __file__,
    "storage data held_out boxes teacher pretrained sam distill_images text_to_mask "
    "workers precision use_gpu dry_run resume",
)

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor, nn

from data_prep import locks, storage, tables
from data_prep.embeddings import features
from data_prep.streams.collate import FeatureCollate, MaskCollate
from data_prep.streams.mask_loader import feature_loader, mask_loader
from ovd_models.checkpoints import load_model, sam_id, save_checkpoint
from ovd_models.clip.model import Clip, ClipTextEncoder
from ovd_models.errors import InputError
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import OvSam, OvSamConfig
from ovd_models.ovsam.text_to_mask import TextToMask, TextToMaskConfig, TextToMaskModelConfig
from ovd_models.ovsam.training import Clip2SamConfig, Clip2SamTraining, Sam2ClipTraining
from ovd_models.sam.model import SamConfig, SamModel
from ovd_models.sam.training import SamTraining
from workflows import prepare_boxes
from workflows.common import cli, descriptions, runs, training
from workflows.common.rehearsal import Rehearsal, rehearse
from workflows.common.runs import ActiveRun, Evaluation, Trained
from workflows.common.session import Session, Validated
from workflows.common.teacher import find_teacher
from workflows.common.tracking import MetricLogger
from workflows.common.training import Fit, Stage
from workflows.configs.ovsam import CONFIGS, Run
from workflows.inputs.ovsam import (
    OvSamNames,
    base_masks,
    choose_sam,
    distillation_table,
    model_config,
    open_clip_teacher,
    open_sam,
    read_names,
)
from workflows.reports import pointing as pointing_report


@dataclass(frozen=True)
class Task:
    """What a stage trains, in a form that workers can build."""

    build: Callable[[], nn.Module]
    """Makes the module, with any weights."""
    collate: ArrowBatchCollateFn
    extra: tuple[Tensor, ...] = ()
    """Further arguments of its `forward`, after the batch."""
    seeded: bool = False
    """Whether its `forward` draws at random, and so takes a generator as its last argument."""
    measure: Callable[[nn.Module], Validated] | None = None
    """Measures it during training."""


@dataclass(frozen=True)
class Feeding:
    """A stage's task with its data and its module."""

    task: Task
    load: Callable[[Any], Any]
    """Makes rows of positions of the stream."""
    module: Any
    """With the weights to start from."""


def train_worker(run: Run, stage: Stage, task: Task, start: dict[str, Tensor], logger: MetricLogger) -> None:
    """The loop of every stage: batches -> losses -> step."""
    device = training.prepare_worker(stage.settings)
    module = task.build()
    module.load_state_dict(start)
    session = Session(module, stage, device, logger)
    extra = [value.to(device) for value in task.extra]
    for batch in session.batches("images", run.batch_size, task.collate):
        generators = [session.generator()] if task.seeded else []
        with session.autocast():
            losses = session.model(batch, *extra, *generators)
        session.update(losses)
        if task.measure is not None:
            session.validate(run.validate_every, task.measure)
        session.end_step(losses, run.batch_size)


def train_stage(run: Run, stage: Stage, feeding: Feeding, logger: MetricLogger, fit: Fit = training.fit) -> None:
    """Feed a stream to the loop; the module gets the final weights."""
    module = feeding.module
    loop = partial(train_worker, run, stage, feeding.task, module.state_dict(), logger)
    streams = {"images": training.feed(feeding.load, run.batch_size, stage.settings)}
    module.load_state_dict(fit(loop, stage, streams))


def sam_feeding(run: Run) -> Feeding:
    """What trains a SAM of its own on the masks of base categories."""
    build = partial(SamTraining, run.sam_model, run.sam_training)
    load = mask_loader(
        run.storage,
        f"{run.boxes}-train",
        [],
        seed=run.sam_stage.seed,
        augmentation=run.augmentation,
        side=run.sam_model.image_size,
    )
    torch.manual_seed(run.sam_stage.seed)
    return Feeding(Task(build, MaskCollate(), seeded=True), load, build())


def train_sam(run: Run, active: ActiveRun) -> str:
    """Train a SAM on the masks of base categories; returns its checkpoint folder."""
    target, stage = storage.join(active.folder, "sam_model"), active.stage("sam", run.sam_stage)
    if storage.exists(storage.join(target, "config.json")):
        return target
    feeding = sam_feeding(run)
    train_stage(run, stage, feeding, active.tracked.logger())
    return active.save("sam_model", partial(write_sam, run, feeding.module.model))


def write_sam(run: Run, sam: SamModel, folder: Path) -> None:
    """Write a SAM's checkpoint folder."""
    save_checkpoint(sam, None, folder, splits={}, run=dataclasses.asdict(run))


def teach_sam(run: Run) -> str:
    """Train a SAM in a run of its own, for several OV-SAMs to learn from; returns its checkpoint folder.

    Raises:
        InputError: the table of masks is missing.
    """
    with runs.open_run(
        run,
        "ovsam",
        data_set=run.boxes,
        tables_read={"boxes": f"{run.boxes}-train"},
        inputs={},
        stages=(run.sam_stage,),
    ) as active:
        return train_sam(run, active)


def share_sam(run: Run, sam: SamModel, active: ActiveRun) -> str:
    """The folder of the given SAM, for other processes; a published file is converted to a folder."""
    if not storage.base_name(run.sam).endswith(".pth"):
        return storage.absolute(run.sam)  # actors of the cache have other working folders
    return active.save("sam_model", partial(write_sam, run, sam))


def train_adapter(run: Run, model: OvSam, sam_folder: str, sam_name: str, active: ActiveRun) -> None:
    """Cache the SAM's embeddings, then train the adapter to predict them from CLIP's levels."""
    settings, name = run.sam2clip_stage, distillation_table(run)
    cache = features.cache_name(run.storage, name, sam_name)
    with locks.hold(run.storage, f"features/{cache}"):
        features.cache_features(
            run.storage,
            name,
            sam_folder,
            sam_name,
            model.config.sam,
            rows_per_shard=run.rows_per_shard,
            workers=settings.workers,
            gpus=float(bool(settings.use_gpu)),
        )
    side = model.config.sam.image_size
    load = feature_loader(run.storage, name, cache, sam_name, seed=settings.seed, side=side)
    task = Task(partial(build_adapter_training, model.config), FeatureCollate(load.shape))
    feeding = Feeding(task, load, Sam2ClipTraining(model))
    train_stage(run, active.stage("sam2clip", settings), feeding, active.tracked.logger())


def build_adapter_training(config: OvSamConfig) -> nn.Module:
    """The second stage's module."""
    return Sam2ClipTraining(OvSam(config))


def build_head_training(config: OvSamConfig, settings: Clip2SamConfig) -> nn.Module:
    """The third stage's module."""
    return Clip2SamTraining(OvSam(config), settings)


def head_feeding(run: Run, model: OvSam, names: OvSamNames) -> Feeding:
    """What trains the mask decoder and the label branch on the base categories."""
    load = base_masks(run, names, model.config.sam.image_size)
    build = partial(build_head_training, model.config, run.clip2sam)
    task = Task(
        build,
        MaskCollate(),
        extra=(names.base.embeddings[:, None],),
        seeded=True,
        measure=partial(measure_head, storage.absolute(run.storage), run, names),  # the driver's folder
    )
    return Feeding(task, load, Clip2SamTraining(model, run.clip2sam))


def measure_head(storage_uri: str, run: Run, names: OvSamNames, module: nn.Module) -> Validated:
    """IoU and accuracy of an OV-SAM in training, with boxes as prompts."""
    assert isinstance(module, Clip2SamTraining)
    values, pictures = pointing_report.measure_pointing(
        storage_uri,
        f"{run.boxes}-eval",
        names.ids,
        names.vocabulary,
        module.model,
        limit=run.validate_images,
    )
    return Validated(values, pictures)


def build_text_training(sam: SamConfig, tower: TowerConfig, settings: TextToMaskConfig) -> nn.Module:
    """The module that learns names as prompts."""
    return TextToMask(TextToMaskModelConfig(sam=sam, tower=tower, text=settings))


def text_feeding(run: Run, sam: SamModel, clip: Clip) -> Feeding:
    """What trains a copy of the SAM to use CLIP's embeddings as prompts."""
    config, seed = model_config(run, sam.config, clip), run.text_stage.seed
    load = mask_loader(run.storage, f"{run.boxes}-train", [], seed=seed, side=config.sam.image_size)
    torch.manual_seed(seed)
    build = partial(build_text_training, config.sam, config.tower, run.text)
    module = build()
    assert isinstance(module, TextToMask)
    module.sam.load_state_dict(sam.state_dict())
    module.clip.load_tower(clip.model.visual.state_dict())
    return Feeding(Task(build, MaskCollate(), seeded=True), load, module)


def train_text(run: Run, sam: SamModel, clip: Clip, names: OvSamNames, active: ActiveRun) -> TextToMask:
    """Train a copy of the SAM to use CLIP's embeddings as prompts."""
    feeding = text_feeding(run, sam, clip)
    train_stage(run, active.stage("text", run.text_stage), feeding, active.tracked.logger())
    module: TextToMask = feeding.module
    module.set_text_centre(names.base.embeddings)
    return module.eval()


def teach_text(run: Run) -> str:
    """Train names as prompts of the SAM `--sam` in a run of its own; returns its checkpoint folder.

    Raises:
        InputError: a table, the teacher or the SAM is missing, or there are fewer than two base names.
    """
    clip, encoder = open_clip_teacher(run)
    names, (sam, sam_name) = read_names(run, encoder), open_sam(run)
    with runs.open_run(
        run,
        "ovsam",
        data_set=run.boxes,
        tables_read={"boxes": f"{run.boxes}-train", "categories": run.boxes},
        inputs={"teacher": encoder.teacher, "sam": sam_name},
        stages=(run.text_stage,),
    ) as active:
        text = train_text(run, sam, clip, names, active)
        return active.save("text_model", partial(save, run, text, encoder, names))


def train(run: Run) -> Trained[pointing_report.SegmentationReport]:
    """All stages, then the evaluation beside SAM and the baselines.

    Raises:
        InputError: a table or the teacher is missing or does not fit.
    """
    clip, encoder = open_clip_teacher(run)
    names = read_names(run, encoder)
    if run.text_to_mask and len(names.base) < 2:
        raise InputError(f"categories/{run.boxes}: {len(names.base)} base names, expected at least 2 for text prompts")
    # Refuses tables without masks before days of training.
    base_masks(run, names, run.sam_model.image_size)
    pointing_report.read_mask_rows(run.storage, f"{run.boxes}-eval", names.ids, run.eval_images)
    given = open_sam(run) if run.sam else None
    inputs = {"teacher": encoder.teacher, "sam": given[1] if given else "its own"}
    if run.distill_images:
        inputs["distill_images"] = tables.read_manifest(run.storage, "boxes", distillation_table(run)).digest
    with runs.open_run(
        run,
        "ovsam",
        title=descriptions.run_name("ovsam", run, CONFIGS),
        data_set=run.boxes,
        tables_read={"boxes": f"{run.boxes}-train", "categories": run.boxes},
        inputs=inputs,
        stages=tuple(run.stages.values()),
    ) as active:
        with active.timing("sam"):
            sam_folder = share_sam(run, given[0], active) if given else train_sam(run, active)
        active.outputs["sam"] = sam_folder
        sam = given[0] if given else load_model(storage.local_folder(sam_folder), SamModel)
        sam_name = given[1] if given else sam_id(sam)
        with active.timing("sam2clip"):
            torch.manual_seed(run.sam2clip_stage.seed)
            model = OvSam(model_config(run, sam.config, clip))
            model.load_teachers(sam, clip.model.visual)
            train_adapter(run, model, sam_folder, sam_name, active)
        with active.timing("clip2sam"):
            stage = active.stage("clip2sam", run.clip2sam_stage)
            train_stage(run, stage, head_feeding(run, model, names), active.tracked.logger())
        text = None
        if run.text_to_mask:
            with active.timing("text"):
                text = train_text(run, sam, clip, names, active)
                active.outputs["text"] = active.save("text_model", partial(save, run, text, encoder, names))
        evaluation = partial(evaluate_models, run, model.eval(), sam, text, names, active)
        return active.finish(partial(save, run, model, encoder, names), evaluation)


def dry_run(run: Run) -> None:
    """Run some steps of the stages in this process, and print what they cost and what their workers need.

    The adapter's stage needs a cache that only a training makes, and is left out.
    """
    clip, encoder = open_clip_teacher(run)
    names = read_names(run, encoder)
    sam = open_sam(run)[0] if run.sam else SamModel(run.sam_model)

    def train_some(share: Run, stage: Stage, rehearsal: Rehearsal) -> None:
        if stage.name == "sam":
            feeding = sam_feeding(share)
        elif stage.name == "text":
            feeding = text_feeding(share, sam, clip)
        else:
            feeding = head_feeding(share, OvSam(model_config(share, sam.config, clip)), names)
        train_stage(share, stage, feeding, rehearsal, rehearsal.fit)

    rehearse(run, {"sam": "sam_stage", "clip2sam": "clip2sam_stage", "text": "text_stage"}, train_some)


def save(run: Run, model: OvSam | TextToMask, encoder: ClipTextEncoder, names: OvSamNames, folder: Path) -> None:
    """Write a complete checkpoint folder."""
    save_checkpoint(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))


def evaluate_models(
    run: Run, model: OvSam, sam: SamModel, text: TextToMask | None, names: OvSamNames, active: ActiveRun, folder: str
) -> Evaluation[pointing_report.SegmentationReport]:
    """Evaluate the OV-SAM beside SAM and the baselines, and log the results."""

    def evaluate(device: str) -> pointing_report.SegmentationReport:
        return pointing_report.evaluate_ovsam(
            run.storage,
            f"{run.boxes}-eval",
            names.ids,
            names.vocabulary,
            model,
            sam,
            text,
            limit=run.eval_images,
            device=device,
        )

    report = training.on_device(run.clip2sam_stage, evaluate)
    active.tracked.log_data_set(run.storage, "boxes", f"{run.boxes}-eval", "evaluation")
    report.log(active.tracked, "eval", active.last_step)
    metric = "accuracy_novel" if "novel" in names.splits.values() else "accuracy_all"
    return Evaluation(metrics=report, headline=f"eval/{metric}", value=report.rows["ovsam", "box"][metric])


def prepare_data(run: Run) -> Run:
    """Publish the tables of `--data` or of `smoke` where they are missing; returns the run with its teacher and SAM."""
    run = choose_sam(run)
    teacher = find_teacher(run.storage, run.config, data=run.data, teacher=run.teacher, pretrained=run.pretrained)
    prepare_boxes.prepare_for_training(run.storage, run.config, run.boxes, run.data, run.held_out)
    if run.distill_images:
        prepare_boxes.prepare_images(run.storage, distillation_table(run), run.distill_images)
    return dataclasses.replace(run, teacher=teacher)


def main() -> None:
    """Read -> train -> evaluate; prints the table and the next command."""
    run = runs.begin(cli.parse(CONFIGS, __doc__), "ovsam")
    run = prepare_data(run)
    if run.dry_run:
        dry_run(run)
        return
    trained = train(run)
    command = cli.script_command("serve", "--model", trained.model)
    runs.print_results(run, trained, trained.metrics.table(), command)


if __name__ == "__main__":
    cli.execute(main)

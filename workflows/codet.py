"""CoDet: learn to detect from boxes of some categories and from captions that share a concept.

boxes (base categories) --> DetectionBatch --+
                                             +-> train -> AP50 of base and novel names -> runs/codet/NAME/model
groups (captioned images) -> ConceptBatch ---+
                             teacher (clip.py) embeds names and captions

First `boxes`: box supervision alone. Then `joint`, continued from it: every step takes both kinds of batch.

python workflows/codet.py --config smoke
python workflows/codet.py --config pictograms --teacher store/runs/clip/NAME/model
python workflows/codet.py --config photos_laptop --data photos/ --teacher CLIP
ray job submit --working-dir . -- python workflows/codet.py --config smoke --storage s3://bucket/ovd
"""

from workflows.common import brief_help

brief_help.answer(
    __name__,
    __file__,
    "storage data held_out boxes pairs teacher pretrained texts box_model backbone_weights "
    "workers precision use_gpu dry_run resume",
)

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data_prep import storage
from data_prep.streams.collate import DetectionCollate, GroupCollate
from ovd_models.batches import ConceptBatch
from ovd_models.checkpoints import load_encoder, save_checkpoint, save_encoder
from ovd_models.clip.model import ClipTextEncoder
from ovd_models.codet.drawing import draw_attention, draw_similarity
from ovd_models.codet.model import CoDet
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.evaluation import DetectionMetrics
from ovd_models.vocabulary import TextEncoder
from workflows import prepare_boxes, prepare_pairs
from workflows.common import cli, descriptions, runs, starting_weights, training
from workflows.common.optimisation import Optimisation
from workflows.common.rehearsal import Rehearsal, rehearse
from workflows.common.runs import ActiveRun, Evaluation, Trained
from workflows.common.session import Session
from workflows.common.teacher import CodetNames, find_teacher
from workflows.common.tracking import MetricLogger
from workflows.common.training import Fit, Stage
from workflows.configs import boxes as boxes_configs
from workflows.configs.codet import CONFIGS, Run
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.inputs.codet import (
    box_images,
    caption_groups,
    check_flags,
    find_weights,
    is_release,
    own_encoder,
    read_inputs,
)
from workflows.reports import evaluation
from workflows.reports.validation import ValidationSet, validation_set


@dataclass(frozen=True)
class Metrics:
    """Results after each stage."""

    box_supervised: DetectionMetrics
    codet: DetectionMetrics


def train_worker(
    run: Run,
    stage: Stage,
    names: CodetNames,
    encoder_folder: str,
    start: dict[str, Tensor],
    validation: ValidationSet,
    logger: MetricLogger,
) -> None:
    """The loop of both stages: batches -> losses -> step."""
    device = training.prepare_worker(stage.settings)
    model = CoDet(run.model)
    model.load_state_dict(start)
    if isinstance(model.detector, CenterNet2):  # before the session copies the model for its average
        model.detector.set_image_counts(torch.tensor(names.base_image_counts))
    session = Session(model, stage, device, logger)
    base_KD, concepts_CD = names.base_embeddings.to(device), names.concept_embeddings.to(device)
    detections = session.batches("boxes", run.detection_batch, DetectionCollate())
    groups: Iterator[ConceptBatch] = iter(())
    sentences = None
    if uses_captions(run, stage):
        sentences = caption_encoder(run, encoder_folder, device)
        collate = GroupCollate(len(concepts_CD), sentences.tokenize if sentences else None)
        groups = session.batches("groups", run.groups_per_step, collate)
    while not session.done:
        with_boxes, with_captions = kinds_of_step(run, stage, session.step)
        detection = next(detections) if with_boxes else None
        concepts = embed_captions(next(groups), sentences) if with_captions else None
        with session.autocast():
            losses = session.model(detection, concepts, base_KD, concepts_CD)
        session.update(losses)
        if session.due and session.rank == 0 and concepts is not None:
            log_attention(session.module, concepts, names, session.run_step, logger)
        session.validate(run.validate_every, validation.measure)
        images = run.detection_batch * with_boxes + run.groups_per_step * run.group_size * with_captions
        session.end_step(losses, images)


def caption_encoder(run: Run, folder: str, device: torch.device) -> ClipTextEncoder | None:
    """The frozen text tower on the worker's device; None if captions are not learned, or the teacher has no tower."""
    encoder = load_encoder(storage.local_folder(folder)) if run.model.caption_weight else None
    if not isinstance(encoder, ClipTextEncoder):
        return None
    encoder.tower.to(device)
    return encoder


def embed_captions(concepts: ConceptBatch, encoder: ClipTextEncoder | None) -> ConceptBatch:
    """The batch with its captions embedded, if they are tokenised."""
    if encoder is None or concepts.caption_tokens is None:
        return concepts
    return dataclasses.replace(concepts, caption_embeddings=encoder.embed_tokens(concepts.caption_tokens))


def kinds_of_step(run: Run, stage: Stage, step: int) -> tuple[bool, bool]:
    """Whether a step uses boxes, and whether it uses captions: the same on every worker."""
    captions = uses_captions(run, stage)
    if captions and run.alternate:
        return step % 2 == 0, step % 2 == 1
    return True, captions


def log_attention(model: nn.Module, concepts: ConceptBatch, names: CodetNames, step: int, logger: MetricLogger) -> None:
    """Log pictures of the first group: attention over its proposals, and their similarities."""
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
    """Whether a stage uses caption groups."""
    return stage.name == "joint" and run.model.supervision != "boxes"


def train_stage(
    run: Run,
    stage: Stage,
    names: CodetNames,
    encoder_folder: str,
    start: dict[str, Tensor],
    logger: MetricLogger,
    fit: Fit = training.fit,
) -> dict[str, Tensor]:
    """Feed the streams of one stage to the loop; returns the final weights."""
    settings = stage.settings
    boxes = box_images(run, names, settings.seed)
    every = 2 if run.alternate and uses_captions(run, stage) else 1
    streams = {"boxes": training.feed(boxes, run.detection_batch, settings, every)}
    if uses_captions(run, stage):
        groups = caption_groups(run, settings.seed)
        streams["groups"] = training.feed(groups, run.groups_per_step, settings, every, every - 1)
    loop = partial(train_worker, run, stage, names, encoder_folder, start, validation_set(run, names), logger)
    return fit(loop, stage, streams)


def train(run: Run) -> Trained[Metrics]:
    """Box supervision, then joint training; both are evaluated and saved.

    Raises:
        InputError: a table, the teacher or the embeddings are missing or do not fit.
    """
    title = descriptions.run_name("codet", run, CONFIGS)
    run, encoder, names, weights = read_inputs(run)
    boxes, joint = run.box_stage, run.joint_stage
    with runs.open_run(
        run,
        "codet",
        title=title,
        data_set=run.boxes,
        tables_read={
            "boxes": f"{run.boxes}-train",
            "categories": run.boxes,
            **({"concepts": run.pairs, "groups": run.pairs} if run.pairs else {}),
        },
        inputs={"teacher": encoder.teacher, "backbone": starting_weights.digest_of(run.backbone_weights)},
        stages=tuple(run.stages.values()),
    ) as active:
        encoder_folder, logger = active.save("encoder", partial(save_encoder, encoder)), active.tracked.logger()
        if not run.box_model:
            with active.timing("boxes"):
                weights = train_stage(run, active.stage("boxes", boxes), names, encoder_folder, weights, logger)
        if run.box_model and not is_release(run.box_model):
            boxes_model = run.box_model
        else:
            boxes_model = active.save("boxes_model", partial(save, run, weights, names, encoder))
        active.outputs["boxes_model"] = boxes_model
        with active.timing("evaluate"):
            last = joint if run.box_model else boxes
            supervised = evaluate_model(run, active, boxes_model, "eval/box_supervised", last)
            if not run.box_model:
                scores = {f"eval/{name}": value for name, value in supervised.metrics.summary().items()}
                active.tracked.log_metrics(scores, active.last_step)
        with active.timing("joint"):
            weights = train_stage(run, active.stage("joint", joint), names, encoder_folder, weights, logger)

        def evaluate_joint(model: str) -> Evaluation[Metrics]:
            found = evaluate_model(run, active, model, "eval", joint)
            return found.of(Metrics(supervised.metrics, found.metrics))

        return active.finish(partial(save, run, weights, names, encoder), evaluate_joint)


def dry_run(run: Run) -> None:
    """Run some steps of the stages in this process, and print what they cost and what their workers need."""
    run, encoder, names, weights = read_inputs(run)

    def train_some(share: Run, stage: Stage, rehearsal: Rehearsal) -> None:
        with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
            save_encoder(encoder, Path(folder))
            train_stage(share, stage, names, folder, weights, rehearsal, rehearsal.fit)

    rehearse(run, {"boxes": "box_stage", "joint": "joint_stage"}, train_some)


def save(run: Run, weights: dict[str, Tensor], names: CodetNames, encoder: TextEncoder, folder: Path) -> None:
    """Write a complete checkpoint folder."""
    model = CoDet(run.model)
    model.load_state_dict(weights)
    save_checkpoint(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))


def evaluate_model(
    run: Run, active: ActiveRun, model: str, prefix: str, stage: Optimisation
) -> Evaluation[DetectionMetrics]:
    """Evaluate a checkpoint and log the results under `prefix`."""
    settings = EvaluationRun(
        storage=run.storage,
        model=model,
        boxes=f"{run.boxes}-eval",
        max_detections=run.max_detections,
        iou_type="segm" if run.measure_masks else "bbox",
        synonyms=run.synonyms,
    )
    return evaluation.evaluate_trained(settings, active, stage, prefix)


def prepare_data(run: Run) -> Run:
    """Publish missing tables of `--data` or of `smoke`; returns the run with its teacher and starting weights."""
    run = find_weights(run)
    boxes = dataclasses.replace(
        boxes_configs.coco(), storage=run.storage, name=run.boxes, data=run.data, eval_images=run.held_out
    )
    if run.data and run.pairs:
        prepare_boxes.check_captions(boxes, run.pairs, run.config)
    own = own_encoder(run) if run.continues and not (run.teacher or run.texts) else ""
    check_flags(run)
    teacher = own or find_teacher(
        run.storage, run.config, data=run.data, teacher=run.teacher, pretrained=run.pretrained, texts=run.texts
    )
    prepare_boxes.prepare_for_training(run.storage, run.config, run.boxes, run.data, run.held_out)
    if run.data and run.pairs:
        prepare_boxes.prepare_captions(boxes, run.pairs, run.config)
    elif run.config == "smoke":
        prepare_pairs.prepare_smoke(run.storage)
    return dataclasses.replace(run, teacher=teacher)


def main() -> None:
    """Read -> train -> evaluate; prints the table and the next command."""
    run = runs.begin(cli.parse(CONFIGS, __doc__), "codet")
    run = prepare_data(run)
    if run.dry_run:
        dry_run(run)
        return
    trained = train(run)
    rows = {"box supervision": trained.metrics.box_supervised, "CoDet": trained.metrics.codet}
    runs.print_results(run, trained, runs.ap_table(rows), cli.script_command("serve", "--model", trained.model))


if __name__ == "__main__":
    cli.execute(main)

"""ViLD: distil an image-text teacher into a detector that has seen boxes of some categories only.

boxes (novel ones stripped) --> rpn --> proposals checkpoint
                                           | its best proposals of every image -> crops -> teacher (embed.py)
                                           v
boxes, regions --> DetectionBatch --> detector -> AP50 of base and novel names -> runs/vild/NAME/model

python workflows/vild.py --config smoke
python workflows/vild.py --config pictograms --teacher store/runs/clip/NAME/model
python workflows/vild.py --config pictograms --teacher CLIP --proposals store/runs/vild/NAME/proposals
python workflows/vild.py --config lvis_r50 --storage s3://bucket/ovd --teacher s3://bucket/clip
"""

from workflows.common import brief_help

brief_help.answer(
    __name__,
    __file__,
    "storage data held_out boxes teacher pretrained proposals box_model backbone_weights "
    "workers precision use_gpu dry_run resume",
)

import dataclasses
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_prep import storage
from data_prep.streams.box_loader import RegionSource
from data_prep.streams.collate import DetectionCollate
from ovd_models.checkpoints import save_checkpoint
from ovd_models.detectors.rcnn import ProposalNetwork
from ovd_models.evaluation import DetectionMetrics
from ovd_models.importers.backbones import load_backbone
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import TextEncoder
from workflows import embed, prepare_boxes
from workflows.common import cli, descriptions, runs, starting_weights, training
from workflows.common.rehearsal import Rehearsal, rehearse
from workflows.common.runs import ActiveRun, Evaluation, Trained
from workflows.common.session import Session
from workflows.common.teacher import find_teacher
from workflows.common.tracking import MetricLogger
from workflows.common.training import Fit, Stage
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.configs.vild import CONFIGS, Run
from workflows.inputs.vild import (
    VildNames,
    box_stream,
    check_flags,
    check_proposals,
    continue_model,
    detector_start,
    find_weights,
    read_inputs,
    read_weights,
    region_source,
)
from workflows.reports import evaluation
from workflows.reports.validation import ValidationSet, validation_set


def train_worker(
    run: Run,
    stage: Stage,
    start: dict[str, Tensor],
    names: VildNames,
    validation: ValidationSet,
    logger: MetricLogger,
) -> None:
    """The loop of both stages: batches -> losses -> step."""
    device = training.prepare_worker(stage.settings)
    model = build_model(run, stage.name)
    model.load_state_dict(start)
    session = Session(model, stage, device, logger)
    is_detector = isinstance(model, ViLD)
    given = (names.vocabulary.embeddings.to(device), names.trained.to(device)) if is_detector else ()
    for batch in session.batches("boxes", run.detection_batch, DetectionCollate()):
        with session.autocast():
            losses = session.model(batch, *given)
        session.update(losses)
        session.validate(run.validate_every if is_detector else 0, validation.measure)
        session.end_step(losses, run.detection_batch)


def build_model(run: Run, stage: str) -> ProposalNetwork | ViLD:
    """The model that a stage trains."""
    return ProposalNetwork(run.model.detector) if stage == "rpn" else ViLD(run.model)


def train_stage(
    run: Run,
    stage: Stage,
    names: VildNames,
    start: dict[str, Tensor],
    regions: RegionSource | None,
    logger: MetricLogger,
    fit: Fit = training.fit,
) -> dict[str, Tensor]:
    """Feed the stream of a stage (`rpn` or `detector`) to the loop; returns the final weights."""
    loader = box_stream(run, names, stage.name, stage.settings.seed, regions)
    loop = partial(train_worker, run, stage, start, names, validation_set(run, names), logger)
    return fit(loop, stage, {"boxes": training.feed(loader, run.detection_batch, stage.settings)})


def train(run: Run) -> Trained[DetectionMetrics]:
    """Proposals, their embeddings, then the detector, which is evaluated and saved.

    Raises:
        InputError: a table, the teacher or the embeddings are missing or do not fit.
    """
    title = descriptions.run_name("vild", run, CONFIGS)
    run, names, encoder = read_inputs(run)
    if run.proposals:
        check_proposals(run)
    if run.regions or run.model.detector.masks:  # checked before the hours of the first stage
        given = region_source(run, encoder, run.regions) if run.regions and run.model.distils else None
        box_stream(run, names, "detector", run.detector_stage.seed, given)
    with open_vild_run(run, title, encoder) as active:
        logger = active.tracked.logger()
        with active.timing("rpn"):
            proposals = run.proposals or train_proposals(run, names, encoder, active)
        with active.timing("embed"):
            regions = embed_proposals(run, encoder, proposals) if run.model.distils else None
        if regions:
            runs.hold_to_inputs(active.folder, {"regions": regions.name})
        active.outputs.update(proposals=proposals, regions=regions.name if regions else "")
        stage = active.stage("detector", run.detector_stage)
        with active.timing("detector"):
            weights = train_stage(run, stage, names, detector_start(run, proposals), regions, logger)
        model = ViLD(run.model)
        model.load_state_dict(weights)
        evaluation = partial(evaluate_model, run, active)
        return active.finish(partial(save, run, model, encoder, names), evaluation)


def open_vild_run(run: Run, title: str, encoder: TextEncoder) -> AbstractContextManager[ActiveRun]:
    """Open or resume the run of either stage."""
    return runs.open_run(
        run,
        "vild",
        title=title,
        data_set=run.boxes,
        tables_read={"boxes": run.train_table, "categories": run.boxes},
        inputs={"teacher": encoder.teacher, "backbone": starting_weights.digest_of(run.backbone_weights)},
        stages=tuple(run.stages.values()),
    )


def train_rpn(run: Run) -> str:
    """The first stage alone; returns its checkpoint.

    Raises:
        InputError: a table or the teacher is missing.
    """
    title = descriptions.run_name("vild", run, CONFIGS)
    run, names, encoder = read_inputs(run)
    with open_vild_run(run, title, encoder) as active:
        return train_proposals(run, names, encoder, active)


def train_proposals(run: Run, names: VildNames, encoder: TextEncoder, active: ActiveRun) -> str:
    """Train the proposal network on all training boxes, whatever their category; returns its checkpoint.

    A checkpoint is a whole detector: the box head of this one is untrained, and only its proposals are useful.
    """
    torch.manual_seed(run.rpn_stage.seed)
    network = ProposalNetwork(run.model.detector)
    weights = read_weights(run)
    if weights is not None:
        load_backbone(network, weights)
    stage = active.stage("rpn", run.rpn_stage)
    trained = train_stage(run, stage, names, network.state_dict(), None, active.tracked.logger())
    torch.manual_seed(run.rpn_stage.seed)  # a resumed run gives the same checkpoint, and so the same embeddings
    model = ViLD(dataclasses.replace(run.model, variant="text", supervised_names=()))
    model.detector.load_state_dict(trained, strict=False)
    return active.save("proposals", partial(save, run, model, encoder, names))


def dry_run(run: Run) -> None:
    """Run some steps of the stages in this process, and print what they cost and what their workers need.

    There are no embeddings of proposals yet, so the detector's steps are those of ViLD-text.
    """
    run, names, _ = read_inputs(run)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, variant="text", supervised_names=()))

    def train_some(share: Run, stage: Stage, rehearsal: Rehearsal) -> None:
        start = build_model(share, stage.name).state_dict()
        train_stage(share, stage, names, start, None, rehearsal, rehearsal.fit)

    rehearse(run, {"rpn": "rpn_stage", "detector": "detector_stage"}, train_some)


def embed_proposals(run: Run, encoder: TextEncoder, proposals: str) -> RegionSource:
    """The stored embeddings of the best proposals of every training image; computed where they are missing.

    Raises:
        InputError: `regions` names a table of another teacher or other crops.
    """
    name = run.regions
    if not name:
        weights = storage.local_folder(proposals) / "model.safetensors"
        provenance = (
            storage.file_sha256(weights),
            encoder.teacher,
            dataclasses.asdict(run.crops),
            run.max_proposals,
            run.train_table,
        )
        name = f"{run.train_table}-{storage.sha256(repr(provenance).encode())[:8]}"
        embed.embed(
            embed.Run(
                storage=run.storage,
                teacher=run.teacher,
                name=name,
                boxes=run.train_table,
                detector=proposals,
                max_proposals=run.max_proposals,
                crops=run.crops,
                # where the stages train
                embed=dataclasses.replace(run.embed, gpus=(run.embed.gpus or 1.0) if run.rpn_stage.use_gpu else 0.0),
            )
        )
    return region_source(run, encoder, name)


def evaluate_model(run: Run, active: ActiveRun, model: str) -> Evaluation[DetectionMetrics]:
    """Evaluate the checkpoint and log the results."""
    settings = EvaluationRun(
        storage=run.storage,
        model=model,
        boxes=f"{run.boxes}-eval",
        score_threshold=run.score_threshold,
        max_detections=run.max_detections,
        iou_type="segm" if run.measure_masks else "bbox",
        synonyms=run.synonyms,
    )
    return evaluation.evaluate_trained(settings, active, run.detector_stage, "eval")


def save(run: Run, model: ViLD, encoder: TextEncoder, names: VildNames, folder: Path) -> None:
    """Write a complete checkpoint folder."""
    save_checkpoint(model, encoder, folder, splits=names.splits, run=dataclasses.asdict(run))


def prepare_data(run: Run) -> Run:
    """Publish missing tables of `--data` or of `smoke`; returns the run with its teacher and starting weights."""
    run = find_weights(continue_model(run))
    check_flags(run)
    teacher = find_teacher(
        run.storage, run.config, data=run.data, teacher=run.teacher, pretrained=run.pretrained, texts=run.texts
    )
    prepare_boxes.prepare_for_training(run.storage, run.config, run.boxes, run.data, run.held_out)
    return dataclasses.replace(run, teacher=teacher)


def main() -> None:
    """Read -> train -> evaluate; prints the table and the next command."""
    run = runs.begin(cli.parse(CONFIGS, __doc__), "vild")
    run = prepare_data(run)
    if run.dry_run:
        dry_run(run)
        return
    trained = train(run)
    table = runs.ap_table({run.model.variant: trained.metrics})
    runs.print_results(run, trained, table, cli.script_command("serve", "--model", trained.model))


if __name__ == "__main__":
    cli.execute(main)

"""CoDet: learn to detect from boxes of some categories and from captions that share a concept.

boxes (base categories) --> DetectionBatch --+
                                             +-> train -> AP50 of base and novel names -> runs/codet/NAME/model
groups (captioned images) -> ConceptBatch ---+
                             teacher (clip.py) embeds names and captions

First `boxes`: box supervision alone. Then `joint`, continued from it: every step takes both kinds of batch.

python workflows/codet.py --config smoke
python workflows/codet.py --config pictograms --teacher store/runs/clip/NAME/model
python workflows/codet.py --config photos_laptop --data photos/ --teacher <CLIP>
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

from data_prep import storage, tables
from data_prep.streams.box_loader import DetectionLoader, detection_loader
from data_prep.streams.collate import DetectionCollate, GroupCollate
from data_prep.streams.group_loader import GroupLoader, group_loader
from ovd_models.batches import ConceptBatch
from ovd_models.checkpoints import load_encoder, load_model, save_checkpoint, save_encoder
from ovd_models.clip.model import ClipTextEncoder
from ovd_models.codet.drawing import draw_attention, draw_similarity
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.errors import InputError
from ovd_models.evaluation import DetectionMetrics
from ovd_models.importers.backbones import adopt_config, fit_config, load_backbone, read_backbone
from ovd_models.importers.codet import ImportedDetector, load_codet_release
from ovd_models.vocabulary import TextEncoder, build_vocabulary
from workflows import prepare_boxes, prepare_pairs
from workflows.common import cli, descriptions, runs, starting_weights, training
from workflows.common.optimisation import Optimisation
from workflows.common.rehearsal import Rehearsal, rehearse
from workflows.common.runs import ActiveRun, Evaluation, Trained
from workflows.common.session import Session
from workflows.common.teacher import CodetNames, find_teacher, open_encoder, read_codet_names
from workflows.common.tracking import MetricLogger
from workflows.common.training import Fit, Stage
from workflows.configs.codet import CONFIGS, Run
from workflows.configs.evaluation import Run as EvaluationRun
from workflows.reports import evaluation
from workflows.reports.validation import ValidationSet, validation_set

SAME_TEACHER = 0.5
"""Mean cosine of a teacher's and a released detector's embeddings of the same names, if it is its teacher."""


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


def box_images(run: Run, names: CodetNames, seed: int) -> DetectionLoader:
    """The stream of annotated images.

    Raises:
        InputError: the table is missing, or has no box or mask to train on.
    """
    return detection_loader(
        run.storage,
        f"{run.boxes}-train",
        names.base_ids,
        seed=seed,
        augmentation=run.augmentation,
        masks=run.model.architecture == "centernet2" and run.model.centernet2.mask_convs > 0,
        repeat_threshold=run.repeat_threshold,
    )


def caption_groups(run: Run, seed: int) -> GroupLoader:
    """The stream of caption groups.

    Raises:
        InputError: a table is missing, or no concept has enough images.
    """
    return group_loader(
        run.storage,
        run.pairs,
        seed=seed,
        group_size=run.group_size,
        sampling=run.sampling,
        augmentation=run.caption_augmentation,
    )


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
        stages=(boxes, joint),
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
            supervised = evaluate_model(run, active, boxes_model, "eval/box_supervised", boxes)
            if not run.box_model:
                scores = {f"eval/{name}": value for name, value in supervised.metrics.summary().items()}
                active.tracked.log_metrics(scores, active.last_step)
        with active.timing("joint"):
            weights = train_stage(run, active.stage("joint", joint), names, encoder_folder, weights, logger)

        def evaluate_joint(model: str) -> Evaluation[Metrics]:
            found = evaluate_model(run, active, model, "eval", joint)
            return found.of(Metrics(supervised.metrics, found.metrics))

        return active.finish(partial(save, run, weights, names, encoder), evaluate_joint)


def read_inputs(run: Run) -> tuple[Run, TextEncoder, CodetNames, dict[str, Tensor]]:
    """The run completed by its data, the names and their encoder, and the weights to start from."""
    run = find_weights(run)
    encoder = open_encoder(run.storage, run.boxes, teacher=run.teacher, texts=run.texts, prompt_set=run.prompt_set)
    names = read_codet_names(run.storage, run.boxes, run.pairs, encoder, run.synonyms)
    # All tables are checked before the hours of the first stage.
    box_images(run, names, run.box_stage.seed)
    evaluation.check_images(run.storage, f"{run.boxes}-eval")
    if run.model.supervision != "boxes":
        caption_groups(run, run.joint_stage.seed)
    run, weights = initial_weights(run, names, encoder.teacher)
    return run, encoder, names, weights


def dry_run(run: Run) -> None:
    """Run some steps of both stages in this process, and print what they cost and what their workers need."""
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
        synonyms=run.synonyms,
    )
    return evaluation.evaluate_trained(settings, active, stage, prefix)


def find_weights(run: Run) -> Run:
    """The run with the file that its backbone starts from, or with `from_scratch`; a box model brings its backbone.

    Raises:
        InputError: the file does not exist, or the config needs one and none is found.
    """
    if run.box_model:
        return run
    model = run.model
    backbone = (model.centernet2 if model.architecture == "centernet2" else model.detector).backbone
    file = starting_weights.find_backbone(
        run.config, run.backbone_weights, run.published_backbone, backbone, from_scratch=run.from_scratch
    )
    return dataclasses.replace(run, backbone_weights=file or "auto", from_scratch=not file)


def initial_weights(run: Run, names: CodetNames, teacher: str) -> tuple[Run, dict[str, Tensor]]:
    """Weights to start from, and the run with the embedding width, batch norm and strides that go with them.

    Raises:
        InputError: the backbone's weights or the box model do not fit.
    """
    given = read_box_model(run, names, teacher) if run.box_model else None
    if given is not None and run.continues:
        run = adopt_architecture(run, given.config)
    model, file = run.model, run.backbone_weights
    detector, centernet2 = model.detector, model.centernet2
    if given is not None:
        detector = adopt_config(detector, given.config.detector)
        centernet2 = adopt_config(centernet2, given.config.centernet2)
        backbone = None
    elif model.architecture == "centernet2":
        backbone = None if file == "auto" else read_backbone(storage.local_file(file), centernet2)
        centernet2 = fit_config(centernet2, backbone)
    else:
        backbone = None if file == "auto" else read_backbone(storage.local_file(file), detector)
        detector = fit_config(detector, backbone)
    width = names.base_embeddings.shape[1]
    detector = dataclasses.replace(detector, embed_dim=width)
    centernet2 = dataclasses.replace(centernet2, embed_dim=width)
    run = dataclasses.replace(run, model=dataclasses.replace(model, detector=detector, centernet2=centernet2))
    torch.manual_seed(run.box_stage.seed)
    start = CoDet(run.model)
    if backbone is not None:
        load_backbone(start.detector, backbone)
    weights = start.state_dict()
    return run, weights if given is None else given_weights(run.box_model, given, weights)


def adopt_architecture(run: Run, given: CoDetConfig) -> Run:
    """The run with the architecture of the detector that it continues; its training settings stay."""
    sizes = {name: getattr(given, name) for name in ("architecture", "detector", "centernet2")}
    stage = run.joint_stage
    if given.architecture == "centernet2":  # whose backbone has another name
        renamed = {name.replace(".backbone.", ".pyramid."): factor for name, factor in stage.rate_factors.items()}
        stage = dataclasses.replace(stage, rate_factors=renamed)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **sizes), joint_stage=stage)


def is_release(box_model: str) -> bool:
    """Whether `--box-model` is a released file, not a checkpoint folder."""
    return box_model.endswith((".pth", ".pkl"))


def read_box_model(run: Run, names: CodetNames, teacher: str) -> CoDet:
    """The detector that `--box-model` names.

    Raises:
        InputError: it is no detector, or was trained with another teacher.
    """
    if is_release(run.box_model):
        imported = load_codet_release(storage.local_file(run.box_model))
        check_release_teacher(run, imported, names)
        return imported.model
    folder = storage.local_folder(run.box_model)
    given, its_teacher = load_model(folder, CoDet), load_encoder(folder / "text").teacher
    if its_teacher != teacher:
        raise InputError(f"--box-model {run.box_model}: trained with teacher {its_teacher}, expected {teacher}")
    return given


def check_release_teacher(run: Run, imported: ImportedDetector, names: CodetNames) -> None:
    """Check that the teacher embeds the base names about as a released file does, which records no teacher.

    Two prompts of one CLIP give a name similar embeddings; those of two CLIPs are unrelated.

    Raises:
        InputError: the embeddings have another width or are unrelated.
    """
    base = [names.categories[key] for key in names.base_ids]
    ours_KD = names.base_embeddings
    if imported.encoder is not None:
        theirs_KD = build_vocabulary(imported.encoder, base).embeddings
    else:
        every = tables.read_table(run.storage, "categories", run.boxes, ["category_id"])["category_id"].to_pylist()
        table, rows = imported.name_embeddings, {key: row for row, key in enumerate(sorted(every))}
        if table is None or len(table) != len(rows):
            print(f"--box-model {run.box_model}: records no teacher; Detic and CoDet used CLIP ViT-B/32", flush=True)
            return
        theirs_KD = table[[rows[key] for key in names.base_ids]]
    width, expected = ours_KD.shape[1], theirs_KD.shape[1]
    similarity = float((ours_KD * theirs_KD).sum(1).mean()) if width == expected else 0.0
    if similarity < SAME_TEACHER:
        raise InputError(
            f"--box-model {run.box_model}: the teacher embeds names otherwise (width {width} and {expected}, mean "
            f"cosine {similarity:.2f}), expected the file's teacher, CLIP ViT-B/32"
        )


def given_weights(origin: str, given: CoDet, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The initial weights with those of the detector that `--box-model` names.

    Raises:
        InputError: it is no detector of this architecture.
    """
    state = given.state_dict()
    for name, value in start.items():
        found = list(state[name].shape) if name in state else "nothing"
        if found != list(value.shape) and not name.startswith("aggregations."):
            raise InputError(f"--box-model {origin}: {name}: found {found}, expected {list(value.shape)}")
    same = {name for name, value in start.items() if name in state and state[name].shape == value.shape}
    return {name: state[name] if name in same else value for name, value in start.items()}


def prepare_data(run: Run) -> Run:
    """Publish missing tables of `--data` or of `smoke`; returns the run with its teacher and starting weights."""
    run = find_weights(run)
    boxes = dataclasses.replace(
        prepare_boxes.coco(), storage=run.storage, name=run.boxes, data=run.data, eval_images=run.held_out
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


def check_flags(run: Run) -> None:
    """Check that the files of flags are there, before tables are made.

    Raises:
        InputError: one is not, or the prompt set is unknown.
    """
    if run.box_model and is_release(run.box_model):
        starting_weights.check_file("--box-model", run.box_model)
    elif run.box_model:
        cli.check_checkpoint("--box-model", run.box_model)
    starting_weights.check_given(run.texts, run.backbone_weights, run.prompt_set)


def own_encoder(run: Run) -> str:
    """The text encoder of the detector that is continued.

    Raises:
        InputError: there is no such folder.
    """
    folder = storage.join(run.box_model, "text") if run.box_model else ""
    if not folder or not storage.exists(folder):
        expected = "a checkpoint folder, such as `python workflows/import_weights.py` makes of a released file"
        raise InputError(f"--box-model {run.box_model}: no detector to continue, expected {expected}")
    return folder


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

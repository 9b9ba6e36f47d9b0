"""What CoDet trains on and starts from: the streams of its tables, and the weights of a backbone or a box model."""

import dataclasses

import torch
from torch import Tensor

from data_prep import storage, tables
from data_prep.streams.box_loader import DetectionLoader, detection_loader
from data_prep.streams.group_loader import GroupLoader, group_loader
from ovd_models.checkpoints import load_encoder, load_model
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.errors import InputError
from ovd_models.importers.backbones import adopt_config, fit_config, load_backbone, read_backbone
from ovd_models.importers.codet import ImportedDetector, load_codet_release
from ovd_models.vocabulary import TextEncoder, build_vocabulary
from workflows.common import cli, starting_weights
from workflows.common.teacher import CodetNames, open_encoder, read_codet_names
from workflows.configs.codet import Run
from workflows.reports import evaluation

SAME_TEACHER = 0.5
"""Mean cosine of a teacher's and a released detector's embeddings of the same names, if it is its teacher."""


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
    return storage.base_name(box_model).endswith((".pth", ".pkl"))


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

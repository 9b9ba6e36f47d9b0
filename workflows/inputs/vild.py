"""What ViLD trains on and starts from: names, streams of its tables, proposals, and weights."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep import storage, tables
from data_prep.streams.box_loader import DetectionLoader, RegionSource, detection_loader
from ovd_models.checkpoints import load_encoder, load_model, read_info
from ovd_models.detectors.rcnn import ProposalNetwork, RCNNConfig
from ovd_models.errors import InputError
from ovd_models.importers.backbones import BackboneWeights, adopt_config, fit_config, load_backbone, read_backbone
from ovd_models.vild.model import ViLD
from ovd_models.vocabulary import TextEncoder, Vocabulary, build_vocabulary
from workflows.common import cli, starting_weights
from workflows.common.teacher import open_encoder, read_categories, read_synonyms
from workflows.configs.vild import Run
from workflows.reports import evaluation


@dataclass(frozen=True)
class VildNames:
    """The names of a box set; those with training boxes come first."""

    ids: list[int]
    """Category ids of the names with training boxes."""
    splits: dict[str, str]
    """`base` or `novel` by name."""
    categories: dict[int, str]
    """Category id -> name, for categories with a split."""
    vocabulary: Vocabulary
    """All names."""

    @property
    def trained(self) -> Tensor:
        """[K] bool: whether a name has training boxes."""
        return torch.arange(len(self.vocabulary)) < len(self.ids)


def read_inputs(run: Run) -> tuple[Run, VildNames, TextEncoder]:
    """The run completed by its data and starting weights, the names and their encoder."""
    run = find_weights(continue_model(run))
    encoder = open_encoder(run.storage, run.boxes, teacher=run.teacher, texts=run.texts, prompt_set=run.prompt_set)
    check_teacher(run, encoder)
    names = read_names(run, encoder)
    # Both tables are checked before the hours of the first stage.
    box_stream(run, names, "rpn", run.rpn_stage.seed, None)
    evaluation.check_images(run.storage, f"{run.boxes}-eval")
    return complete(run, names), names, encoder


def read_names(run: Run, encoder: TextEncoder) -> VildNames:
    """Embed the names of the box set; prints the categories without a split, which are not used."""
    categories, splits = read_categories(run.storage, run.boxes)
    rows = tables.read_table(run.storage, "categories", run.boxes, ["name", "split"]).to_pylist()
    without = [row["name"] for row in rows if not row["split"]]
    if without:
        print(f"categories/{run.boxes}: {len(without)} without a split are not used: {', '.join(without[:20])}")
    trained = [key for key, name in categories.items() if run.novel_boxes or splits[name] == "base"]
    others = [key for key in categories if key not in set(trained)]
    ordered = [categories[key] for key in (*trained, *others)]
    words = read_synonyms(run.storage, run.boxes) if run.synonyms == "mean" else None
    return VildNames(trained, splits, categories, build_vocabulary(encoder, ordered, splits, words))


def box_stream(run: Run, names: VildNames, stage: str, seed: int, regions: RegionSource | None) -> DetectionLoader:
    """The images and boxes of a stage (`rpn` or `detector`).

    Raises:
        InputError: the table has no box or mask to train on, or `regions` are of other images or another teacher.
    """
    return detection_loader(
        run.storage,
        run.train_table,
        names.ids,
        seed=seed,
        augmentation=run.augmentation,
        masks=run.model.detector.masks and stage == "detector",
        repeat_threshold=run.repeat_threshold,
        regions=regions,
    )


def region_source(run: Run, encoder: TextEncoder, name: str) -> RegionSource:
    """How a step samples the stored embeddings of that name."""
    return RegionSource(
        name=name,
        teacher=encoder.teacher,
        crops=dataclasses.asdict(run.crops),
        num_candidates=run.max_proposals,
        num_sampled=run.regions_per_step,
    )


def continue_model(run: Run) -> Run:
    """The run with the architecture and the proposals of the model that it continues, if any.

    Raises:
        InputError: there is no such model, or `finetune` is given none.
    """
    if not run.box_model:
        if run.config == "finetune":
            raise InputError("--box-model: missing, expected the ViLD checkpoint to continue")
        return run
    cli.check_checkpoint("--box-model", run.box_model)
    model = load_model(storage.local_folder(run.box_model), ViLD).config
    return dataclasses.replace(run, model=model, proposals=run.proposals or run.box_model)


def find_weights(run: Run) -> Run:
    """The run with the file that its backbone starts from, or with `from_scratch`; given proposals have a backbone.

    Raises:
        InputError: the file does not exist.
    """
    if run.proposals and run.start_from_proposals:
        return run
    backbone = run.model.detector.backbone
    file = starting_weights.find_backbone(
        run.config, run.backbone_weights, run.published_backbone, backbone, from_scratch=run.from_scratch
    )
    return dataclasses.replace(run, backbone_weights=file or "auto", from_scratch=not file)


def check_flags(run: Run) -> None:
    """Check that the files and tables of flags are there, before tables are made.

    Raises:
        InputError: one is not, or the prompt set is unknown.
    """
    if run.proposals:
        cli.check_checkpoint("--proposals", run.proposals)
    if run.regions:
        tables.read_manifest(run.storage, "regions", run.regions)
    starting_weights.check_given(run.texts, run.backbone_weights, run.prompt_set)


def check_teacher(run: Run, encoder: TextEncoder) -> None:
    """Check that the model that is continued was trained with this teacher.

    Raises:
        InputError: it was trained with another.
    """
    if not run.box_model:
        return
    theirs = load_encoder(storage.local_folder(storage.join(run.box_model, "text"))).teacher
    if theirs != encoder.teacher:
        raise InputError(f"--box-model {run.box_model}: trained with teacher {theirs}, expected {encoder.teacher}")


def check_proposals(run: Run) -> None:
    """Check that the given proposals fit this detector and were not trained on boxes that this run must not use.

    Raises:
        InputError: they do not fit.
    """
    folder = storage.local_folder(run.proposals)
    theirs, ours = load_model(folder, ViLD).config.detector, run.model.detector
    for name in ("backbone", "backbone_options", "strides", "anchor_sizes", "pyramid_channels"):
        if getattr(theirs, name) != getattr(ours, name):
            found, expected = getattr(theirs, name), getattr(ours, name)
            raise InputError(f"--proposals {run.proposals}: {name} is {found!r}, expected {expected!r}")
    if read_info(folder).run.get("novel_boxes") and not run.novel_boxes:
        raise InputError(
            f"--proposals {run.proposals}: trained on novel boxes, expected proposals trained on base boxes"
        )


def complete(run: Run, names: VildNames) -> Run:
    """The run completed by its data and weights: embedding width, batch norm, names of a supervised classifier."""
    detector = dataclasses.replace(fit_detector(run), embed_dim=names.vocabulary.embeddings.shape[1])
    supervised = names.vocabulary.names[: len(names.ids)] if run.model.variant == "supervised" else ()
    return dataclasses.replace(
        run, model=dataclasses.replace(run.model, detector=detector, supervised_names=supervised)
    )


def fit_detector(run: Run) -> RCNNConfig:
    """The run's detector with the batch norm and strides that go with the weights it starts from."""
    if run.proposals and run.start_from_proposals:
        theirs = load_model(storage.local_folder(run.proposals), ViLD).config.detector
        return adopt_config(run.model.detector, theirs)
    return fit_config(run.model.detector, read_weights(run))


def read_weights(run: Run) -> BackboneWeights | None:
    """The weights that the backbone of a completed run starts from.

    Raises:
        InputError: the file cannot be read, or holds no backbone.
    """
    if run.backbone_weights == "auto":
        return None
    return read_backbone(storage.local_file(run.backbone_weights), run.model.detector)


def detector_start(run: Run, proposals: str) -> dict[str, Tensor]:
    """The detector's initial weights: the proposal network's, or only the backbone's."""
    torch.manual_seed(run.detector_stage.seed)
    model = ViLD(run.model)
    if run.box_model:
        return load_model(storage.local_folder(run.box_model), ViLD).state_dict()
    if run.start_from_proposals:
        trained = load_model(storage.local_folder(proposals), ViLD).detector.state_dict()
        first_stage = ProposalNetwork(run.model.detector).state_dict()
        model.detector.load_state_dict({name: trained[name] for name in first_stage}, strict=False)
    else:
        weights = read_weights(run)
        if weights is not None:
            load_backbone(model.detector, weights)
    return model.state_dict()

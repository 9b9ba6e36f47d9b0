"""Settings of `codet.py`: a `Run` holds everything that affects results; each function returns a named one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from data_prep.streams.augmentation import Augmentation
from data_prep.streams.group_loader import Sampling
from ovd_models.codet.model import CoDetConfig
from ovd_models.errors import InputError
from ovd_models.importers.codet import released_architectures
from ovd_models.vocabulary import SynonymMean
from workflows.common.optimisation import STEPS_PER_BLOCK, Optimisation, check_shared
from workflows.common.starting_weights import Published, PublishedBackbone
from workflows.configs.detectors import (
    EVA02_L,
    MIIL_RESNET50,
    MSRA_RESNET50,
    RESNET50,
    SWIN_B,
    large_photo_detector,
    photo_detector,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of CoDet."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config; starts the run's name."""
    boxes: str
    """Name of the box set: tables `boxes/<name>-train`, `boxes/<name>-eval`, `categories/<name>`."""
    pairs: str
    """Name of the tables `pairs`, `concepts` and `groups`."""
    teacher: str = ""
    """CLIP checkpoint, or with `pretrained` an architecture of open_clip, that embeds names and captions."""
    pretrained: str = ""
    """Released weights of `teacher`, an architecture of open_clip: a tag (`openai`), or the path or URI of a file."""
    prompt_set: str = ""
    """Prompt templates around names, see `ovd_models/prompts.py`; the teacher's own if empty."""
    synonyms: SynonymMean = "none"
    """Use of the synonyms in `categories`: none, or the mean of their embeddings."""
    texts: str = ""
    """Replaces the teacher: a .npy file with an embedding for each category of the data, in category-id order."""
    data: str = ""
    """A folder with `instances.json` and `images/`, or another set that `prepare_boxes.py --data` reads, whose tables
    are made first. Captions are `captions.tsv` or COCO's `captions_*.json` in it; only the published configs need
    them."""
    held_out: int = 0
    """Images of `data` that are held out for evaluation, if it has no part for that; 0 for a fifth of them, at most
    20."""
    backbone_weights: str = "auto"
    """A file with the backbone's weights; `auto` is the published one of the config, if it is on this machine."""
    from_scratch: bool = False
    """Start from random weights, without a search for published ones."""
    published_backbone: Published = field(default_factory=PublishedBackbone)
    model: CoDetConfig = field(default_factory=CoDetConfig)
    detection_batch: int = 8
    """Images with boxes in a step, over all workers."""
    groups_per_step: int = 4
    """Caption groups in a step, over all workers."""
    group_size: int = 4
    """Images in a group."""
    sampling: Sampling = field(default_factory=Sampling)
    """How groups are drawn."""
    alternate: bool = False
    """Boxes in even steps and captions in odd ones, on all workers; otherwise both in every step."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation of images with boxes."""
    caption_augmentation: Augmentation = field(default_factory=Augmentation)
    """Augmentation of captioned images."""
    repeat_threshold: float = 0.0
    """Repeat-factor sampling: images of categories in less than this fraction of the images are repeated; 0: never."""
    box_stage: Optimisation
    joint_stage: Optimisation
    box_model: str = ""
    """Folder or URI of a detector checkpoint, or a file released by Detic (.pth, .pkl), to start the joint stage from,
    instead of training the box stage."""
    continues: bool = False
    """Take the architecture from `box_model`, and without a teacher its own text encoder."""
    max_detections: int = 100
    """Detections of an image in evaluation."""
    measure_masks: bool = False
    """Evaluate masks instead of boxes, as is usual on LVIS; `centernet2` predicts them."""
    validate_every: int = 5000
    """Steps between measurements on the first `validate_images` of the evaluation set during training; 0 for none."""
    validate_images: int = 100
    wait_minutes: float = 20.0
    """Minutes to wait for a cluster that grows to the workers' number."""
    dry_run: bool = False
    """Only run some steps of each stage in this process, and print what they cost and what the workers need."""
    resume: str = ""
    """Name of a run to continue."""

    @property
    def stages(self) -> dict[str, Optimisation]:
        """The stages that are trained, by their fields."""
        boxes = {} if self.box_model else {"box_stage": self.box_stage}
        return {**boxes, "joint_stage": self.joint_stage}

    def __post_init__(self) -> None:
        """Check that batches can be shared among the workers."""
        if self.continues and self.model.supervision != "boxes" and not self.pairs:
            raise InputError("--pairs: missing, expected the captions that the detector is continued with")
        for stage in self.stages.values():
            check_shared("detection_batch", self.detection_batch, stage)
        if self.model.supervision != "boxes":
            check_shared("groups_per_step", self.groups_per_step, self.joint_stage)
        if self.group_size < 2:
            raise InputError(f"group_size: {self.group_size}, expected at least 2")
        if self.alternate and self.joint_stage.checkpoint_every % (2 * STEPS_PER_BLOCK):
            expected = f"a multiple of {2 * STEPS_PER_BLOCK}, since kinds of batches alternate"
            raise InputError(f"checkpoint_every: {self.joint_stage.checkpoint_every}, expected {expected}")
        if self.model.aggregation == "learned" and self.model.guidance == "support":
            raise InputError('model.guidance: "support", expected "dimensions" or "none" for the learned aggregation')
        if self.model.aggregation == "learned" and self.model.group_size != self.group_size:
            raise InputError(f"model.group_size: {self.model.group_size}, expected the group_size, {self.group_size}")


def smoke() -> Run:
    """Runs in seconds; builds its own tables and an untrained teacher."""
    quick = Optimisation(steps=5, learning_rate=1e-3, checkpoint_every=5, log_every=5, workers=0)
    return Run(
        config="smoke",
        boxes="smoke",
        pairs="smoke",
        detection_batch=2,
        validate_every=3,
        validate_images=4,
        groups_per_step=2,
        group_size=2,
        sampling=Sampling(min_side=100),
        box_stage=quick,
        joint_stage=quick,
    )


def pictograms() -> Run:
    """The pictogram world: 128 px scenes, a detector of 1.7 M parameters, minutes on two cores."""
    return Run(
        config="pictograms",
        boxes="pictograms",
        pairs="pictograms",
        sampling=Sampling(min_side=100),
        groups_per_step=2,
        validate_every=150,
        validate_images=60,
        # Small operators parallelise badly: two processes with one thread each use less CPU than one with two.
        box_stage=Optimisation(steps=300, learning_rate=2e-3, workers=2),
        joint_stage=Optimisation(steps=600, learning_rate=2e-3, workers=2),
    )


def pictograms_quick() -> Run:
    """`pictograms` in half the steps; the demo's."""
    run = pictograms()
    box_stage = dataclasses.replace(run.box_stage, steps=150, optimiser="muon")
    joint_stage = dataclasses.replace(run.joint_stage, steps=300, optimiser="muon")
    return dataclasses.replace(run, config="pictograms_quick", box_stage=box_stage, joint_stage=joint_stage)


def photos() -> Run:
    """Photographs in COCO's form, a ResNet-50, 20 steps: shows that they can be read and trained on; no model."""
    return Run(
        config="photos",
        boxes="photos",
        pairs="photos",
        published_backbone=RESNET50,
        model=CoDetConfig(detector=photo_detector(), num_proposals=32),
        detection_batch=2,
        groups_per_step=1,
        augmentation=Augmentation(flip_probability=0.5),
        box_stage=Optimisation(steps=20, learning_rate=2e-4, checkpoint_every=20, log_every=5),
        joint_stage=Optimisation(steps=20, learning_rate=1e-4, checkpoint_every=20, log_every=5),
    )


def photos_laptop() -> Run:
    """Photographs on a laptop: small images, 600 steps of 4 for boxes and 600 with captions; hours."""
    boxes = Optimisation(steps=600, learning_rate=2e-4, checkpoint_every=100)
    return dataclasses.replace(
        photos(),
        config="photos_laptop",
        detection_batch=4,
        group_size=2,
        groups_per_step=2,
        box_stage=boxes,
        joint_stage=dataclasses.replace(boxes, learning_rate=1e-4),
    )


def photos_gpu() -> Run:
    """Photographs on one GPU: 480 to 800 px, 6,000 steps of 8 for boxes and 6,000 with captions."""
    laptop = photos_laptop()
    boxes = dataclasses.replace(laptop.box_stage, steps=6_000, checkpoint_every=500, log_every=20, use_gpu=True)
    return dataclasses.replace(
        laptop,
        config="photos_gpu",
        model=CoDetConfig(detector=large_photo_detector(), num_proposals=32),
        detection_batch=8,
        group_size=4,
        groups_per_step=4,
        box_stage=boxes,
        joint_stage=dataclasses.replace(boxes, learning_rate=1e-4),
    )


def photos_8gpu() -> Run:
    """`photos_gpu` on eight GPUs: eight times the images a step and twice the steps, for COCO's size and more."""
    one = photos_gpu()
    boxes = dataclasses.replace(one.box_stage, steps=12_000, learning_rate=5e-4, workers=8)
    return dataclasses.replace(
        one,
        config="photos_8gpu",
        detection_batch=64,
        groups_per_step=32,
        box_stage=boxes,
        joint_stage=dataclasses.replace(boxes, learning_rate=2.5e-4),
    )


def finetune() -> Run:
    """A trained or imported detector, continued on some labelled images; needs --box-model, and --data or --boxes.

    All names are trained, none is held out. The backbone learns at a tenth of the rate.
    """
    stage = Optimisation(
        steps=200,
        learning_rate=2e-4,
        checkpoint_every=50,
        rate_factors={"detector.backbone.": 0.1},
    )
    return Run(
        config="finetune",
        boxes="finetune",
        pairs="",
        continues=True,
        model=CoDetConfig(supervision="boxes"),
        detection_batch=4,
        augmentation=Augmentation(flip_probability=0.5),
        box_stage=stage,
        joint_stage=stage,
        validate_every=50,
    )


def coco_r50() -> Run:
    """OV-COCO as published: R50-C4, groups of two, 16 images with boxes and 64 captioned ones a step, on 8 GPUs."""
    released = released_architectures()["r50_c4"].config
    stage = Optimisation(
        steps=90_000,
        learning_rate=0.02,
        weight_decay=1e-4,
        optimiser="sgd",
        warmup=1 / 90,
        decay_at=(2 / 3, 8 / 9),
        clip_norm=None,
        clip_value=1.0,
        checkpoint_every=1000,
        log_every=20,
        workers=8,
        use_gpu=True,
    )
    return Run(
        config="coco_r50",
        boxes="coco",
        pairs="coco",
        prompt_set="name:a",
        published_backbone=MSRA_RESNET50,
        model=dataclasses.replace(
            released,
            aggregation="learned",
            num_proposals=32,
            group_size=2,
            caption_sizes=(400, 667),
            mentioned_are_negatives=True,
        ),
        detection_batch=16,
        groups_per_step=32,
        group_size=2,
        augmentation=Augmentation(flip_probability=0.5),
        caption_augmentation=Augmentation(flip_probability=0.5),
        box_stage=stage,
        joint_stage=dataclasses.replace(stage, rate_factors={"aggregations": 0.1}),
    )


def lvis_r50() -> Run:
    """OV-LVIS as published: CenterNet2, groups of eight, 64 images with boxes and 256 captioned ones, on 8 GPUs."""
    released = released_architectures()["centernet2_r50"].config
    stage = Optimisation(
        steps=90_000,
        learning_rate=2e-4,
        weight_decay=1e-4,
        schedule="cosine",
        warmup=1 / 90,
        clip_norm=None,
        clip_value=1.0,
        checkpoint_every=1000,
        log_every=20,
        workers=8,
        use_gpu=True,
    )
    return Run(
        config="lvis_r50",
        boxes="lvis",
        pairs="cc3m",
        prompt_set="name:a",
        max_detections=300,
        measure_masks=True,
        published_backbone=MIIL_RESNET50,
        model=dataclasses.replace(
            released,
            aggregation="learned",
            num_proposals=128,
            group_size=8,
            caption_sizes=(400, 400),
            sampled_concepts=50,
            mentioned_are_negatives=True,
        ),
        detection_batch=64,
        groups_per_step=32,
        group_size=8,
        augmentation=Augmentation(flip_probability=0.5, side=800),
        caption_augmentation=Augmentation(flip_probability=0.5, side=400, scales=(0.5, 1.5)),
        repeat_threshold=1e-3,
        box_stage=stage,
        joint_stage=stage,
    )


def lvis_swin_b() -> Run:
    """`lvis_r50` with Swin-B: half the batch, twice the steps, half the learning rate, larger images."""
    paper = lvis_r50()
    released = released_architectures()["centernet2_swin_b"].config
    stage = dataclasses.replace(paper.joint_stage, steps=180_000, learning_rate=1e-4, warmup=1 / 180)
    return dataclasses.replace(
        paper,
        config="lvis_swin_b",
        published_backbone=SWIN_B,
        model=dataclasses.replace(paper.model, centernet2=released.centernet2, caption_sizes=(448, 448)),
        detection_batch=32,
        groups_per_step=16,
        augmentation=dataclasses.replace(paper.augmentation, side=896),
        caption_augmentation=dataclasses.replace(paper.caption_augmentation, side=448),
        box_stage=stage,
        joint_stage=stage,
    )


def lvis_eva() -> Run:
    """`lvis_r50` with EVA-02-L on 16 GPUs: 32 images with boxes and 256 captioned ones."""
    paper = lvis_r50()
    released = released_architectures()["centernet2_eva02_l"].config
    stage = dataclasses.replace(paper.joint_stage, workers=16, rate_factors={"detector.pyramid.": 0.25})
    return dataclasses.replace(
        paper,
        config="lvis_eva",
        published_backbone=EVA02_L,
        model=dataclasses.replace(paper.model, centernet2=released.centernet2, caption_sizes=(640, 640)),
        detection_batch=32,
        augmentation=dataclasses.replace(paper.augmentation, side=1280),
        caption_augmentation=dataclasses.replace(paper.caption_augmentation, side=640),
        box_stage=stage,
        joint_stage=stage,
    )


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke,
    "pictograms": pictograms,
    "pictograms_quick": pictograms_quick,
    "photos": photos,
    "photos_laptop": photos_laptop,
    "photos_gpu": photos_gpu,
    "photos_8gpu": photos_8gpu,
    "finetune": finetune,
    "coco_r50": coco_r50,
    "lvis_r50": lvis_r50,
    "lvis_swin_b": lvis_swin_b,
    "lvis_eva": lvis_eva,
}

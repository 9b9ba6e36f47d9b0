"""Settings of `vild.py`: a `Run` holds everything that affects results; each function returns a named one."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from data_prep.embeddings.crops import CropConfig
from data_prep.embeddings.teachers import EmbedConfig
from data_prep.streams.augmentation import Augmentation
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.detectors.region_scores import Scoring
from ovd_models.errors import InputError
from ovd_models.vild.model import ViLDConfig
from ovd_models.vocabulary import SynonymMean
from workflows.common.optimisation import Optimisation, check_shared
from workflows.common.starting_weights import Published, PublishedBackbone
from workflows.configs.detectors import RESNET50, RESNET152, large_photo_detector, photo_detector


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of ViLD."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config; starts the run's name."""
    boxes: str
    """Name of the box set: tables `boxes/<name>-train`, `boxes/<name>-eval`, `categories/<name>`."""
    train_boxes: str = ""
    """Name of the training table; `<boxes>-train` if empty."""
    novel_boxes: bool = False
    """Train with novel boxes too, for supervised comparisons; `train_boxes` must contain them."""
    teacher: str = ""
    """CLIP checkpoint, or with `pretrained` an architecture of open_clip, that embeds names and regions."""
    pretrained: str = ""
    """Released weights of `teacher`, an architecture of open_clip: a tag (`openai`), or the path or URI of a file."""
    prompt_set: str = ""
    """Prompt templates around names, see `ovd_models/prompts.py`; the teacher's own if empty."""
    synonyms: SynonymMean = "none"
    """Use of the synonyms in `categories`: none, or the mean of their embeddings."""
    texts: str = ""
    """Replaces the teacher for names: a .npy file with an embedding for each category, in category-id order."""
    data: str = ""
    """A folder with `instances.json` and `images/`, or another set that `prepare_boxes.py --data` reads, whose tables
    are made first."""
    held_out: int = 0
    """Images of `data` that are held out for evaluation, if it has no part for that; 0 for a fifth of them, at most
    20."""
    backbone_weights: str = "auto"
    """A file with the backbone's weights; `auto` is the published one of the config, if it is on this machine."""
    from_scratch: bool = False
    """Start from random weights, without a search for published ones."""
    published_backbone: Published = field(default_factory=PublishedBackbone)
    proposals: str = ""
    """Folder or URI of an earlier run's proposals checkpoint, used instead of training the `rpn` stage."""
    regions: str = ""
    """Name of a `regions` table; if empty, the proposals are embedded into a table named after their detector."""
    box_model: str = ""
    """Folder or URI of a ViLD checkpoint to continue: its architecture, its weights, and its proposals."""
    start_from_proposals: bool = True
    """Start the detector from the proposal network's weights."""
    model: ViLDConfig = field(default_factory=ViLDConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    max_proposals: int = 300
    """M: the number of an image's best proposals that are embedded."""
    regions_per_step: int = 300
    """Embedded proposals of an image that a step distils from."""
    detection_batch: int = 8
    """Images in a step, over all workers."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    repeat_threshold: float = 0.0
    """Repeat-factor sampling: images of categories in less than this fraction of the images are repeated; 0: never."""
    rpn_stage: Optimisation
    detector_stage: Optimisation
    score_threshold: float = 0.01
    max_detections: int = 100
    """Detections of an image in evaluation."""
    measure_masks: bool = False
    """Evaluate masks instead of boxes, as is usual on LVIS."""
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
        proposals = {} if self.proposals else {"rpn_stage": self.rpn_stage}
        return {**proposals, "detector_stage": self.detector_stage}

    def __post_init__(self) -> None:
        """Check that batches can be shared among the workers and that the settings fit together."""
        for stage in self.stages.values():
            check_shared("detection_batch", self.detection_batch, stage)
        if self.texts and self.model.distils:
            raise InputError(f"--texts: names only, expected --teacher for the variant {self.model.variant!r}")
        if not 1 <= self.regions_per_step <= self.max_proposals:
            raise InputError(f"regions_per_step: {self.regions_per_step}, expected 1 to {self.max_proposals}")

    @property
    def train_table(self) -> str:
        """Name of the `boxes` table to train on."""
        return self.train_boxes or f"{self.boxes}-train"


def smoke() -> Run:
    """Runs in seconds; builds its own tables and an untrained teacher."""
    quick = Optimisation(steps=5, learning_rate=1e-3, checkpoint_every=5, log_every=5, workers=0)
    return Run(
        config="smoke",
        boxes="smoke",
        max_proposals=8,
        regions_per_step=4,
        detection_batch=2,
        validate_every=3,
        validate_images=4,
        embed=EmbedConfig(actors=0),
        rpn_stage=quick,
        detector_stage=quick,
    )


def pictograms() -> Run:
    """The pictogram world: 128 px scenes, a detector of 1.7 M parameters, minutes on two cores."""
    return Run(
        config="pictograms",
        boxes="pictograms",
        # The paper has w = 0.5 and lambda = 2/3 for a far larger backbone; here w = 0.5 costs 0.06 base AP50.
        model=ViLDConfig(image_weight=0.1, scoring=Scoring(image_temperature=25.0, base_image=0.2, novel_image=0.8)),
        max_proposals=32,
        regions_per_step=32,
        validate_every=200,
        validate_images=60,
        # Small operators parallelise badly: two processes with one thread each use less CPU than one with two.
        rpn_stage=Optimisation(steps=200, learning_rate=2e-3, workers=2),
        detector_stage=Optimisation(steps=800, learning_rate=2e-3, workers=2),
    )


def photos() -> Run:
    """Photographs in COCO's form, a ResNet-50, 20 steps: shows that they can be read and trained on; no model."""
    quick = Optimisation(steps=20, learning_rate=2e-4, checkpoint_every=20, log_every=5)
    return Run(
        config="photos",
        boxes="photos",
        published_backbone=RESNET50,
        model=ViLDConfig(detector=photo_detector()),
        max_proposals=64,
        regions_per_step=32,
        detection_batch=2,
        augmentation=Augmentation(flip_probability=0.5),
        rpn_stage=quick,
        detector_stage=quick,
    )


def photos_laptop() -> Run:
    """Photographs on a laptop: small images, 300 steps of 4 for proposals and 600 with embeddings of them; hours."""
    detector = Optimisation(steps=600, learning_rate=2e-4, checkpoint_every=100)
    return dataclasses.replace(
        photos(),
        config="photos_laptop",
        detection_batch=4,
        rpn_stage=dataclasses.replace(detector, steps=300),
        detector_stage=detector,
    )


def photos_gpu() -> Run:
    """Photographs on one GPU: 480 to 800 px, 2,000 steps of 8 for proposals and 12,000 with embeddings of them."""
    detector = Optimisation(steps=12_000, learning_rate=2e-4, checkpoint_every=500, log_every=20, use_gpu=True)
    return dataclasses.replace(
        photos(),
        config="photos_gpu",
        model=ViLDConfig(detector=large_photo_detector()),
        embed=EmbedConfig(batch_size=256, threads=4, gpus=1.0),
        max_proposals=300,
        regions_per_step=300,
        detection_batch=8,
        rpn_stage=dataclasses.replace(detector, steps=2_000),
        detector_stage=detector,
    )


def photos_8gpu() -> Run:
    """`photos_gpu` on eight GPUs: eight times the images a step and twice the steps, for COCO's size and more."""
    one = photos_gpu()
    detector = dataclasses.replace(one.detector_stage, steps=24_000, learning_rate=5e-4, workers=8)
    return dataclasses.replace(
        one,
        config="photos_8gpu",
        detection_batch=64,
        rpn_stage=dataclasses.replace(detector, steps=4_000),
        detector_stage=detector,
    )


def lvis_r50() -> Run:
    """The paper's setting: from scratch, 256 images a step, 180,000 steps; for a cluster of GPUs."""
    detector = RCNNConfig(
        backbone="resnet50",
        backbone_options={},
        strides=(4, 8, 16, 32),
        anchor_sizes=(32, 64, 128, 256, 512),
        pyramid_channels=256,
        head_convs=4,
        head_width=1024,
        masks=True,
        embed_dim=512,
        min_size=1024,
        max_size=1024,
        rpn_batch_size=256,
        pre_nms=2000,
        post_nms=1000,
        rois_per_image=512,
        temperature=100.0,
        box_beta=1.0,
    )
    # The paper warms up for 1,000 steps and decays at 162k, 171k and 175.5k.
    paper = Optimisation(
        steps=180_000,
        learning_rate=0.32,
        optimiser="sgd",
        weight_decay=4e-5,
        warmup=1 / 180,
        decay_at=(0.9, 0.95, 0.975),
        clip_norm=None,
        checkpoint_every=1000,
        log_every=20,
        workers=32,
        use_gpu=True,
    )
    return Run(
        config="lvis_r50",
        boxes="lvis",
        prompt_set="vild",
        synonyms="mean",
        model=ViLDConfig(
            detector=detector, image_weight=0.5, scoring=Scoring(temperature=100.0, image_temperature=100.0)
        ),
        from_scratch=True,
        start_from_proposals=False,
        embed=EmbedConfig(batch_size=256, threads=4, gpus=1.0),
        detection_batch=256,
        augmentation=Augmentation(flip_probability=0.5, side=1024),
        rpn_stage=dataclasses.replace(paper, steps=45_000, warmup=1 / 45),
        detector_stage=paper,
        score_threshold=1e-4,
        max_detections=300,
        measure_masks=True,
    )


def lvis_r50_short() -> Run:
    """`lvis_r50` from ImageNet weights in 20 epochs of 16 images a step (DetPro's schedule), for one machine."""
    return short(lvis_r50(), images=100_170, repeat_threshold=1e-3)


def lvis_r152() -> Run:
    """The paper's larger backbone, with w = 2 for the ensemble."""
    paper = lvis_r50()
    detector = dataclasses.replace(paper.model.detector, backbone="resnet152")
    model = dataclasses.replace(paper.model, detector=detector, image_weight=2.0)
    return dataclasses.replace(paper, config="lvis_r152", model=model)


def lvis_r152_short() -> Run:
    """The larger backbone from ImageNet weights, for one machine."""
    return short(lvis_r152(), images=100_170, repeat_threshold=1e-3)


def finetune() -> Run:
    """A trained detector, continued on some labelled images; needs --box-model, --teacher, and --data or --boxes.

    All names are trained, none is held out. The backbone learns at a tenth of the rate.
    """
    stage = Optimisation(steps=200, learning_rate=2e-4, checkpoint_every=50, rate_factors={"detector.backbone.": 0.1})
    return Run(
        config="finetune",
        boxes="finetune",
        detection_batch=4,
        augmentation=Augmentation(flip_probability=0.5),
        rpn_stage=stage,
        detector_stage=stage,
        validate_every=50,
    )


def coco_48_17() -> Run:
    """COCO with 48 base and 17 novel categories, 45,000 steps of 256 images from scratch."""
    paper = lvis_r50()
    stage = dataclasses.replace(paper.detector_stage, steps=45_000, warmup=1 / 45)
    return dataclasses.replace(
        paper,
        config="coco_48_17",
        boxes="coco",
        rpn_stage=stage,
        detector_stage=stage,
        max_detections=100,
        measure_masks=False,
    )


def coco_48_17_short() -> Run:
    """`coco_48_17` from ImageNet weights, for one machine."""
    return short(coco_48_17(), images=107_761, repeat_threshold=0.0)


def short(run: Run, *, images: int, repeat_threshold: float) -> Run:
    """20 epochs from ImageNet weights with frozen batch norm: 16 images a step, a tenth of the rate after epoch 16."""
    detector = dataclasses.replace(run.model.detector, freeze_norm=True)
    stage = dataclasses.replace(
        run.detector_stage,
        steps=20 * images // 16,
        learning_rate=0.02,
        weight_decay=2.5e-5,
        warmup=0.004,
        decay_at=(0.8,),
        workers=4,
    )
    return dataclasses.replace(
        run,
        config=f"{run.config}_short",
        from_scratch=False,
        published_backbone=RESNET152 if detector.backbone == "resnet152" else RESNET50,
        model=dataclasses.replace(run.model, detector=detector),
        start_from_proposals=True,
        detection_batch=16,
        repeat_threshold=repeat_threshold,
        rpn_stage=dataclasses.replace(stage, steps=stage.steps // 4),
        detector_stage=stage,
    )


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke,
    "pictograms": pictograms,
    "photos": photos,
    "photos_laptop": photos_laptop,
    "photos_gpu": photos_gpu,
    "photos_8gpu": photos_8gpu,
    "finetune": finetune,
    "coco_48_17": coco_48_17,
    "coco_48_17_short": coco_48_17_short,
    "lvis_r50": lvis_r50,
    "lvis_r50_short": lvis_r50_short,
    "lvis_r152": lvis_r152,
    "lvis_r152_short": lvis_r152_short,
}

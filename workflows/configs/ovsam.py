"""Settings of `ovsam.py`: a `Run` holds everything that affects results; each function returns a named one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from data_prep.streams.augmentation import Augmentation
from ovd_models.ovsam.clip_pyramid import NUM_LEVELS
from ovd_models.ovsam.text_to_mask import WINDOWS, TextToMaskConfig
from ovd_models.ovsam.training import Clip2SamConfig
from ovd_models.sam.model import VIT_B, VIT_H, SamConfig
from ovd_models.sam.training import SamTrainingConfig
from workflows.common.optimisation import Optimisation, check_shared
from workflows.common.starting_weights import Published, PublishedBackbone
from workflows.configs.detectors import SAM_VIT_B, SAM_VIT_H


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of OV-SAM."""

    storage: str = "store"
    """Folder or URI that holds tables and runs."""
    config: str
    """Name of the config; starts the run's name."""
    boxes: str
    """Name of the box set: tables `boxes/<name>-train` and `boxes/<name>-eval` with masks, `categories/<name>`."""
    data: str = ""
    """A folder with `instances.json` and `images/`, or another set that `prepare_boxes.py --data` reads, whose tables
    are made first."""
    held_out: int = 0
    """Images of `data` that are held out for evaluation, if it has no part for that; 0 for a fifth of them, at most
    20."""
    teacher: str = ""
    """CLIP checkpoint, or with `pretrained` an architecture of open_clip: its image tower becomes OV-SAM's encoder, its
    text tower embeds names."""
    pretrained: str = ""
    """Released weights of `teacher`, an architecture of open_clip: a tag (`openai`), or the path or URI of a file."""
    prompt_set: str = ""
    """Prompt templates around names, see `ovd_models/prompts.py`; the teacher's own if empty."""
    sam: str = ""
    """Folder or URI of a SAM checkpoint, or a published `.pth` file of the architecture `sam_model`; if empty, a SAM is
    trained first."""
    distill_images: str = ""
    """Folder or URI of images, such as SA-1B's, from which the adapter learns; if empty, it learns from the training
    images. Masks beside them are not read."""
    published_sam: Published = field(default_factory=PublishedBackbone)
    """The released SAM that the config learns from, or that would be better than its own."""
    sam_model: SamConfig = field(default_factory=SamConfig)
    """The SAM to be trained."""
    sam_training: SamTrainingConfig = field(default_factory=SamTrainingConfig)
    adapter_depth: int = 2
    pyramid_width: int = 64
    label_levels: int = NUM_LEVELS
    """CLIP's levels that the label branch sees, the coarsest ones."""
    label_hidden: int = 256
    alpha: float = 0.1
    """CLIP's weight in the score of base names."""
    beta: float = 0.9
    """CLIP's weight in the score of novel names."""
    novel_bias: float = 0.0
    """Constant added to the log scores of novel names."""
    clip_view: Literal["features", "cut_out"] = "features"
    """How CLIP sees a mask, see `OvSamConfig`."""
    clip2sam: Clip2SamConfig = field(default_factory=Clip2SamConfig)
    batch_size: int = 8
    """Images in a step of any stage, over all workers."""
    rows_per_shard: int = 200
    """Images in one file of the feature cache."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(flip_probability=0.5))
    """Augmentation of images in the stages `sam` and `clip2sam`."""
    sam_stage: Optimisation
    sam2clip_stage: Optimisation
    clip2sam_stage: Optimisation
    text_to_mask: bool = False
    """Whether SAM is also trained to take a name as its prompt."""
    text: TextToMaskConfig = field(default_factory=lambda: TextToMaskConfig(windows=WINDOWS))
    text_stage: Optimisation = field(default_factory=lambda: Optimisation(steps=500, learning_rate=1e-3))
    eval_images: int = 0
    """Evaluate on this many first images of the evaluation set; all if 0."""
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
    def needs_sam(self) -> bool:
        """Whether the config trains no SAM of its own, as the published recipes."""
        return self.published_sam.required

    @property
    def stages(self) -> dict[str, Optimisation]:
        """The stages that are trained, by their fields."""
        sam = {} if self.sam else {"sam_stage": self.sam_stage}
        text = {"text_stage": self.text_stage} if self.text_to_mask else {}
        return {**sam, "sam2clip_stage": self.sam2clip_stage, "clip2sam_stage": self.clip2sam_stage, **text}

    def __post_init__(self) -> None:
        """Check that batches can be shared among the workers."""
        for stage in self.stages.values():
            check_shared("batch_size", self.batch_size, stage)


def smoke() -> Run:
    """Runs in seconds; builds its own tables and an untrained CLIP."""
    quick = Optimisation(steps=5, learning_rate=1e-3, checkpoint_every=5, log_every=5, workers=0)
    sam = SamConfig(image_size=64, patch_size=8, width=32, depth=2, heads=2, window=4, global_blocks=(1,))
    return Run(
        config="smoke",
        boxes="smoke",
        sam_model=sam,
        batch_size=2,
        rows_per_shard=20,
        sam_stage=quick,
        sam2clip_stage=quick,
        clip2sam_stage=quick,
        text_to_mask=True,
        text_stage=quick,
        eval_images=4,
        validate_every=3,
        validate_images=4,
    )


def pictograms() -> Run:
    """The pictogram world: 128 px scenes, models of about a million parameters, minutes on two cores."""
    return Run(
        config="pictograms",
        boxes="pictograms",
        # Strokes are about three pixels wide. At half resolution, which patches of 8 pixels give, even the annotated
        # masks reach an IoU of only 0.85; patches of 4 give masks at full resolution. A smaller prompt width, which
        # is the mask decoder's too, learns masks far more slowly.
        sam_model=SamConfig(patch_size=4, width=96, heads=2, global_blocks=(), prompt_width=128),
        # Thin strokes cover little of an image: with the paper's weight of 1 they are learnt last.
        sam_training=SamTrainingConfig(dice_weight=5.0),
        pyramid_width=32,
        # Chosen on the study's first seed, on scenes that the evaluation does not use.
        alpha=0.5,
        beta=0.8,
        novel_bias=1.0,
        clip_view="cut_out",
        batch_size=4,
        # Small operators parallelise badly: two processes with one thread each are faster than one with two. AdamW
        # needs more steps than Muon to the same SAM loss and label accuracy.
        sam_stage=Optimisation(steps=1800, learning_rate=2e-3, optimiser="muon", workers=2),
        sam2clip_stage=Optimisation(steps=1000, learning_rate=3e-3, optimiser="muon", workers=2),
        clip2sam_stage=Optimisation(steps=1200, learning_rate=2e-3, optimiser="muon", workers=2),
        text_stage=Optimisation(steps=1200, learning_rate=2e-3, optimiser="muon", workers=2),
        eval_images=100,
        validate_every=300,
        validate_images=30,
    )


def photos() -> Run:
    """Photographs in COCO's form at 256 px, 20 steps: shows that they can be read and trained on; no model."""
    quick = Optimisation(steps=20, learning_rate=5e-4, checkpoint_every=20, log_every=5, workers=0)
    return Run(
        config="photos",
        boxes="photos",
        published_sam=SAM_VIT_B,
        sam_model=SamConfig(image_size=256, patch_size=16, width=128, global_blocks=(1, 3)),
        batch_size=2,
        rows_per_shard=20,
        sam_stage=quick,
        sam2clip_stage=quick,
        clip2sam_stage=quick,
    )


def photos_laptop() -> Run:
    """Photographs on a laptop at 256 px: 1,500 steps of 4 for a small SAM, 500 for the adapter, 1,000 for names."""
    sam = Optimisation(steps=1500, learning_rate=1e-3, optimiser="muon")
    return replace(
        photos(),
        config="photos_laptop",
        sam_model=SamConfig(image_size=256, patch_size=8, width=128, global_blocks=(1, 3)),
        batch_size=4,
        rows_per_shard=200,
        sam_stage=sam,
        sam2clip_stage=replace(sam, steps=500),
        clip2sam_stage=replace(sam, steps=1000),
    )


def photos_gpu() -> Run:
    """Photographs on one GPU at 1,024 px: SAM's ViT-B (`--sam`), 6,000 steps of 4 for the adapter, 6,000 for names."""
    stage = Optimisation(
        steps=6_000, learning_rate=1e-4, decay_norms=False, checkpoint_every=500, log_every=20, use_gpu=True
    )
    return replace(
        coco_rn50x16(),
        config="photos_gpu",
        boxes="photos",
        published_sam=replace(SAM_VIT_B, required=True),
        sam_model=VIT_B,
        batch_size=4,
        sam_stage=replace(stage, steps=10),  # not run
        sam2clip_stage=stage,
        clip2sam_stage=replace(stage, clip_norm=0.01),
        text_stage=stage,
    )


def photos_8gpu() -> Run:
    """`photos_gpu` on eight GPUs: eight times the images a step and twice the steps, for COCO's size and more."""
    one = photos_gpu()
    stage = replace(one.sam2clip_stage, steps=12_000, learning_rate=2.5e-4, workers=8)
    return replace(
        one,
        config="photos_8gpu",
        batch_size=32,
        sam_stage=replace(one.sam_stage, workers=8),
        sam2clip_stage=stage,
        clip2sam_stage=replace(stage, clip_norm=0.01),
        text_stage=stage,
    )


def published_recipe(name: str, boxes: str, images: int, scales: tuple[float, float]) -> Run:
    """The paper's settings on eight GPUs with two images each; `--sam` gives SAM, `--teacher` CLIP.

    Without `--distill-images` the adapter learns from the images of the box set, not from a part of SA-1B.
    """
    epoch = images // 16
    step = partial(Optimisation, learning_rate=1e-4, decay_norms=False, workers=8, use_gpu=True, checkpoint_every=1000)
    return Run(
        config=name,
        boxes=boxes,
        prompt_set="ovsam",
        published_sam=SAM_VIT_H,
        sam_model=VIT_H,
        adapter_depth=5,
        pyramid_width=256,
        label_hidden=1024,
        clip2sam=Clip2SamConfig(prompts_per_image=40, num_points=12544),
        batch_size=16,
        rows_per_shard=256,
        augmentation=Augmentation(flip_probability=0.5, side=1024, scales=scales, min_mask_area=32),
        sam_stage=step(steps=1),  # not run
        sam2clip_stage=step(steps=24 * epoch, warmup=500 / (24 * epoch), schedule="cosine"),
        clip2sam_stage=step(steps=12 * epoch, warmup=500 / (12 * epoch), decay_at=(8 / 12, 11 / 12), clip_norm=0.01),
        text_stage=step(steps=12 * epoch, warmup=500 / (12 * epoch)),
    )


def coco_rn50x16() -> Run:
    """COCO's 48 base categories, CLIP's RN50x16."""
    return published_recipe("coco_rn50x16", "coco", 118_287, (0.9, 2.0))


def lvis_rn50x16() -> Run:
    """LVIS without rare categories, CLIP's RN50x16."""
    return published_recipe("lvis_rn50x16", "lvis", 100_170, (0.1, 2.0))


def lvis_convnext_l() -> Run:
    """LVIS without rare categories, a ConvNeXt-L of open_clip."""
    return published_recipe("lvis_convnext_l", "lvis", 100_170, (0.1, 2.0))


CONFIGS: dict[str, Callable[[], Run]] = {
    "smoke": smoke,
    "pictograms": pictograms,
    "photos": photos,
    "photos_laptop": photos_laptop,
    "photos_gpu": photos_gpu,
    "photos_8gpu": photos_8gpu,
    "coco_rn50x16": coco_rn50x16,
    "lvis_rn50x16": lvis_rn50x16,
    "lvis_convnext_l": lvis_convnext_l,
}

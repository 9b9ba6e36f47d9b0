"""The steps that `gpu.py` measures: each config's last stage on random images, and torchvision's Mask R-CNN.

`build_trial` makes a config's, `peer_trial` the peer's on the same images with boxes.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import open_clip
import torch
from measure import REPOSITORY
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import maskrcnn_resnet50_fpn

from data_prep.streams.augmentation import Augmentation
from ovd_models.batches import ConceptBatch, DetectionBatch, StoredRegions, TensorRecord
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.detectors.centernet2 import CenterNet2
from ovd_models.ovsam.clip_pyramid import TowerConfig
from ovd_models.ovsam.model import RN50X16, OvSam, OvSamConfig
from ovd_models.ovsam.training import Clip2SamTraining
from ovd_models.segments import MaskBatch
from ovd_models.vild.model import ViLD
from workflows.common.acceleration import DeviceCopies
from workflows.common.optimisation import Optimisation
from workflows.configs import codet, ovsam, vild

sys.path.append(str(REPOSITORY / "tests"))
from published import small_run

Batch = TypeVar("Batch", bound=TensorRecord)
PUBLISHED = {
    "vild": ("lvis_r50", "lvis_r152", "coco_48_17", "photos_gpu"),
    "codet": ("coco_r50", "lvis_r50", "lvis_swin_b", "lvis_eva", "photos_gpu"),
    "ovsam": ("coco_rn50x16", "lvis_convnext_l", "photos_gpu"),
}
"""The configs by method; those left out differ from one of these in data, schedule or frozen norms alone."""
CONFIGS: dict[str, Mapping[str, Callable[[], Any]]] = {
    "vild": vild.CONFIGS,
    "codet": codet.CONFIGS,
    "ovsam": ovsam.CONFIGS,
}
NAMES = {"lvis": (1203, 866), "coco": (65, 48), "photos": (80, 80)}
"""All names of a box set, and those with boxes."""
CONCEPTS = {"coco": 634, "cc3m": 6000, "photos": 600}
"""Concepts of the captions; CC3M's number depends on the crawl and hardly affects the cost."""
OBJECTS = 8
"""Objects of an image."""
PHOTO = (480, 640)
"""Height and width of images that the augmentation leaves as they are, COCO's most frequent size."""
PEER_REGIONS, TINY_PEER_REGIONS = (1000, 512), (16, 8)
"""The peer's proposals of an image, and the regions that its second stage is trained on."""
PEER = Optimisation(steps=1000, learning_rate=1e-3, optimiser="sgd", weight_decay=1e-4, clip_norm=None)


@dataclass(frozen=True)
class Trial:
    """A model and its step's losses."""

    build: Callable[[], nn.Module]
    """Makes the model, with random weights."""
    losses: Callable[[nn.Module], Mapping[str, Tensor]]
    """Copies the batch to the device and calls the model."""
    settings: Optimisation
    scene: DetectionBatch
    """The step's images with boxes and masks."""
    classes: int
    """Number of names that the scene's labels index."""
    sides: tuple[int, int]
    """Shorter side and greatest longer side that these images are resized to."""
    captioned: int = 0
    """The step's other images."""


# ------------------------------------------------------------------------------------------------------------- inputs


def unit(*shape: int) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(*shape), dim=-1)


def rectangles(count: int, height: int, width: int) -> Tensor:
    """[count, 4] random boxes with sides of 0.1 to 0.4 of the image's."""
    frame = torch.tensor([width, height])
    corner, side = torch.rand(count, 2) * 0.6, 0.1 + torch.rand(count, 2) * 0.3
    return torch.cat((corner * frame, (corner + side) * frame), dim=1)


def pictures(count: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Random uint8 images [3, H, W]."""
    return tuple(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8))


def random_scene(count: int, size: tuple[int, int], classes: int) -> DetectionBatch:
    """Images of height and width `size` with rectangles as objects."""
    boxes = tuple(rectangles(OBJECTS, *size) for _ in range(count))
    masks = []
    for entry in boxes:
        mask = torch.zeros(OBJECTS, *size, dtype=torch.bool)
        for row, (x0, y0, x1, y1) in enumerate(entry.int().tolist()):
            mask[row, y0:y1, x0:x1] = True
        masks.append(mask)
    labels = tuple(torch.randint(0, classes, (count, OBJECTS)))
    return DetectionBatch(pictures(count, *size), boxes, labels, tuple(masks))


def size_of(augmentation: Augmentation) -> tuple[int, int]:
    """Height and width of an augmented image."""
    return (augmentation.side, augmentation.side) if augmentation.side else PHOTO


def sender(batch: Batch, device: torch.device) -> Callable[[], Batch]:
    """Copies a batch to the device, as `Session.batches` does for each step."""
    if device.type != "cuda":
        return lambda: batch.to(device)
    pinned, copies = batch.map(Tensor.pin_memory), DeviceCopies(device)
    return lambda: copies(pinned)


def share(total: int, settings: Optimisation) -> int:
    """One worker's part of a batch."""
    return total // max(1, settings.workers)


# ------------------------------------------------------------------------------------------------------------- trials


def vild_trial(run: vild.Run, batch: int, device: torch.device) -> Trial:
    """ViLD's stage `detector`."""
    detector = run.model.detector
    (names, trained), size = NAMES[run.boxes], size_of(run.augmentation)
    count = batch or share(run.detection_batch, run.detector_stage)
    scene, stored = random_scene(count, size, trained), run.regions_per_step
    boxes = rectangles(count * stored, *size).view(count, stored, 4)
    regions = StoredRegions(boxes, unit(count, stored, detector.embed_dim), torch.ones(count, stored) > 0)
    given = sender(replace(scene, masks=scene.masks if detector.masks else None, regions=regions), device)
    text_KD, trained_K = unit(names, detector.embed_dim).to(device), (torch.arange(names) < trained).to(device)
    return Trial(
        partial(ViLD, run.model),
        lambda model: model(given(), text_KD, trained_K),
        run.detector_stage,
        scene,
        trained,
        (detector.min_size, detector.max_size),
    )


def codet_trial(run: codet.Run, batch: int, device: torch.device) -> Trial:
    """CoDet's stage `joint`: images with boxes and groups of captioned images, fewer groups for a smaller `batch`."""
    config, stage, (_, base) = run.model, run.joint_stage, NAMES[run.boxes]
    count, published = batch or share(run.detection_batch, stage), share(run.detection_batch, stage)
    groups = max(1, share(run.groups_per_step, stage) * count // published)
    captioned, concepts = groups * run.group_size, CONCEPTS[run.pairs]
    detector = config.centernet2 if config.architecture == "centernet2" else config.detector
    masks = config.architecture == "centernet2" and config.centernet2.mask_convs > 0
    scene = random_scene(count, size_of(run.augmentation), base)
    given = sender(scene if masks else replace(scene, masks=None), device)
    shared = torch.randint(0, concepts, (groups,))
    mentioned = torch.rand(captioned, concepts) < 4 / concepts
    mentioned[torch.arange(captioned), shared.repeat_interleave(run.group_size)] = True
    groups_batch = ConceptBatch(
        pictures(captioned, *size_of(run.caption_augmentation)),
        shared,
        mentioned,
        ("",) * captioned,
        unit(captioned, detector.embed_dim) if config.caption_weight else None,
    )
    captions = sender(groups_batch, device)
    base_KD, concepts_CD = (unit(rows, detector.embed_dim).to(device) for rows in (base, concepts))
    return Trial(
        partial(build_codet, config, base),
        lambda model: model(given(), captions(), base_KD, concepts_CD),
        stage,
        scene,
        base,
        (detector.min_size, detector.max_size),
        captioned,
    )


def build_codet(config: CoDetConfig, categories: int) -> CoDet:
    """CoDet, with equally frequent categories for the federated loss."""
    model = CoDet(config)
    if isinstance(model.detector, CenterNet2):
        model.detector.set_image_counts(torch.ones(categories))
    return model


def ovsam_trial(run: ovsam.Run, batch: int, device: torch.device) -> Trial:
    """OV-SAM's stage `clip2sam`."""
    (_, base), side, tower = NAMES[run.boxes], run.sam_model.image_size, tower_of(run)
    scene = random_scene(batch or share(run.batch_size, run.clip2sam_stage), size_of(run.augmentation), base)
    assert scene.masks is not None
    given = sender(MaskBatch(scene.images, scene.masks, scene.labels), device)
    text_KYD = unit(base, 1, tower.embed_dim).to(device)
    config = OvSamConfig(
        sam=run.sam_model,
        tower=tower,
        adapter_depth=run.adapter_depth,
        pyramid_width=run.pyramid_width,
        label_hidden=run.label_hidden,
    )
    generator = torch.Generator().manual_seed(0)
    return Trial(
        lambda: Clip2SamTraining(OvSam(config), run.clip2sam),
        lambda model: model(given(), text_KYD, generator),
        run.clip2sam_stage,
        scene,
        base,
        (side, side),
    )


def tower_of(run: ovsam.Run) -> TowerConfig:
    """The image tower of the teacher that a config is published with, narrow for a SAM of tiny images.

    For photographs, CLIP's ResNet-50.
    """
    tiny = run.sam_model.image_size < 256
    if "rn50x16" in run.config:
        return replace(RN50X16, vision={"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}) if tiny else RN50X16
    found: dict[str, Any] = open_clip.get_model_config("RN50" if run.boxes == "photos" else "convnext_large_d_320")
    if run.boxes == "photos":
        own = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16} if tiny else found["vision_cfg"]
        return TowerConfig(embed_dim=found["embed_dim"], vision=own)
    vision = {**found["vision_cfg"], **({"timm_model_name": "convnext_atto", "image_size": 64} if tiny else {})}
    return TowerConfig(embed_dim=found["embed_dim"], vision=vision)


TRIALS: dict[str, Callable[[Any, int, torch.device], Trial]] = {
    "vild": vild_trial,
    "codet": codet_trial,
    "ovsam": ovsam_trial,
}


def build_trial(name: str, batch: int, device: torch.device, *, tiny: bool) -> Trial:
    """The trial of `method/config`.

    Args:
        name: of the config.
        batch: images with boxes in a step; 0 for the published number of one GPU.
        device: of the step.
        tiny: whether all sizes are small.
    """
    method, config = name.split("/")
    torch.manual_seed(0)
    run = small_run(method, config, REPOSITORY) if tiny else CONFIGS[method][config]()
    return TRIALS[method](run, batch, device)


def peer_trial(ours: Trial, device: torch.device, *, tiny: bool) -> Trial:
    """Mask R-CNN on a trial's images with boxes, with few regions if `tiny`."""
    proposals, regions = TINY_PEER_REGIONS if tiny else PEER_REGIONS
    build = partial(
        maskrcnn_resnet50_fpn,
        weights=None,
        weights_backbone=None,
        num_classes=ours.classes + 1,
        min_size=ours.sides[0],
        max_size=ours.sides[1],
        rpn_post_nms_top_n_train=proposals,
        box_batch_size_per_image=regions,
    )

    given = sender(ours.scene, device)

    def losses(model: nn.Module) -> Mapping[str, Tensor]:
        batch = given()
        assert batch.masks is not None
        targets = [
            {"boxes": box, "labels": label + 1, "masks": mask.to(torch.uint8)}
            for box, label, mask in zip(batch.boxes, batch.labels, batch.masks, strict=True)
        ]
        found: Mapping[str, Tensor] = model([image.float() / 255 for image in batch.images], targets)
        return found

    return replace(ours, build=build, losses=losses, settings=PEER, captioned=0)

"""A training step of ViLD-text beside one of torchvision's Mask R-CNN, at equal sizes on the same images.

python benchmarks/torchvision_step.py

Both have a ResNet-50 with trained batch norm, a pyramid of strides 4 to 64 and a mask head; a step is forward pass,
backward pass and SGD. `make bench-train` writes the figure with its own.
"""

import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from measure import update_figures
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection import maskrcnn_resnet50_fpn

from ovd_models.batches import DetectionBatch
from ovd_models.detectors.rcnn import RCNNConfig
from ovd_models.vild.model import ViLD, ViLDConfig

BATCH, SIDE, CLASSES, REGIONS, PROPOSALS, OBJECTS = 2, 512, 1203, 512, 1000, 8
ROUNDS = 7
"""Timed pairs of steps."""


def main() -> None:
    figures = torchvision_step_ratio()
    update_figures("train", figures)
    print(figures)


def torchvision_step_ratio() -> dict[str, float]:
    """The median over pairs of our step's time divided by torchvision's."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    batch = scene()
    ours, theirs = vild_step(batch), torchvision_step(batch)
    ratios, seconds = [], []
    for turn in range(-2, ROUNDS):
        pair = (timed(ours), timed(theirs)) if turn % 2 else tuple(reversed((timed(theirs), timed(ours))))
        if turn >= 0:
            ratios.append(pair[0] / pair[1])
            seconds.append(pair)
    first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"ViLD-text {first:.2f} s, Mask R-CNN {second:.2f} s a step, medians of {ROUNDS} pairs")
    return {"torchvision_step_ratio": statistics.median(ratios)}


def scene() -> DetectionBatch:
    """Random images with random rectangles as objects."""
    rng = np.random.default_rng(0)
    corner = torch.from_numpy(rng.uniform(0, SIDE - 200, (BATCH, OBJECTS, 2)).astype(np.float32))
    size = torch.from_numpy(rng.uniform(40, 200, (BATCH, OBJECTS, 2)).astype(np.float32))
    boxes = torch.cat((corner, corner + size), dim=2)
    masks = torch.zeros(BATCH, OBJECTS, SIDE, SIDE, dtype=torch.bool)
    for image, entry in enumerate(boxes.int().tolist()):
        for row, (x0, y0, x1, y1) in enumerate(entry):
            masks[image, row, y0:y1, x0:x1] = True
    return DetectionBatch(
        tuple(torch.from_numpy(rng.integers(0, 256, (BATCH, 3, SIDE, SIDE), np.uint8))),
        tuple(boxes),
        tuple(torch.from_numpy(rng.integers(0, CLASSES, (BATCH, OBJECTS)))),
        tuple(masks),
    )


def vild_step(batch: DetectionBatch) -> Callable[[], dict[str, Tensor]]:
    """ViLD-text with 1,203 names."""
    detector = RCNNConfig(
        backbone="resnet50",
        backbone_options={},
        strides=(4, 8, 16, 32),
        anchor_sizes=(32, 64, 128, 256, 512),
        pyramid_channels=256,
        head_width=1024,
        masks=True,
        embed_dim=512,
        min_size=SIDE,
        max_size=SIDE,
        rpn_batch_size=256,
        pre_nms=2000,
        post_nms=PROPOSALS,
        rois_per_image=REGIONS,
    )
    model = ViLD(ViLDConfig(detector=detector, variant="text")).to(memory_format=torch.channels_last).train()
    text_KD = F.normalize(torch.randn(CLASSES, 512), dim=1)
    return step_of(model, lambda: model(batch, text_KD, torch.arange(CLASSES) < 866))


def torchvision_step(batch: DetectionBatch) -> Callable[[], dict[str, Tensor]]:
    """Mask R-CNN with 1,203 classes and the background."""
    model = maskrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + 1,
        min_size=SIDE,
        max_size=SIDE,
        rpn_post_nms_top_n_train=PROPOSALS,
        box_batch_size_per_image=REGIONS,
    )
    model = model.to(memory_format=torch.channels_last).train()
    images = [image.float() / 255 for image in batch.images]
    assert batch.masks is not None
    targets = [
        {"boxes": box, "labels": label + 1, "masks": mask.to(torch.uint8)}
        for box, label, mask in zip(batch.boxes, batch.labels, batch.masks, strict=True)
    ]
    return step_of(model, lambda: model(images, targets))


def step_of(model: torch.nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """A step: forward pass, backward pass, SGD."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> dict[str, Tensor]:
        found = losses()
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return found

    return step


def timed(step: Callable[[], dict[str, Tensor]]) -> float:
    """Seconds of one step."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

"""Training of ViLD: fractions of time spent on data wait and checkpoints, and the time that distillation adds.

make bench-train

The teacher is an untrained CLIP, since its weights do not affect time. The figures of `alignment.py`, `box_files.py`,
`host_waits.py`, `loader.py`, `plans.py` and `torchvision_step.py` are measured too.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from alignment import data_wait, time_both
from box_files import hashing, lvis_json
from host_waits import measure_waits
from loader import loader_speedup
from measure import write_figures
from plans import planning
from torchvision_step import torchvision_step_ratio

from data_prep.streams.box_loader import detection_loader
from data_prep.streams.collate import DetectionCollate
from ovd_models.batches import DetectionBatch
from ovd_models.checkpoints import load_encoder
from ovd_models.clip.model import Clip, ClipConfig, save_clip
from ovd_models.vild.model import ViLD
from workflows import prepare_boxes, vild
from workflows.common import tracking
from workflows.configs import boxes as boxes_configs
from workflows.configs import vild as vild_configs
from workflows.configs.vild import Run
from workflows.inputs import vild as vild_inputs

WARM_UP = 20
"""Steps that are not counted, while caches and pools fill."""
CHECKPOINT_EVERY = 100
VARIANTS = ("text", "vild", "ensemble")
CODET_STEPS = 60
ROUNDS = 24
"""Timed steps of each variant, alternated."""


def main() -> None:
    figures = {
        **planning(),
        **loader_speedup(),
        **torchvision_step_ratio(),
        **lvis_json(),
        **hashing(),
        **measure_waits(),
        **time_both(ROUNDS),
        **data_wait(CODET_STEPS),
    }
    with tempfile.TemporaryDirectory(prefix="ovd-") as storage:
        run = prepare(storage)
        trained = vild.train(run)
        figures |= {
            **shares(run, trained.run_id),
            **overheads(run, trained.outputs["proposals"], trained.outputs["regions"]),
        }
    figures = {name: round(value, 4) for name, value in figures.items()}
    write_figures("train", figures)
    print(json.dumps(figures, indent=1))


def prepare(storage: str) -> Run:
    """The config `pictograms` on fewer images, with enough steps for one checkpoint interval after the warm-up."""
    prepare_boxes.prepare(
        dataclasses.replace(boxes_configs.pictograms(), storage=storage, train_images=320, eval_images=8)
    )
    torch.manual_seed(0)
    save_clip(Clip(ClipConfig()), Path(storage, "teacher"))
    run = vild_configs.pictograms()
    return dataclasses.replace(
        run,
        storage=storage,
        teacher=f"{storage}/teacher",
        model=dataclasses.replace(run.model, variant="vild"),
        rpn_stage=dataclasses.replace(run.rpn_stage, steps=10, workers=0),
        detector_stage=dataclasses.replace(
            run.detector_stage, steps=WARM_UP + CHECKPOINT_EVERY, checkpoint_every=CHECKPOINT_EVERY
        ),
    )


def shares(run: Run, run_id: str) -> dict[str, float]:
    """Fractions of the time after the warm-up, which includes one checkpoint in 100 steps."""
    history = tracking.metric_history(tracking.tracking_uri(run.storage), run_id, "train/")
    column = {
        name: [value for step, value in history[f"train/{name}"] if step > run.rpn_stage.steps + WARM_UP]
        for name in ("images_per_second", "data_wait_fraction", "checkpoint_fraction")
    }
    seconds = [1 / rate for rate in column["images_per_second"]]  # each window has the same number of images

    def share(name: str) -> float:
        return float(np.average(column[name], weights=seconds))

    return {
        "vild_data_wait": share("data_wait_fraction"),
        "checkpoint_overhead": share("checkpoint_fraction"),
        "vild_images_per_second": 1 / statistics.mean(seconds),
    }


def overheads(run: Run, proposals: str, regions: str) -> dict[str, float]:
    """Additional time of a step with stored embeddings over one of ViLD-text on the same images; without Ray."""
    encoder = load_encoder(Path(run.teacher))
    names = vild_inputs.read_names(run, encoder)
    source = vild.embed_proposals(dataclasses.replace(run, regions=regions), encoder, proposals)
    loader = detection_loader(
        run.storage, run.train_table, names.ids, seed=0, augmentation=run.augmentation, regions=source
    )
    count = run.detection_batch
    batches = [DetectionCollate()(loader(np.arange(at * count, (at + 1) * count))) for at in range(8)]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    models = {}
    for variant in VARIANTS:
        own = vild_inputs.complete(
            dataclasses.replace(run, model=dataclasses.replace(run.model, variant=variant)), names
        )
        model = ViLD(own.model).train()
        model.load_state_dict(vild_inputs.detector_start(own, proposals))
        models[variant] = model.to(memory_format=torch.channels_last)
    ratios: dict[str, list[float]] = {variant: [] for variant in VARIANTS[1:]}
    text_KD, trained_K = names.vocabulary.embeddings, names.trained
    for turn in range(-4, ROUNDS):
        batch = batches[turn % len(batches)]
        seconds = {variant: timed_step(model, batch, text_KD, trained_K) for variant, model in models.items()}
        if turn >= 0:
            for variant, values in ratios.items():
                values.append(seconds[variant] / seconds["text"] - 1)
    return {
        "distillation_overhead": statistics.median(ratios["vild"]),
        "second_head_overhead": statistics.median(ratios["ensemble"]),
    }


def timed_step(model: ViLD, batch: DetectionBatch, text_KD: torch.Tensor, trained_K: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    losses = model(batch, text_KD, trained_K)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

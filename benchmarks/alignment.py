"""CoDet's alignment, all images at once, beside one image after the other; and how long its training waits for data.

make bench-alignment        # a table, and runs/bench/alignment.json
python benchmarks/alignment.py --skip-training

Forward and backward pass of the alignment of 4 groups of 8 images (a GPU's batch of OV-LVIS), 128 proposals of 512
dimensions, alternated in one process; attention and gradients have to agree. Memory is that of a process of each kind
of its own. Data wait is that of the pictogram config's joint stage on two workers, the start of its streams left out.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import forget_peak, provenance, resident_mb
from torch import Tensor
from torch.nn import functional as F

from ovd_models.codet.alignment import Alignment, align
from workflows import codet
from workflows.common import tracking
from workflows.configs import codet as codet_configs

REPOSITORY = Path(__file__).resolve().parent.parent
BENCH = REPOSITORY / "runs" / "bench"
GROUPS, SIZE, PROPOSALS, WIDTH, TEMPERATURE = 4, 8, 128, 512, 0.1
Align = Callable[[Tensor, Tensor, Tensor, float], Alignment]


def image_by_image(region: Tensor, valid: Tensor, guidance: Tensor, temperature: float) -> Alignment:
    """The same alignment with a loop over query images: each meets its supports in one matrix product."""
    attention, prototypes = [], []
    for group, usable, weights in zip(region, valid, guidance, strict=True):
        for query in range(len(group)):
            others = [image for image in range(len(group)) if image != query]
            supports = F.normalize(group[others].flatten(0, 1), dim=-1)
            similarity = (F.normalize(group[query], dim=-1) * weights) @ supports.T
            similarity = similarity.masked_fill(~usable[others].flatten(), torch.finfo(similarity.dtype).min)
            shared = similarity.view(len(similarity), len(others), -1).amax(-1).mean(-1)
            weight = torch.softmax((shared / temperature).masked_fill(~usable[query], -torch.inf), dim=0)
            attention.append(weight)
            prototypes.append(weight @ group[query])
    shape = region.shape[:2]
    return Alignment(torch.stack(attention).view(*shape, -1), torch.stack(prototypes).view(*shape, -1))


WAYS: dict[str, Align] = {"loop": image_by_image, "batched": align}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    region = torch.randn(GROUPS, SIZE, PROPOSALS, WIDTH, generator=generator).requires_grad_()
    valid = torch.ones(GROUPS, SIZE, PROPOSALS, dtype=torch.bool)
    return region, valid, torch.rand(GROUPS, WIDTH, generator=generator) + 0.5


def step(way: Align, region: Tensor, valid: Tensor, guidance: Tensor) -> tuple[Alignment, Tensor]:
    region.grad = None
    found = way(region, valid, guidance, TEMPERATURE)
    found.prototype.square().sum().backward()
    assert region.grad is not None
    return found, region.grad


def time_both(rounds: int) -> dict[str, float]:
    region, valid, guidance = inputs()
    (one, gradient), (two, other) = (step(way, region, valid, guidance) for way in WAYS.values())
    assert torch.allclose(one.attention, two.attention, atol=1e-5)
    assert torch.allclose(gradient, other, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            started = time.perf_counter()
            step(way, region, valid, guidance)
            seconds[name].append(time.perf_counter() - started)
    ratios = [loop / batched for loop, batched in zip(seconds["loop"], seconds["batched"], strict=True)]
    return {
        "loop_ms": 1e3 * statistics.median(seconds["loop"]),
        "batched_ms": 1e3 * statistics.median(seconds["batched"]),
        "alignment_speedup": statistics.median(ratios),
    }


def memory_of(name: str) -> float:
    """What three steps add to a fresh process at their peak, in units of 10^6 bytes."""
    told = subprocess.run(
        [sys.executable, __file__, "--memory", name], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return float(told.stdout)


def print_memory(name: str) -> None:
    arguments = inputs()
    torch.ones(64, 64) @ torch.ones(64, 64)  # lets the matrix library take its buffers
    before = forget_peak()
    for _ in range(3):
        step(WAYS[name], *arguments)
    print(resident_mb("VmHWM") - before)


def data_wait(steps: int) -> dict[str, float]:
    """The part of the joint stage's time that it waits for batches, from its second fifth on."""
    run = codet.prepare_data(dataclasses.replace(codet_configs.smoke(), storage=str(BENCH / "alignment")))
    full = codet_configs.pictograms()
    run = dataclasses.replace(
        full,
        storage=run.storage,
        boxes=run.boxes,
        pairs=run.pairs,
        teacher=run.teacher,
        box_stage=dataclasses.replace(full.box_stage, steps=5, checkpoint_every=5),
        joint_stage=dataclasses.replace(full.joint_stage, steps=steps, checkpoint_every=steps, log_every=5),
    )
    trained = codet.train(run)
    uri = tracking.tracking_uri(run.storage)
    history = tracking.metric_history(uri, trained.run_id, "joint/train/")
    later = {name: [value for step, value in points if step > steps // 5] for name, points in history.items()}
    return {
        "codet_data_wait": statistics.mean(later["joint/train/data_wait_fraction"]),
        "codet_images_per_second": statistics.median(later["joint/train/images_per_second"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="of training, for the data wait")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--memory", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory)
        return
    figures = time_both(arguments.rounds)
    for name in WAYS:
        figures[f"{name}_mb"] = memory_of(name)
    figures["alignment_memory_ratio"] = figures["batched_mb"] / figures["loop_mb"]
    if not arguments.skip_training:
        figures |= data_wait(arguments.steps)
    print(f"{'':10}{'forward + backward':>20}{'memory':>12}")
    for name in WAYS:
        print(f"{name:10}{figures[f'{name}_ms']:17.1f} ms{figures[f'{name}_mb']:9.0f} MB")
    for name in ("alignment_speedup", "alignment_memory_ratio", "codet_data_wait", "codet_images_per_second"):
        if name in figures:
            print(f"{name:26}{figures[name]:.3g}")
    BENCH.mkdir(parents=True, exist_ok=True)
    (BENCH / "alignment.json").write_text(json.dumps({**figures, **provenance(REPOSITORY)}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""CoDet's alignment of all images at once compared with a loop over images, and the data wait of its training.

make bench-alignment        # prints a table and writes runs/bench/alignment.json
python benchmarks/alignment.py --skip-training

Forward and backward pass of the alignment of 4 groups of 8 images (a GPU's batch of OV-LVIS), 128 proposals of 512
dimensions, alternated in one process; attention and gradients must agree. Memory is measured in a separate process for
each. Data wait is that of the pictogram config's joint stage on two workers, without the start of its streams.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from measure import BENCH, REPOSITORY, reset_peak, resident_mb, write_figures
from torch import Tensor
from torch.nn import functional as F

from ovd_models.codet.alignment import Alignment, align
from workflows import codet
from workflows.common import tracking
from workflows.configs import codet as codet_configs

GROUPS, SIZE, PROPOSALS, WIDTH, TEMPERATURE = 4, 8, 128, 512, 0.1
Align = Callable[[Tensor, Tensor, Tensor, float], Alignment]


def image_by_image(region: Tensor, valid: Tensor, guidance: Tensor, temperature: float) -> Alignment:
    """The same alignment as a loop over query images, with one matrix product for each and its supports."""
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


IMPLEMENTATIONS: dict[str, Align] = {"loop": image_by_image, "batched": align}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    region = torch.randn(GROUPS, SIZE, PROPOSALS, WIDTH, generator=generator).requires_grad_()
    valid = torch.ones(GROUPS, SIZE, PROPOSALS, dtype=torch.bool)
    return region, valid, torch.rand(GROUPS, WIDTH, generator=generator) + 0.5


def step(implementation: Align, region: Tensor, valid: Tensor, guidance: Tensor) -> tuple[Alignment, Tensor]:
    region.grad = None
    alignment = implementation(region, valid, guidance, TEMPERATURE)
    alignment.prototype.square().sum().backward()
    assert region.grad is not None
    return alignment, region.grad


def time_both(rounds: int) -> dict[str, float]:
    region, valid, guidance = inputs()
    (loop, loop_gradient), (batched, batched_gradient) = (
        step(implementation, region, valid, guidance) for implementation in IMPLEMENTATIONS.values()
    )
    assert torch.allclose(loop.attention, batched.attention, atol=1e-5)
    assert torch.allclose(loop_gradient, batched_gradient, atol=1e-4)
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds):
        for name, implementation in IMPLEMENTATIONS.items():
            started = time.perf_counter()
            step(implementation, region, valid, guidance)
            seconds[name].append(time.perf_counter() - started)
    ratios = [slow / fast for slow, fast in zip(seconds["loop"], seconds["batched"], strict=True)]
    return {
        "loop_ms": 1e3 * statistics.median(seconds["loop"]),
        "batched_ms": 1e3 * statistics.median(seconds["batched"]),
        "alignment_speedup": statistics.median(ratios),
    }


def memory_of(name: str) -> float:
    """Peak memory that three steps add to a fresh process, in units of 10^6 bytes."""
    command = [sys.executable, __file__, "--memory", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout)


def print_memory(name: str) -> None:
    arguments = inputs()
    torch.ones(64, 64) @ torch.ones(64, 64)  # the matrix library allocates its buffers
    before = reset_peak()
    for _ in range(3):
        step(IMPLEMENTATIONS[name], *arguments)
    print(resident_mb("VmHWM") - before)


def data_wait(steps: int) -> dict[str, float]:
    """Fraction of the joint stage's time spent waiting for batches, without its first fifth."""
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
    history = tracking.metric_history(uri, trained.run_id, "train/")
    later = {name: [value for step, value in points if step > 5 + steps // 5] for name, points in history.items()}
    return {
        "codet_data_wait": statistics.mean(later["train/data_wait_fraction"]),
        "codet_images_per_second": statistics.median(later["train/images_per_second"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="training steps, for the data wait")
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--memory", choices=list(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory)
        return
    figures = time_both(arguments.rounds)
    for name in IMPLEMENTATIONS:
        figures[f"{name}_mb"] = memory_of(name)
    figures["alignment_memory_ratio"] = figures["batched_mb"] / figures["loop_mb"]
    if not arguments.skip_training:
        figures |= data_wait(arguments.steps)
    print(f"{'':10}{'forward + backward':>20}{'memory':>12}")
    for name in IMPLEMENTATIONS:
        print(f"{name:10}{figures[f'{name}_ms']:17.1f} ms{figures[f'{name}_mb']:9.0f} MB")
    for name in ("alignment_speedup", "alignment_memory_ratio", "codet_data_wait", "codet_images_per_second"):
        if name in figures:
            print(f"{name:26}{figures[name]:.3g}")
    write_figures("alignment", figures)


if __name__ == "__main__":
    main()

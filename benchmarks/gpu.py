"""Training steps of the published configs on one GPU, beside those of torchvision's Mask R-CNN.

make bench-gpu
python benchmarks/gpu.py --only codet/lvis_r50 vild/lvis_r50 --batch 4

Prints images per second, peak memory, FLOPs, their share of the card's peak, and host waits. A step is that of a
config's last stage: copy of the batch to the GPU, forward and backward pass in the stage's precision (bfloat16),
clipping and optimiser step. Ray is not started and nothing is downloaded: weights, images, boxes, masks, and embeddings
of names and captions are random. Loading of data and exchange of gradients between GPUs are not measured.

- The batch of a GPU is the published batch divided by the published number of GPUs, or `--batch`.
- FLOPs are those of matrix products, convolutions and attention in one forward and backward pass.
- Host waits are the synchronisations that CUDA's debug mode reports in one step; it does not see all of them.
- Mask R-CNN has a ResNet-50 and is trained on the images with boxes of the same step. The ratio is our time of a step
  divided by its time. CoDet's steps also hold captioned images, which Mask R-CNN's lack.

Without a GPU, or with `--tiny`, all sizes are tiny: this checks the code, and its figures say nothing about the
configs. `--full` measures two steps of the published sizes on the CPU, for their FLOPs. Writes the table to
runs/bench/gpu.md and the figures to runs/bench/gpu.json. Exits with 1 if a config failed for another reason than lack
of memory.
"""

import argparse
import contextlib
import gc
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar
from unittest import mock

import ray.train
import torch
from gpu_trials import PUBLISHED, Trial, build_trial, peer_trial
from measure import BENCH, provenance, write_figures
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from workflows.common.session import Session
from workflows.common.tracking import MetricLogger
from workflows.common.training import Stage

Result = TypeVar("Result")
SYNCHRONISES = "called a synchronizing CUDA operation"
"""PyTorch's warning."""
FAILED = "failed"
"""Start of the note of a step that raised an error."""
PEAKS = {
    r"H200": 989,
    r"H200 NVL": 835,
    r"H100 80GB HBM3": 989,
    r"H100 NVL": 835,
    r"H100 PCIe": 756,
    r"A100[-\w ]*GB( PCIe)?": 312,
    r"V100-SXM2-\d+GB": 125,
    r"V100-PCIE-\d+GB": 112,
    r"GeForce RTX 4090": 165,
    r"L4": 121,
}
"""Peak TFLOP/s of cards by name: bfloat16 (V100: float16) on tensor cores, float32 sums, dense.

From NVIDIA's data sheets of H200, H100, A100, V100 and L4 and its white paper on the Ada architecture (RTX 4090). The
sheets of H200, H100 and L4 give numbers for sparse matrices, twice these.
"""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    tiny: bool
    seconds: float
    """Time for the timed steps of one model."""
    least: int
    """Minimum number of timed steps."""
    most: int
    """Maximum number of timed steps."""


FULL = Sizes(tiny=False, seconds=10.0, least=3, most=20)
TINY = Sizes(tiny=True, seconds=0.0, least=1, most=1)


@dataclass(frozen=True)
class Measured:
    """One model's steps."""

    seconds: float
    """Time of a step."""
    flops: int
    peak_gb: float | None
    """Highest allocated memory of the GPU in units of 10^9 bytes."""
    waits: int | None
    loss: float


@dataclass(frozen=True)
class Row:
    """One config's result."""

    name: str
    """`method/config`."""
    with_boxes: int = 0
    captioned: int = 0
    ours: Measured | None = None
    peer: Measured | None = None
    note: str = ""

    def figures(self, peak: float | None) -> dict[str, float | None]:
        """Values by name; None for what was not measured."""
        ours, peer, images = self.ours, self.peer, self.with_boxes + self.captioned
        if ours is None:
            return {}
        speed = ours.flops / ours.seconds / 1e12
        return {
            "images_per_second": images / ours.seconds,
            "step_seconds": ours.seconds,
            "peak_gb": ours.peak_gb,
            "tflop_per_step": ours.flops / 1e12,
            "share_of_peak": None if peak is None else speed / peak,
            "host_waits": ours.waits,
            "torchvision_step_ratio": None if peer is None else ours.seconds / peer.seconds,
        }


# -------------------------------------------------------------------------------------------------------- measurement


class Alone:
    """What Ray Train tells the only worker; `host_waits.py`, which has one too, would register a second accelerator."""

    def get_world_size(self) -> int:
        """Workers."""
        return 1

    def get_world_rank(self) -> int:
        """Of this worker."""
        return 0


class Step:
    """A training step of the workflows on one worker, without logs and checkpoints."""

    def __init__(self, trial: Trial, device: torch.device) -> None:
        """Build the model on the device, and its optimiser."""
        torch.manual_seed(0)
        settings = replace(trial.settings, workers=0)
        self.losses, self.device = trial.losses, device
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(ray.train, "get_context", Alone):
            stage = Stage(job="gpu", name="gpu", settings=settings, folder=folder)
            self.session = Session(trial.build(), stage, device, MetricLogger("", ""))

    def __call__(self) -> Mapping[str, Tensor]:
        """One step; returns its losses, without their graph."""
        with self.session.autocast():
            losses = self.losses(self.session.model)
        self.session.update(losses)
        return {name: value.detach() for name, value in losses.items()}


def count_flops(job: Callable[[], object], device: torch.device) -> int:
    """Operations of matrix products, convolutions and attention, those of the backward pass included."""
    # The CPU's fused attention is not counted.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with plain, FlopCounterMode(display=False) as counter:
        job()
    return int(counter.get_total_flops())


def count_waits(job: Callable[[], object]) -> int:
    """The synchronisations that CUDA's debug mode warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            job()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONISES in str(entry.message) for entry in caught)


def timed(step: Step, count: int) -> tuple[float, float]:
    """Seconds of each of some steps, and the last one's loss."""
    finish(step.device)
    started = time.perf_counter()
    for _ in range(count):
        losses = step()
    finish(step.device)
    return (time.perf_counter() - started) / count, sum(map(float, losses.values()))


def finish(device: torch.device) -> None:
    """Wait until the device has done all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_steps(trial: Trial, sizes: Sizes, device: torch.device) -> Measured:
    """Count FLOPs and waits in the first steps, which also warm up, then time some."""
    step, cuda = Step(trial, device), device.type == "cuda"
    flops, count, waits, peak = count_flops(step, device), sizes.most, None, None
    if cuda:
        waits = count_waits(step)
        step()
        estimate, _ = timed(step, 1)
        count = max(sizes.least, min(sizes.most, int(sizes.seconds / estimate)))
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = timed(step, count)
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 1e9
    return Measured(seconds, flops, peak, waits, loss)


def attempt(job: Callable[[], Result]) -> tuple[Result | None, str]:
    """The result, or why there is none; frees the job's memory."""
    try:
        return job(), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:  # one config must not end the others' measurement
        traceback.print_exc()
        return None, f"{FAILED}: {(str(error) or type(error).__name__).splitlines()[0]}"
    finally:
        if torch.cuda.is_available():
            gc.collect()
            with contextlib.suppress(RuntimeError):  # after a fatal error of CUDA every call fails
                torch.cuda.empty_cache()


Peers = dict[tuple[int, ...], tuple[Measured | None, str]]
"""Results of Mask R-CNN by number of images, their shape and resized sides, and classes."""


def measure_config(name: str, sizes: Sizes, batch: int, device: torch.device, peers: Peers) -> Row:
    """One config's step and Mask R-CNN's, which is measured once for equal sizes."""
    trial, note = attempt(lambda: build_trial(name, batch, device, tiny=sizes.tiny))
    if trial is None:
        return Row(name, note=note)
    ours, note = attempt(lambda: measure_steps(trial, sizes, device))
    scene = trial.scene
    key = (scene.num_images, *scene.images[0].shape, *trial.sides, trial.classes)
    if key not in peers:
        peers[key] = attempt(lambda: measure_steps(peer_trial(trial, device, tiny=sizes.tiny), sizes, device))
    peer, peer_note = peers[key]
    note, peer_note = note or not_finite(ours), peer_note or not_finite(peer)
    notes = [note, f"Mask R-CNN: {peer_note}" if peer_note else ""]
    return Row(name, scene.num_images, trial.captioned, ours, peer, "; ".join(filter(None, notes)))


def not_finite(measured: Measured | None) -> str:
    """A note if the last loss was not finite, since such steps may do other work."""
    return "the loss is not finite" if measured and not math.isfinite(measured.loss) else ""


def measure_all(
    names: Sequence[str], sizes: Sizes, batch: int, device: torch.device, minutes: float = math.inf
) -> list[Row]:
    """The rows of configs; those not begun within the minutes are left out, with a note."""
    started, peers = time.monotonic(), Peers()
    rows: list[Row] = []
    for name in names:
        if time.monotonic() - started > 60 * minutes:
            rows.append(Row(name, note=f"not run: {minutes:g} minutes are over"))
            continue
        rows.append(measure_config(name, sizes, batch, device, peers))
        print(f"{name}: {time.monotonic() - started:.0f} s {rows[-1].note}", file=sys.stderr, flush=True)
    return rows


# ------------------------------------------------------------------------------------------------------------- report


def peak_of(card: str) -> float | None:
    """The card's peak TFLOP/s; None if the name is unknown."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", card)
    return next((float(peak) for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)


HEADER = (
    "| config | images a step | images/s | peak memory, GB | TFLOP a step | share of the card's peak "
    "| host waits a step | step time / Mask R-CNN's | note |\n|---|---|---|---|---|---|---|---|---|"
)


def table(rows: Sequence[Row], peak: float | None) -> str:
    """Markdown of all rows."""
    return "\n".join([HEADER, *(line(row, peak) for row in rows)])


def line(row: Row, peak: float | None) -> str:
    """Markdown of a row."""
    figures = row.figures(peak)
    images = f"{row.with_boxes} + {row.captioned} captioned" if row.captioned else f"{row.with_boxes or ''}"

    def shown(name: str, form: str) -> str:
        value = figures.get(name)
        return "" if value is None else format(value, form)

    cells = (
        row.name.replace("/", " "),
        images,
        shown("images_per_second", ".1f"),
        shown("peak_gb", ".1f"),
        shown("tflop_per_step", ".3g"),
        shown("share_of_peak", ".1%"),
        shown("host_waits", ".0f"),
        shown("torchvision_step_ratio", ".2f"),
        row.note.replace("|", "/"),
    )
    return f"| {' | '.join(cells)} |"


def report(rows: Sequence[Row], card: str, sizes: Sizes, options: Sequence[str] = ()) -> None:
    """Print the table, and write `runs/bench/gpu.md` and `gpu.json`.

    Args:
        rows: of the table.
        card: name of the GPU or CPU.
        sizes: what was measured.
        options: of the command line.
    """
    peak = peak_of(card)
    scale = f"published sizes, peak {peak or 'unknown'} TFLOP/s"
    if sizes.tiny:
        scale = "tiny sizes, not the published ones: the figures say nothing about the configs"
    title, text = f"{card}, PyTorch {torch.__version__}: {scale}", table(rows, peak)
    print(f"{title}\n\n{text}")
    figures: dict[str, object] = {"device": card, "sizes": "tiny" if sizes.tiny else "published"}
    for row in rows:
        start = row.name.replace("/", "_")
        figures |= {f"{start}_{name}": value for name, value in row.figures(peak).items()}
        if row.note:
            figures[f"{start}_note"] = row.note
    write_figures("gpu", figures)
    command = shlex.join(["python", "benchmarks/gpu.py", *options])
    (BENCH / "gpu.md").write_text(f"{title}. Commit {provenance()['commit']}, `{command}`.\n\n{text}\n")


def main() -> None:
    every = [f"{method}/{config}" for method, configs in PUBLISHED.items() for config in configs]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="METHOD/CONFIG")
    parser.add_argument("--batch", type=int, default=0, help="images with boxes a step; 0 for the published number")
    parser.add_argument("--minutes", type=float, default=6.0, help="no config is begun after these")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes also on a GPU")
    parser.add_argument("--full", action="store_true", help="published sizes also on a CPU")
    given = parser.parse_args()
    if given.batch < 0:
        parser.error(f"--batch: {given.batch}, expected 0 or more")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cuda = torch.cuda.is_available()
    device, card = torch.device("cuda:0" if cuda else "cpu"), f"CPU {platform.machine()}"
    if cuda:
        card = torch.cuda.get_device_name(device)
    sizes = TINY if given.tiny or not (cuda or given.full) else FULL if cuda else replace(FULL, most=1)
    rows = measure_all(given.only, sizes, given.batch, device, given.minutes)
    report(rows, card, sizes, sys.argv[1:])
    if any(FAILED in row.note for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

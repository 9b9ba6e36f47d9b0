"""Image towers at equal compute on the pictogram world: flat convnet, ResNet, ConvNeXt, ViT.

python workflows/prepare_pairs.py --config pictograms
python benchmarks/clip_towers.py --steps 500

Equal compute: the number of steps of a tower is inversely proportional to the multiply-adds of a pair (image and
caption). Finished towers are not trained again; a stopped one continues from its last checkpoint.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss

from ovd_models.clip.model import Clip, ClipConfig
from workflows import clip
from workflows.common.optimisation import build_optimiser
from workflows.configs import clip as clip_configs
from workflows.studies.clip_towers import TOWERS, multiply_adds, tower_run

TIMED_STEPS = 7


def step_seconds(config: ClipConfig, batch: int) -> float:
    """Median CPU-seconds of a training step."""
    model, loss = Clip(config).train(), ClipLoss()
    optimiser = build_optimiser(model, clip_configs.pictograms().optimisation)
    images = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8)
    tokens = model.tokenize(["a red umbrella and an anchor"] * batch)
    seconds = []
    for _ in range(TIMED_STEPS):
        before = time.process_time()
        optimiser.zero_grad()
        loss(*model(images, tokens)).backward()
        optimiser.step()
        seconds.append(time.process_time() - before)
    return statistics.median(seconds)


def measure(tower: str, storage: str, base_steps: int) -> dict[str, Any]:
    """Train one tower, or read the figures of its finished run."""
    name = f"tower-{tower.lower().replace(' ', '-')}-{base_steps}"
    saved = Path(storage) / "runs" / "clip" / name / "figures.json"
    if saved.is_file():
        figures: dict[str, Any] = json.loads(saved.read_text())
        return figures
    run = dataclasses.replace(tower_run(tower, base_steps), storage=storage, config=name, resume=name)
    saved.parent.mkdir(parents=True, exist_ok=True)
    trained = clip.train(run)
    figures = {
        "tower": tower,
        "parameters": sum(value.numel() for value in Clip(run.model).model.visual.parameters()),
        "multiply_adds": multiply_adds(run.model),
        "steps": run.optimisation.steps,
        "top1_base": trained.metrics.top1_base,
        "top1_novel": trained.metrics.top1_novel,
        "cpu_seconds": step_seconds(run.model, run.batch_size) * run.optimisation.steps,
    }
    saved.write_text(json.dumps(figures))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", default="store")
    parser.add_argument("--steps", type=int, default=500, help="of the flat convnet; others at equal compute")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    given = parser.parse_args()
    rows = [measure(tower, given.storage, given.steps) for tower in given.towers]
    print("| tower | parameters | multiply-adds a pair | steps | top-1 base | top-1 novel | CPU-seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['tower']} | {row['parameters'] / 1e6:.2f} M | {row['multiply_adds'] / 1e6:.0f} M | {row['steps']} "
            f"| {row['top1_base']:.3f} | {row['top1_novel']:.3f} | {row['cpu_seconds']:.0f} |"
        )
    report = Path(given.storage) / "bench" / "clip_towers.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Evaluation beside LVIS's own package: equal numbers, CPU time, and memory on a whole validation set.

make bench-eval

Equality is measured on 100 annotated images of LVIS v0.5 with 300 predictions each, boxes and masks; time on 1,000
synthetic images with 300 predictions each, as whole commands; memory on 20,000 images; and two actors against one.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from eval_data import lvis_like, predictions_for, write_results
from measure import REPOSITORY, Cost, measure, update_figures

from data_prep import tables
from ovd_models.checkpoints import save_checkpoint
from ovd_models.codet.model import CoDet, CoDetConfig
from ovd_models.vocabulary import EmbeddingTable
from workflows import prepare_boxes
from workflows.common import cluster
from workflows.configs import boxes as boxes_configs
from workflows.configs.evaluation import Run
from workflows.reports import evaluation

REFERENCE = Path(os.environ.get("OVD_REFERENCE_DATA", REPOSITORY.parent / "shared"))
TRUTH = REFERENCE / "data/lvis/lvis_val_100.json"
SCRIPT, PEER = REPOSITORY / "workflows/evaluate.py", REPOSITORY / "benchmarks/eval_peer.py"
IMAGES, PER_IMAGE, CATEGORIES = 1000, 300, 1203
LARGE_IMAGES, SCENES = 20_000, 300
ROUNDS = int(os.environ.get("OVD_BENCH_ROUNDS", "2"))


def main() -> None:
    """Measure all figures, or those named on the command line, and record each as it is measured."""
    parts = {"equality": equality, "speed": speed, "memory": memory, "actors": actors}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory(prefix="ovd-") as folder:
            figures = parts[name](Path(folder))
        update_figures("eval", figures)
        print(json.dumps(figures), flush=True)


def equality(folder: Path) -> dict[str, float]:
    """The largest difference of the 13 numbers between our command and LVIS's package."""
    if not TRUTH.exists():
        print(f"{TRUTH}: absent, so equality is not measured")
        return {}
    truth = json.loads(TRUTH.read_bytes())
    largest, compared = 0.0, 0
    for kind in ("bbox", "segm"):
        results, output = folder / f"{kind}.json", folder / f"{kind}-metrics.json"
        write_results(predictions_for(truth, PER_IMAGE, masks=kind == "segm"), results)
        ours(TRUTH, results, kind, output)
        theirs = json.loads(peer(TRUTH, results, kind, folder)[1])
        found = json.loads(output.read_text())
        assert list(found) == list(theirs)
        compared += len(found)
        largest = max(largest, *(abs(found[name] - theirs[name]) for name in theirs))
    print(f"largest difference of {compared} numbers: {largest:.2g}")
    return {"lvis_max_abs_diff": largest}


def speed(folder: Path) -> dict[str, float]:
    """CPU seconds of LVIS's package over ours, both from the same files, in turn."""
    truth, results = folder / "gt.json", folder / "dt.json"
    content = lvis_like(IMAGES, 12, CATEGORIES)
    truth.write_text(json.dumps(content))
    write_results(predictions_for(content, PER_IMAGE), results)
    own, other = [], []
    for _ in range(ROUNDS):
        own.append(ours(truth, results, "bbox", folder / "metrics.json"))
        other.append(peer(truth, results, "bbox", folder)[0])
    median = statistics.median
    rows = {"LVIS's package": other, "ours": own}
    print(f"{IMAGES:,} images x {PER_IMAGE}, whole commands, medians of {ROUNDS}")
    for name, costs in rows.items():
        cpu, wall = (median(getattr(cost, field) for cost in costs) for field in ("cpu_seconds", "wall_seconds"))
        print(f"{name:16} {cpu:7.1f} s CPU {wall:7.1f} s wall {max(cost.peak_gb for cost in costs):6.2f} GB")
    return {
        "lvis_speedup": round(median(c.cpu_seconds for c in other) / median(c.cpu_seconds for c in own), 2),
        "lvis_speedup_wall": round(median(c.wall_seconds for c in other) / median(c.wall_seconds for c in own), 2),
        "lvis_cpu_seconds": round(median(c.cpu_seconds for c in own), 1),
        "lvis_peak_gb": round(max(cost.peak_gb for cost in own), 2),
    }


def memory(folder: Path) -> dict[str, float]:
    """Peak memory of our command on a set of LVIS's size, read from JSON."""
    truth, results = folder / "gt.json", folder / "dt.json"
    content = lvis_like(LARGE_IMAGES, 12, CATEGORIES)
    truth.write_text(json.dumps(content))
    write_results(predictions_for(content, PER_IMAGE), results)
    size = results.stat().st_size / 1e9
    cost = ours(truth, results, "bbox", folder / "metrics.json")
    print(f"{LARGE_IMAGES:,} images x {PER_IMAGE} ({size:.2f} GB of JSON): {cost.peak_gb:.2f} GB, "
          f"{cost.cpu_seconds:.0f} s CPU, {cost.wall_seconds:.0f} s wall")  # fmt: skip
    return {"eval_peak_gb": round(cost.peak_gb, 2), "eval_seconds": round(cost.wall_seconds, 1)}


def actors(folder: Path) -> dict[str, float]:
    """Seconds of prediction with one actor over those with two, with their start; the tables must be equal."""
    storage = str(folder / "store")
    settings = replace(boxes_configs.pictograms(), storage=storage, train_images=1, eval_images=SCENES)
    prepare_boxes.prepare(settings)
    names = {row["name"]: row["split"] for row in tables.read_table(storage, "categories", "pictograms").to_pylist()}
    torch.manual_seed(0)
    given = EmbeddingTable.from_array(list(names), np.random.default_rng(0).normal(size=(len(names), 128)), "random")
    save_checkpoint(CoDet(CoDetConfig()), given, folder / "model", splits=names, run={})
    cluster.start_ray()
    seconds, digests = {1: [], 2: []}, set()
    for workers in (1, 2) * ROUNDS:
        shutil.rmtree(folder / "store/predictions", ignore_errors=True)
        run = Run(storage=storage, model=str(folder / "model"), boxes="pictograms-eval", workers=workers, batch_size=4)
        started = time.perf_counter()
        table = evaluation.predict_boxes(run)
        seconds[workers].append(time.perf_counter() - started)
        digests.add(tables.read_manifest(storage, "predictions", table).digest)
    assert len(digests) == 1
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(f"{SCENES} scenes: {one:.1f} s with one actor, {two:.1f} s with two on {os.cpu_count()} cores; equal tables")
    return {"actors_speedup": round(one / two, 2)}


def ours(truth: Path, results: Path, kind: str, output: Path) -> Cost:
    """The cost of our command."""
    flags = ["--ground-truth", str(truth), "--predictions", str(results), "--iou-type", kind, "--output", str(output)]
    return run([sys.executable, str(SCRIPT), *flags, "--protocol", "lvis"], output.with_suffix(".log"))


def peer(truth: Path, results: Path, kind: str, folder: Path) -> tuple[Cost, str]:
    """The cost and the last line of the same with LVIS's package."""
    log = folder / "peer.log"
    cost = run([sys.executable, str(PEER), str(truth), str(results), kind], log)
    return cost, log.read_text().splitlines()[-1]


def run(command: list[str], log: Path) -> Cost:
    """The cost of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    cost = measure(command, log=log, env=environment, cwd=REPOSITORY)
    if cost.exit_code:
        sys.exit(log.read_text())
    return cost


if __name__ == "__main__":
    main()

"""The whole path on the pictogram world, on a laptop: from a URL list to a served detector.

web site --crawl--> pairs, groups --> CLIP --> CoDet (boxes, then boxes and captions) --> HTTP endpoint
scenes ---draw----> boxes -------------------^

Ends with a table, `runs/demo/summary.json` and `runs/demo/report.html`. The detector is never given a box of the
novel names; it learns them from captions.

python workflows/demo.py
"""

from workflows.common import brief_help

brief_help.answer(__name__, __file__, "storage port")

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import requests
from PIL import Image

from data_prep import locks, storage, tables
from ovd_models.errors import InputError
from workflows import clip, codet, prepare_boxes, prepare_pairs, serve
from workflows.common import cli, cluster, quiet, tracking
from workflows.configs import boxes as boxes_configs
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.configs import pairs as pairs_configs
from workflows.inputs.pairs import pictogram_site
from workflows.reports.demo import format_summary, write_demo_report
from workflows.reports.detections import read_box_image

MARKER = ".ovd-demo"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The demo; everything is written below `storage`, which is emptied first."""

    storage: str = "runs/demo"
    """Local folder of all results, which each demo empties first."""
    pairs: pairs_configs.Run = field(default_factory=pairs_configs.pictograms)
    boxes: boxes_configs.Run = field(default_factory=boxes_configs.pictograms)
    teacher: clip_configs.Run = field(default_factory=clip_configs.pictograms_quick)
    detector: codet_configs.Run = field(default_factory=codet_configs.pictograms_quick)
    port: int = 0
    """Port of the endpoint; 0 chooses a free one."""


def pictograms() -> Run:
    """The full demo, in minutes on two cores."""
    return Run()


def smoke() -> Run:
    """The same path with tiny settings: shows that it runs, not that it learns."""
    short = dataclasses.replace(clip_configs.smoke().optimisation, steps=5, checkpoint_every=5, workers=1)
    stage = dataclasses.replace(codet_configs.smoke().box_stage, workers=1)
    return Run(
        storage="runs/demo-smoke",
        pairs=pairs_configs.smoke(),
        boxes=boxes_configs.smoke(),
        teacher=dataclasses.replace(clip_configs.smoke(), optimisation=short),
        detector=dataclasses.replace(codet_configs.smoke(), box_stage=stage, joint_stage=stage),
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "smoke": smoke}


@contextlib.contextmanager
def time_stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a stage and store its duration in `seconds`."""
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)


def empty_folder(folder: Path) -> None:
    """Empty the folder of an earlier demo, or create it.

    Raises:
        InputError: the folder holds files that no demo wrote.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise InputError(f"{folder}: not empty and not of an earlier demo, expected another --storage")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def run_demo(run: Run, folder: Path) -> dict[str, Any]:
    """Crawl, draw boxes, train CLIP, train CoDet, serve and report; returns the summary."""
    started, home = time.perf_counter(), str(folder)
    seconds: dict[str, float] = {}
    stage = partial(time_stage, seconds=seconds)
    with contextlib.ExitStack() as stack:
        with stage("web site"):
            crawl = stack.enter_context(pictogram_site(dataclasses.replace(run.pairs, storage=home)))
        with stage("pairs"):
            cluster.start_ray()
            crawled = prepare_pairs.prepare(crawl)
    with stage("boxes"):
        prepare_boxes.prepare(dataclasses.replace(run.boxes, storage=home))
    with stage("clip"):
        teacher = clip.train(dataclasses.replace(run.teacher, storage=home))
        print(f"zero-shot top-1: base {teacher.metrics.top1_base:.3f}, novel {teacher.metrics.top1_novel:.3f}")
    with stage("codet"):
        trained = codet.train(dataclasses.replace(run.detector, storage=home, teacher=teacher.model))
    model = folder / "codet"
    storage.download_folder(trained.model, model)
    with stage("serve"):
        request, response, detect_ms = call_endpoint(run, model, home)
    uri = tracking.tracking_uri(home)
    box_supervised, joint = trained.metrics.box_supervised.summary(), trained.metrics.codet.summary()
    summary = {
        "seconds": 0.0,
        "stage_seconds": seconds,
        "pairs": {"input": crawled.input, "kept": crawled.kept, "rejected": crawled.rejected},
        "clip": {"top1_base": teacher.metrics.top1_base, "top1_novel": teacher.metrics.top1_novel},
        "box_supervised": {key: box_supervised[key] for key in ("ap50_base", "ap50_novel")},
        "codet": {key: joint[key] for key in ("ap50_base", "ap50_novel")},
        "detect_ms": detect_ms,
        "mlflow_uri": quiet.hide_logins(uri),
        "mlflow_experiment": trained.experiment_id,
        "report": str(folder / "report.html"),
    }
    with stage("report"):
        write_demo_report(
            folder,
            summary=summary,
            seed=run.boxes.seed,
            pairs=run.pairs.name,
            boxes=f"{run.boxes.name}-eval",
            checkpoints=(trained.outputs["boxes_model"], trained.model),
            curves={
                "CLIP": tracking.metric_history(uri, teacher.run_id, "train/loss"),
                "CoDet": tracking.metric_history(uri, trained.run_id, "train/loss"),
            },
            request=request,
            response=response,
        )
    summary["seconds"] = round(time.perf_counter() - started, 1)
    return summary


def call_endpoint(run: Run, model: Path, home: str) -> tuple[Image.Image, dict[str, Any], float]:
    """Serve the detector and detect the novel names over HTTP.

    Returns:
        The scene with the most novel names, the response, and the median time of five requests in milliseconds.
    """
    rows = tables.read_table(home, "boxes", f"{run.boxes.name}-eval").to_pylist()
    categories = tables.read_table(home, "categories", run.boxes.name).to_pylist()
    novel = {row["category_id"]: row["name"] for row in categories if row["split"] == "novel"}
    scene = max(rows, key=lambda row: len(novel.keys() & set(row["category_ids"])))
    names = sorted(novel.values())
    image, buffer = read_box_image(home, scene), io.BytesIO()
    image.save(buffer, "PNG")
    with serve.serve_model(serve.Run(model=str(model), port=run.port)) as url:
        milliseconds = []
        for _ in range(5):
            started = time.perf_counter()
            response = requests.post(
                f"{url}/v1/detect",
                files={"image": ("scene.png", buffer.getvalue(), "image/png")},
                data={"vocabulary": json.dumps(names), "score_threshold": "0.3"},
                timeout=60,
            )
            response.raise_for_status()
            milliseconds.append((time.perf_counter() - started) * 1000)
    answer: dict[str, Any] = response.json()
    found = ", ".join(f"{entry['label']} {entry['score']:.2f}" for entry in answer["detections"]) or "nothing"
    truth = ", ".join(sorted(novel[key] for key in scene["category_ids"] if key in novel))
    print(f"requested {len(names)} names without boxes: found {found} (the scene shows {truth})")
    return image, answer, round(sorted(milliseconds)[2], 1)


def main() -> None:
    """Run the demo, then print the table and the paths of its results."""
    run = cli.parse(CONFIGS, __doc__)
    if "://" in run.storage:
        raise InputError(f"--storage {run.storage}: expected a local folder")
    serve.free_port(serve.Run().host, run.port)
    folder = Path(run.storage).absolute()
    with locks.hold(str(folder.parent), f"demo/{folder.name}", wait_seconds=0):  # not in the folder, which is emptied
        empty_folder(folder)
        try:
            summary = run_demo(run, folder)
        finally:
            ray.shutdown()
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(format_summary(summary))
    path = os.path.relpath(folder)
    print(f"report:   {path}/report.html")
    print(f"MLflow:   {tracking.how_to_open(summary['mlflow_uri'], summary['mlflow_experiment'])}")
    print(f"endpoint: .venv/bin/python workflows/serve.py --model {shlex.quote(path)}/codet")


if __name__ == "__main__":
    cli.execute(main)

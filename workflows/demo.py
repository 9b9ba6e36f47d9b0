"""The whole story on the pictogram world, on a laptop: from a URL list to a served detector.

web site --crawl--> pairs, groups --> CLIP --> CoDet (boxes, then boxes and captions) --> HTTP endpoint
scenes ---draw----> boxes -------------------^

Ends with a table, `runs/demo/summary.json` and `runs/demo/report.html`. The detector is never given a box of the
novel names; it learns them from captions.

python workflows/demo.py
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import requests
from PIL import Image

from data_prep import storage, tables
from data_prep.pictograms.world import World, contact_sheet
from ovd_models.errors import InputError
from workflows import clip, codet, evaluate, prepare_boxes, prepare_pairs, serve
from workflows.common import cli, cluster, tracking
from workflows.configs import clip as clip_configs
from workflows.configs import codet as codet_configs
from workflows.configs import pairs as pairs_configs
from workflows.reports import demo as report

MARKER = ".ovd-demo"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The demo; everything lands below `storage`, which it empties first."""

    storage: str = "runs/demo"
    pairs: pairs_configs.Run = field(default_factory=pairs_configs.pictograms)
    boxes: prepare_boxes.Run = field(default_factory=prepare_boxes.pictograms)
    teacher: clip_configs.Run = field(default_factory=clip_configs.pictograms)
    detector: codet_configs.Run = field(default_factory=codet_configs.pictograms)
    port: int = 0
    """Of the endpoint that is called once; 0 finds a free one."""


def pictograms() -> Run:
    """The story in minutes on two cores."""
    return Run()


def smoke() -> Run:
    """The same path in little: shows that it runs, not that it learns."""
    few = dataclasses.replace(clip_configs.smoke().optimisation, steps=5, checkpoint_every=5, workers=1)
    stage = dataclasses.replace(codet_configs.smoke().box_stage, workers=1)
    return Run(
        storage="runs/demo-smoke",
        pairs=pairs_configs.smoke(),
        boxes=prepare_boxes.smoke(),
        teacher=dataclasses.replace(clip_configs.smoke(), optimisation=few),
        detector=dataclasses.replace(codet_configs.smoke(), box_stage=stage, joint_stage=stage),
    )


CONFIGS: dict[str, Callable[[], Run]] = {"pictograms": pictograms, "smoke": smoke}


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def clear(folder: Path) -> None:
    """Empty the demo's own folder.

    Raises:
        InputError: it holds something that no demo wrote.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise InputError(f"{folder}: not empty and not of an earlier demo, expected another --storage")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def tell(run: Run, folder: Path) -> dict[str, Any]:
    """The story: crawl, draw boxes, train CLIP, train CoDet, serve; returns the summary."""
    began, watch, home = time.perf_counter(), Stopwatch(), str(folder)
    with contextlib.ExitStack() as stack:
        with watch.stage("web site"):
            crawl = stack.enter_context(prepare_pairs.pictogram_site(dataclasses.replace(run.pairs, storage=home)))
        with watch.stage("pairs"):
            cluster.start_ray()
            crawled = prepare_pairs.prepare(crawl)
    with watch.stage("boxes"):
        prepare_boxes.prepare(dataclasses.replace(run.boxes, storage=home))
    with watch.stage("clip"):
        teacher = clip.train(dataclasses.replace(run.teacher, storage=home))
        print(f"zero-shot top-1: base {teacher.metrics.top1_base:.3f}, novel {teacher.metrics.top1_novel:.3f}")
    with watch.stage("codet"):
        trained = codet.train(dataclasses.replace(run.detector, storage=home, teacher=teacher.model))
    model = folder / "codet"
    storage.download_folder(trained.model, model)
    with watch.stage("serve"):
        answer, detect_ms, picture = ask(run, model, home)
    box_supervised, joint = trained.metrics.box_supervised.summary(), trained.metrics.codet.summary()
    summary = {
        "seconds": 0.0,
        "stage_seconds": watch.seconds,
        "pairs": {"input": crawled.input, "kept": crawled.kept, "rejected": crawled.rejected},
        "clip": {"top1_base": teacher.metrics.top1_base, "top1_novel": teacher.metrics.top1_novel},
        "box_supervised": {key: box_supervised[key] for key in ("ap50_base", "ap50_novel")},
        "codet": {key: joint[key] for key in ("ap50_base", "ap50_novel")},
        "detect_ms": detect_ms,
        "mlflow_uri": tracking.tracking_uri(home),
        "report": str(folder / "report.html"),
    }
    with watch.stage("report"):
        world = World.create(run.boxes.seed)
        report.write(
            folder / "report.html",
            summary=summary,
            sheet=contact_sheet(world),
            storage_uri=home,
            pairs=run.pairs.name,
            boxes=f"{run.boxes.name}-eval",
            checkpoints=(trained.outputs["boxes_model"], trained.model),
            curves={
                "CLIP": tracking.metric_history(tracking.tracking_uri(home), teacher.run_id, "train/loss"),
                "Box supervision": tracking.metric_history(
                    tracking.tracking_uri(home), trained.run_id, "boxes/train/loss"
                ),
                "CoDet": tracking.metric_history(tracking.tracking_uri(home), trained.run_id, "joint/train/loss"),
            },
            answer=answer,
            answered_on=picture,
        )
    summary["seconds"] = round(time.perf_counter() - began, 1)
    return summary


def ask(run: Run, model: Path, home: str) -> tuple[dict[str, Any], float, Image.Image]:
    """Start the endpoint and ask it over HTTP for names that never had a box; returns the answer and its time."""
    rows = tables.read_table(home, "boxes", f"{run.boxes.name}-eval").to_pylist()
    categories = tables.read_table(home, "categories", run.boxes.name).to_pylist()
    novel = {row["category_id"]: row["name"] for row in categories if row["split"] == "novel"}
    shown = max(rows, key=lambda row: len(novel.keys() & set(row["category_ids"])))
    names = sorted(novel.values())
    picture = evaluate.read_box_image(evaluate.Run(storage=home), shown)
    sink = io.BytesIO()
    picture.save(sink, "PNG")
    with serve.serve_model(serve.Run(model=str(model), port=run.port)) as url:
        milliseconds = []
        for _ in range(5):
            started = time.perf_counter()
            response = requests.post(
                f"{url}/v1/detect",
                files={"image": ("scene.png", sink.getvalue(), "image/png")},
                data={"vocabulary": json.dumps(names), "score_threshold": "0.3"},
                timeout=60,
            )
            response.raise_for_status()
            milliseconds.append((time.perf_counter() - started) * 1000)
    answer: dict[str, Any] = response.json()
    found = ", ".join(f"{entry['label']} {entry['score']:.2f}" for entry in answer["detections"]) or "nothing"
    truth = ", ".join(sorted(novel[key] for key in shown["category_ids"] if key in novel))
    print(f"asked for {len(names)} names without boxes: found {found} (the scene shows {truth})")
    return answer, round(sorted(milliseconds)[len(milliseconds) // 2], 1), picture


def main() -> None:
    """The script: tell the story, print the table and where to look."""
    run = cli.parse(CONFIGS, __doc__)
    if "://" in run.storage:
        raise InputError(f"--storage {run.storage}: expected a folder of this machine")
    folder = Path(run.storage).absolute()
    clear(folder)
    try:
        summary = tell(run, folder)
    finally:
        ray.shutdown()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(report.text_table(summary))
    shown = os.path.relpath(folder)
    print(f"report:   {shown}/report.html")
    print(f"MLflow:   .venv/bin/mlflow ui --backend-store-uri {summary['mlflow_uri']}  (then Model training, top left)")
    print(f"endpoint: .venv/bin/python workflows/serve.py --model {shown}/codet")


if __name__ == "__main__":
    cli.execute(main)

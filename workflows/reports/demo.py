"""The demo's summary on the console and its report, a single HTML file with all images embedded."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from PIL import Image, ImageDraw, ImageFont

import ovd_models
from data_prep import storage, tables
from data_prep.pictograms.world import World, contact_sheet
from data_prep.streams.images import read_image
from ovd_models.drawing import draw_boxes
from workflows.common import tracking
from workflows.common.teacher import read_categories
from workflows.reports import page
from workflows.reports.detections import annotations_as_detections, read_box_image

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""(step, value) pairs of each loss."""
NUM_GROUPS, IMAGES_PER_GROUP, NUM_SCENES, MONTAGE_SCENES = 6, 8, 6, 3
COLUMNS = ("what is there", "boxes of base names only", "+ captions (CoDet)")


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary's figures for the console."""
    pairs, clip, seconds = summary["pairs"], summary["clip"], summary["stage_seconds"]
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    lines = [
        "",
        f"pairs   {pairs['kept']:,} kept + {sum(pairs['rejected'].values()):,} rejected = {pairs['input']:,} rows",
        f"CLIP    zero-shot top-1: base {clip['top1_base']:.3f}, novel {clip['top1_novel']:.3f}",
        "",
        f"{'AP50':28}{'base':>8}{'novel':>8}",
    ]
    for label, key in zip(COLUMNS[1:], ("box_supervised", "codet"), strict=True):
        lines.append(f"{label:28}{summary[key]['ap50_base']:8.3f}{summary[key]['ap50_novel']:8.3f}")
    request = f"one request over HTTP: {summary['detect_ms']:.0f} ms"
    return "\n".join([*lines, "", f"{request}; in all {summary['seconds']:.0f} s ({stages})"])


def write_demo_report(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    seed: int,
    pairs: str,
    boxes: str,
    checkpoints: tuple[str, str],
    curves: Mapping[str, Curves],
    request: Image.Image,
    response: Mapping[str, Any],
) -> None:
    """Write `report.html` and `before_after.jpg`.

    Args:
        folder: the demo's storage.
        summary: the figures of `summary.json`.
        seed: seed of the pictogram world.
        pairs: name of the `groups`, `concepts` and `rejects` tables.
        boxes: name of the `boxes` table.
        checkpoints: folders of the detector before and after caption training.
        curves: loss curves of each training.
        request: the image sent to the endpoint.
        response: the endpoint's answer to it.
    """
    scenes = compare_detectors(str(folder), boxes, checkpoints)
    draw_montage(scenes).save(folder / "before_after.jpg", quality=88)
    values = {
        "summary": summary,
        "mlflow_page": tracking.page_of(summary["mlflow_experiment"]),
        "sheet": contact_sheet(World.create(seed)),
        "reasons": read_rejections(str(folder), pairs),
        "groups": read_groups(str(folder), pairs),
        "curves": {title: plot_losses(lines) for title, lines in curves.items() if lines},
        "scenes": scenes,
        "detections": response["detections"],
        "answer_picture": draw_boxes(
            request,
            torch.tensor([entry["box"] for entry in response["detections"]]).view(-1, 4),
            [f"{entry['label']} {entry['score']:.2f}" for entry in response["detections"]],
            [entry["label"] for entry in response["detections"]],
        ),
    }
    (folder / "report.html").write_text(page.render_page("demo", values), encoding="utf-8")


def read_rejections(storage_uri: str, name: str) -> list[dict[str, Any]]:
    """Each reason for rejection, with its number of rows and one example."""
    reasons: dict[tuple[str, str], dict[str, Any]] = {}
    for row in tables.read_table(storage_uri, "rejects", name, ["stage", "reason", "url", "detail"]).to_pylist():
        entry = reasons.setdefault((row["stage"], row["reason"]), {**row, "count": 0})
        entry["count"] += 1
    stages = list(tables.REASONS)
    return sorted(reasons.values(), key=lambda entry: (stages.index(entry["stage"]), entry["reason"]))


def read_groups(storage_uri: str, name: str) -> list[dict[str, Any]]:
    """A few concepts, each with its largest images and their captions."""
    concepts = tables.read_table(storage_uri, "concepts", name).to_pylist()
    rows = tables.read_table(storage_uri, "groups", name)
    root = tables.table_uri(storage_uri, "pairs", name)
    groups = []
    for concept in concepts[:: max(1, len(concepts) // NUM_GROUPS)][:NUM_GROUPS]:
        members = rows.slice(concept["start"], concept["stop"] - concept["start"])
        members = members.sort_by([("width", "descending"), ("image_id", "ascending")]).slice(0, IMAGES_PER_GROUP)
        pictures = [
            (read_image(f"{root}/{row['shard']}", offset=row["offset"], size=row["size"]), row["caption"])
            for row in members.to_pylist()
        ]
        groups.append({"name": concept["name"], "count": concept["image_count"], "pictures": pictures})
    return groups


def plot_losses(curves: Curves) -> Image.Image:
    """Plot loss curves on a logarithmic scale."""
    figure = matplotlib.figure.Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name.rsplit("loss_", 1)[-1], linewidth=1.4)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


@dataclass(frozen=True)
class SceneComparison:
    """A held-out scene with its annotations and the detections before and after caption training."""

    annotated: Image.Image
    before: Image.Image
    after: Image.Image
    novel: list[str]
    """Novel names in the scene."""


def compare_detectors(storage_uri: str, boxes: str, checkpoints: tuple[str, str]) -> list[SceneComparison]:
    """Run both detectors on the first held-out scenes."""
    detectors = [ovd_models.load(storage.local_folder(folder)) for folder in checkpoints]
    rows = tables.read_table(storage_uri, "boxes", boxes).slice(0, NUM_SCENES).to_pylist()
    names, splits = read_categories(storage_uri, tables.category_table(boxes))
    scenes = []
    for row in rows:
        image = read_box_image(storage_uri, row)
        before, after = (detector.detect(image, score_threshold=0.3) for detector in detectors)
        annotated = annotations_as_detections(row, names, after)
        shown = {names[key] for key in row["category_ids"] if key in names}
        novel = sorted(name for name in shown if splits[name] == "novel")
        scenes.append(SceneComparison(annotated.draw(distinct=False), before.draw(), after.draw(), novel))
    return scenes


def draw_montage(scenes: Sequence[SceneComparison]) -> Image.Image:
    """The scenes with the most novel names, one per row, below column titles."""
    chosen = sorted(scenes, key=lambda scene: -len(scene.novel))[:MONTAGE_SCENES]
    width, height = chosen[0].annotated.size
    sheet = Image.new("RGB", (3 * width + 20, 24 + len(chosen) * (height + 10)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(COLUMNS):
        pen.text((column * (width + 10) + 4, 2), title, font=font, fill="black")
    for row, scene in enumerate(chosen):
        for column, image in enumerate((scene.annotated, scene.before, scene.after)):
            sheet.paste(image, (column * (width + 10), 24 + row * (height + 10)))
    return sheet

"""The demo's report: one HTML file that explains itself, pictures included."""

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
from data_prep.streams.plans import read_images
from ovd_models.drawing import draw_boxes
from ovd_models.images import decode_image
from workflows import evaluate
from workflows.reports import page

Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
NUM_GROUPS, GROUP_IMAGES, NUM_SCENES = 6, 8, 6


def text_table(summary: Mapping[str, Any]) -> str:
    """The summary's figures for the console."""
    pairs, seconds = summary["pairs"], summary["stage_seconds"]
    stages = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return "\n".join(
        [
            "",
            f"pairs   {pairs['kept']:,} kept + {sum(pairs['rejected'].values()):,} rejected = {pairs['input']:,} rows",
            f"CLIP    zero-shot top-1: base {summary['clip']['top1_base']:.3f}, "
            f"novel {summary['clip']['top1_novel']:.3f}",
            "",
            f"{'AP50':28}{'base':>8}{'novel':>8}",
            *(
                f"{label:28}{summary[key]['ap50_base']:8.3f}{summary[key]['ap50_novel']:8.3f}"
                for label, key in (("boxes of base names only", "box_supervised"), ("+ captions (CoDet)", "codet"))
            ),
            "",
            f"one request over HTTP: {summary['detect_ms']:.0f} ms; in all {summary['seconds']:.0f} s ({stages})",
        ]
    )


def write(
    path: Path,
    *,
    summary: Mapping[str, Any],
    sheet: Image.Image,
    storage_uri: str,
    pairs: str,
    boxes: str,
    checkpoints: tuple[str, str],
    curves: Curves,
    answer: Mapping[str, Any],
    answered_on: Image.Image,
) -> None:
    """Write the report.

    Args:
        path: the HTML file.
        summary: the demo's figures.
        sheet: what the world looks like.
        storage_uri: of the tables.
        pairs: name of the `groups`, `concepts` and `rejects` tables.
        boxes: name of the `boxes` table whose first scenes are shown.
        checkpoints: folders of the detector before and after caption training.
        curves: (step, value) of each loss, by training.
        answer: what the endpoint said.
        answered_on: about which picture.
    """
    shown = scenes(storage_uri, boxes, checkpoints)
    montage(shown).save(path.with_name("before_after.jpg"), quality=88)
    values = {
        "summary": summary,
        "sheet": page.picture_uri(sheet),
        "reasons": reasons(storage_uri, pairs),
        "groups": groups(storage_uri, pairs),
        "curves": {title: page.picture_uri(plot(lines), "PNG") for title, lines in curves.items() if lines},
        "scenes": shown,
        "embed": page.picture_uri,
        "answer": answer,
        "answered": page.picture_uri(draw_answer(answer, answered_on)),
    }
    path.write_text(page.render(TEMPLATE, values), encoding="utf-8")


def reasons(storage_uri: str, name: str) -> list[dict[str, Any]]:
    """Each reason for rejection with its count and one example."""
    rows = tables.read_table(storage_uri, "rejects", name, ["stage", "reason", "url", "detail"]).to_pylist()
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        entry = found.setdefault((row["stage"], row["reason"]), {**row, "count": 0})
        entry["count"] += 1
    order = list(tables.REASONS)
    return sorted(found.values(), key=lambda entry: (order.index(entry["stage"]), entry["reason"]))


def groups(storage_uri: str, name: str) -> list[dict[str, Any]]:
    """A few concepts with some of their larger images and captions."""
    concepts = tables.read_table(storage_uri, "concepts", name).to_pylist()
    rows = tables.read_table(storage_uri, "groups", name)
    root = tables.table_uri(storage_uri, "pairs", name)
    shown = []
    for concept in concepts[:: max(1, len(concepts) // NUM_GROUPS)][:NUM_GROUPS]:
        members = rows.slice(concept["start"], concept["stop"] - concept["start"])
        members = members.sort_by([("width", "descending"), ("image_id", "ascending")]).slice(0, GROUP_IMAGES)
        paths = [f"{root}/{shard}" for shard in members["shard"].to_pylist()]
        members = members.set_column(members.schema.get_field_index("shard"), "shard", [paths])
        images = [page.picture_uri(decode_image(content, origin)) for content, origin in read_images(members)]
        pictures = list(zip(images, members["caption"].to_pylist(), strict=True))
        shown.append({"name": concept["name"], "count": concept["image_count"], "pictures": pictures})
    return shown


def plot(lines: Mapping[str, Sequence[tuple[int, float]]]) -> Image.Image:
    """Loss curves on a logarithmic scale."""
    figure = matplotlib.figure.Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name.rsplit("loss_", 1)[-1], linewidth=1.4)
    axes.set(xlabel="step", ylabel="weighted loss", yscale="log")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    sink = io.BytesIO()
    figure.savefig(sink, format="png")
    return Image.open(sink)


@dataclass(frozen=True)
class SceneView:
    """A held-out scene: what it shows, what was found before caption training, and after."""

    truth: Image.Image
    before: Image.Image
    after: Image.Image
    novel: str
    """Names it shows that never had a box."""


def montage(views: Sequence[SceneView], rows: int = 3) -> Image.Image:
    """The scenes with most novel names, a row each, under a line that says what the columns are."""
    chosen = sorted(views, key=lambda view: -len(view.novel.split(",") if view.novel else []))[:rows]
    width, height = chosen[0].truth.size
    sheet = Image.new("RGB", (3 * width + 20, 24 + len(chosen) * (height + 10)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for column, title in enumerate(("what is there", "boxes of base names only", "+ captions (CoDet)")):
        pen.text((column * (width + 10) + 4, 2), title, font=font, fill="black")
    for row, view in enumerate(chosen):
        for column, image in enumerate((view.truth, view.before, view.after)):
            sheet.paste(image, (column * (width + 10), 24 + row * (height + 10)))
    return sheet


def scenes(storage_uri: str, boxes: str, checkpoints: tuple[str, str]) -> list[SceneView]:
    """The first held-out scenes through both detectors."""
    detectors = [ovd_models.load(storage.local_folder(folder)) for folder in checkpoints]
    rows = tables.read_table(storage_uri, "boxes", boxes).slice(0, NUM_SCENES).to_pylist()
    categories = tables.read_table(storage_uri, "categories", boxes.rsplit("-", 1)[0]).to_pylist()
    names = {row["category_id"]: row["name"] for row in categories if row["split"]}
    shown = []
    for row in rows:
        image = evaluate.read_box_image(evaluate.Run(storage=storage_uri), row)
        before, after = (detector.detect(image, score_threshold=0.3).distinct() for detector in detectors)
        truth = evaluate.truth_as_detections(row, names, after)
        novel = sorted(row["name"] for row in categories if row["split"] == "novel")
        seen = sorted({truth.names[label] for label in truth.labels.tolist()} & set(novel))
        shown.append(SceneView(truth.draw(), before.draw(), after.draw(), ", ".join(seen)))
    return shown


def draw_answer(answer: Mapping[str, Any], picture: Image.Image) -> Image.Image:
    """The endpoint's answer on the picture that was sent."""
    found: list[dict[str, Any]] = list(answer["detections"])
    boxes = torch.tensor([entry["box"] for entry in found]).view(-1, 4)
    return draw_boxes(
        picture, boxes, [f"{entry['label']} {entry['score']:.2f}" for entry in found], list(range(len(found)))
    )


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ovd-ray: from a URL list to a served detector</title>
<style>{{ style|safe }}</style>
</head>
<body>
<h1>From a URL list to a served detector</h1>
<p class="muted">Made by <code>make demo</code> in {{ "%.0f"|format(summary.stage_seconds.values()|sum) }} seconds.
Novel names never had a box in training: what the detector knows of them it learned from captions.</p>
<table class="big">
  <tr><th>AP50 on held-out scenes, all names at once</th><th class="n">base</th><th class="n">novel</th></tr>
  <tr><td>boxes of base names only</td><td class="n">{{ "%.3f"|format(summary.box_supervised.ap50_base) }}</td>
      <td class="n">{{ "%.3f"|format(summary.box_supervised.ap50_novel) }}</td></tr>
  <tr><td>+ captions (CoDet)</td><td class="n">{{ "%.3f"|format(summary.codet.ap50_base) }}</td>
      <td class="n number">{{ "%.3f"|format(summary.codet.ap50_novel) }}</td></tr>
</table>
<p>The teacher, a tiny CLIP trained on the same crawl, names single objects with a top-1 accuracy of
{{ "%.3f"|format(summary.clip.top1_base) }} (base) and {{ "%.3f"|format(summary.clip.top1_novel) }} (novel).
One request over HTTP took {{ "%.0f"|format(summary.detect_ms) }} ms.</p>

<h2>The world</h2>
<p>Every category once, novel ones framed in red; below, scenes with their boxes, and the second style.</p>
<img src="{{ sheet }}" alt="contact sheet of the pictogram world">

<h2>The crawl</h2>
<p><b>{{ "{:,}".format(summary.pairs.kept) }}</b> of {{ "{:,}".format(summary.pairs.input) }} rows were kept as
image-text pairs; each of the others was rejected for a reason.</p>
<table>
  <tr><th>stage</th><th>reason</th><th class="n">rows</th><th>an example</th></tr>
  {% for entry in reasons %}
  <tr><td>{{ entry.stage }}</td><td>{{ entry.reason }}</td><td class="n">{{ entry.count }}</td>
      <td class="url">{{ entry.url }} <span class="muted">{{ entry.detail or "" }}</span></td></tr>
  {% endfor %}
</table>

<h2>Concept groups</h2>
<p>Images whose captions share a concept. Captions leave objects out and say things that nothing shows.</p>
{% for group in groups %}
<p><b>{{ group.name }}</b> <span class="muted">{{ group.count }} images</span></p>
<div class="row">
  {% for image, caption in group.pictures %}
  <figure class="tiny"><img src="{{ image }}" alt=""><figcaption>{{ caption }}</figcaption></figure>
  {% endfor %}
</div>
{% endfor %}

<h2>Training</h2>
<div class="row three">
  {% for title, image in curves.items() %}
  <figure><img src="{{ image }}" alt="loss curves of {{ title }}"><figcaption>{{ title }}</figcaption></figure>
  {% endfor %}
</div>

<h2>Before and after captions</h2>
<p>Held-out scenes, all names asked for at once; the best name of each object, if above 0.3.</p>
{% for scene in scenes %}
<div class="row three">
  <figure><img src="{{ embed(scene.truth) }}" alt=""><figcaption>what is there{% if scene.novel %}; novel:
    <b>{{ scene.novel }}</b>{% endif %}</figcaption></figure>
  <figure><img src="{{ embed(scene.before) }}" alt=""><figcaption>boxes of base names only</figcaption></figure>
  <figure><img src="{{ embed(scene.after) }}" alt=""><figcaption>+ captions (CoDet)</figcaption></figure>
</div>
{% endfor %}

<h2>Over HTTP</h2>
<p><code>POST /v1/detect</code> with the names that never had a box:</p>
<div class="row three">
  <figure><img src="{{ answered }}" alt="what the endpoint found"></figure>
  <figure><table>
    <tr><th>label</th><th class="n">score</th><th class="n">box</th></tr>
    {% for entry in answer.detections %}
    <tr><td>{{ entry.label }}</td><td class="n">{{ "%.2f"|format(entry.score) }}</td>
        <td class="n">{% for value in entry.box %}{{ "%.0f"|format(value) }} {% endfor %}</td></tr>
    {% endfor %}
  </table></figure>
</div>

<h2>Time</h2>
<table>
  {% for stage, seconds in summary.stage_seconds.items() %}
  <tr><td>{{ stage }}</td><td class="n">{{ "%.0f"|format(seconds) }} s</td></tr>
  {% endfor %}
</table>
<p>Runs, metrics and checkpoints: <code>mlflow ui --backend-store-uri {{ summary.mlflow_uri }}</code>, then
<i>Model training</i> at the top left</p>
</body>
</html>
"""
